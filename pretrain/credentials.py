"""Who this process is for Google Cloud Storage, and the client that speaks in that name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pretrain import log
from pretrain.errors import ConfigError, StorageError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
EMULATOR_VARIABLE = "STORAGE_EMULATOR_HOST"
CREDENTIALS_VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
LOG_IN = (
    "Log in with: gcloud auth application-default login, "
    f"or set {CREDENTIALS_VARIABLE} to the key file of a service account"
)
_MACHINE_MODEL = Path("/sys/class/dmi/id/product_name")


@dataclass(frozen=True)
class Access:
    """A client, and what to say about it."""

    client: Any
    """google.cloud.storage.Client"""
    endpoint: str
    identity: str
    """In words for a log line: an e-mail address, `anonymous`, `anonymous (emulator)`."""
    member: str
    """The same as gcloud writes it in an IAM policy, such as `serviceAccount:NAME@PROJECT.iam.gserviceaccount.com`."""
    can_write: bool
    """False for anonymous access to the real service, which is for public data only."""


def connect() -> Access:
    """The client for the emulator that the environment names, else for Google, in the name of the default credentials.

    Without any credentials the client is anonymous, which is enough to read public data; the log says so.

    Raises:
        ConfigError: the emulator's address can't be one, or the credentials lie inside the project's folder.
        StorageError: there are credentials, but they can't be used.
    """
    # Else each client asks for the bucket's metadata in a thread of its own, with retries of its own, for telemetry.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    if emulator := os.environ.get(EMULATOR_VARIABLE, ""):
        return _anonymous(checked_emulator(emulator), "anonymous (emulator)", can_write=True)
    _refuse_key_inside_project()
    if not _may_be_google_machine():
        os.environ.setdefault("NO_GCE_CHECK", "true")  # read when google.auth is imported, hence the imports below
    import google.auth
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage

    try:
        credentials, project = google.auth.default(scopes=storage.Client.SCOPE)
    except DefaultCredentialsError as error:
        if key := os.environ.get(CREDENTIALS_VARIABLE):
            what = f"{CREDENTIALS_VARIABLE} names {key}, which can't be used: {error}"
            raise StorageError(what, "Set it to the key file of a service account, or unset it.") from error
        log.get(__name__).warning("no Google credentials found: reading anonymously, which public data allows")
        return _anonymous("", "anonymous", can_write=False)
    identity, member = _names(credentials)
    client = storage.Client(project=project or "none", credentials=credentials)
    return Access(client, client.api_endpoint, identity, member, can_write=True)


def checked_emulator(address: str) -> str:
    """`address`, if the google client can use it as it is."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.netloc or address.endswith("/"):
        raise ConfigError(
            f"{EMULATOR_VARIABLE} is {address!r}, which needs a scheme and no slash at its end",
            f"Set it like this: {EMULATOR_VARIABLE}=http://127.0.0.1:9023",
        )
    return address


def _anonymous(endpoint: str, identity: str, can_write: bool) -> Access:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    options = {"api_endpoint": endpoint} if endpoint else None
    project = "emulator" if endpoint else "none"
    client = storage.Client(project=project, credentials=AnonymousCredentials(), client_options=options)
    return Access(client, client.api_endpoint, identity, "allUsers", can_write)


def _refuse_key_inside_project() -> None:
    key = os.environ.get(CREDENTIALS_VARIABLE)
    if key and Path(key).expanduser().resolve().is_relative_to(PROJECT_ROOT):
        raise ConfigError(
            f"{CREDENTIALS_VARIABLE} names {key}, a key inside the project's folder, from where it may be committed",
            "Move it out, for example to ~/.config/gcloud/, and set the variable again.",
        )


def _may_be_google_machine() -> bool:
    """False only where the machine names another maker: asking its metadata server would take seconds for nothing.

    The google client trusts the same file. Where it is missing (containers, other systems) the client asks.
    """
    if any(os.environ.get(name) for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP")):
        return True
    try:
        return _MACHINE_MODEL.read_text().strip().startswith("Google")
    except OSError:
        return True


def _names(credentials: Any) -> tuple[str, str]:
    """(identity, IAM member) of Google credentials."""
    email = getattr(credentials, "service_account_email", "") or ""
    if email == "default":
        return "this machine's service account", "serviceAccount:THIS_MACHINES_SERVICE_ACCOUNT"
    if email:
        return email, f"serviceAccount:{email}"
    account = getattr(credentials, "account", "") or ""
    if account:
        return account, f"user:{account}"
    return "the application default credentials of this user", "user:YOUR_EMAIL"
