"""Scenarios 3, 11 and 15: checkpoints and shards whose bytes are not what was written."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint_manifest import MANIFEST_FILE
from pretrain.config import DataConfig
from pretrain.discovery import AUTO, choose, take_inventory
from pretrain.errors import CheckpointError, ShardError
from pretrain.shards import fetch_shards
from pretrain.storage import LocalStore
from tests.chaos.chain import INTERVAL, OPTIONS, STEPS, Chain
from tests.chaos.score import Score, dice
from tests.runs import RUN, VOCAB_SIZE, TrainingProcess, make_shards, store_of, train

# ---- ways to damage a file ----


def truncate(path: Path, luck: random.Random) -> None:
    """The file ends anywhere before its end."""
    path.write_bytes(path.read_bytes()[: luck.randrange(path.stat().st_size)])


def flip(path: Path, luck: random.Random) -> None:
    """One bit anywhere in the file is another one."""
    data = bytearray(path.read_bytes())
    data[luck.randrange(len(data))] ^= 1 << luck.randrange(8)
    path.write_bytes(data)


def delete(path: Path, luck: random.Random) -> None:
    """The file is gone."""
    path.unlink()


DAMAGES = (truncate, flip, delete)


def damage_object(
    url: str, name: str, harm: Callable[[Path, random.Random], None], scratch: Path, luck: object
) -> None:
    """The same to an object of a bucket."""
    store = store_of(url)
    store.download(name, scratch)
    harm(scratch, luck)
    store.delete(name)
    if scratch.exists():
        store.upload(scratch, name)


# ---- 3. one file of a checkpoint ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The disk of a run of two ranks with its last checkpoints."""
    folder = tmp_path_factory.mktemp("saved")
    make_shards(folder / "shards")
    ended = train(folder, *OPTIONS, ranks=2)
    assert ended.code == 0, ended.output
    return folder


def newest_folder(folder: Path) -> Path:
    (newest,) = (folder / "checkpoints" / RUN).glob(f"checkpoint-*-step{STEPS}-*")
    return newest


def kinds_of_file(checkpoint: Path) -> list[str]:
    """Every file of a checkpoint; of the tensors' files one of each kind and rank."""
    return sorted(path.name for path in checkpoint.iterdir())


@pytest.mark.chaos(3)
def test_every_damage_to_a_local_checkpoint_is_seen_and_costs_one_commit(saved, tmp_path, score):
    names = kinds_of_file(newest_folder(saved))
    assert {name.partition("-0")[0] for name in names} >= {"model", "optimizer", MANIFEST_FILE, "config.yaml"}
    score.count("files", len(names), "files")
    detected = []
    cases = [(name, harm) for name in names for harm in DAMAGES]
    for name, harm in cases:
        with score.run():
            run = tmp_path / RUN
            shutil.copytree(saved / "checkpoints" / RUN, run)
            (newest,) = run.glob(f"checkpoint-*-step{STEPS}-*")
            harm(newest / name, dice("damage", name, harm.__name__))
            chosen = choose(take_inventory(run, None, RUN), AUTO, run, None, RUN)
            assert chosen is not None
            detected.append(chosen.name.step == STEPS - INTERVAL)
            assert detected[-1], f"{harm.__name__} of {name}: went on from step {chosen.name.step}"
            shutil.rmtree(run)
    score.equal("damages_detected", sum(detected), len(cases), "damages")


@pytest.mark.chaos(3)
def test_every_damage_to_a_checkpoint_in_the_bucket_is_seen_and_costs_one_commit(
    saved, tmp_path, bucket_url, score: Score
):
    # fake-gcs keeps the checksum it computed itself, so every damage here is one the manifest doesn't know of.
    manifests = take_inventory(saved / "checkpoints" / RUN, None, RUN).local.values()
    newest = max(manifests, key=lambda manifest: manifest.sequence)
    detected = []
    cases = [(name, harm) for name in [*newest.files, MANIFEST_FILE] for harm in DAMAGES]
    for number, (name, harm) in enumerate(cases):
        with score.run():
            url = f"{bucket_url}/{number}"
            store = store_of(url)
            for manifest in sorted(manifests, key=lambda manifest: manifest.sequence)[-2:]:
                prefix = f"{RUN}/{manifest.name}"
                for file in manifest.files:
                    path = saved / "checkpoints" / RUN / str(manifest.name) / file
                    store.upload(path, f"{prefix}/{manifest.attempt}/{file}")
                store.create(f"{prefix}/{MANIFEST_FILE}", manifest.to_bytes())
            place = "" if name == MANIFEST_FILE else f"{newest.attempt}/"
            target = f"{RUN}/{newest.name}/{place}{name}"
            damage_object(url, target, harm, tmp_path / "scratch", dice("object", name, harm.__name__))
            here = tmp_path / str(number)
            chosen = choose(take_inventory(here, store, RUN), AUTO, here, store, RUN)
            assert chosen is not None
            detected.append(chosen.name.step == STEPS - INTERVAL)
            assert detected[-1], f"{harm.__name__} of {name}: went on from step {chosen.name.step}"
            shutil.rmtree(here)
    score.equal("damages_detected", sum(detected), len(cases), "damages")


