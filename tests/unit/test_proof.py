"""What the proof of a resume compares, and that it sees each thing that could be wrong."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.batches import Batches, Position
from pretrain.cache import Shard
from pretrain.checkpoint import CheckpointReader, retract_manifest, saving_folder
from pretrain.config import BatchConfig, OptimConfig
from pretrain.errors import CheckpointError
from pretrain.model_config import FAMILIES, MODEL_SIZES, ModelConfig, model_problems
from pretrain.npz import read_npz
from pretrain.proof import (
    COMPARED,
    MADE_SHARDS,
    differing_records,
    differing_tensors,
    make_shards,
    missing_steps,
    small_batch,
    small_model,
    small_schedule,
    windows_off,
)
from pretrain.trial import Moment, Start, Trial, random_moments
from tests.helpers_training import TinyModel, flip_a_byte, write_checkpoint

GLOBAL_SIZE, SEQ_LEN, STEPS = 4, 8, 12


def record(step: int, **other: Any) -> dict[str, Any]:
    figures = {"loss": 1 / step, "grad_norm": 0.1, "lr": 1e-3, "tokens": step * 32, "files": 0, "epoch": 0}
    return {"step": step, "time": 100.0 + step, **figures, **other}


# ---- scale ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", MODEL_SIZES)
def test_every_model_has_a_small_one_of_its_kind(family: str, size: str) -> None:
    model = ModelConfig(family=family, size=size).resolve()
    small = small_model(model, keep_vocabulary=False)
    assert small == small.resolve()
    assert model_problems(small) == []
    assert small.n_parameters < 1e6
    kept = ("family", "position", "norm", "activation", "bias", "qk_norm", "tie_embeddings", "dropout", "rotary_pct")
    assert [getattr(small, name) for name in kept] == [getattr(model, name) for name in kept]
    assert (small.n_kv_head < small.n_head) == (model.n_kv_head < model.n_head)


def test_the_vocabulary_of_given_shards_stays() -> None:
    assert small_model(ModelConfig().resolve(), keep_vocabulary=True).vocab_size == 50257


def test_a_model_that_is_smaller_already_stays_as_it_is() -> None:
    model = ModelConfig(size="custom", n_layer=1, n_head=2, d_model=16, vocab_size=40, seq_len=12).resolve()
    assert small_model(model, keep_vocabulary=False) == model


def test_an_accumulated_batch_stays_one() -> None:
    assert small_batch(BatchConfig(128, 8), 2) == BatchConfig(8, 2)
    assert small_batch(BatchConfig(16, 8), 2) == BatchConfig(4, 2)
    assert small_schedule(OptimConfig(warmup_steps=2000), 40).warmup_steps == 10


def test_made_shards_are_shards_of_so_many_tokens(tmp_path: Path) -> None:
    paths = sorted(make_shards(tmp_path / "shards", 1001, 77, seed=1).glob("*.npz"))
    streams = [read_npz(path)[0] for path in paths]
    assert len(paths) == MADE_SHARDS
    assert 1001 <= sum(map(len, streams)) < 1001 + MADE_SHARDS
    assert max(tokens.max() for tokens in streams) == 76


# ---- moments ----


def test_moments_are_drawn_over_time_not_over_steps() -> None:
    times = [0.0, 1.0, 2.0, 12.0, 13.0]  # step 4 waited ten seconds for a save
    records = [record(step, time=time) for step, time in enumerate(times, 1)]
    moments = random_moments(records, 400, seed=3)
    assert moments == random_moments(records, 400, seed=3)
    assert moments != random_moments(records, 400, seed=4)
    assert {moment.step for moment in moments} == {1, 2, 3}
    during_the_save = [moment for moment in moments if moment.step == 3]
    assert 0.75 < len(during_the_save) / 400 < 0.91
    assert max(moment.later_s for moment in during_the_save) < 10
    reached = [times[moment.step - 1] + moment.later_s for moment in moments]
    assert reached == sorted(reached)


# ---- records ----


def test_equal_records_differ_in_nothing() -> None:
    whole = [record(step) for step in range(1, 6)]
    again = [*whole[:4], *whole[2:]]  # steps 3 and 4 were lost and done again
    assert differing_records(whole, [{**each, "time": 0.0, "step_ms": 3.0} for each in again]) == []
    assert missing_steps(whole, again) == []


@pytest.mark.parametrize("name", [name for name in COMPARED if name not in ("loss_scale", "skipped_updates")])
def test_one_bit_of_one_figure_of_a_step_that_was_lost_again_is_seen(name: str) -> None:
    whole = [record(step) for step in range(1, 6)]
    value = whole[3][name]
    bits = struct.pack(">d", value) if isinstance(value, float) else None
    flipped = struct.unpack(">d", bits[:-1] + bytes([bits[-1] ^ 1]))[0] if bits else value + 1
    lost = {**whole[3], name: flipped}
    [problem] = differing_records(whole, [*whole[:3], lost, *whole[3:]])
    assert problem.startswith(f"step 4: {name} is ")


def test_a_figure_that_only_one_run_has_differs() -> None:
    assert differing_records([record(1, loss_scale=2.0)], [record(1)]) == ["step 1: loss_scale is None and was 2.0"]
    assert differing_records([record(1)], [record(1), record(2)]) == ["step 2 is not one of the uninterrupted run's"]
    assert missing_steps([record(1), record(2)], [record(2)]) == [1]


# ---- tensors ----


def trial_with_checkpoint(folder: Path, step: int = 3) -> Trial:
    trial = Trial(folder, "run", [])
    write_checkpoint(trial.checkpoints, step, sequence=1)
    return trial


def test_the_same_tensors_are_the_same(tmp_path: Path) -> None:
    left, right = trial_with_checkpoint(tmp_path / "a"), trial_with_checkpoint(tmp_path / "b")
    compared, problems = differing_tensors(left, right)
    assert compared == 3 * len(list(TinyModel().named_parameters()))
    assert problems == []


def test_one_bit_of_one_tensor_is_seen(tmp_path: Path, monkeypatch) -> None:
    left, right = trial_with_checkpoint(tmp_path / "a"), trial_with_checkpoint(tmp_path / "b")
    read = CheckpointReader.parameter_state

    def one_bit_off(reader: CheckpointReader, name: str):
        state = read(reader, name)
        if name == "mix.weight" and reader.folder.is_relative_to(right.checkpoints):
            state["exp_avg"].view(torch.int32)[0, 0] ^= 1
        return state

    monkeypatch.setattr(CheckpointReader, "parameter_state", one_bit_off)
    assert differing_tensors(left, right)[1] == ["mix.weight (exp_avg)"]


def test_a_damaged_end_is_not_compared(tmp_path: Path) -> None:
    left, right = trial_with_checkpoint(tmp_path / "a"), trial_with_checkpoint(tmp_path / "b")
    flip_a_byte(next(right.checkpoints.glob("*/model-*.safetensors")))
    with pytest.raises(CheckpointError, match="differs from the manifest"):
        differing_tensors(left, right)


def test_runs_that_end_at_different_steps_are_not_compared(tmp_path: Path) -> None:
    left, right = trial_with_checkpoint(tmp_path / "a", 3), trial_with_checkpoint(tmp_path / "b", 4)
    with pytest.raises(CheckpointError, match="the runs end at checkpoint-epoch0-step3-files3"):
        differing_tensors(left, right)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Trial(tmp_path / "c", "run", []).newest_commit()


def test_a_save_that_a_kill_left_without_its_name_may_be_gone_on_from(tmp_path: Path) -> None:
    trial = Trial(tmp_path, "run", [])
    for step in (2, 4, 6):
        state = json.dumps({"progress": {"position": dataclasses.asdict(Position(0, 0, step))}})
        write_checkpoint(trial.checkpoints, step, step, documents={"trainer_state.json": state})
    for step in (4, 6):
        path = trial.checkpoints / f"checkpoint-epoch0-step{step}-files{step}"
        path.rename(saving_folder(path))
    retract_manifest(saving_folder(path))  # this one was not whole
    assert trial._saved_positions() == {2: Position(0, 0, 2), 4: Position(0, 0, 4)}


# ---- windows ----


@pytest.fixture
def batches(tmp_path: Path) -> Batches:
    """Data that the run goes through more than once."""
    shards = []
    for index in range(3):
        path = tmp_path / f"{index}.bin"
        tokens = np.arange(100, dtype=np.uint16)
        tokens.tofile(path)
        shards.append(Shard(str(index), len(tokens), path, "uint16"))
    return Batches(shards, seq_len=SEQ_LEN, global_size=GLOBAL_SIZE, seed=1)


def trial_of(batches: Batches, *starts: tuple[int, int], recorded: dict[int, int] | None = None) -> Trial:
    """A trial of (first step, last step) each; `recorded`: at which step a checkpoint's position really was."""
    trial = Trial(Path("nowhere"), "run", [])
    positions = [Position()]
    for _ in range(STEPS):
        positions.append(batches.take(positions[-1], 0, 1)[1])
    trial.starts = [
        Start([record(step) for step in range(first + 1, last + 1)], Moment(last, 0.0)) for first, last in starts
    ]
    for first, _ in starts:
        trial.positions[first] = positions[(recorded or {}).get(first, first)]
    return trial


