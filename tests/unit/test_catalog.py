from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.catalog import Catalog
from pretrain.checkpoint_manifest import MANIFEST_FILE
from pretrain.errors import CheckpointError, ConfigError
from pretrain.storage import LocalStore
from tests.helpers_training import FaultyStore, flip_a_byte, upload_checkpoint, write_checkpoint

METADATA = {"current_loss": 2.5, "timestamp": "2026-01-31T12:34:56+00:00", "training_progress": {"tokens": 1000}}


class Runs:
    """Checkpoints of several runs, here and in a bucket."""

    def __init__(self, tmp_path: Path) -> None:
        self.store = LocalStore(tmp_path / "bucket")
        self.catalog = Catalog(tmp_path / "local", self.store)

    def commit(self, run, step, sequence, *, local=True, bucket=True, attempt="attempt1"):
        folder = self.catalog.folder / run
        documents = {"metadata.json": json.dumps(METADATA)}
        manifest = write_checkpoint(folder, step, sequence, attempt, documents)
        if bucket:
            upload_checkpoint(self.store, run, folder, manifest)
        if not local:
            shutil.rmtree(folder / str(manifest.name))
        return manifest

    def found(self, run=""):
        return [(entry.run, entry.name.step, entry.where) for entry in self.catalog.entries(run)]


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def test_every_run_is_found_in_both_places_in_order_of_its_commits(runs):
    runs.commit("b", 30, sequence=1)
    runs.commit("b", 20, sequence=2, bucket=False)
    runs.commit("a", 5, sequence=1, local=False)
    assert runs.found() == [("a", 5, "bucket"), ("b", 30, "both"), ("b", 20, "local")]
    assert runs.found("b") == [("b", 30, "both"), ("b", 20, "local")]
    assert runs.found("nobody") == []


def test_without_anything_there_is_nothing(tmp_path):
    assert Catalog(tmp_path / "none", None).entries() == []
    assert Catalog(tmp_path / "none", LocalStore(tmp_path / "neither")).entries() == []


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_a_commit_that_is_pruned_between_the_listing_and_the_look_is_not_damaged(runs, place):
    manifest = runs.commit("a", 5, 1, local=place == "local", bucket=place == "bucket")
    [entry] = runs.catalog.entries()
    root = runs.catalog.folder if place == "local" else runs.store.root
    shutil.rmtree(root / "a" / str(manifest.name))
    assert runs.catalog.problems(entry) == {}
    assert runs.catalog.describe(entry, verify=True)["problems"] == []


def test_what_has_no_manifest_is_listed_and_not_found(runs):
    manifest = runs.commit("a", 5, 1)
    (runs.catalog.folder_of(runs.catalog.find(str(manifest.name))) / MANIFEST_FILE).unlink()
    (runs.store.root / "a" / str(manifest.name) / MANIFEST_FILE).unlink()
    [entry] = runs.catalog.entries()
    assert entry.manifest is None
    described = runs.catalog.describe(entry, verify=True)
    assert (described["committed"], described["verified"], described["loss"]) == (False, None, None)
    assert described["bytes"] == manifest.total_bytes
    with pytest.raises(CheckpointError, match="no checkpoint latest"):
        runs.catalog.find("latest")


def test_a_torn_manifest_is_damage_and_the_other_copy_counts(runs):
    manifest = runs.commit("a", 5, 1)
    (runs.store.root / "a" / str(manifest.name) / MANIFEST_FILE).write_text("{")
    [entry] = runs.catalog.entries()
    assert entry.manifest == manifest and entry.is_local and not entry.is_in_bucket
    problems = runs.catalog.problems(entry)
    assert problems["local"] == [] and "is not a checkpoint manifest" in problems["bucket"][0]


def test_latest_is_the_last_commit_not_the_highest_step(runs):
    runs.commit("a", 30, sequence=1)
    runs.commit("a", 20, sequence=2)
    assert runs.catalog.find("latest").name.step == 20
    assert runs.catalog.find("a/latest").name.step == 20
    assert runs.catalog.find("latest", "a").name.step == 20


def test_a_name_that_several_runs_have_must_name_its_run(runs):
    runs.commit("a", 5, 1)
    runs.commit("b", 5, 1)
    with pytest.raises(ConfigError, match="several runs: a, b"):
        runs.catalog.find("latest")
    assert runs.catalog.find("b/checkpoint-epoch0-step5-files5").run == "b"
    with pytest.raises(CheckpointError, match="no checkpoint c/latest"):
        runs.catalog.find("c/latest")


def test_two_commits_of_one_step_differ_and_the_later_one_counts(runs):
    runs.commit("a", 5, sequence=1, local=False, attempt="earlier")
    later = runs.commit("a", 5, sequence=2, bucket=False, attempt="later")
    [entry] = runs.catalog.entries()
    assert entry.where == "both, differ"
    assert entry.manifest == later and entry.is_local and not entry.is_in_bucket


def test_damage_is_told_of_the_copy_that_has_it(runs):
    manifest = runs.commit("a", 5, 1)
    [entry] = runs.catalog.entries()
    assert runs.catalog.problems(entry) == {"local": [], "bucket": []}
    flip_a_byte(runs.catalog.folder_of(entry) / "trainer_state.json")
    (runs.store.root / "a" / str(manifest.name) / "attempt1" / "metadata.json").unlink()
    assert runs.catalog.problems(entry) == {
        "local": ["trainer_state.json differs from the manifest's crc32c"],
        "bucket": ["metadata.json is missing"],
    }
    described = runs.catalog.describe(entry, verify=True)
    assert described["verified"] is False and len(described["problems"]) == 2


def test_it_says_what_the_metadata_say(runs):
    runs.commit("a", 5, 1, local=False)
    described = runs.catalog.describe(runs.catalog.find("latest"), verify=True)
    assert [described[key] for key in ("step", "loss", "tokens", "files", "where")] == [5, 2.5, 1000, 5, "bucket"]
    assert described["committed"] and described["verified"]
    assert runs.catalog.describe(runs.catalog.find("latest"), verify=False)["verified"] is None


def test_a_document_that_is_damaged_here_is_read_from_the_bucket(runs):
    runs.commit("a", 5, 1)
    entry = runs.catalog.find("latest")
    flip_a_byte(runs.catalog.folder_of(entry) / "metadata.json")
    assert runs.catalog.document(entry, "metadata.json") == METADATA
    alone = Catalog(runs.catalog.folder, None)
    with pytest.raises(CheckpointError, match=r"metadata\.json is missing or differs"):
        alone.document(alone.find("latest"), "metadata.json")


def test_a_local_document_needs_no_bucket(runs):
    runs.commit("a", 5, 1)
    store = FaultyStore(runs.store)
    catalog = Catalog(runs.catalog.folder, store)
    entry = catalog.find("latest", "a")
    catalog.document(entry, "metadata.json")
    assert [name for name in store.names_of("read_bytes") if not name.endswith(MANIFEST_FILE)] == []


def test_tensors_are_read_only_where_they_are_here_and_whole(runs):
    runs.commit("a", 5, 1)
    runs.commit("a", 10, 2, local=False)
    here, far = runs.catalog.entries("a")
    reader = runs.catalog.reader(here)
    assert reader is not None and "mix.weight" in reader.parameter_names
    assert runs.catalog.reader(far) is None
    flip_a_byte(runs.catalog.folder_of(here) / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="damaged here"):
        runs.catalog.reader(here)