@pytest.mark.chaos(3)
@pytest.mark.slow  # test_resume.py does it with a bucket in the ordinary suite
def test_a_run_with_a_damaged_checkpoint_resumes_one_back_and_ends_as_if_it_were_whole(folder, baseline, score):
    chain = Chain(folder, OPTIONS)
    chain.finish()
    newest = newest_folder(folder)
    flip(next(newest.glob("optimizer-*")), dice("resumed"))
    ended = chain.finish()
    assert f"passed over {newest.name} (local)" in ended.output, ended.output
    assert f"resumed checkpoint-epoch1-step{STEPS - INTERVAL}-" in ended.output, ended.output
    chain.compare(baseline(*OPTIONS), score)


# ---- 11. a bad shard at the source ----


def of_pickles(path: Path) -> None:
    np.savez(path, input_ids=np.array([{"a": 1}, None], dtype=object))


def of_floats(path: Path) -> None:
    np.savez(path, input_ids=np.linspace(0, 1, 100))


def of_other_words(path: Path) -> None:
    np.savez(path, input_ids=np.array([1, 2, VOCAB_SIZE], dtype=np.uint16))


def of_negative_ids(path: Path) -> None:
    np.savez(path, input_ids=np.array([1, -2, 3], dtype=np.int32))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def with_a_flipped_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


BAD_SHARDS = (cut_short, with_a_flipped_bit, empty, of_floats, of_negative_ids, of_other_words, of_pickles)


@pytest.mark.chaos(11)
def test_every_bad_shard_is_named_and_left_out_where_that_is_the_policy(folder, bucket_url, score):
    for number, spoil in enumerate(BAD_SHARDS):
        with score.run():
            source = shutil.copytree(folder / "shards", folder / f"source{number}")
            bad = sorted(source.iterdir())[2]
            good = {path.name for path in source.iterdir()} - {bad.name}
            spoil(bad)
            url = f"{bucket_url}/{number}"
            for path in source.iterdir():
                store_of(url).upload(path, path.name)
            for store in (LocalStore(source), store_of(url)):
                cache = str(folder / f"cache{number}")
                with pytest.raises(ShardError, match=bad.name) as caught:
                    fetch_shards(store, DataConfig(cache_dir=cache), vocab_size=VOCAB_SIZE)
                assert caught.value.mend or "skip" in str(caught.value)
                found = fetch_shards(store, DataConfig(cache_dir=cache, on_bad_shard="skip"), vocab_size=VOCAB_SIZE)
                assert {shard.name for shard in found.shards} == good and found.skipped == (bad.name,)
    score.equal("bad_shards_detected", score.passed, len(BAD_SHARDS), "kinds")


@pytest.mark.chaos(11)
@pytest.mark.slow  # test_faults.py does it with a bucket in the ordinary suite
def test_a_run_stops_at_a_bad_shard_or_goes_on_without_it_as_told(folder, score):
    cut_short(sorted((folder / "shards").iterdir())[3])
    with score.run():
        stopped = train(folder, "--max-steps", "3")
        assert stopped.code == 3 and len(stopped.errors) == 1, stopped.output
        assert "tokenized_cleaned_003.npz" in stopped.errors[0] and "on_bad_shard skip" in stopped.errors[0]
    with score.run():
        gone_on = train(folder, "--max-steps", "3", "--data.on_bad_shard", "skip")
        assert gone_on.code == 0, gone_on.output
        told = json.loads((folder / "logs" / RUN / "summary.json").read_text())
        assert told["skipped_shard_names"] == ["tokenized_cleaned_003.npz"] and told["steps"] == 3


# ---- 15. nothing verifies ----


@pytest.mark.chaos(15)
def test_where_nothing_verifies_a_resume_is_refused_and_never_starts_over(folder, bucket_url, score):
    options = (*OPTIONS, "--checkpoints", bucket_url)
    assert train(folder, *options, "--resume", "auto").code == 0
    store, luck = store_of(bucket_url), dice("everything")
    for number, name in enumerate(info.name for info in store.list() if "/optimizer-" in info.name):
        damage_object(bucket_url, name, DAMAGES[number % 3], folder / "scratch", luck)
    for number, path in enumerate(sorted((folder / "checkpoints" / RUN).glob("checkpoint-*/model-*"))):
        DAMAGES[number % 3](path, luck)
    before = (folder / "logs" / RUN / "metrics.jsonl").read_bytes()
    names = [path.name for path in (folder / "checkpoints" / RUN).iterdir()]
    elsewhere = folder / "elsewhere"
    make_shards(elsewhere / "shards")
    machines = [(folder, "auto"), (folder, max(names)), (elsewhere, "auto")]
    for machine, resume in machines:
        with score.run(), TrainingProcess(machine, *options, "--resume", resume) as training:
            ended = training.wait()
            assert ended.code == 5 and len(ended.errors) == 1, ended.output
            assert "step  1/" not in ended.output and "snapshot taken" not in ended.output
    score.equal("refused", score.passed, len(machines), "starts")
    assert (folder / "logs" / RUN / "metrics.jsonl").read_bytes() == before
    assert not (elsewhere / "logs" / RUN / "metrics.jsonl").exists()
    with pytest.raises(CheckpointError, match="no checkpoint of run tiny verifies"):
        choose(take_inventory(folder / "x", store, RUN), AUTO, folder / "x", store, RUN)
