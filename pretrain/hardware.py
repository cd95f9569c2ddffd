"""What this machine can do: devices, precisions, peak rates (what it is doing right now: sensors.py).

Sizes are in GB of 10^9 bytes, rates in floating-point operations per second.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from pretrain.errors import ConfigError
from pretrain.gpus import PEAK_FLOPS, match_gpu

GB = 1e9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP8_MEND = "Run pip install -r requirements-fp8.txt, or give --precision bf16."
PRECISIONS_SINCE = {"fp32": (0, 0), "fp16": (0, 0), "bf16": (8, 0), "fp8": (8, 9)}  # compute capability


def resolve_device(local_rank: int) -> torch.device:
    """The device of this rank: its own GPU, or the CPU on a machine without one.

    Raises:
        ConfigError: there are GPUs, but fewer than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        problem = ConfigError(
            f"rank {local_rank} of this node has no GPU: torch sees {count}",
            f"Start at most {count} processes a node, or widen CUDA_VISIBLE_DEVICES",
        )
        problem.shared = False  # rank 0 has one
        raise problem
    return torch.device("cuda", local_rank)


def choose_device(device: str, dtype: str) -> tuple[torch.device, str]:
    """What a script's --device (auto, cpu, cuda) and --dtype (auto, fp32, bf16, fp16) mean for a model that only reads.

    Raises:
        ConfigError: cuda, on a machine without a GPU.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("--device cuda, and torch sees no GPU here", "Take --device cpu.")
    chosen = torch.device("cuda" if has_gpu and device != "cpu" else "cpu")
    if dtype == "auto":
        dtype = "bf16" if chosen.type == "cuda" else "fp32"
    return chosen, dtype


def device_name(device: torch.device) -> str:
    """The device's name as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def supported_precisions(device: torch.device) -> tuple[str, ...]:
    """The values of `train.precision` that train on this device: a CPU has no fp16, a GPU before Ampere no bf16, one
    before Ada and Hopper no fp8."""
    if device.type != "cuda":
        return ("fp32", "bf16")
    capability = torch.cuda.get_device_capability(device)
    return tuple(precision for precision, since in PRECISIONS_SINCE.items() if capability >= since)


def check_precision(device: torch.device, precision: str) -> None:
    """Refuse a precision that the device can't train in.

    Raises:
        ConfigError: naming the precisions that it can; or torchao, which fp8 needs, is missing.
    """
    able = supported_precisions(device)
    if precision not in able:
        where = "a CPU" if device.type == "cpu" else device_name(device)
        raise ConfigError(
            f"train.precision is {precision}, which {where} can't train in; it can {', '.join(able)}",
            f"Give --precision {able[-1]}" + (", or start on a machine with a GPU" if device.type == "cpu" else ""),
        )
    if precision == "fp8" and importlib.util.find_spec("torchao") is None:
        raise ConfigError("train.precision is fp8, and torchao is not installed", FP8_MEND)


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The rate that MFU is measured against: the data sheet's dense peak, or where there is none, a measured rate.

    fp32 counts as TF32 where torch is set to multiply so, and fp8 as bf16, in which much of it is done. On a CPU call
    it at the same moment on every rank of the node: each then measures its own share of the cores.

    Args:
        precision: a value of `train.precision`.

    Returns:
        FLOP/s of one device, and its source: "H100 SXM data sheet", "measured".
    """
    precision = "bf16" if precision == "fp8" else precision
    if device.type == "cuda":
        unit = "tf32" if precision == "fp32" and _multiplies_in_tf32() else precision
        label = match_gpu(device_name(device))
        rate = getattr(PEAK_FLOPS[label], unit) if label else 0
        if rate:
            return rate * 1e12, f"{label} data sheet"
    return measure_flops(device, DTYPES[precision]), "measured"


def _multiplies_in_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def measure_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of the best of many square matrix products, with the threads torch has now.

    The best and not the mean, for a peak should not depend on what else the machine was doing.
    """
    n = 8192 if device.type == "cuda" else 1024  # large enough to fill the device, and several times in the time
    matrix = torch.linspace(-100, 100, n * n, device=device).sin().view(n, n).to(dtype)
    result = matrix @ matrix  # the first run sets up
    best = float("inf")
    _wait(device)
    end = time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=result)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def _wait(device: torch.device) -> None:
    """GPU kernels run behind Python; a clock is read only after them."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The `system_info` of a checkpoint's metadata: plain values, ready for JSON."""
    facts: dict[str, Any] = {
        "cuda_available": torch.cuda.is_available(),
        "device_count": torch.cuda.device_count(),
        "device_type": device.type,
        "device_name": device_name(device),
        "torch_version": torch.__version__,
        "cuda_version": torch.version.cuda,
        "python_version": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "host_memory_gb": round(psutil.virtual_memory().total / GB, 1),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device_memory_gb"] = round(properties.total_memory / GB, 1)
        facts["compute_capability"] = f"{properties.major}.{properties.minor}"
    return facts
