"""Nothing that runs what it reads, and no secret in anything that is written.

The sources are walked as syntax trees, names resolved through their imports: a docstring that says pickle is no
pickle, and `from torch import load` is one.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from pretrain.config import StorageConfig
from pretrain.errors import StorageError
from pretrain.storage import open_store
from tests.runs import make_shards, plain_environment, train

ROOT = Path(__file__).resolve().parents[2]

FORBIDDEN_MODULES = {
    # they run what a file or a peer says
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "joblib",
    "jsonpickle",
    "marshal",
    "shelve",
}
FORBIDDEN_CALLS = {
    "torch.load": "reads pickle",
    "torch.save": "writes pickle",
    "torch.distributed.broadcast_object_list": "pickles",
    "torch.distributed.all_gather_object": "pickles",
    "torch.distributed.gather_object": "pickles",
    "torch.distributed.scatter_object_list": "pickles",
    "torch.distributed.send_object_list": "pickles",
    "torch.distributed.recv_object_list": "pickles",
    "torch.distributed.checkpoint.load": "reads pickle",
    "pandas.read_pickle": "reads pickle",
    "yaml.load": "builds any object; yaml.safe_load doesn't",
    "yaml.load_all": "builds any object",
    "yaml.full_load": "builds objects",
    "yaml.unsafe_load": "builds any object",
    "eval": "runs what it is given",
    "exec": "runs what it is given",
    "os.system": "a shell string",
    "os.popen": "a shell string",
    "subprocess.getoutput": "a shell string",
    "subprocess.getstatusoutput": "a shell string",
    "shutil.unpack_archive": "unpacks without a filter",
    "tempfile.mktemp": "a name that somebody else may take first",
}
# (file, call): why it may stay. Only what writes, never what reads.
ALLOWED = {
    ("benchmarks/bench_checkpoint.py", "torch.save"): "the other side of the comparison; never read back",
    ("tests/chaos/hostile.py", "import pickle"): "makes the malicious files that nothing here may run",
    ("tests/chaos/hostile.py", "allow_pickle=True"): "likewise",
}
SHELL_FORBIDDEN = {
    r"(^|[;&|(]\s*|\b(?:then|do|else)\s+)eval\s": "eval runs a string",
    r"\|\s*(sudo\s+)?(ba|z|da)?sh\b": "runs what was downloaded",
    r"\b(ba|z|da)?sh\s+-c\b": "a shell string",
}
PYTHON_IN_SHELL = re.compile(  # a quoted here-document; its first line may be continued
    r"<<-?'(\w+)'(?:[^\n]*\\\n)*[^\n]*\n(.*?)\n\1\n", re.DOTALL
)


def sources(*patterns: str) -> list[str]:
    """What git tracks, and what it would: paths from the root."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return sorted({path for path in listed if path and (ROOT / path).exists()})


def aliases(tree: ast.AST) -> dict[str, str]:
    """Name in the file -> what it stands for: {"np": "numpy", "load": "torch.load"}."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.asname: each.name for each in node.names if each.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {each.asname or each.name: f"{node.module}.{each.name}" for each in node.names}
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """The full name of what is called, '' where it is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (head := dotted(node.value, names)):
        return f"{head}.{node.attr}"
    return ""


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value == value


