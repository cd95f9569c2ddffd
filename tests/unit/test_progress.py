from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from pretrain.batches import Position
from pretrain.checkpoint import CheckpointReader
from pretrain.checkpoint_manifest import CheckpointName
from pretrain.config import TrainConfig
from pretrain.divergence import Observation, Watch
from pretrain.engine.base import EngineState
from pretrain.errors import CheckpointError
from pretrain.history import LossTracker
from pretrain.progress import TRAINER_STATE_FILE, DataOrder, Progress, checkpoint_documents, read_progress, step_seed
from tests.helpers_training import write_checkpoint

ORDER = DataOrder("f1n9e7", seed=3, seq_len=128, shuffle_shards=2)
PROGRESS = Progress(
    40, Position(1, 2, 30), files=12, tokens=5120, skipped_updates=2, seconds=7.5, rollbacks=1, windows_passed_over=16
)
ENGINE = EngineState(38, 2048.0, 5)


def history_of(*losses):
    history = LossTracker()
    for step, loss in enumerate(losses, 1):
        history.update(step, loss, 1e-3)
    history.validated(len(losses), 4.25)
    return history


def documents(**about):
    return checkpoint_documents(PROGRESS, ENGINE, history_of(5.0, 4.0, 4.5), ORDER, {"run": "r", **about})


def reader_of(tmp_path, trees):
    manifest = write_checkpoint(tmp_path, 1, 1, documents=trees)
    return CheckpointReader(tmp_path / str(manifest.name), manifest)


def test_what_a_checkpoint_says_is_what_a_resume_reads(tmp_path):
    history = LossTracker()
    progress, engine = read_progress(reader_of(tmp_path, documents()), ORDER, history)
    assert (progress, engine) == (PROGRESS, ENGINE)
    assert history.state() == history_of(5.0, 4.0, 4.5).state()


def test_what_the_watch_remembers_is_resumed(tmp_path):
    watch = watched_until_skipped()
    trees = checkpoint_documents(PROGRESS, ENGINE, history_of(5.0), ORDER, {}, watch)
    resumed = Watch(TrainConfig(spike_threshold=8.0), 0)
    read_progress(reader_of(tmp_path, trees), ORDER, LossTracker(), resumed)
    assert resumed.state() == watch.state() and resumed.skipped_in_a_row == 1


def watched_until_skipped():
    watch = Watch(TrainConfig(spike_threshold=8.0), 0)
    for step, applied in ((1, True), (2, False)):
        watch.observe(Observation(step, 5.0, 1.0, 1e-3, None, applied, Position()))
    return watch


def test_a_checkpoint_of_a_version_without_roll_backs_is_read(tmp_path):
    trees = documents()
    tree = json.loads(trees[TRAINER_STATE_FILE])
    del tree["divergence"], tree["progress"]["rollbacks"], tree["progress"]["windows_passed_over"]
    watch = Watch(TrainConfig(), 0)
    reader = reader_of(tmp_path, {**trees, TRAINER_STATE_FILE: json.dumps(tree)})
    progress, _ = read_progress(reader, ORDER, LossTracker(), watch)
    assert progress == replace(PROGRESS, rollbacks=0, windows_passed_over=0)
    assert watch.skipped_in_a_row == 0 and not watch.passed_over


