"""Whether all ranks run the same thing: code, settings, packages and data, compared before the first step."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import ConfigError, ShardError
from pretrain.ranks import Ranks

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "torchao")
OWN_TO_A_NODE = (
    "data.cache_dir",
    "data.cache_gb",
    "data.tokenizer_num_workers",
    "checkpoint.dir",
    "log.dir",
)  # each node may have its own disks
SHOWN = 3


def check_alike(ranks: Ranks, root: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare every rank with rank 0. Every rank must call it.

    Args:
        root: of the project; its Python files are what is compared.
        settings: the config as a tree of sections.

    Raises:
        ConfigError: a rank runs other code, settings or packages; what differs is named, on every rank alike.
    """
    everyone = ranks.exchange({"host": socket.gethostname(), **_identity(root, settings)})
    for number, other in enumerate(everyone):
        if problems := _differences(everyone[0], other):
            more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            error = ConfigError(
                f"rank {number} on {other['host']} is not like rank 0 on {everyone[0]['host']}: "
                f"{'; '.join(problems[:SHOWN])}{more}",
                "Start every node with the same code, the same settings and the same packages.",
            )
            error.shared = True
            raise error


def _identity(root: Path, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What must be the same everywhere."""
    flat = {f"{section}.{name}": repr(value) for section, fields in settings.items() for name, value in fields.items()}
    return {
        "code": code_hash(root),
        "packages": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "settings": {name: value for name, value in flat.items() if name not in OWN_TO_A_NODE},
    }


def code_hash(root: Path) -> str:
    """A short hash of the project's Python files: of what runs, committed or not."""
    digest = hashlib.sha256()
    for path in (root / "train.py", root / "model.py", *sorted((root / "pretrain").rglob("*.py"))):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What is another thing on `other`, in words."""
    problems = []
    if first["code"] != other["code"]:
        problems.append(f"code {other['code']} instead of {first['code']}")
    for kind in ("packages", "settings"):
        for name in sorted({*first[kind], *other[kind]}):
            here, there = first[kind].get(name), other[kind].get(name)
            if here != there:
                problems.append(f"{name} is {there} instead of {here}")
    return problems


def check_same_data(ranks: Ranks, source: str, fingerprint: str, n_shards: int, manifest: str) -> None:
    """Compare what every rank found under `source` with rank 0. Every rank must call it.

    Args:
        fingerprint: of the shards' names and tokens.
        manifest: the text of the manifest.json beside them; '' where there is none.

    Raises:
        ShardError: a rank found something else; it is named, on every rank alike.
    """
    told = hashlib.sha256(manifest.encode()).hexdigest()[:12] if manifest else "none"
    found = {"host": socket.gethostname(), "shards": n_shards, "tokens": fingerprint[:12], "manifest.json": told}
    everyone = ranks.exchange(found)
    for number, other in enumerate(everyone):
        names = [name for name in found if name != "host" and other[name] != everyone[0][name]]
        if names:
            problems = [f"{name} {other[name]} instead of {everyone[0][name]}" for name in names]
            error = ShardError(
                f"{source}: rank {number} on {other['host']} did not find what rank 0 on {everyone[0]['host']} found: "
                f"{', '.join(problems)}",
                "Give every node the same shards, and start again once nobody is writing there.",
            )
            error.shared = True
            raise error
