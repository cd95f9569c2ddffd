"""litgpt: its GPT and its pretraining loop over Lightning Fabric (litgpt/pretrain.py, main and fit).

It knows no learned positions, so the model has RoPE; ours that it is held against has it, too. Documented: mixed
precision, torch.compile (always on there), AdamW fused on a GPU only, cross entropy in chunks of 128. Best: fused AdamW
on a CPU, too, and cross entropy in one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor
from torch.utils.data import DataLoader
from worker import Spec, count_parameters, read_spec, serve, windows

PADDING = 128


def build(spec: Spec) -> GPT:
    """The GPT-2 block with RoPE, its head tied."""
    config = Config(
        n_layer=spec.n_layer,
        n_head=spec.n_head,
        n_embd=spec.d_model,
        vocab_size=spec.vocab_size,
        padded_vocab_size=-(-spec.vocab_size // PADDING) * PADDING,
        block_size=spec.seq_len,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=True,
        lm_head_bias=False,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        intermediate_size=4 * spec.d_model,
    )
    model = GPT(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    model.transformer.wte.weight = model.lm_head.weight
    return model


def main() -> None:
    """Train when told to."""
    spec = read_spec()
    precision = "bf16-mixed" if spec.precision == "bf16" else "32-true"
    fabric = L.Fabric(devices=1, precision=precision, accelerator="auto")
    fabric.launch()
    fabric.seed_everything(0)
    model = build(spec)
    padding = (model.config.padded_vocab_size - spec.vocab_size) * spec.d_model
    parameters = count_parameters(model, padding)
    module = fabric.setup(torch.compile(model))
    fused = spec.is_best or fabric.device.type == "cuda"
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(
            module.parameters(), lr=spec.lr, betas=spec.betas, weight_decay=spec.weight_decay, fused=fused
        )
    )
    stream: Any = windows(spec)
    loader = fabric.setup_dataloaders(DataLoader(stream, spec.micro_size, shuffle=True, drop_last=True))
    batches: Iterator[Tensor] = iter(())
    chunk = 0 if spec.is_best else 128

    def step() -> float:
        nonlocal batches
        total = 0.0
        for number in range(1, spec.accumulation + 1):
            if (tokens := next(batches, None)) is None:
                batches = iter(loader)
                tokens = next(batches)
            inputs, targets = tokens[:, :-1].contiguous().long(), tokens[:, 1:].contiguous().long()
            with fabric.no_backward_sync(module, enabled=number < spec.accumulation):
                loss = chunked_cross_entropy(module(inputs), targets, chunk_size=chunk)
                fabric.backward(loss / spec.accumulation)
            total += loss.item() / spec.accumulation
        fabric.clip_gradients(module, optimizer, max_norm=spec.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    serve(step, parameters)


if __name__ == "__main__":
    main()
