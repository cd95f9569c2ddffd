"""Accelerate's training loop, as its quick tour has it, over the GPT-2 of transformers.

Documented: Accelerator(mixed_precision=…), AdamW. Best: dynamo_backend="inductor" and fused AdamW.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from hf_model import build
from torch import Tensor
from torch.utils.data import DataLoader
from worker import count_parameters, decay_groups, read_spec, serve, windows


def main() -> None:
    """Train when told to."""
    spec = read_spec()
    accelerator = Accelerator(
        mixed_precision="bf16" if spec.precision == "bf16" else "no",
        dynamo_backend="inductor" if spec.is_best else "no",
        gradient_accumulation_steps=spec.accumulation,
    )
    model = build(spec)
    parameters = count_parameters(model)
    groups = decay_groups(model, spec.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=spec.lr, betas=spec.betas, fused=spec.is_best or None)
    # a window less its last token: the model shifts the labels itself
    stream: Any = windows(spec)[:, :-1]
    loader = DataLoader(stream, spec.micro_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches: Iterator[Tensor] = iter(())

    def step() -> float:
        nonlocal batches
        total = 0.0
        for _ in range(spec.accumulation):
            if (tokens := next(batches, None)) is None:
                batches = iter(loader)
                tokens = next(batches)
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), spec.clip)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item() / spec.accumulation
        return total

    serve(step, parameters)


if __name__ == "__main__":
    main()