def test_the_documents_that_people_and_tools_read():
    trees = {name: json.loads(text) for name, text in documents(system_info={"device_count": 1}).items()}
    assert set(trees) == {TRAINER_STATE_FILE, "metadata.json", "training_metrics.json"}
    completed = {
        "completed_steps": 40,
        "total_epochs": 1,
        "files_processed": 12,
        "tokens": 5120,
        "rollbacks": 1,
        "windows_passed_over": 16,
        "tokens_passed_over": 16 * 128,
    }
    for name in ("metadata.json", "training_metrics.json"):
        tree = trees[name]
        assert tree["step"] == 40 and tree["training_progress"] == completed
        assert (tree["current_loss"], tree["best_loss"]) == (4.5, 4.0)
        assert tree["loss_history"] == [5.0, 4.0, 4.5] and tree["learning_rates"] == [1e-3] * 3
        assert tree["validation_metrics"]["current_avg_loss"] == 4.25
    assert trees["metadata.json"]["epoch"] == 1
    assert trees["metadata.json"]["system_info"] == {"device_count": 1} and trees["metadata.json"]["run"] == "r"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("fingerprint", "other", "fingerprint was f1n9e7 and is other"),
        ("seed", 4, "seed was 3 and is 4"),
        ("seq_len", 64, "seq_len was 128 and is 64"),
        ("shuffle_shards", 1, "shuffle_shards was 2 and is 1"),
    ],
)
def test_another_data_order_is_refused_and_the_difference_named(tmp_path, field, value, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        read_progress(reader_of(tmp_path, documents()), replace(ORDER, **{field: value}), LossTracker())
    assert "checkpoint-epoch0-step1-files1" in caught.value.what and "--run NAME" in caught.value.mend
    assert caught.value.what.count(" was ") == 2  # "was trained", and this one field


def test_every_field_of_the_data_order_that_differs_is_named():
    with pytest.raises(CheckpointError, match=r"fingerprint was .*; seed was .*; seq_len was .*; shuffle_shards was"):
        DataOrder("other", 0, 0, 0).check(asdict(ORDER), "a checkpoint")


@pytest.mark.parametrize(
    "damage",
    [
        lambda tree: tree.pop("progress"),
        lambda tree: tree.pop("order"),
        lambda tree: tree["progress"].pop("position"),
        lambda tree: tree["progress"].update(unknown=1),
        lambda tree: tree["engine"].update(unknown=1),
        lambda tree: tree["history"].pop("loss_history"),
        lambda tree: tree["history"]["loss_history"].pop(),
        lambda tree: tree.update(progress=None),
    ],
)
def test_a_state_of_another_version_is_one_clear_error(tmp_path, damage):
    trees = documents()
    tree = json.loads(trees[TRAINER_STATE_FILE])
    damage(tree)
    reader = reader_of(tmp_path, {**trees, TRAINER_STATE_FILE: json.dumps(tree)})
    with pytest.raises(CheckpointError, match=r"trainer_state\.json can't be read"):
        read_progress(reader, ORDER, LossTracker())


def test_a_state_that_is_no_json_or_is_not_there_is_one_clear_error(tmp_path):
    reader = reader_of(tmp_path, {**documents(), TRAINER_STATE_FILE: "{"})
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"trainer_state\.json can't be read"):
            read_progress(reader, ORDER, LossTracker())
        (reader.folder / TRAINER_STATE_FILE).unlink(missing_ok=True)


def test_a_step_moves_progress_on():
    after = PROGRESS.after_step(Position(1, 3, 0), files=13, tokens=128, applied=True, seconds=0.5)
    assert after == Progress(41, Position(1, 3, 0), 13, 5248, 2, 8.0, 1, 16)
    skipped = PROGRESS.after_step(Position(1, 3, 0), files=13, tokens=128, applied=False, seconds=0.5)
    assert skipped == replace(after, skipped_updates=3)


def test_a_checkpoint_is_named_after_where_it_was_taken():
    assert PROGRESS.checkpoint_name == CheckpointName(epoch=1, step=40, files=12)


def test_every_step_and_rank_has_a_seed_of_its_own_that_torch_takes():
    steps, ranks = [0, 1, 2, 65_535, 65_536, 2**27 - 1], [0, 1, 255, 256, 65_535]
    seeds = [step_seed(seed, step, rank) for seed in (0, 1234, 2**20 - 1) for step in steps for rank in ranks]
    assert len(set(seeds)) == len(seeds)
    for seed in (min(seeds), max(seeds)):
        torch.manual_seed(seed)


def test_an_order_of_text_prepared_ahead_is_another_and_an_older_version_knew_none():
    saved = asdict(ORDER)
    del saved["raw_ahead"]
    ORDER.check(saved, "x")
    with pytest.raises(CheckpointError, match="raw_ahead was False and is True"):
        replace(ORDER, raw_ahead=True).check(saved, "x")
