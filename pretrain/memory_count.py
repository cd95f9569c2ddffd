"""Counts of a training step's peak memory that know nothing of the plan: torch's own tracker, and a GPU's allocator.

Tests and benchmarks/bench_memory.py hold the plan against them. The tracker goes over fake tensors, on any machine.

The native engine takes its real step, with shapes and dtypes but no data. Three things differ from a GPU: attention is
torch's fused kernel for CPUs, which knows no dropout (a GPU's saves the same tensors: q, k, v, the output and the
log-sum-exp), and dropout outside of it is called by its fused form, whose mask is a byte an element as on a GPU; and
RMSNorm saves its input and a number a row, as the fused kernel of GPUs, which CPUs don't have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from model import GPT, KERNELS
from pretrain import document_mask
from pretrain.config import EngineConfig
from pretrain.engine.base import PRECISION_DTYPES
from pretrain.engine.native import NativeEngine
from pretrain.kernels import Masking, choose_attention
from pretrain.memory import Setup

CPU = torch.device("cpu")


def count_peak(setup: Setup) -> int:
    """Bytes at the fullest moment of one optimizer step of the native engine on one rank."""
    batch, model = setup.batch, setup.model
    kernel = "plain" if model.attention == "plain" else "sdpa"
    with _as_on_a_gpu(), FakeTensorMode(allow_non_fake_inputs=True):
        gpt = GPT(model, kernel, document_mask.DocumentMask(kernel, 0) if setup.document_mask else None)
        with mock.patch.object(gpt, "to", lambda what: _converted(gpt, what)):
            engine = NativeEngine(gpt, setup.optim, EngineConfig(name="native"), setup.precision, CPU, 1)
        tracker = MemTracker()
        states = [tensor for state in engine._optimizer.state.values() for tensor in state.values()]
        tracker.track_external(gpt, *engine._masters.values(), *states)
        collect = engine._collect_gradients

        def collect_and_forget() -> None:  # the tracker wants to be told that the modules are called again
            collect()
            tracker.reset_mod_stats()

        # a fake norm has no value, and the engine asks for it to decide whether to update
        with (
            mock.patch.object(engine, "_collect_gradients", collect_and_forget),
            mock.patch("torch.nn.utils.get_total_norm", lambda gradients: 1.0),
            tracker,
        ):
            tokens = torch.zeros(batch.micro_size, model.seq_len + 1, dtype=torch.int64)
            assert engine.train_step([tokens] * batch.accumulation(1), 1e-3).applied
            (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return int(snapshot["Total"])


def measure_peak(setup: Setup, device: torch.device) -> int:
    """Bytes at the fullest moment of optimizer steps of the native engine on one GPU, as torch's allocator has them.

    Raises:
        torch.OutOfMemoryError: it does not fit there.
    """
    batch, model = setup.batch, setup.model
    masking = Masking(model.dropout) if setup.document_mask else None
    kernel, _ = choose_attention(model.attention, device, PRECISION_DTYPES[setup.precision], model.head_dim, masking)
    documents = document_mask.DocumentMask(kernel, 1) if masking else None
    engine = NativeEngine(
        GPT(model, kernel, documents), setup.optim, EngineConfig(name="native"), setup.precision, device, 1
    )
    tokens = torch.zeros(batch.micro_size, model.seq_len + 1, dtype=torch.int64)
    torch.cuda.reset_peak_memory_stats(device)  # what building took is no step
    for _ in range(2):
        engine.train_step([tokens] * batch.accumulation(1), 1e-3)
    return int(torch.cuda.max_memory_allocated(device))


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    def dropout(x: Tensor, p: float = 0.5, training: bool = True, _inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if p and training else x

    def rms_norm(x: Tensor, _shape: list[int], weight: Tensor, _eps: float) -> Tensor:
        normed: Tensor = FusedRMSNorm.apply(x, weight)
        return normed

    kernel = KERNELS["sdpa"]
    fused = {"sdpa": lambda q, k, v, dropout: kernel(q, k, v, 0.0)}
    masked = document_mask.sdpa_attend
    fused_documents = document_mask.DocumentKernel(
        document_mask.sdpa_mask, lambda q, k, v, dropout, mask: masked(q, k, v, 0.0, mask)
    )
    with (
        mock.patch.dict(KERNELS, fused),
        mock.patch.dict(document_mask.DOCUMENT_KERNELS, {"sdpa": fused_documents}),
        mock.patch("torch.nn.functional.dropout", dropout),
        mock.patch("torch.nn.functional.rms_norm", rms_norm),
    ):
        yield


class FusedRMSNorm(torch.autograd.Function):
    """The shapes and dtypes of a fused RMSNorm, forward and backward; its numbers mean nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _converted(module: nn.Module, what: torch.dtype | torch.device) -> nn.Module:
    """`module.to(what)`; torch's own can't replace a fake parameter."""
    if isinstance(what, torch.dtype):
        for part in module.modules():
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(parameter.detach().to(what)))
    return module
