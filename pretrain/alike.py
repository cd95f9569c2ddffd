"""Whether all ranks run the same thing: code, settings and packages, compared before the first step."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import socket
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from pretrain import log
from pretrain.errors import ConfigError
from pretrain.ranks import Ranks

logger = log.get(__name__)

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
OWN_TO_A_NODE = (
    "data.cache_dir",
    "data.cache_gb",
    "data.tokenizer_num_workers",
    "checkpoint.dir",
    "log.dir",
)  # each node may have its own disks
SHOWN = 3


def check_alike(ranks: Ranks, root: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare every rank with rank 0, and say on rank 0 where the ranks are. Every rank must call it.

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
    if ranks.is_first:
        logger.info("ranks: %s", _topology([each["host"] for each in everyone]))


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


def _topology(hosts: Iterable[str]) -> str:
    """Ranks by host: "0–7 on a, 8–15 on b"."""
    parts = []
    for host, group in groupby(enumerate(hosts), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        parts.append(f"{numbers[0]}–{numbers[-1]} on {host}" if len(numbers) > 1 else f"{numbers[0]} on {host}")
    return ", ".join(parts)
