"""What the compiler is told to write other code for on a CPU, where torch's own is slow.

    model.compile(backend=cpu_backend)

The model stays as it is, and so does eager mode. Each entry replaces one operation of torch's graph by others that mean
the same; benchmarks/NOTES.md has what each of them brings. Sizes below: B batch, H heads, T tokens, D width of a head.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp.decompositions import gelu_backward as torch_gelu_backward
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._refs.nn.functional import gelu as torch_gelu

aten = torch.ops.aten

TWICE_KAPPA, CUBE = 2 * math.sqrt(2 / math.pi), 0.044715  # of GELU's tanh form (arXiv 1606.08415)
LEAST_BLOCK, MOST_BLOCKS = 128, 4  # queries; the compiled graph grows with the number of blocks


def cpu_backend(graph: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Torch's own compiler, with the operations of this module; a backend of torch.compile."""
    # Not by compile_fx's own argument: with a table that is given there, no compiled code is cached. Its cache knows
    # nothing of the table that it finds, so the tag tells it.
    settings: Any = torch.compiler.config
    with _in_table(select_decomp_table()), settings.patch(cache_key_tag=_tag()):
        return cast(Callable[..., Any], compile_fx(graph, inputs))


@contextlib.contextmanager
def _in_table(table: dict[Any, Callable[..., Any]]) -> Iterator[None]:
    """OURS stand in torch's table as long as the block lasts."""
    before = dict(table)
    table.update(OURS)
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@functools.cache
def _tag() -> str:
    """Of this very text, so that what an earlier one compiled is not taken for ours."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """GELU; its tanh form by a sigmoid, which takes half as long: ½(1 + tanh z) = σ(2z)."""
    if approximate != "tanh":
        return cast(Tensor, torch_gelu(x, approximate))
    y = x.float()
    return (y * _gate(y)).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    """The gradient of `gelu`."""
    if approximate != "tanh":
        exact: Tensor = torch_gelu_backward(grad, x, approximate)
        return exact
    y = x.float()
    gate = _gate(y)
    slope = gate * (1 + y * (1 - gate) * (TWICE_KAPPA * (1 + 3 * CUBE * y * y)))
    return (grad.float() * slope).to(x.dtype)


def _gate(y: Tensor) -> Tensor:
    return torch.sigmoid(TWICE_KAPPA * (y + CUBE * y * y * y))


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    logsumexp: Tensor,
    dropout: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """The gradients of q, k and v, in bf16 by matrix products over blocks of queries; else torch's own kernel.

    Torch's multiplies small tiles one head after the other, which leaves bf16 units idle; in fp32 it is the faster one.
    A block of queries meets only the keys up to its end, and keeps its scores for itself.

    Args:
        grad, q, k, v, y: (B, H, T, D).
        logsumexp: of each query's scaled scores, fp32 (B, H, T).
    """
    plain = q.dtype == torch.bfloat16 and is_causal and not dropout and attn_mask is None and q.shape == k.shape
    if not plain or any(isinstance(size, torch.SymInt) for size in q.shape):
        return NotImplemented
    B, H, T, D = q.shape
    factor = 1 / math.sqrt(D) if scale is None else scale
    ours = (grad * y.float()).sum(-1, keepdim=True).view(B * H, T, 1)
    log_z = logsumexp.reshape(B * H, T, 1)
    grad, q, k, v = (part.reshape(B * H, T, D) for part in (grad, q, k, v))
    block = max(LEAST_BLOCK, -(-T // MOST_BLOCKS))
    dq, dk, dv = list[Tensor](), list[Tensor](), list[Tensor]()
    for begin in range(0, T, block):
        end = min(T, begin + block)
        queries, above, keys = q[:, begin:end], grad[:, begin:end], k[:, :end]
        scores = torch.bmm(queries, keys.transpose(1, 2)).float() * factor - log_z[:, begin:end]
        row, column = torch.arange(begin, end, device=q.device)[:, None], torch.arange(end, device=q.device)
        weights = torch.where(column <= row, scores.exp(), 0.0)  # (B·H, block, end)
        d_weights = torch.bmm(above, v[:, :end].transpose(1, 2)).float() - ours[:, begin:end]
        d_scores = (weights * d_weights * factor).to(q.dtype)
        dq.append(torch.bmm(d_scores, keys))
        dk.append(torch.bmm(d_scores.transpose(1, 2), queries))
        dv.append(torch.bmm(weights.to(q.dtype).transpose(1, 2), above))
    return torch.cat(dq, 1).view(B, H, T, D), _joined(dk, block, (B, H, T, D)), _joined(dv, block, (B, H, T, D))


def _joined(parts: list[Tensor], block: int, shape: tuple[int, ...]) -> Tensor:
    """The sum of what the blocks of queries give the keys that they met: part i is of the first i + 1 blocks."""
    pieces = []
    for number, own in enumerate(parts):
        begin, end = number * block, own.size(1)
        later = [part[:, begin:end].float() for part in parts[number + 1 :]]
        pieces.append(sum(later, own[:, begin:end].float()).to(own.dtype))
    return torch.cat(pieces, 1).view(shape)


OURS: dict[Any, Callable[..., Any]] = {
    aten.gelu.default: gelu,
    aten.gelu_backward.default: gelu_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: attention_backward,
}
