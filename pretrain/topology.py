"""Where the ranks are and what joins them, told once at the start: hosts, GPUs, NVLink, InfiniBand, interfaces."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from pretrain import log
from pretrain.communication import GLOO_INTERFACE, settled
from pretrain.hardware import device_name
from pretrain.ranks import Ranks

INFINIBAND = Path("/sys/class/infiniband")
MOST_LINKS = 18  # NVLinks of one GPU, on Hopper and Blackwell

logger = log.get(__name__)


def tell_topology(ranks: Ranks, device: torch.device, timeout_minutes: int) -> None:
    """Say on rank 0 where the ranks are and how they talk. Every rank must call it."""
    everyone = ranks.exchange(place_of(device))
    if not ranks.is_first:
        return
    logger.info("ranks: %s", ranks_by_host([each["host"] for each in everyone]))
    if ranks.world_size > 1:
        logger.info("topology: %s", describe(everyone))
        told = ", ".join(f"{name}={value}" for name, value in settled().items())
        logger.info("communication: %s; a rank waits %d min for the others", told, timeout_minutes)


def place_of(device: torch.device) -> dict[str, Any]:
    """What this rank knows of its place, as JSON: host, device, its NVLinks, and the host's InfiniBand ports."""
    ports = sorted(path.name for path in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    links, problem = nvlinks(device) if device.type == "cuda" else (0, "")
    return {
        "host": socket.gethostname(),
        "device": device_name(device) if device.type == "cuda" else "CPU",
        "nvlinks": links,
        "unknown": problem,
        "infiniband": len(ports),
        "gloo": settled().get(GLOO_INTERFACE, ""),
    }


def nvlinks(device: torch.device) -> tuple[int, str]:
    """(NVLinks of a GPU that are up, why that is not known or '')."""
    try:
        import pynvml
    except ImportError:
        return 0, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        return 0, str(error)
    up = 0
    for link in range(MOST_LINKS):
        try:
            up += int(pynvml.nvmlDeviceGetNvLinkState(handle, link))
        except pynvml.NVMLError:  # the card has no such link
            break
    return up, ""


def describe(everyone: Sequence[dict[str, Any]]) -> str:
    """One line: "2 hosts × 8 NVIDIA H100 80GB HBM3, NVLink ×18; 8 InfiniBand ports a host; gloo over eth0"."""
    hosts = Counter(each["host"] for each in everyone)
    counts, devices = sorted(set(hosts.values())), sorted({each["device"] for each in everyone})
    each_host = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    parts = [f"{len(hosts)} host{'s' * (len(hosts) > 1)} × {each_host} {' and '.join(devices)}"]
    if devices != ["CPU"]:
        links = sorted({each["nvlinks"] for each in everyone})
        unknown = next((each["unknown"] for each in everyone if each["unknown"]), "")
        joined = f"NVLink ×{links[0]}" if links[0] else "no NVLink on every GPU: PCIe"
        parts[0] += f", links unknown ({unknown})" if unknown else f", {joined}"
    if len(hosts) > 1:
        ports = sorted({each["infiniband"] for each in everyone})
        parts.append(f"{ports[0]} InfiniBand ports a host" if ports[0] else "no InfiniBand on every host: TCP")
        parts.append(
            f"gloo over {' and '.join(sorted({each['gloo'] or 'an interface of its choice' for each in everyone}))}"
        )
    return "; ".join(parts)


def ranks_by_host(hosts: Sequence[str]) -> str:
    """Ranks by host: "0–7 on a, 8–15 on b"."""
    parts = []
    for host, group in groupby(enumerate(hosts), key=lambda item: item[1]):
        numbers = [number for number, _ in group]
        parts.append(f"{numbers[0]}–{numbers[-1]} on {host}" if len(numbers) > 1 else f"{numbers[0]} on {host}")
    return ", ".join(parts)
