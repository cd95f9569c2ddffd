"""What this machine can do: devices, precisions, peak rates, and what the GPU is doing right now.

Sizes are in GB of 10^9 bytes, rates in floating-point operations per second.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from pretrain.errors import ConfigError

GB = 1e9
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Peak(NamedTuple):
    """Dense matrix rates of one GPU in TFLOP/s; 0 where it has no such unit.

    `pattern` is found in the name that the driver gives. fp16 and bf16 are with fp32 accumulation, as torch multiplies.
    """

    pattern: str
    fp16: float
    bf16: float
    tf32: float
    fp32: float


# The data sheets since Ampere print rates "with sparsity"; the dense rates here are half of those. More specific names
# come first. B300 is left out, for its published rates disagree; what isn't listed is measured.
PEAK_FLOPS: dict[str, Peak] = {
    # NVIDIA Blackwell architecture data sheet: HGX B200 and GB200 NVL72, per GPU
    "GB200": Peak(r"GB200", 2500, 2500, 1250, 80),
    "B200": Peak(r"B200", 2250, 2250, 1100, 75),
    # NVIDIA H200 data sheet
    "H200 NVL": Peak(r"H200 NVL", 835.5, 835.5, 417.5, 60),
    "H200 SXM": Peak(r"H200", 989.4, 989.4, 494.7, 66.9),
    # NVIDIA GH200 Grace Hopper superchip data sheet
    "GH200": Peak(r"GH200", 989.4, 989.4, 494.7, 66.9),
    # NVIDIA H100 architecture white paper (SXM5, PCIe) and H100 data sheet (NVL)
    "H100 PCIe": Peak(r"H100 PCIe", 756, 756, 378, 51.2),
    "H100 NVL": Peak(r"H100 NVL", 835.5, 835.5, 417.5, 60),
    "H100 SXM": Peak(r"H100", 989.4, 989.4, 494.7, 66.9),
    # H800: an H100 with slower NVLink and fp64; H20: its data sheet
    "H800 SXM": Peak(r"H800", 989.4, 989.4, 494.7, 66.9),
    "H20": Peak(r"H20", 148, 148, 74, 44),
    # NVIDIA A100 data sheet (A800 differs in NVLink only); SXM and PCIe alike
    "A100": Peak(r"A100", 312, 312, 156, 19.5),
    "A800": Peak(r"A800", 312, 312, 156, 19.5),
    # NVIDIA A30, A40, A10 and A10G data sheets
    "A30": Peak(r"A30", 165, 165, 82, 10.3),
    "A40": Peak(r"A40", 149.7, 149.7, 74.8, 37.4),
    "A10G": Peak(r"A10G", 70, 70, 35, 31.5),
    "A10": Peak(r"A10", 125, 125, 62.5, 31.2),
    # NVIDIA L40S, L40 and L4 data sheets
    "L40S": Peak(r"L40S", 362.05, 362.05, 183, 91.6),
    "L40": Peak(r"L40", 181.05, 181.05, 90.5, 90.5),
    "L4": Peak(r"L4", 121, 121, 60, 30.3),
    # NVIDIA RTX Blackwell, Ada and Ampere GA102 architecture white papers
    "RTX 5090": Peak(r"RTX 5090", 209.5, 209.5, 104.8, 104.8),
    "RTX 4090": Peak(r"RTX 4090", 165.2, 165.2, 82.6, 82.6),
    "RTX 3090 Ti": Peak(r"RTX 3090 Ti", 80, 80, 40, 40),
    "RTX 3090": Peak(r"RTX 3090", 71, 71, 35.6, 35.6),
    "RTX 6000 Ada": Peak(r"RTX 6000 Ada", 364.2, 364.2, 182.1, 91.1),
    "RTX A6000": Peak(r"RTX A6000", 154.8, 154.8, 77.4, 38.7),
    # NVIDIA V100, V100S and T4 data sheets; neither bf16 nor TF32 units
    "V100S": Peak(r"V100S", 130, 0, 0, 16.4),
    "V100 PCIe": Peak(r"V100-PCIE", 112, 0, 0, 14),
    "V100 SXM": Peak(r"V100", 125, 0, 0, 15.7),
    "T4": Peak(r"T4", 65, 0, 0, 8.1),
}


def resolve_device(local_rank: int) -> torch.device:
    """The device of this rank: its own GPU, or the CPU on a machine without one.

    Raises:
        ConfigError: there are GPUs, but fewer than ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"rank {local_rank} of this node has no GPU: torch sees {count}",
            f"start at most {count} processes a node, or widen CUDA_VISIBLE_DEVICES",
        )
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """The device's name as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def supported_precisions(device: torch.device) -> tuple[str, ...]:
    """The values of `train.precision` that train on this device: a CPU has no fp16, a GPU before Ampere no bf16."""
    if device.type != "cuda":
        return ("fp32", "bf16")
    return ("fp32", "fp16", "bf16") if torch.cuda.get_device_capability(device) >= (8, 0) else ("fp32", "fp16")


def check_precision(device: torch.device, precision: str) -> None:
    """Refuse a precision that the device can't train in.

    Raises:
        ConfigError: naming the precisions that it can.
    """
    able = supported_precisions(device)
    if precision not in able:
        where = "a CPU" if device.type == "cpu" else device_name(device)
        raise ConfigError(
            f"train.precision is {precision}, which {where} can't train in; it can {', '.join(able)}",
            f"give --precision {able[-1]}" + (", or start on a machine with a GPU" if device.type == "cpu" else ""),
        )


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """The rate that MFU is measured against: the data sheet's dense peak, or where there is none, a measured rate.

    fp32 counts as TF32 where torch is set to multiply so. On a CPU call it at the same moment on every rank of the
    node: each then measures its own share of the cores.

    Args:
        precision: fp32, bf16 or fp16.

    Returns:
        FLOP/s of one device, and its source: "H100 SXM data sheet", "measured".
    """
    if device.type == "cuda":
        unit = "tf32" if precision == "fp32" and _multiplies_in_tf32() else precision
        label = match_gpu(device_name(device))
        rate = getattr(PEAK_FLOPS[label], unit) if label else 0
        if rate:
            return rate * 1e12, f"{label} data sheet"
    return measure_flops(device, DTYPES[precision]), "measured"


def match_gpu(name: str) -> str:
    """The key of PEAK_FLOPS for a driver's name of a GPU, or '' for one that is not in it."""
    if {"MIG", "Laptop", "D"} & set(name.split()):  # a part of the card, or a smaller chip under its name
        return ""
    for label, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{peak.pattern}\b", name):
            return label
    return ""


