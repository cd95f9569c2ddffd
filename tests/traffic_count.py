"""Counts what an engine really hands to torch.distributed: bytes of weights and gradients by kind of collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# collective: (its kind, which argument is the whole: what is reduced, or what is gathered)
COLLECTIVES = {
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::allreduce_coalesced_": ("all_reduce", 0),
    "c10d::reduce_": ("reduce_scatter", 0),  # each bucket to its owner: together what a reduce-scatter moves
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_": ("reduce_scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::allgather_": ("all_gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all_gather", 0),
    "c10d::broadcast_": ("broadcast", 0),
}
SMALLEST = 64  # elements: norms, flags and losses travel too, and are no traffic


class TrafficCount(TorchDispatchMode):
    """Counts while it is entered; `bytes` by kind: all_reduce, reduce_scatter, all_gather, broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in COLLECTIVES:
            kind, place = COLLECTIVES[func._schema.name]
            for tensor in tensors_in(args[place]):
                if tensor.is_floating_point() and tensor.numel() >= SMALLEST:
                    self.bytes[kind] += tensor.numel() * tensor.element_size()
        return func(*args, **(kwargs or {}))


def tensors_in(found: Any) -> Iterator[Tensor]:
    """The tensors of an argument, however deeply listed."""
    if isinstance(found, torch.Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from tensors_in(each)
