"""The model of the two sides that take theirs from transformers: GPT-2, its own attention choice, no dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from worker import Spec


def build(spec: Spec) -> nn.Module:
    """GPT2LMHeadModel of the shape, in fp32 on the CPU."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "n_layer": spec.n_layer,
        "n_head": spec.n_head,
        "n_embd": spec.d_model,
        "vocab_size": spec.vocab_size,
    }
    no_dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(n_positions=spec.seq_len, use_cache=False, **shape, **no_dropout, **special)
    )
    return model