def _multiplies_in_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def measure_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.4) -> float:
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


class GpuMonitor:
    """What a rank's device is doing, asked of the driver once a record and never inside a step.

    Attributes:
        problem: why the driver can't be asked, or ''. A CPU is no problem: it has no driver to ask.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.problem = ""
        self._nvml: Any = None
        self._handle: Any = None
        self._process = psutil.Process()
        if device.type == "cuda":
            self._open()

    def _open(self) -> None:
        try:
            import pynvml
        except ImportError:
            self.problem = "nvidia-ml-py is not installed"
            return
        # By UUID: the driver counts all GPUs of the machine, torch only those in CUDA_VISIBLE_DEVICES, in its order.
        uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        try:
            pynvml.nvmlInit()
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.problem = f"the NVIDIA driver can't be asked about {uuid}: {error}"

    def sample(self) -> dict[str, float]:
        """The figures of this moment; one that the device doesn't tell is left out.

        Returns:
            gpu_utilization (percent of the last driver period), gpu_power_w, gpu_memory_gb (in use on the GPU, by all
            processes), gpu_memory_peak_gb (most that torch ever held here at once), host_memory_gb (resident in this
            process). On a CPU host_memory_gb only.
        """
        figures = {"host_memory_gb": self._process.memory_info().rss / GB}
        if self.device.type == "cuda":
            figures["gpu_memory_peak_gb"] = torch.cuda.max_memory_allocated(self.device) / GB
        return figures | self._ask_driver()

    def _ask_driver(self) -> dict[str, float]:
        if self._nvml is None:
            return {}
        nvml, handle = self._nvml, self._handle
        questions: dict[str, Callable[[], float]] = {
            "gpu_utilization": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu_power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu_memory_gb": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / GB,
        }
        figures = {}
        for name, ask in questions.items():
            try:
                figures[name] = float(ask())
            except nvml.NVMLError:  # a card without that sensor
                continue
        return figures
