from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from pretrain.config import OptimConfig
from pretrain.optim import MAX_LOSS_SCALE, LossScale, build_adamw, learning_rate, parameter_groups
from tests.helpers_training import TinyModel

SCHEDULE = OptimConfig(lr=1.0, warmup_steps=4, min_lr_ratio=0.1, schedule="cosine")


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.25),  # the first of four warm-up steps
        (1, 0.5),
        (3, 1.0),  # the peak ends the warm-up
        (4, 1.0),  # and begins the cosine: cos(0) = 1
        (6, 0.1 + 0.9 * 0.8535533905932737),  # a quarter of it: (1 + cos 45°) / 2
        (8, 0.55),  # half of it: (1 + cos 90°) / 2 = 0.5
        (12, 0.1),  # the end
        (13, 0.1),
        (1000, 0.1),
    ],
)
def test_cosine_learning_rate_by_hand(step, expected):
    assert learning_rate(step, 12, SCHEDULE) == pytest.approx(expected, abs=1e-12)


def test_linear_learning_rate_falls_evenly_to_its_end():
    config = OptimConfig(lr=2.0, warmup_steps=0, min_lr_ratio=0.5, schedule="linear")
    assert [learning_rate(step, 4, config) for step in range(6)] == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0, 1.0])


def test_constant_learning_rate_stays_at_its_peak():
    config = OptimConfig(lr=3e-4, warmup_steps=2, schedule="constant")
    assert [learning_rate(step, 4, config) for step in (0, 1, 2, 50)] == pytest.approx([1.5e-4, 3e-4, 3e-4, 3e-4])


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("linear", [0.5, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("sqrt", [0.5, 1, 1, 1, 1, 1, 1, 0.55, 1 - 0.9 * 0.5**0.5, 1 - 0.9 * 0.75**0.5, 0.1, 0.1]),
    ],
)
def test_wsd_stays_at_its_peak_and_then_cools_down(form, expected):
    """Ten steps, of which the last four fall: 1 - sqrt has fallen by half after a quarter of them."""
    config = replace(SCHEDULE, schedule="wsd", warmup_steps=2, cooldown_fraction=0.4, cooldown=form)
    assert [learning_rate(step, 10, config) for step in range(12)] == pytest.approx(expected)


def test_the_warm_up_comes_before_the_cool_down():
    config = replace(SCHEDULE, schedule="wsd", warmup_steps=4, cooldown_fraction=1.0, cooldown="linear", min_lr_ratio=0)
    assert [learning_rate(step, 8, config) for step in range(8)] == pytest.approx(
        [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]
    )


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    assert [learning_rate(step, 2, SCHEDULE) for step in (0, 1)] == [0.25, 0.5]


def test_matrices_decay_and_vectors_do_not():
    model = TinyModel()
    decaying, sparing = parameter_groups(model.named_parameters(), 0.1)
    assert (decaying["weight_decay"], sparing["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decaying["params"]} == {id(model.embedding.weight), id(model.mix.weight)}
    assert {id(p) for p in sparing["params"]} == {
        id(p) for p in (model.mix.bias, model.norm.weight, model.norm.bias, model.head.bias)
    }


def test_every_parameter_is_in_exactly_one_group():
    model = TinyModel()
    grouped = [id(p) for group in parameter_groups(model.named_parameters(), 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_an_empty_group_is_left_out():
    assert len(parameter_groups(nn.Linear(2, 2, bias=False).named_parameters(), 0.1)) == 1


def test_one_adamw_step_by_hand():
    matrix, vector = nn.Parameter(torch.full((1, 1), 2.0)), nn.Parameter(torch.tensor([2.0]))
    config = OptimConfig(lr=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    adamw = build_adamw(parameter_groups([("m", matrix), ("v", vector)], config.weight_decay), config)
    matrix.grad, vector.grad = torch.full((1, 1), 3.0), torch.tensor([3.0])
    adamw.step()
    # The first step's bias-corrected update is lr × g / |g| = 0.5; only the matrix decays, by lr × 0.1 × 2.
    assert vector.item() == pytest.approx(1.5, abs=1e-6)
    assert matrix.item() == pytest.approx(1.4, abs=1e-6)


def test_loss_scale_halves_on_overflow_and_starts_counting_again():
    scale = LossScale(8.0, window=3, finite_steps=2)
    scale.update(finite=False)
    assert (scale.scale, scale.finite_steps) == (4.0, 0)


def test_loss_scale_doubles_after_so_many_finite_steps_in_a_row():
    scale = LossScale(8.0, window=3)
    seen = []
    for finite in (True, True, False, True, True, True, True):
        scale.update(finite)
        seen.append((scale.scale, scale.finite_steps))
    assert seen == [(8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1)]


def test_loss_scale_stays_within_its_bounds():
    low, high = LossScale(1.0, window=1), LossScale(MAX_LOSS_SCALE, window=1)
    low.update(finite=False)
    high.update(finite=True)
    assert (low.scale, high.scale) == (1.0, MAX_LOSS_SCALE)


@pytest.mark.parametrize("seed", range(5))
def test_loss_scale_moves_as_torch_grad_scaler_does(seed):
    overflows = random.Random(seed)
    window = overflows.randint(1, 6)
    ours = LossScale(2.0**12, window)
    theirs, growth = torch.tensor(2.0**12), torch.tensor(0, dtype=torch.int32)
    for _ in range(200):
        finite = overflows.random() < 0.8
        ours.update(finite)
        # The kernel behind torch.amp.GradScaler.update(): scale, counter, found_inf, growth, backoff, interval.
        torch._amp_update_scale_(theirs, growth, torch.tensor(float(not finite)), 2.0, 0.5, window)
        theirs.clamp_(1.0, MAX_LOSS_SCALE)  # GradScaler has no bounds
        assert (ours.scale, ours.finite_steps) == (theirs.item(), growth.item())


def test_a_loss_scale_goes_on_from_a_checkpoint_of_its_own_precision_only():
    scale = LossScale(1024.0, window=10)
    scale.restore(0.0, 0)  # what a bf16 run saved
    assert (scale.scale, scale.finite_steps) == (1024.0, 0)
    scale.restore(256.0, 7)
    assert (scale.scale, scale.finite_steps) == (256.0, 7)
