"""Which attention kernel runs on this machine, found by trying."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import KERNELS, plain_attention
from pretrain.document_mask import DOCUMENT_KERNELS, document_starts

KERNEL_TITLES = {
    "flash": "the FlashAttention package",
    "flex": "torch's flex attention",
    "sdpa": "torch's fused attention",
    "plain": "plain matrices",
}
HOPPER = (9, 0)  # compute capability from which cuDNN's kernels beat FlashAttention 2, by what their makers publish
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

_PREFERENCE = contextlib.ExitStack()  # torch has one order for the process; it stays until another model is built


@dataclass(frozen=True)
class Masking:
    """That documents are kept apart, and what decides which kernels can do it.

    Args:
        dropout: probability of the model's.
        compiled: whether torch.compile compiles the model.
    """

    dropout: float = 0.0
    compiled: bool = False


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, head_dim: int, masking: Masking | None = None
) -> tuple[str, str]:
    """The attention kernel for this machine, tried out on it and not guessed from what is installed.

    Args:
        requested: "flash", "flex", "sdpa" or "plain"; "auto" takes the first of them, in this order, that runs.
        device: where the model will train.
        dtype: dtype of queries, keys and values: the compute precision.
        head_dim: d_model / n_head.
        masking: None where a token sees all tokens before it. With documents the name is for `DocumentMask`, and flex
            is one more kernel.

    Returns:
        The kernel's name for `GPT`, and the reason in words for the log.

    Raises:
        ValueError: the requested kernel can't run here, and why; or there is no kernel of that name.
    """
    what = "the document mask by " if masking else ""
    cudnn_first = prefer_cudnn(device)
    if requested != "auto":
        if obstacle := _obstacle(requested, device, dtype, head_dim, masking):
            raise ValueError(f"attention kernel {requested!r} can't run on {device}: {obstacle}")
        return requested, f"{what}{KERNEL_TITLES[requested]}, as requested"
    passed_over = ""
    for name in _order(DOCUMENT_KERNELS if masking else KERNELS, cudnn_first and not masking):
        obstacle = _obstacle(name, device, dtype, head_dim, masking)
        if not obstacle:
            first = ", cuDNN's kernel first" if name == "sdpa" and cudnn_first else ""
            return name, f"{what}{KERNEL_TITLES[name]}{first}{passed_over}"
        passed_over += f"; {KERNEL_TITLES[name]} can't run: {obstacle}"
    raise ValueError(f"no attention kernel runs on {device}{passed_over}")


def prefer_cudnn(device: torch.device) -> bool:
    """Have torch's fused attention try cuDNN's kernel before its others where that is the fastest: on Hopper and newer
    GPUs. Not with deterministic algorithms, which its backward pass is not. Whether it does now."""
    _PREFERENCE.close()
    may = device.type == "cuda" and torch.cuda.is_available() and not torch.are_deterministic_algorithms_enabled()
    wanted = may and torch.cuda.get_device_capability(device) >= HOPPER
    if wanted:
        _PREFERENCE.enter_context(sdpa_kernel(CUDNN_FIRST, set_priority=True))
    return wanted


def _order(kernels: Iterable[str], sdpa_first: bool) -> list[str]:
    """In which "auto" tries the kernels."""
    return sorted(kernels, key=lambda name: name != "sdpa") if sdpa_first else list(kernels)


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, masking: Masking | None) -> str:
    """Why the kernel can't train here, or ''."""
    known = DOCUMENT_KERNELS if masking else KERNELS
    if name not in known:
        return f"there is no such kernel, only {', '.join(known)}"
    if name == "flash" and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
        return f"it takes fp16 and bf16 on CUDA only, not {str(dtype).removeprefix('torch.')} on {device.type}"
    if name == "flash" and masking and masking.compiled:
        return "compiled code wants fixed shapes, and the number of documents varies"
    if name == "flex" and device.type != "cuda":
        return f"it has a backward pass on CUDA only, not on {device.type}"
    if name == "flex" and masking and masking.dropout:
        return f"it knows no dropout, and model.dropout is {masking.dropout}"
    if not masking:
        return _trial(KERNELS[name], plain_attention, device, dtype, head_dim)
    tokens = torch.tensor([[1] * 5 + [0] + [1] * 10], device=device)  # documents of 6 and 10 tokens
    masked, reference = _masked(name, tokens, dtype), _masked("plain", tokens, dtype)
    return _trial(masked, reference, device, dtype, head_dim)


def _masked(name: str, tokens: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    """A kernel for documents that end with token 0, as one without a mask."""
    kernel = DOCUMENT_KERNELS[name]

    def attend(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        return kernel.attend(q, k, v, dropout, kernel.prepare(document_starts(tokens, 0), dtype))

    return attend


@torch.inference_mode(False)
@torch.enable_grad()  # a model that only generates is built without, and the probe must see gradients
def _trial(
    kernel: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
) -> str:
    """Why the kernel can't train here, or '': a tiny forward and backward pass against plain attention."""
    # not random numbers: the probe must leave the seeded generators where they were
    wave = torch.linspace(-40, 40, 3 * 16 * head_dim, device=device).sin().to(dtype)
    qkv = wave.view(3, 1, 16, 1, head_dim).requires_grad_()
    q, k, v = qkv.unbind(0)  # each (B = 1, T = 16, n_head = 1, D)
    try:
        y = kernel(q, k, v, 0.0)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), qkv, retain_graph=True)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    expected = reference(q, k, v, 0.0)
    (expected_gradient,) = torch.autograd.grad(expected.float().square().sum(), qkv)
    close = torch.allclose(y, expected, atol=0.05) and torch.allclose(gradient, expected_gradient, atol=0.1)
    return "" if close else "it runs, but its results are wrong"
