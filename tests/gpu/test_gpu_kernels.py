"""Attention kernels on a GPU, forward and backward, against plain matrices in fp32 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import KERNELS, plain_attention
from pretrain.document_mask import DOCUMENT_KERNELS, document_starts
from pretrain.kernels import Masking, choose_attention

pytestmark = pytest.mark.gpu
END = 0


def qkv_of(heads: int, kv_heads: int, length: int, head_dim: int) -> list[torch.Tensor]:
    """Query, key and value of two sequences, (2, T, heads, D) in fp32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, n, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads)]


def results(attend: Any, qkv: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value, on the CPU in fp32."""
    inputs = [part.to(device, dtype).requires_grad_() for part in qkv]
    y = attend(*inputs, 0.0)
    weights = torch.linspace(-1, 1, y.numel(), device=device).view_as(y)
    return [part.float().cpu() for part in (y.detach(), *torch.autograd.grad((y.float() * weights).sum(), inputs))]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for name, left, right in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error = (left - right).norm() / right.norm()
        assert error < 0.02, f"{name} is off by {error:.2%}"


@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128)])
def test_a_kernel_is_plain_attention(device, kernel, heads, kv_heads, head_dim):
    try:
        choose_attention(kernel, device, torch.bfloat16, head_dim)
    except ValueError as error:
        pytest.skip(str(error))
    qkv = qkv_of(heads, kv_heads, 256 if device.type == "cuda" else 32, head_dim)
    exact = results(plain_attention, qkv, torch.device("cpu"), torch.float32)
    assert_close(results(KERNELS[kernel], qkv, device, torch.bfloat16), exact)


@pytest.mark.parametrize("kernel", list(DOCUMENT_KERNELS))
def test_a_kernel_keeps_documents_apart_as_plain_attention_does(device, kernel):
    try:
        choose_attention(kernel, device, torch.bfloat16, 64, Masking())
    except ValueError as error:
        pytest.skip(str(error))
    length = 256 if device.type == "cuda" else 32
    tokens = torch.ones(2, length, dtype=torch.int64)
    tokens[0, [5, length // 2]] = tokens[1, [length // 3]] = END

    def masked(name: str, dtype: torch.dtype, where: torch.device) -> Any:
        own = DOCUMENT_KERNELS[name]
        mask = own.prepare(document_starts(tokens.to(where), END), dtype)
        return lambda q, k, v, dropout: own.attend(q, k, v, dropout, mask)

    qkv, cpu = qkv_of(4, 4, length, 64), torch.device("cpu")
    exact = results(masked("plain", torch.float32, cpu), qkv, cpu, torch.float32)
    assert_close(results(masked(kernel, torch.bfloat16, device), qkv, device, torch.bfloat16), exact)
