"""Packed sequences in which no token sees another document: who sees whom, and the attention kernels that obey it.

    model = GPT(config, documents=DocumentMask("sdpa", document_end=0))

A document ends with the token `document_end`, which still belongs to it. Its positions start at 0; the one that a
sequence begins in the middle of starts there. So each document is computed as if it were a sequence of its own. Every
token stays a target: the first of a document is predicted from the end of the one before, as is common.

Sizes below: B batch, T tokens, D width of a head; q is (B, T, n_head, D), k and v are (B, T, n_kv_head, D).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from model import plain_attention


@dataclass(frozen=True)
class DocumentMask:
    """How a model keeps documents apart.

    Args:
        kernel: name in DOCUMENT_KERNELS, as `pretrain.kernels.choose_attention` returns it.
        document_end: token id that ends a document.
    """

    kernel: str
    document_end: int

    def read(self, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Any]:
        """What one forward pass over the tokens (B, T) needs: computed on their device, and shared by all blocks.

        Args:
            dtype: of queries, keys and values.

        Returns:
            The place of each token in its document, int64 (B, T), and the mask for `attend`.
        """
        starts = document_starts(tokens, self.document_end)
        places = torch.arange(tokens.size(1), device=tokens.device) - starts
        return places, DOCUMENT_KERNELS[self.kernel].prepare(starts, dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Any) -> Tensor:
        """Causal attention inside the documents, like q."""
        return DOCUMENT_KERNELS[self.kernel].attend(q, k, v, dropout, mask)


def document_starts(tokens: Tensor, document_end: int) -> Tensor:
    """Where the document that each of the tokens (B, T) belongs to begins in its row, int64 (B, T)."""
    begins = F.pad(tokens[:, :-1] == document_end, (1, 0), value=True)
    return (begins * torch.arange(tokens.size(1), device=tokens.device)).cummax(1).values


# ---- the FlashAttention package: documents are sequences of several lengths ----


def flash_bounds(starts: Tensor, _dtype: torch.dtype) -> Tensor:
    """Where each document of the flattened batch begins, and the end: int32 (documents + 1,)."""
    places = torch.arange(starts.size(1), device=starts.device)
    return F.pad((starts == places).flatten().nonzero().flatten(), (0, 1), value=starts.numel()).int()


def flash_attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, bounds: Tensor) -> Tensor:
    """fp16 and bf16 on CUDA."""
    from flash_attn import flash_attn_varlen_func

    packed, longest = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)), q.size(1)
    y: Tensor = flash_attn_varlen_func(*packed, bounds, bounds, longest, longest, dropout_p=dropout, causal=True)
    return y.view_as(q)


# ---- torch's flex attention: passes over the blocks of the scores that are hidden ----


def flex_blocks(starts: Tensor, _dtype: torch.dtype) -> flex.BlockMask:
    """Which blocks of 128 × 128 scores are seen, and what of them."""

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[row, query])

    count, length = starts.shape
    return flex.create_block_mask(sees, count, None, length, length, device=starts.device)


def flex_attend(q: Tensor, k: Tensor, v: Tensor, _dropout: float, blocks: flex.BlockMask) -> Tensor:
    """Compiled, also where the model is not; it knows no dropout."""
    attend: Any = flex.flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
    y: Tensor = attend(q, k, v, block_mask=blocks, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex.flex_attention)


# ---- a mask as large as the scores ----


def sdpa_mask(starts: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, (B, 1, T, T): 0 where a key is seen, else -inf.

    In compute precision: of a boolean one each block would make, and keep, a copy of this.
    """
    hidden = hidden_keys(starts, dtype)
    return torch.zeros(hidden.shape, dtype=dtype, device=starts.device).masked_fill_(hidden, -math.inf)


def sdpa_attend(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor) -> Tensor:
    """Torch's memory-efficient kernel on CUDA, its flash kernel on a CPU. With a mask neither shares keys."""
    shared_by = q.size(2) // k.size(2)
    if shared_by > 1:
        k, v = k.repeat_interleave(shared_by, 2), v.repeat_interleave(shared_by, 2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, n_head, T, D)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


def hidden_keys(starts: Tensor, _dtype: torch.dtype) -> Tensor:
    """The keys that each query does not see, bool (B, 1, T, T): later ones, and those of earlier documents."""
    place = torch.arange(starts.size(1), device=starts.device)
    return ((place > place[:, None]) | (place < starts[..., None])).unsqueeze(1)


@dataclass(frozen=True)
class DocumentKernel:
    """An attention kernel that keeps documents apart.

    Args:
        prepare: from `document_starts` and the dtype of queries, keys and values to the kernel's own kind of mask.
        attend: (q, k, v, dropout probability, that mask) to the result, like q.
    """

    prepare: Callable[[Tensor, torch.dtype], Any]
    attend: Callable[[Tensor, Tensor, Tensor, float, Any], Tensor]


DOCUMENT_KERNELS = {
    # the best first
    "flash": DocumentKernel(flash_bounds, flash_attend),
    "flex": DocumentKernel(flex_blocks, flex_attend),
    "sdpa": DocumentKernel(sdpa_mask, sdpa_attend),
    "plain": DocumentKernel(hidden_keys, plain_attention),
}
