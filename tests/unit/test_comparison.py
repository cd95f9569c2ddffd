from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint import CheckpointReader
from pretrain.comparison import WeightChange, by_layer, weight_changes
from pretrain.errors import CheckpointError
from tests.helpers_training import write_checkpoint


def reader(tmp_path, step):
    manifest = write_checkpoint(tmp_path, step, step)
    return CheckpointReader(tmp_path / str(manifest.name), manifest)


def test_weight_changes_are_those_of_the_tensors(tmp_path):
    before, after = reader(tmp_path, 1), reader(tmp_path, 2)
    tensors = [load_file(each.folder / "model-00001-of-00001.safetensors") for each in (before, after)]
    changes = {change.name: change for change in weight_changes(before, after)}
    assert set(changes) == set(tensors[0])
    for name, change in changes.items():
        left, right = tensors[0][name].double(), tensors[1][name].double()
        assert change.norm_before == pytest.approx(left.norm().item())
        assert change.norm_after == pytest.approx(right.norm().item())
        assert change.change == pytest.approx((right - left).norm().item(), rel=1e-5)
        assert change.largest == pytest.approx((right - left).abs().max().item(), rel=1e-5)
    assert changes["mix.weight"].relative > 0
    assert all(change.change == change.relative == 0 for change in weight_changes(before, before))


def test_checkpoints_of_different_models_are_not_compared(tmp_path):
    before, after = reader(tmp_path, 1), reader(tmp_path, 2)
    after._where["stranger"] = after._where.pop("mix.weight")
    with pytest.raises(CheckpointError, match=r"different models: mix\.weight"):
        weight_changes(before, after)
    after._where["mix.weight"] = after._where.pop("stranger")
    after.weight = lambda name: torch.zeros(3, 5)
    with pytest.raises(CheckpointError, match=r"\(3, 5\) in the other"):
        weight_changes(before, after)


def test_a_layer_is_its_parameters_taken_together():
    changes = [
        WeightChange("tok_emb.weight", 1, 1, 0.5, 0.1),
        WeightChange("blocks.0.attn.weight", 3, 6, 0.3, 0.2),
        WeightChange("blocks.0.attn.bias", 4, 8, 0.4, 0.1),
        WeightChange("blocks.10.attn.bias", 4, 8, 0.4, 0.1),
    ]
    layers = {layer.name: layer for layer in by_layer(changes)}
    assert list(layers) == ["tok_emb", "blocks.0", "blocks.10"]
    assert layers["blocks.0"] == WeightChange("blocks.0", 5, 10, pytest.approx(0.5), 0.2)
    assert layers["blocks.0"].relative == pytest.approx(0.1)


def test_a_change_from_zero_is_infinite():
    assert WeightChange("bias", 0, 1, 1, 1).relative == math.inf
    assert WeightChange("bias", 0, 0, 0, 0).relative == 0
