from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pretrain import failpoints
from pretrain.batches import Batches, Position
from pretrain.checkpoint_manifest import CheckpointName, Manifest
from pretrain.config import TrainConfig
from pretrain.discovery import Inventory
from pretrain.divergence import Observation, PassedOver, Trouble, Watch, spread
from pretrain.engine.base import watched
from pretrain.errors import ConfigError, StorageError
from pretrain.rollback import good_names, roll_back
from pretrain.uploads import BucketManifest

SPIKES = TrainConfig(spike_threshold=8.0, spike_window=8)
PASSED_OVER = PassedOver(60, 40, 160, Position(0, 1, 2), Position(0, 3, 4), ("a.npz",), "a reason")


def seen(step, loss, applied=True, loss_scale=None):
    return Observation(step, loss, 1.0, 1e-3, loss_scale, applied, Position(0, 0, step))


def feed(watch, losses, first_step=1):
    """What was said of each loss, all of applied steps."""
    return [watch.observe(seen(step, loss)) for step, loss in enumerate(losses, first_step)]


@pytest.fixture
def said(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("pretrain"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        yield caplog


# ---- skipped updates ----


def test_more_than_max_skipped_in_a_row_is_trouble_and_it_began_with_the_first(said):
    watch = Watch(TrainConfig(max_skipped=3), 0)
    assert feed(watch, [4.0] * 6) == [None] * 6
    skipped = [watch.observe(seen(step, math.nan, applied=False, loss_scale=512.0)) for step in range(7, 11)]
    assert skipped[:3] == [None] * 3
    assert (skipped[3].step, skipped[3].since) == (10, 7) and "4 updates in a row" in skipped[3].reason
    assert said.text.count("update skipped; loss scale now 512") == 4 and "step 7 (loss nan)" in said.text


def test_an_update_in_between_ends_the_row():
    watch = Watch(TrainConfig(max_skipped=2), 0)
    applied = [False, False, True, False, False]
    assert [watch.observe(seen(step, 4.0, applied=each)) for step, each in enumerate(applied, 1)] == [None] * 5
    assert watch.skipped_in_a_row == 2
    assert watch.observe(seen(6, 4.0, applied=False)).since == 4


def test_a_loss_that_is_not_finite_never_enters_the_window():
    watch = Watch(SPIKES, 0)
    feed(watch, [4.0] * 4 + [math.nan, math.inf])
    assert watch.window_losses == [4.0] * 4 and watch.skipped_in_a_row == 2


@pytest.mark.parametrize(
    ("step", "loss", "vocab_size", "warns"),
    [
        (1, 10.9, 50257, False),
        (1, 12.0, 50257, True),
        (1, 2.0, 50257, True),
        (2, 2.0, 50257, False),
        (1, 2.0, 0, False),
    ],
)
def test_a_first_loss_far_from_that_of_a_fresh_model_is_said(said, step, loss, vocab_size, warns):
    Watch(TrainConfig(), vocab_size).observe(seen(step, loss))
    assert ("a fresh model starts near ln(vocab_size) = 10.82" in said.text) is warns


# ---- spikes ----


def test_the_spread_is_the_median_and_the_scaled_deviation_from_it():
    median, sigma = spread([1.0, 2.0, 3.0, 4.0, 100.0])
    assert median == 3.0 and sigma == pytest.approx(1.4826)  # the outlier moves neither
    noise = np.random.default_rng(0).normal(5.0, 0.7, 20_001)
    assert spread(noise.tolist()) == (pytest.approx(5.0, abs=0.02), pytest.approx(0.7, rel=0.03))


def test_the_deviation_has_a_floor():
    assert spread([4.0] * 8) == (4.0, 0.02)  # 0.5 % of the loss
    assert spread([0.0] * 8) == (0.0, 1e-3)


@pytest.mark.parametrize(("loss", "is_spike"), [(4.15, False), (4.17, True), (1.0, False), (1e30, True)])
def test_a_loss_is_a_spike_above_the_threshold_and_only_upwards(loss, is_spike):
    watch = Watch(SPIKES, 0)
    feed(watch, [4.0] * 8)
    trouble = watch.observe(seen(9, loss))  # sigma is at its floor, 0.02: 8 of it are 0.16
    assert (trouble is not None) is is_spike
    if trouble:
        assert (trouble.step, trouble.since) == (9, 9)
        assert trouble.statistics["z"] == pytest.approx((loss - 4.0) / 0.02)


def test_there_is_no_spike_before_the_window_is_full_nor_where_none_is_looked_for():
    assert feed(Watch(SPIKES, 0), [4.0] * 7 + [400.0]) == [None] * 8
    off = Watch(replace(SPIKES, spike_threshold=0.0), 0)
    assert feed(off, [4.0] * 20 + [400.0]) == [None] * 21
    assert off.state()["window"] == []


def test_noise_and_a_falling_curve_are_no_spikes():
    steps = np.arange(400)
    noise = np.random.default_rng(1).normal(0, 0.05, steps.size)
    losses = 3.0 + 7.0 * np.exp(-steps / 80) + noise
    assert feed(Watch(replace(SPIKES, spike_window=64), 0), losses.tolist()) == [None] * 400


def test_a_spike_that_rose_over_several_steps_began_with_the_first():
    watch = Watch(SPIKES, 0)
    trouble = feed(watch, [*[4.0] * 8, 4.09, 4.12, 4.5])[-1]
    assert (trouble.step, trouble.since) == (11, 9)


def test_the_window_restarts_after_a_roll_back():
    watch = Watch(SPIKES, 0)
    assert feed(watch, [*[4.0] * 8, 9.0])[-1]
    watch.rolled_back(PASSED_OVER)
    assert watch.window_losses == [] and watch.passed_over == [PASSED_OVER]
    assert feed(watch, [9.0] + [4.0] * 7, 5) == [None] * 8
    assert feed(watch, [9.0], 13)[0]


@pytest.mark.parametrize("cut", [3, 8, 11])
def test_a_watch_resumed_from_json_decides_as_the_one_that_went_on(cut):
    losses = [*[4.0, 4.01, 3.99, 4.02] * 3, 4.9]
    alone, before, after = (Watch(SPIKES, 0) for _ in range(3))
    alone.rolled_back(PASSED_OVER)
    before.rolled_back(PASSED_OVER)
    whole = feed(alone, losses)
    feed(before, losses[:cut])
    after.restore(json.loads(json.dumps(before.state())))
    assert feed(after, losses[cut:], cut + 1) == whole[cut:] and whole[-1]
    assert after.state() == alone.state()


# ---- what is gone back to ----


def inventory(*local, bucket=()):
    """Commits as (step, sequence)."""
    manifests = [Manifest(CheckpointName(0, step, 0), "a", sequence, {}) for step, sequence in (*local, *bucket)]
    here, there = manifests[: len(local)], manifests[len(local) :]
    return Inventory({m.name: m for m in here}, {m.name: BucketManifest(1, m) for m in there}, {})


def steps(since, *local, bucket=()):
    return [CheckpointName.parse(name).step for name in good_names(inventory(*local, bucket=bucket), since)]


def test_good_is_what_the_next_step_has_shown_to_be_sound():
    commits = ((10, 1), (20, 2), (30, 3))
    assert steps(31, *commits) == [20, 10]  # nothing has shown yet that 30 is sound
    assert steps(32, *commits) == [30, 20, 10]
    assert steps(11, *commits) == []


def test_what_a_roll_back_has_left_is_not_gone_back_to():
    # 50 was saved, then the run went back to 40, which it saved again, and came to 45.
    assert steps(60, (30, 1), (50, 2), (40, 3), (45, 4)) == [45, 40, 30]
    assert steps(43, (30, 1), (50, 2), (40, 3)) == [40, 30]
    assert steps(41, (30, 1), (50, 2), (40, 3)) == [30]


def test_a_commit_here_and_in_the_bucket_is_one():
    assert steps(99, (40, 2), bucket=((40, 2), (30, 1))) == [40, 30]


# ---- the data that is passed over ----


class Tokens:
    """A shard of so many tokens."""

    def __init__(self, name, n_tokens):
        self.name, self.n_tokens = name, n_tokens


@pytest.mark.parametrize("shuffle_shards", [1, 3])
def test_the_shards_between_two_positions_are_those_their_windows_begin_in(shuffle_shards):
    shards = [Tokens(f"{index}.npz", length) for index, length in enumerate([70, 90, 5, 200, 33])]
    batches = Batches(shards, seq_len=8, global_size=4, seed=3, shuffle_shards=shuffle_shards)
    order = batches._epoch(0).order
    first, end = Position(0, 0, 0), Position(1, 0, 0)
    whole = batches.shards_between(first, end)
    assert set(whole) <= {shard.name for shard in shards} and len(whole) >= 4
    if shuffle_shards == 1:
        assert whole == [shards[index].name for index in order if shards[index].name in whole]
        assert batches.shards_between(first, Position(0, 1, 0)) == [shards[order[0]].name]
    assert batches.shards_between(first, first) == []
    last_and_next = batches.shards_between(batches._epoch(0).position(batches.windows_per_epoch - 1), Position(1, 0, 1))
    assert 1 <= len(last_and_next) <= 2


# ---- a loss that is not finite ----


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_spoils_gradients_that_are(bad):
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = weight.sum() + bad
    (finite,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert finite.isfinite().all()  # so nothing would notice
    watched(loss).backward()
    assert weight.grad.isnan().all()


def test_a_finite_loss_is_left_as_it_is_to_the_last_bit():
    weight = torch.randn(1000, requires_grad=True)
    loss = (weight**3).mean()
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(watched(loss), loss)
    watched(loss).backward()
    assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("count", ["0", "5-3", "0-2"])
def test_a_failpoint_that_can_never_come_is_refused(monkeypatch, count):
    monkeypatch.setenv(failpoints.VARIABLE, f"loss.poison:{count}:poison")
    with pytest.raises(ConfigError, match="never reached"):
        failpoints.arm(0)


@pytest.mark.parametrize(("timeout_s", "waits_s"), [(600.0, 150.0), (0.0, None)])
def test_a_roll_back_waits_for_uploads_for_less_than_the_watchdog_does(timeout_s, waits_s):
    class Keeper:
        def wait(self, limit_s):
            self.waited_s = limit_s

        def check(self):
            raise StorageError("enough")

    train = TrainConfig(hang_timeout_s=timeout_s)
    run = SimpleNamespace(keeper=Keeper(), config=SimpleNamespace(train=train), record_events=lambda: None)
    with pytest.raises(StorageError, match="enough"):
        roll_back(run, Trouble(9, 9, "a spike", 9.0, {}))
    assert run.keeper.waited_s == waits_s


def test_a_failpoint_poisons_a_range_of_losses_on_one_rank(monkeypatch):
    monkeypatch.setenv(failpoints.VARIABLE, "loss.poison:2-3:poison@1")
    try:
        for rank, poisoned in ((0, []), (1, [2, 3])):
            failpoints.arm(rank)
            losses = [watched(torch.tensor(1.0)) for _ in range(5)]
            assert [number for number, loss in enumerate(losses, 1) if loss.isnan()] == poisoned
    finally:
        monkeypatch.delenv(failpoints.VARIABLE)
        failpoints.arm(0)
