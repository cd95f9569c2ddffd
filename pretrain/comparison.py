"""How the weights of checkpoints differ, layer by layer."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pretrain.checkpoint import CheckpointReader
from pretrain.errors import CheckpointError

_BLOCK = re.compile(r"(.*?\.\d+)\..+")


@dataclass(frozen=True)
class WeightChange:
    """How one parameter, or all of a layer, differs between two checkpoints.

    Args:
        name: of the parameter, or of the layer.
        norm_before, norm_after: Euclidean norms.
        change: Euclidean norm of the difference.
        largest: the largest absolute difference of one element.
    """

    name: str
    norm_before: float
    norm_after: float
    change: float
    largest: float

    @property
    def relative(self) -> float:
        """The change as a fraction of the norm before; infinite where that was 0 and something changed."""
        if self.norm_before == 0:
            return math.inf if self.change else 0.0
        return self.change / self.norm_before


def weight_changes(before: CheckpointReader, after: CheckpointReader) -> list[WeightChange]:
    """How each parameter changed, in the order of the model; two tensors are in memory at a time.

    Raises:
        CheckpointError: the checkpoints are of different models.
    """
    names = before.parameter_names
    if strangers := set(names) ^ set(after.parameter_names):
        pair = f"{before.folder.name} and {after.folder.name}"
        raise CheckpointError(f"{pair} are of different models: {min(strangers)} is in one only")
    return [_change(name, before.weight(name), after.weight(name)) for name in names]


def _change(name: str, before: torch.Tensor, after: torch.Tensor) -> WeightChange:
    if before.shape != after.shape:
        raise CheckpointError(
            f"{name} is {tuple(before.shape)} in one checkpoint and {tuple(after.shape)} in the other"
        )
    norms = [float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) for tensor in (before, after)]
    difference = after.sub_(before)  # in place: `after` was read for this alone
    change = float(torch.linalg.vector_norm(difference, dtype=torch.float64))
    return WeightChange(name, norms[0], norms[1], change, float(difference.abs().max()) if difference.numel() else 0.0)


def by_layer(changes: Sequence[WeightChange]) -> list[WeightChange]:
    """The changes of each block's parameters taken together; what lies outside the blocks, by module."""
    layers: dict[str, list[WeightChange]] = defaultdict(list)
    for change in changes:
        block = _BLOCK.fullmatch(change.name)
        layers[block[1] if block else change.name.rpartition(".")[0] or change.name].append(change)
    return [
        WeightChange(
            layer,
            math.hypot(*(part.norm_before for part in parts)),
            math.hypot(*(part.norm_after for part in parts)),
            math.hypot(*(part.change for part in parts)),
            max(part.largest for part in parts),
        )
        for layer, parts in layers.items()
    ]
