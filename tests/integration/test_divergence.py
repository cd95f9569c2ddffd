"""A run that diverges: real processes, real spikes of the loss, and losses that a failpoint makes NaN.

The spikes come from shards of random tokens, met by a model that has begun to learn the others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from pretrain.batches import Batches
from pretrain.checkpoint import damaged_files
from pretrain.discovery import damaged_objects, take_inventory
from pretrain.shards import Shard
from pretrain.uploads import list_commits
from tests.runs import (
    PATIENCE_S,
    RUN,
    SEQ_LEN,
    VOCAB_SIZE,
    Ended,
    TrainingProcess,
    differing,
    final_state,
    losses,
    make_shards,
    metrics,
    plain_environment,
    store_of,
    train,
)

GLOBAL_SIZE, SEED = 8, 1234
OPTIONS = ("--data.shuffle_shards", "1", "--lr", "0.01", "--checkpoint.every_steps", "4", "--resume", "auto")
SPIKES = (*OPTIONS, "--train.spike_threshold", "5", "--train.spike_window", "8", "--max-steps", "36")
SKIPS = (*OPTIONS, "--train.max_skipped", "2", "--max-steps", "16")
RANDOM_TOKENS = 400  # of a bad shard: a step and a half


class Sized:
    """What the order of the data asks of a shard."""

    def __init__(self, name: str, n_tokens: int) -> None:
        self.name, self.n_tokens = name, n_tokens


def batches_of(shards: list[Sized]) -> Batches:
    return Batches(cast(list[Shard], shards), seq_len=SEQ_LEN, global_size=GLOBAL_SIZE, seed=SEED)


def make_data(folder: Path, *bad: int) -> list[str]:
    """Eight shards; the bad ones, by their place in the order of the first epoch, hold random tokens: their names."""
    shards = sorted(make_shards(folder / "shards", n_shards=8).iterdir())
    order = batches_of([Sized(path.name, 2000) for path in shards])._epoch(0).order
    chosen = [shards[int(order[place])] for place in bad]
    for path in chosen:
        tokens = np.random.default_rng(9).integers(0, VOCAB_SIZE, RANDOM_TOKENS).astype(np.uint16)
        np.savez(path, input_ids=tokens)
    return [path.name for path in chosen]


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "logs" / RUN / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def document(folder: Path, name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "logs" / RUN / name).read_text())
    return tree


def trainer_state(folder: Path) -> dict[str, Any]:
    """Of the newest local checkpoint."""
    path = folder / "checkpoints" / RUN
    newest = max(take_inventory(path, None, RUN).local.values(), key=lambda manifest: manifest.sequence)
    tree: dict[str, Any] = json.loads((path / str(newest.name) / "trainer_state.json").read_text())
    return tree


def windows_read(folder: Path) -> int:
    """Windows between the beginning of the data and where the newest checkpoint stands, in the first epoch."""
    position = trainer_state(folder)["progress"]["position"]
    shards = [Sized(path.name, len(np.load(path)["input_ids"])) for path in sorted((folder / "shards").iterdir())]
    assert position["epoch"] == 0
    return int(batches_of(shards)._epoch(0).bounds[position["shard"]]) + int(position["window"])


def poisoned(failpoint: str) -> dict[str, str]:
    return plain_environment(PRETRAIN_FAILPOINT=failpoint)


def assert_went_on(folder: Path, ended: Ended, steps: int, rollbacks: int = 1) -> dict[str, Any]:
    """The run is complete, and every window that was read is trained on once or passed over; the last roll-back."""
    assert ended.code == 0, ended.output
    assert list(losses(folder)) == list(range(1, steps + 1))
    progress, summary = trainer_state(folder)["progress"], document(folder, "summary.json")
    rolled_back = trainer_state(folder)["divergence"]["passed_over"]
    assert progress["step"] == summary["steps"] == steps
    assert progress["rollbacks"] == summary["rollbacks"] == len(rolled_back) == rollbacks
    passed_over = progress["windows_passed_over"]
    assert passed_over == sum(each["windows"] for each in rolled_back) == summary["windows_passed_over"] > 0
    assert progress["tokens"] == steps * GLOBAL_SIZE * SEQ_LEN
    assert windows_read(folder) == steps * GLOBAL_SIZE + passed_over
    last: dict[str, Any] = rolled_back[-1]
    return last


# ---- spikes ----


@pytest.mark.parametrize(
    ("engine", "precision", "ranks"),
    [
        pytest.param("native", "fp32", 1, marks=pytest.mark.slow),
        pytest.param("native", "bf16", 2, marks=pytest.mark.slow),
        ("deepspeed", "bf16", 2),
    ],
)
def test_a_spike_is_rolled_back_and_its_data_passed_over(tmp_path, engine, precision, ranks):
    (bad,) = make_data(tmp_path, 3)
    ended = train(tmp_path, *SPIKES, "--engine", engine, "--precision", precision, ranks=ranks)
    last = assert_went_on(tmp_path, ended, 36)
    assert bad in last["shards"] and "is a spike" in last["reason"]
    assert last["to_step"] % 4 == 0 and last["to_step"] < last["from_step"] - 1
    assert last["windows"] == (last["from_step"] - last["to_step"]) * GLOBAL_SIZE
    (event,) = events(tmp_path, "rolled_back")
    assert {key: event[key] for key in last} == last
    assert f"Back to checkpoint-epoch0-step{last['to_step']}-" in ended.output
    told = [loss for loss, _, _ in losses(tmp_path).values()]
    assert max(told[last["to_step"] :]) < told[last["to_step"]] + 0.5  # nothing of the spike is in the curve


def test_spikes_beyond_max_rollbacks_end_the_run_with_a_report_and_a_restart_does_not_forget(tmp_path):
    bad = make_data(tmp_path, 3, 5)
    options = (*SPIKES, "--train.max_rollbacks", "1")
    for ended in (train(tmp_path, *options), train(tmp_path, *options)):
        assert ended.code == 6 and len(ended.errors) == 1 and "Traceback" not in ended.output, ended.output
        assert "went back 1 times (train.max_rollbacks 1)" in ended.errors[0], ended.output
        report = document(tmp_path, "divergence.json")
        assert report["rollbacks"] == 1 and bad[0] in report["passed_over"][0]["shards"]
        assert bad[1] in report["shards"] and bad[0] not in report["shards"]
        assert report["statistics"]["z"] > 5 and len(report["window_losses"]) == 8
        assert report["recent_steps"][-1]["loss"] == report["loss"] and report["recent_steps"][-1]["lr"] > 0
        assert len(report["checkpoints"]) == 3 and "--lr" in report["mend"]
    assert len(events(tmp_path, "rolled_back")) == 1

    went_on = train(tmp_path, *SPIKES, "--train.max_rollbacks", "2")
    assert bad[1] in assert_went_on(tmp_path, went_on, 36, rollbacks=2)["shards"]


# ---- losses that are not finite ----


@pytest.mark.parametrize(
    ("engine", "precision"),
    [
        ("native", "fp32"),
        pytest.param("deepspeed", "fp32", marks=pytest.mark.slow),
        pytest.param("deepspeed", "bf16", marks=pytest.mark.slow),
    ],
)
def test_nan_on_one_rank_is_skipped_and_rolled_back_on_all(tmp_path, engine, precision):
    make_data(tmp_path)
    environment = poisoned("loss.poison:17-22:poison@1")  # two micro-batches a step on each rank: steps 9 to 11
    options = (*SKIPS, "--engine", engine, "--precision", precision)
    ended = train(tmp_path, *options, ranks=2, environment=environment)
    last = assert_went_on(tmp_path, ended, 16)
    assert (last["from_step"], last["to_step"]) == (11, 4) and "3 updates in a row" in last["reason"]
    assert f"engine {engine}, {precision}, 2 ranks" in ended.output
    assert trainer_state(tmp_path)["progress"]["skipped_updates"] == 3
    assert all(np.isfinite(record["loss"]) for record in metrics(tmp_path))


def test_as_many_as_max_skipped_are_only_skipped_and_nothing_is_saved_in_between(tmp_path):
    make_data(tmp_path)
    ended = train(tmp_path, *SKIPS, environment=poisoned("loss.poison:29-36:poison"))  # four a step: steps 8 and 9
    assert ended.code == 0 and "rollbacks" in document(tmp_path, "summary.json"), ended.output
    progress = trainer_state(tmp_path)["progress"]
    assert (progress["skipped_updates"], progress["rollbacks"]) == (2, 0)
    saved = [event["name"].split("-")[2] for event in events(tmp_path, "checkpoint_saved")]
    assert saved == ["step4", "step10", "step12", "step16"]  # the one of step 8 came with the next good update


def test_without_a_checkpoint_to_go_back_to_the_run_ends(tmp_path):
    make_data(tmp_path)
    ended = train(tmp_path, *SKIPS, environment=poisoned("loss.poison:5-99:poison"))
    assert ended.code == 6 and len(ended.errors) == 1, ended.output
    assert "no checkpoint from before step 2 is left" in ended.errors[0], ended.output
    report = document(tmp_path, "divergence.json")
    assert (report["loss"], report["step"], report["since"], report["checkpoints"]) == ("NaN", 4, 2, [])
    assert len(report["shards"]) == 1


# ---- killed ----


@pytest.mark.parametrize(
    "moment", [pytest.param("loop.after_rollback:1", marks=pytest.mark.slow), "loop.before_step:12"]
)
def test_a_kill_around_a_roll_back_changes_nothing(tmp_path, moment):
    """Before the roll-back is saved it is done again; after, it is gone on from. The losses are the same to a bit."""
    poison = "loss.poison:33-44:poison"  # four a step: steps 9 to 11
    options = (*SKIPS, "--no-background-upload")  # so that what is saved is written when the next step begins
    for name in ("alone", "killed"):
        make_data(tmp_path / name)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert_went_on(alone, train(alone, *options, environment=poisoned(poison)), 16)
    with TrainingProcess(killed, *options, environment=poisoned(f"{poison},{moment}")) as training:
        training.process.wait(PATIENCE_S)
    assert training.process.returncode == -9, training.output
    if moment.startswith("loop.before_step"):
        state = trainer_state(killed)
        assert (state["progress"]["step"], state["progress"]["rollbacks"]) == (4, 1)
        again = ""  # the data that made it diverge is behind it
    else:
        assert trainer_state(killed)["progress"]["rollbacks"] == 0
        # The run goes on from step 8, which it had saved, and meets the same losses.
        again = "loss.poison:1-12:poison"
    assert_went_on(killed, train(killed, *options, environment=poisoned(again)), 16)
    assert losses(killed) == losses(alone)
    assert differing(final_state(killed), final_state(alone)) == []
    assert trainer_state(killed)["divergence"] == trainer_state(alone)["divergence"]


AGAIN = (*OPTIONS, "--train.max_skipped", "1", "--max-steps", "10", "--checkpoint.every_steps", "2")
POISON_7_AND_8 = "loss.poison:25-32:poison"  # four a step


def make_one_shard(folder: Path) -> None:
    """Windows of one shard only, so that epoch and files don't tell the branches apart."""
    make_shards(folder / "shards", n_shards=1, tokens_each=16_000)


