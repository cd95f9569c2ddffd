"""The device of these tests: the first GPU, or in a rehearsal (GPU_REHEARSAL=1) the CPU, so that they can't rot.

They need torch, numpy, pytest, PyYAML, rich, psutil and safetensors. What needs more says so where it is left out.
"""

from __future__ import annotations

import os

import pytest
import torch

REHEARSES = os.environ.get("GPU_REHEARSAL") == "1"


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
        return torch.device("cuda", 0)
    if REHEARSES:
        return torch.device("cpu")
    pytest.skip("needs a CUDA device; GPU_REHEARSAL=1 runs it on the CPU")


@pytest.fixture
def size(device: torch.device) -> dict[str, int]:
    """Of a model: small on a CPU, on a GPU large enough for its real kernels."""
    if device.type == "cuda":
        return {"n_layer": 4, "n_head": 8, "d_model": 512, "vocab_size": 8192, "seq_len": 512}
    return {"n_layer": 3, "n_head": 2, "d_model": 32, "vocab_size": 130, "seq_len": 32}


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """A real GPU: what a CPU has no form of is not rehearsed."""
    if device.type != "cuda":
        pytest.skip("there is nothing of it on a CPU")
    return device