@pytest.mark.parametrize(
    "starts", [[(0, 12)], [(0, 5), (4, 12)], [(0, 5), (4, 9), (4, 6), (6, 12)], [(0, 1), (0, 8), (4, 12)]]
)
def test_a_run_that_lost_steps_and_did_them_again_took_each_window_once(batches: Batches, starts) -> None:
    assert windows_off(batches, trial_of(batches, *starts), STEPS) == (0, 0)


def test_windows_that_are_taken_twice_or_never_are_counted(batches: Batches) -> None:
    starts = [(0, 5), (4, 12)]
    behind = windows_off(batches, trial_of(batches, *starts, recorded={4: 3}), STEPS)
    assert behind == (GLOBAL_SIZE, GLOBAL_SIZE)  # the step before again, so the last one's never
    ahead = windows_off(batches, trial_of(batches, *starts, recorded={4: 6}), STEPS)
    assert ahead == (0, 2 * GLOBAL_SIZE)


def test_a_place_where_no_step_ends_is_an_error(batches: Batches) -> None:
    trial = trial_of(batches, (0, 5), (4, 12))
    trial.positions[4] = dataclasses.replace(trial.positions[4], window=trial.positions[4].window + 1)
    with pytest.raises(CheckpointError, match="step 4 was resumed at"):
        windows_off(batches, trial, STEPS)
