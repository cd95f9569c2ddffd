"""The usual hand-written loop: a GPT-2 of plain torch modules, autocast, AdamW; the model stays in fp32.

Documented: eager, AdamW as it comes. Best: torch.compile and fused AdamW.
"""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from worker import Spec, count_parameters, decay_groups, endless_batches, read_spec, serve


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each after a LayerNorm."""

    def __init__(self, width: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, width) to (B, T, width)."""
        B, T, width = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(self.ln_1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).reshape(B, T, width))
        out: Tensor = x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return out


class PlainGPT(nn.Module):
    """GPT-2, its head tied to the token embedding."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(spec.vocab_size, spec.d_model),
            nn.Embedding(spec.seq_len, spec.d_model),
        )
        self.blocks = nn.ModuleList(Block(spec.d_model, spec.n_head) for _ in range(spec.n_layer))
        self.norm = nn.LayerNorm(spec.d_model)
        self.head = nn.Linear(spec.d_model, spec.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                deep = name.endswith(("c_proj.weight", "c_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * spec.n_layer) if deep else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of int64 (B, T) each."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def main() -> None:
    """Train when told to."""
    spec = read_spec()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = PlainGPT(spec).to(device)
    parameters = count_parameters(model)
    optimizer = torch.optim.AdamW(
        decay_groups(model, spec.weight_decay), lr=spec.lr, betas=spec.betas, fused=spec.is_best or None
    )
    run = torch.compile(model) if spec.is_best else model
    batches = endless_batches(spec)
    is_half = spec.precision == "bf16"

    def step() -> float:
        total = 0.0
        for _ in range(spec.accumulation):
            tokens = next(batches).to(device)
            with torch.autocast(device.type, torch.bfloat16) if is_half else contextlib.nullcontext():
                loss = run(tokens[:, :-1], tokens[:, 1:]) / spec.accumulation
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    serve(step, parameters)


if __name__ == "__main__":
    main()