def problems_of_call(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    keywords = {each.arg: each.value for each in call.keywords}
    if (name := dotted(call.func, names)) in FORBIDDEN_CALLS:
        yield name
    if "shell" in keywords and not is_constant(keywords["shell"], False):
        yield "shell=True"
    if "allow_pickle" in keywords and not is_constant(keywords["allow_pickle"], False):
        yield "allow_pickle=True"
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    if method in ("extractall", "extract") and not is_constant(keywords.get("filter"), "data"):
        yield f"{method} without filter='data'"


def problems_of(text: str) -> list[tuple[int, str]]:
    """(line, what) of everything in a Python source that must not be there."""
    tree = ast.parse(text)
    names = aliases(tree)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            modules = [module.split(".")[0] for module in modules]
            found += [(node.lineno, f"import {module}") for module in modules if module in FORBIDDEN_MODULES]
        elif isinstance(node, ast.Call):
            found += [(node.lineno, what) for what in problems_of_call(node, names)]
        elif isinstance(node, ast.Attribute | ast.Name) and dotted(node, names) in FORBIDDEN_CALLS:
            found.append((node.lineno, dotted(node, names)))  # handed on rather than called
    return sorted(set(found))


def problems_of_shell(text: str) -> list[tuple[int, str]]:
    """(line, what) of everything in a shell script that must not be there, the Python in it included."""
    found = []
    for match in PYTHON_IN_SHELL.finditer(text):
        if "PYTHON" in match[1].upper():
            first = text[: match.start(2)].count("\n")
            found += [(first + line, what) for line, what in problems_of(match[2])]
    for number, line in enumerate(text.splitlines(), 1):
        code = line.split(" #")[0].strip()
        if not code.startswith("#"):
            found += [(number, what) for pattern, what in SHELL_FORBIDDEN.items() if re.search(pattern, code)]
    return found


@pytest.mark.parametrize("path", sources("*.py"))
def test_no_source_runs_what_it_reads(path: str) -> None:
    found = problems_of((ROOT / path).read_text(encoding="utf-8"))
    refused = [f"{path}:{line}: {what}" for line, what in found if (path, what) not in ALLOWED]
    assert not refused, refused


@pytest.mark.parametrize("path", sources("*.sh"))
def test_no_script_runs_a_string(path: str) -> None:
    assert not problems_of_shell((ROOT / path).read_text(encoding="utf-8"))


def test_what_is_allowed_is_still_needed() -> None:
    for path, what in ALLOWED:
        assert what in [found for _, found in problems_of((ROOT / path).read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch as t\nt.load(path, weights_only=True)", "torch.load"),
        ("from torch import load as read\nread(path)", "torch.load"),
        ("import torch\nread = torch.load\nread(path)", "torch.load"),
        ("import torch.distributed as dist\ndist.broadcast_object_list(x)", "torch.distributed.broadcast_object_list"),
        ("def f():\n    import pickle", "import pickle"),
        ("from pickle import loads", "import pickle"),
        ("import yaml\nyaml.load(text, yaml.Loader)", "yaml.load"),
        ("import subprocess\nsubprocess.run(line, shell=True)", "shell=True"),
        ("import subprocess\nsubprocess.run(line, shell=flag)", "shell=True"),
        ("import os\nos.system(line)", "os.system"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle=True"),
        ("archive.extractall(folder)", "extractall without filter='data'"),
        ("archive.extractall(folder, filter='tar')", "extractall without filter='data'"),
        ("archive.extract(member, folder)", "extract without filter='data'"),
    ],
)
def test_the_walk_finds_it(source: str, what: str) -> None:
    assert what in [found for _, found in problems_of(source)]


def test_the_walk_leaves_the_rest_alone() -> None:
    harmless = '''
        """No pickle, no torch.load, no eval(x)."""
        import numpy as np, re, yaml, subprocess
        model.eval()
        yaml.safe_load(text)
        np.load(path, allow_pickle=False)
        subprocess.run(["ls"], shell=False)
        archive.extractall(folder, filter="data")
        re.compile("torch.load")
    '''
    assert problems_of("\n".join(line.strip() for line in harmless.splitlines())) == []


@pytest.mark.parametrize(
    "line",
    ['eval "$line"', 'if true; then eval "$x"; fi', "curl -s https://x | bash", 'bash -c "$line"'],
)
def test_the_walk_reads_shell_too(line: str) -> None:
    assert problems_of_shell(f"set -e\n{line}\n")
    assert not problems_of_shell(f"# {line}\n")
    assert problems_of_shell("python - <<'PYTHON' || die \\\n  1\nimport pickle\nPYTHON\n") == [(3, "import pickle")]


# ---- secrets ----

W_AND_B_KEY = "5ec4e7" + "c0ffee" * 5 + "5ec4"  # of the form that W&B checks: 40 characters
HUB_TOKEN = "hf_5ec4e7CANARY5ec4e7CANARY"
KEY_ID = "5ec4e7canary5ec4e7canary"


def service_account(path: Path, token_uri: str = "http://127.0.0.1:9/token") -> list[bytes]:
    """Write the key file of a service account that exists nowhere; what of it is secret."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    fields = {
        "type": "service_account",
        "project_id": "nowhere",
        "private_key_id": KEY_ID,
        "private_key": text,
        "client_email": "robot@nowhere.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": token_uri,
    }
    path.write_text(json.dumps(fields))
    lines = [line.encode() for line in text.splitlines() if len(line) == 64]  # the last may be a few letters
    return [KEY_ID.encode(), *lines]


def leaks(folder: Path, secrets: list[bytes]) -> list[str]:
    """Files below the folder that hold a secret, as it is or as hex."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            found += [str(path.relative_to(folder)) for each in secrets if each in data or each.hex().encode() in data]
    return found


class TokenService(ThreadingHTTPServer):
    """Where a key is turned into a token; it refuses every one and remembers what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), RefusesTokens)
        self.received: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/token"


class RefusesTokens(BaseHTTPRequestHandler):
    server: TokenService

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(parse_qs(sent)[b"assertion"][0])
        body = b'{"error": "invalid_grant", "error_description": "Invalid JWT Signature."}'
        self.send_response(400)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def token_service() -> Iterator[TokenService]:
    with TokenService() as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        yield service
        service.shutdown()


@pytest.fixture
def secret_environment(tmp_path_factory: pytest.TempPathFactory, token_service) -> tuple[dict[str, str], list[bytes]]:
    """An environment full of secrets, and what must not be found."""
    key = tmp_path_factory.mktemp("keys") / "key.json"
    secrets = [W_AND_B_KEY.encode(), HUB_TOKEN.encode(), *service_account(key, token_service.url)]
    more = {
        "WANDB_API_KEY": W_AND_B_KEY,
        "WANDB_MODE": "offline",
        "HF_TOKEN": HUB_TOKEN,
        "GOOGLE_APPLICATION_CREDENTIALS": str(key),
    }
    more |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return plain_environment(**more), secrets


def test_no_secret_is_in_anything_a_run_writes(tmp_path: Path, secret_environment) -> None:
    environment, secrets = secret_environment
    make_shards(tmp_path / "shards")
    options = ("--max-steps", "4", "--checkpoint.every_steps", "2", "--wandb", "--log.tensorboard", "true", "--debug")
    ended = train(tmp_path, *options, environment=environment)
    assert ended.code == 0, ended.output

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    kinds = {"config.yaml", "metadata.json", "training.log", "metrics.jsonl", "summary.json"}
    assert kinds <= {path.name for path in written}
    [w_and_b] = [path for path in written if path.suffix == ".wandb"]
    assert b"warmup_steps" in w_and_b.read_bytes()  # the settings are there as plain bytes, so a key would be seen
    assert any("tfevents" in path.name for path in written)
    assert leaks(tmp_path, secrets) == []  # what was printed is one of the files


def test_no_secret_is_in_what_a_run_says_of_a_key_that_is_refused(
    tmp_path: Path, secret_environment, token_service: TokenService
) -> None:
    environment, secrets = secret_environment
    make_shards(tmp_path / "shards")
    ended = train(
        tmp_path, "--checkpoints", "gs://nowhere/x", "--storage.deadline_s", "1", "--debug", environment=environment
    )
    assert ended.code == 4, ended.output
    assert token_service.received  # the key was read and used
    signatures = [assertion.rsplit(b".", 1)[1] for assertion in token_service.received]
    assert leaks(tmp_path, [*secrets, *signatures]) == []


def test_a_key_that_cannot_be_used_is_named_and_not_quoted(monkeypatch, tmp_path: Path) -> None:
    key = tmp_path / "key.json"
    service_account(key)
    fields = json.loads(key.read_text())
    fields["private_key"] = "-----BEGIN PRIVATE KEY-----\nCANARY5ec4e7\n-----END PRIVATE KEY-----\n"
    key.write_text(json.dumps(fields))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    with pytest.raises(StorageError, match=r"key\.json, which can't be used") as caught:
        open_store("gs://bucket", StorageConfig())
    assert "CANARY" not in str(caught.value)
    assert KEY_ID not in str(caught.value)


@pytest.mark.parametrize("path", ["credentials/key.json", "deep/down/credentials/key.json"])
def test_git_ignores_credentials(path: str) -> None:
    assert subprocess.run(["git", "check-ignore", "--quiet", path], cwd=ROOT, check=False).returncode == 0