@pytest.mark.slow  # test_keeper.py holds it without a process
@pytest.mark.parametrize("point", ["checkpoint.before_write", "checkpoint.after_write", "checkpoint.before_rename"])
def test_a_kill_while_a_save_takes_the_name_of_the_checkpoint_gone_back_to_loses_neither(tmp_path, point):
    make_one_shard(tmp_path)
    kill = f"{POISON_7_AND_8},{point}:4:kill"  # after steps 2, 4 and 6 the one of step 4, again
    with TrainingProcess(tmp_path, *AGAIN, "--no-background-upload", environment=poisoned(kill)) as training:
        training.process.wait(PATIENCE_S)
    assert training.process.returncode == -9, training.output
    ended = train(tmp_path, *AGAIN, "--max-steps", "6")  # only what was whole is there, and nothing is saved yet
    assert ended.code == 0, ended.output
    path = tmp_path / "checkpoints" / RUN
    found = {manifest.name.step: manifest for manifest in take_inventory(path, None, RUN).local.values()}
    assert 4 in found and not any(damaged_files(each, path / str(each.name)) for each in found.values())
    assert found[4].sequence == (4 if point == "checkpoint.before_rename" else 2)
    assert not [each for each in path.iterdir() if each.name.startswith(".checkpoint")]
    ended = train(tmp_path, *AGAIN)
    assert ended.code == 0 and list(losses(tmp_path)) == list(range(1, 11)), ended.output


def test_names_that_come_again_take_the_place_of_the_earlier_ones_in_the_bucket(tmp_path, bucket_url):
    make_one_shard(tmp_path)
    ended = train(tmp_path, *AGAIN, "--checkpoints", bucket_url, environment=poisoned(POISON_7_AND_8))
    assert ended.code == 0, ended.output
    (rolled_back,) = events(tmp_path, "rolled_back")
    assert (rolled_back["from_step"], rolled_back["to_step"]) == (8, 4)
    names = [event["name"] for event in events(tmp_path, "checkpoint_committed")]
    assert [name.split("-")[2] for name in names] == ["step2", "step4", "step6", "step4", "step6", "step8", "step10"]
    assert names[1] == names[3] and names[2] == names[4]
    found = list_commits(store_of(bucket_url), RUN)
    assert sorted(name.step for name in found) == [6, 8, 10]
    assert not any(damaged_objects(commit.manifest, store_of(bucket_url), RUN) for commit in found.values())
