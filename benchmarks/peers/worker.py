"""What a side of bench_train.py and the benchmark say to each other, and what every side measures alike.

The benchmark starts a side with one JSON object, the Spec. The side builds its model, takes its first steps (which
compile and choose kernels), and says how many parameters the model has and what its first loss was. Then a number on
its stdin has it take so many steps, and it answers with their seconds. The end of stdin is its end. Nothing but torch
and numpy is imported here: a side has an environment of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Spec:
    """What every side trains, and how.

    Args:
        size: of the model by name; the shape is in the fields after it.
        position: "learned" or "rope".
        micro_size: sequences of a micro-batch; 0: the side finds the largest that fits (ours alone can).
        global_size: sequences of a step.
        flags: "documented": as the side's own documentation starts it; "best": at its fastest flags.
        data: .npz of one stream of tokens, `input_ids`.
        folder: where a side may write.
        engine: of ours: single, ddp, fsdp, zero0 … zero3.
    """

    size: str
    n_layer: int
    n_head: int
    d_model: int
    vocab_size: int
    seq_len: int
    position: str
    micro_size: int
    global_size: int
    precision: str
    flags: str
    data: str
    folder: str
    engine: str = "single"
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0

    @property
    def is_best(self) -> bool:
        """Whether the side runs at its fastest flags."""
        return self.flags == "best"

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.global_size // self.micro_size


class Conversation:
    """The side's end of the talk; what libraries print to stdout goes to stderr."""

    def __init__(self) -> None:
        self._replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._began = self._cpu_began = 0.0

    def say(self, **fields: Any) -> None:
        """One JSON object on a line."""
        print(json.dumps(fields), file=self._replies, flush=True)

    def orders(self) -> Iterator[int]:
        """How many steps to take, again and again, until the benchmark has had enough."""
        for line in sys.stdin:
            self._began, self._cpu_began = time.perf_counter(), time.process_time()
            yield int(line)

    def taken(self) -> dict[str, float]:
        """The steps are taken: seconds by the clock, and of all cores together; GB at most."""
        finish()
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._cpu_began
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_memory_gb": peak_memory_gb()}


def read_spec() -> Spec:
    """The Spec on the command line."""
    return Spec(**json.loads(sys.argv[1]))


def windows(spec: Spec) -> Tensor:
    """All windows of the stream, int64 (N, T + 1), at stride T."""
    with np.load(spec.data) as file:
        stream = torch.from_numpy(file["input_ids"].astype(np.int64))
    return stream.unfold(0, spec.seq_len + 1, spec.seq_len)


def endless_batches(spec: Spec) -> Iterator[Tensor]:
    """Micro-batches by torch's DataLoader, shuffled, for ever: int64 (micro_size, T + 1)."""
    loader = DataLoader(TensorDataset(windows(spec)), spec.micro_size, shuffle=True, drop_last=True)
    while True:
        for (tokens,) in loader:
            yield tokens


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and vectors, which don't."""
    parameters = list(model.parameters())
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def count_parameters(model: torch.nn.Module, padding: int = 0) -> int:
    """Parameters, a tied one once, without rows that only pad the vocabulary.

    Args:
        padding: numbers in those rows.
    """
    return sum(parameter.numel() for parameter in model.parameters()) - padding


def peak_memory_gb() -> float:
    """Most that torch held on the GPU at once, or without one the largest resident size of the process, GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def finish() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def serve(step: Callable[[], float], parameters: int) -> None:
    """Take the first steps, then as many as are asked for.

    Args:
        step: one optimizer step; returns the loss.
        parameters: of the model.
    """
    talk = Conversation()
    losses = [step() for _ in range(WARM_UP_STEPS)]
    talk.say(parameters=parameters, first_loss=losses[0])
    for steps in talk.orders():
        for _ in range(steps):
            step()
        talk.say(**talk.taken())
