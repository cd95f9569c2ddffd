"""Memory of the host: what is free here, and what the ranks of a node will take. No torch here.

On a CPU the host's memory is the ranks' own, and a step's peak is what `memory.py` counts. Beside GPUs it holds a
parameter that is read or drawn, and a checkpoint on its way to the disk.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from pathlib import Path

import psutil

from pretrain import memory
from pretrain.activations import FP32_BYTES
from pretrain.memory import Setup
from pretrain.optim_config import largest_state_bytes, moments_bytes

# Of one process: Python, torch and what else is imported; beside a GPU CUDA's context, too. Assumed, not measured.
PROCESS_BYTES = {"cpu": 1_000_000_000, "cuda": 4_000_000_000}
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_keeping: list[ctypes.CDLL] = []  # the C library, once it keeps what is freed
_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    # a container's limit, what is taken of it, and the part of that which the kernel gives back when asked
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def host_bytes(setup: Setup, local_ranks: int, kind: str) -> int:
    """Bytes of host memory that the ranks of one node take at most.

    Args:
        kind: of their devices: "cpu" or "cuda".
    """
    saved = checkpoint_bytes(setup)
    if kind == "cpu":
        held = memory.peak(setup).total + saved
    else:
        offloaded = saved if setup.sharding.offload else 0
        # a resume reads one parameter at a time, with both moments
        held = max(largest_state_bytes(setup.optim, setup.model), saved) + offloaded
    return local_ranks * (PROCESS_BYTES[kind] + held)


def checkpoint_bytes(setup: Setup) -> int:
    """Bytes of a rank's part of a checkpoint, on its way to the disk."""
    weights = FP32_BYTES * sum(memory.parameter_sizes(setup.model))
    return (weights + moments_bytes(setup.optim, setup.model)) // setup.world_size


def peak_resident_bytes() -> int:
    """Most bytes that this process ever held in host memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed() -> bool:
    """Have the process keep what it frees for its next allocation; returns whether it does: with glibc alone.

    A step allocates the same tensors again and again. Given back, each page must be fetched and zeroed anew by the
    kernel, and that takes longer than what is then written into it. `give_back` keeps what lies free from growing.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # One arena for all threads: each of the uploads' would keep the top of its own, which malloc_trim passes over.
    if not all(libc.mallopt(*option) for option in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))):
        return False
    _keeping.append(libc)
    return True


def give_back() -> None:
    """Hand whole pages that lie free back to the kernel, where they were kept: else each checkpoint leaves some more
    behind, between what lives on."""
    for libc in _keeping[:1]:
        libc.malloc_trim(0)


def total_bytes() -> int:
    """Bytes of host memory that this process may use at most: the machine's, or its container's limit."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _container(_CGROUP))])


def free_bytes() -> int:
    """Bytes of host memory that can be had now, of the machine's and of its container's."""
    return min([int(psutil.virtual_memory().available), *(limit - taken for limit, taken in _container(_CGROUP))])


def _container(root: Path) -> list[tuple[int, int]]:
    """(limit, taken) of the container in bytes; nothing where there is no limit."""
    for limit_file, taken_file, stat_file, given_back in _LIMITS:
        try:
            limit = (root / limit_file).read_text().strip()
            if not limit.isdecimal():  # "max"
                return []
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
            return [(int(limit), int((root / taken_file).read_text()) - int(stat.get(given_back, 0)))]
        except (OSError, ValueError):
            continue
    return []
