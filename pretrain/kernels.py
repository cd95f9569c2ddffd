"""Which attention kernel runs on this machine, found by trying."""

from __future__ import annotations

import torch

from model import KERNELS, plain_attention

KERNEL_TITLES = {"flash": "the FlashAttention package", "sdpa": "torch's fused attention", "plain": "plain matrices"}


def choose_attention(requested: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The attention kernel for this machine, tried out on it and not guessed from what is installed.

    Args:
        requested: "flash", "sdpa" or "plain"; "auto" takes the first of them, in this order, that runs.
        device: where the model will train.
        dtype: dtype of queries, keys and values: the compute precision.
        head_dim: d_model / n_head.

    Returns:
        The kernel's name for `GPT`, and the reason in words for the log.

    Raises:
        ValueError: the requested kernel can't run here, and why; or there is no kernel of that name.
    """
    if requested != "auto":
        if obstacle := _obstacle(requested, device, dtype, head_dim):
            raise ValueError(f"attention kernel {requested!r} can't run on {device}: {obstacle}")
        return requested, f"{KERNEL_TITLES[requested]}, as requested"
    passed_over = ""
    for name in KERNELS:
        obstacle = _obstacle(name, device, dtype, head_dim)
        if not obstacle:
            return name, f"{KERNEL_TITLES[name]}{passed_over}"
        passed_over += f"; {KERNEL_TITLES[name]} can't run: {obstacle}"
    raise ValueError(f"no attention kernel runs on {device}{passed_over}")


@torch.inference_mode(False)
@torch.enable_grad()  # a model that only generates is built without, and the probe must see gradients
def _obstacle(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernel can't train here, or ''. Found by a tiny forward and backward pass against plain attention."""
    if name not in KERNELS:
        return f"there is no such kernel, only {', '.join(KERNELS)}"
    if name == "flash" and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
        return f"it takes fp16 and bf16 on CUDA only, not {str(dtype).removeprefix('torch.')} on {device.type}"
    # not random numbers: the probe must leave the seeded generators where they were
    wave = torch.linspace(-40, 40, 3 * 16 * head_dim, device=device).sin().to(dtype)
    qkv = wave.view(3, 1, 16, 1, head_dim).requires_grad_()
    q, k, v = qkv.unbind(0)  # each (B = 1, T = 16, n_head = 1, D)
    try:
        y = KERNELS[name](q, k, v, 0.0)
        (gradient,) = torch.autograd.grad(y.float().square().sum(), qkv, retain_graph=True)
    except (ImportError, OSError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0] or type(error).__name__
    expected = plain_attention(q, k, v, 0.0)
    (expected_gradient,) = torch.autograd.grad(expected.float().square().sum(), qkv)
    close = torch.allclose(y, expected, atol=0.05) and torch.allclose(gradient, expected_gradient, atol=0.1)
    return "" if close else "it runs, but its results are wrong"
