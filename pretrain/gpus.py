"""What is known of GPUs without having one: peak rates, memory, power, and the share of the peak that others reached.

No torch here, so that a plan needs neither it nor a GPU. Memory is in GB of 10^9 bytes.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple


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


def match_gpu(name: str) -> str:
    """The key of PEAK_FLOPS for a driver's name of a GPU, or '' for one that is not in it."""
    if {"MIG", "Laptop", "D"} & set(name.split()):  # a part of the card, or a smaller chip under its name
        return ""
    for label, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{peak.pattern}\b", name):
            return label
    return ""


def dense_tflops(label: str, precision: str) -> float:
    """TFLOP/s of the data sheet; 0 where the GPU has no units for the precision. fp32 without TF32, torch's default.

    Of fp8 it is bf16's, in which the head, attention and the outer blocks are computed.

    Args:
        label: key of PEAK_FLOPS.
    """
    if precision == "fp8" and not label.startswith(FP8_UNITS):
        return 0
    rate: float = getattr(PEAK_FLOPS[label], "bf16" if precision == "fp8" else precision)
    return rate


class Card(NamedTuple):
    """A GPU as one rents it.

    Args:
        peak: its key in PEAK_FLOPS.
        memory_gb: of its data sheet; the driver reports up to 6 % more.
        power_w: most that it draws by its data sheet, the host not counted.
    """

    peak: str
    memory_gb: int
    power_w: int


# Memory and power: the data sheets named above; the form factor in the name is the one they are for.
CARDS: dict[str, Card] = {
    "gb200": Card("GB200", 186, 1200),
    "b200": Card("B200", 180, 1000),
    "h200": Card("H200 SXM", 141, 700),
    "h200-nvl": Card("H200 NVL", 141, 600),
    "h100-80gb": Card("H100 SXM", 80, 700),
    "h100-nvl": Card("H100 NVL", 94, 400),
    "h100-pcie": Card("H100 PCIe", 80, 350),
    "a100-80gb": Card("A100", 80, 400),
    "a100-40gb": Card("A100", 40, 400),
    "a100-80gb-pcie": Card("A100", 80, 300),
    "a100-40gb-pcie": Card("A100", 40, 250),
    "a40": Card("A40", 48, 300),
    "a30": Card("A30", 24, 165),
    "a10": Card("A10", 24, 150),
    "l40s": Card("L40S", 48, 350),
    "l40": Card("L40", 48, 300),
    "l4": Card("L4", 24, 72),
    "rtx-5090": Card("RTX 5090", 32, 575),
    "rtx-4090": Card("RTX 4090", 24, 450),
    "rtx-3090": Card("RTX 3090", 24, 350),
    "rtx-6000-ada": Card("RTX 6000 Ada", 48, 300),
    "rtx-a6000": Card("RTX A6000", 48, 300),
    "v100-32gb": Card("V100 SXM", 32, 300),
    "v100-16gb": Card("V100 SXM", 16, 300),
    "t4": Card("T4", 16, 70),
}

# Model FLOPs utilization by parameters, published and not ours: LLM Foundry's training benchmarks (MosaicML, commit
# 061f2c7, scripts/train/benchmarking/README.md): bf16, 2048 tokens, FSDP, FlashAttention, no activation checkpointing,
# no dropout, 8 GPUs (3B on H100: 16). It counts FLOPs as `ModelConfig.flops_per_token` does.
PUBLISHED_MFU: dict[str, dict[float, float]] = {
    "H100 SXM": {0.76e9: 0.349, 1.32e9: 0.418, 2.65e9: 0.437, 6.66e9: 0.464},
    "A100": {0.125e9: 0.448, 0.356e9: 0.516, 0.76e9: 0.569, 1.32e9: 0.599, 2.65e9: 0.621, 6.66e9: 0.642},
}
HOPPER_AND_LATER = ("GB200", "B200", "H200", "GH200", "H100", "H800")
# Compute capability 8.9 and more: Ada, Hopper, Blackwell; how labels of PEAK_FLOPS begin.
FP8_UNITS = (*HOPPER_AND_LATER, "H20", "L40", "L4", "RTX 5090", "RTX 4090", "RTX 6000 Ada")
ASSUMED_MFU = 0.30
PUBLISHED_BY = "published by LLM Foundry, not ours"


class Efficiency(NamedTuple):
    """The share of the peak that training reaches, and who says so."""

    mfu: float
    source: str


def expected_mfu(label: str, n_parameters: int) -> Efficiency:
    """The MFU to expect of a GPU without activation checkpointing: that of the published model nearest in size.

    Args:
        label: key of PEAK_FLOPS.
    """
    donor = label if label in PUBLISHED_MFU else "H100 SXM" if label.startswith(HOPPER_AND_LATER) else ""
    if not donor:
        return Efficiency(ASSUMED_MFU, "assumed: no figure published that we know of, and none of ours")
    size, mfu = min(PUBLISHED_MFU[donor].items(), key=lambda row: abs(math.log(row[0] / n_parameters)))
    source = f"{donor} at {size / 1e9:.3g}B, {PUBLISHED_BY}"
    return Efficiency(mfu, source if donor == label else f"assumed as on {source}")
