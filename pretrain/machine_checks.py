"""What the doctor looks at on the machine itself: Python, packages, memory, limits. No torch here."""

from __future__ import annotations

import os
import platform
import resource
import sys
from pathlib import Path

from pretrain import host_memory
from pretrain.doctor import Finding, fail, ok, skip, warn
from pretrain.errors import ConfigError
from pretrain.listings import size_text
from pretrain.memory import Setup
from pretrain.versions import check_versions

OLDEST_PYTHON = (3, 10)
SHM = Path("/dev/shm")  # noqa: S108 - not a place for our files: where NCCL puts its buffers
SHM_LEAST, SHM_ENOUGH = 128 * 2**20, 1 * 2**30  # bytes; a container has 64 MiB unless it is told otherwise
FILES_ENOUGH = 4096  # sockets of the downloads and of NCCL, files of the shards
INFINIBAND = Path("/sys/class/infiniband")
UNLIMITED = resource.RLIM_INFINITY


def python() -> Finding:
    """The interpreter."""
    found = f"{platform.python_version()} at {sys.executable}, {platform.platform(terse=True)}"
    if sys.version_info < OLDEST_PYTHON:
        return fail("python", ConfigError(found, "Python 3.10 or newer is needed: bash setup_env.sh finds one."))
    if sys.platform != "linux":
        mend = "Ranks of a launcher that was killed go on there, and nothing ends them: train on Linux."
        return warn("python", found, mend)
    return ok("python", found)


def packages(requirements: Path, enforced: bool) -> Finding:
    """What is installed against what was tested.

    Args:
        enforced: train.py refuses to run on others (log.version_check).
    """
    problems = check_versions(requirements)
    if not problems:
        return ok("packages", f"as {requirements.name} pins them")
    mend = "Run bash setup_env.sh."
    if enforced:
        return fail("packages", ConfigError(problems, mend))
    return warn("packages", "; ".join(problems), mend)


def host(setup: Setup, local_ranks: int, kind: str) -> Finding:
    """Host memory against what the ranks of this node need.

    Args:
        kind: of their devices: "cpu" or "cuda".
    """
    needed = host_memory.host_bytes(setup, local_ranks, kind)
    free, total = host_memory.free_bytes(), host_memory.total_bytes()
    ranks = f"{local_ranks} ranks need" if local_ranks > 1 else "the run needs"
    what = f"{size_text(free)} free of {size_text(total)}; {ranks} about {size_text(needed)} (estimated)"
    figures = {"needed_gb": needed / 1e9, "free_gb": free / 1e9, "total_gb": total / 1e9}
    mend = "Give fewer ranks, a smaller --batch.micro_size or a smaller model, or take a larger machine."
    if needed > total:
        return fail("host_memory", ConfigError(what, mend), **figures)
    if needed > free:
        return warn("host_memory", what, "See what takes it: ps aux --sort=-rss | head", **figures)
    return ok("host_memory", what, **figures)


def shared_memory(gpu_ranks: int) -> Finding:
    """Room in /dev/shm, through which NCCL moves data between the GPUs of a node.

    Args:
        gpu_ranks: ranks of this node that have a GPU.
    """
    if not SHM.is_dir():
        return skip("shared_memory", f"there is no {SHM} on this system")
    status = os.statvfs(SHM)
    size, free = status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail
    what = f"{SHM}: {size_text(free)} free of {size_text(size)}"
    figures = {"free_gb": free / 1e9}
    if gpu_ranks < 2 or free >= SHM_ENOUGH:
        return ok("shared_memory", what, **figures)
    mend = f"Start the container with --shm-size=8g, or: mount -o remount,size=8g {SHM}"
    if free < SHM_LEAST:
        return fail("shared_memory", ConfigError(f"{what}: too little for NCCL on {gpu_ranks} GPUs", mend), **figures)
    return warn("shared_memory", what, mend, **figures)


def limits(nodes: int) -> list[Finding]:
    """Open files and locked memory of this process.

    Args:
        nodes: of the run.
    """
    return [_open_files(), _locked_memory(nodes)]


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    what = f"{_limit_text(soft)} open files at once, {_limit_text(hard)} if asked for"
    if soft == UNLIMITED or soft >= FILES_ENOUGH:
        return ok("open_files", what)
    return warn("open_files", what, f"Run ulimit -n {65536 if hard == UNLIMITED else min(hard, 65536)} first.")


def _locked_memory(nodes: int) -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    text = _limit_text(soft) if soft == UNLIMITED else size_text(soft)
    what = f"{text} of locked memory"
    has_infiniband = INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
    if soft == UNLIMITED or nodes < 2 or not has_infiniband:
        return ok("locked_memory", what)
    mend = "InfiniBand locks its buffers: ulimit -l unlimited, or docker run --ulimit memlock=-1."
    return warn("locked_memory", what, mend)


def _limit_text(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else f"{limit:,}"
