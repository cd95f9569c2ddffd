from __future__ import annotations

import shutil

import pytest

from pretrain.checkpoint import damaged_files, read_manifest
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName
from pretrain.discovery import choose, damaged_objects, fetch, take_inventory
from pretrain.errors import CheckpointError, StorageError
from pretrain.storage import LocalStore
from tests.helpers_training import (
    FaultyStore,
    differing,
    flip_a_byte,
    read_states,
    states_of,
    upload_checkpoint,
    write_checkpoint,
)

RUN = "run"


class Place:
    """A run's local folder and its bucket."""

    def __init__(self, tmp_path):
        self.folder = tmp_path / "local" / RUN
        self.bucket = LocalStore(tmp_path / "bucket")

    def commit(self, step, sequence, *, local=True, bucket=True, attempt="attempt1"):
        manifest = write_checkpoint(self.folder, step, sequence, attempt)
        if bucket:
            upload_checkpoint(self.bucket, RUN, self.folder, manifest)
        if not local:
            shutil.rmtree(self.folder / str(manifest.name))
        return manifest

    def local_file(self, manifest, name="trainer_state.json"):
        return self.folder / str(manifest.name) / name

    def object_file(self, manifest, name="trainer_state.json"):
        return self.bucket.root / RUN / str(manifest.name) / manifest.attempt / name

    def choose(self, resume="auto", store=None):
        store = store or self.bucket
        return choose(take_inventory(self.folder, store, RUN), resume, self.folder, store, RUN)


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_auto_with_nothing_anywhere_starts_afresh(place):
    inventory = take_inventory(place.folder, place.bucket, RUN)
    assert inventory.is_empty and inventory.last_sequence == 0
    assert place.choose() is None
    assert choose(take_inventory(place.folder, None, RUN), "auto", place.folder, None, RUN) is None


def test_the_newest_is_the_last_committed_one_not_the_one_of_the_highest_step(place):
    place.commit(10, sequence=1)
    place.commit(30, sequence=3)
    place.commit(20, sequence=4)  # after a resume from step 10 with another interval
    assert place.choose().name == CheckpointName(0, 20, 20)
    assert take_inventory(place.folder, place.bucket, RUN).last_sequence == 4


def test_what_the_bucket_lacks_is_told_oldest_first(place):
    place.commit(5, 1)
    last = place.commit(10, 5, bucket=False)
    superseded = place.commit(15, 3, local=False, attempt="earlier")
    first = place.commit(15, 4, bucket=False, attempt="later")
    place.commit(20, 7, local=False, attempt="later")
    place.commit(20, 6, bucket=False, attempt="earlier")  # the bucket has a later commit of its step
    assert superseded.name == first.name
    inventory = take_inventory(place.folder, place.bucket, RUN)
    assert inventory.not_in_bucket() == [first, last]


def test_a_local_checkpoint_needs_no_download(place):
    manifest = place.commit(10, 1)
    store = FaultyStore(place.bucket)
    assert place.choose(store=store) == manifest
    assert store.names_of("download") == []


def test_without_the_local_folder_it_comes_from_the_bucket_and_is_then_local(place):
    place.commit(5, 1, local=False)
    manifest = place.commit(10, 2, local=False)
    assert place.choose() == manifest
    assert read_manifest(place.folder / str(manifest.name)) == manifest
    assert differing(dict(states_of(10)), read_states(place.folder, manifest)) == []
    assert not (place.folder / "checkpoint-epoch0-step5-files5").exists()


def test_a_damaged_local_copy_is_replaced_from_the_bucket(place):
    manifest = place.commit(10, 2)
    flip_a_byte(place.local_file(manifest))
    assert place.choose() == manifest
    assert damaged_files(manifest, place.folder / str(manifest.name)) == []


@pytest.mark.parametrize("damage", ["missing", "shorter", "flipped"])
def test_a_checkpoint_damaged_in_the_bucket_is_passed_over_for_an_older_one(place, damage):
    older = place.commit(10, 1)
    newest = place.commit(20, 2, local=False)
    path = place.object_file(newest)
    if damage == "missing":
        path.unlink()
    elif damage == "shorter":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        flip_a_byte(path)
    assert place.choose() == older
    with pytest.raises(CheckpointError):
        read_manifest(place.folder / str(newest.name))  # what was downloaded of it is no checkpoint


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_a_torn_manifest_is_passed_over(place, where):
    older = place.commit(10, 1)
    newest = place.commit(20, 2, local=where == "local", bucket=where == "bucket")
    root = place.folder if where == "local" else place.bucket.root / RUN
    (root / str(newest.name) / MANIFEST_FILE).write_text('{"format": 1, "na')
    inventory = take_inventory(place.folder, place.bucket, RUN)
    assert "is not a checkpoint manifest" in inventory.damaged[newest.name]
    assert place.choose() == older


def test_where_none_verifies_it_is_an_error_that_lists_every_reason(place):
    first, second, third = place.commit(10, 1, bucket=False), place.commit(20, 2, local=False), place.commit(30, 3)
    flip_a_byte(place.local_file(first))
    place.object_file(second).unlink()
    place.local_file(third).unlink()
    place.object_file(third).write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of run run verifies") as caught:
        place.choose()
    for said in (
        f"{first.name} (local): trainer_state.json differs",
        f"{second.name} (bucket): trainer_state.json is missing",
        f"{third.name} (local): trainer_state.json is missing",
        f"{third.name} (bucket): trainer_state.json has 0 bytes",
    ):
        assert said in caught.value.what


def test_a_torn_manifest_alone_is_no_reason_to_start_afresh(place):
    manifest = place.commit(10, 1, local=False)
    (place.bucket.root / RUN / str(manifest.name) / MANIFEST_FILE).write_text("{")
    assert not take_inventory(place.folder, place.bucket, RUN).is_empty
    with pytest.raises(CheckpointError, match="no checkpoint of run run verifies"):
        place.choose()


def test_a_checkpoint_by_name(place):
    older = place.commit(10, 1, local=False)
    place.commit(20, 2)
    assert place.choose(str(older.name)) == older


def test_a_damaged_checkpoint_by_name_is_not_replaced_by_another(place):
    place.commit(10, 1)
    named = place.commit(20, 2)
    flip_a_byte(place.local_file(named))
    place.object_file(named).unlink()
    with pytest.raises(CheckpointError, match=f"{named.name} can't be used: .*local.*bucket"):
        place.choose(str(named.name))


def test_a_name_that_is_not_there_lists_those_that_are(place):
    place.commit(10, 1)
    with pytest.raises(CheckpointError, match="no checkpoint x: there are checkpoint-epoch0-step10-files10"):
        place.choose("x")
    shutil.rmtree(place.folder)
    shutil.rmtree(place.bucket.root)
    with pytest.raises(CheckpointError, match="no checkpoint x: this run has none"):
        place.choose("x")


@pytest.mark.parametrize("method", ["list", "read_bytes", "download"])
def test_an_outage_of_the_bucket_is_no_reason_to_fall_back(place, method):
    place.commit(10, 1)
    place.commit(20, 2, local=False)

    def outage(called, name):
        if called == method:
            raise StorageError("503", "Wait.")

    with pytest.raises(StorageError, match="503"):
        place.choose(store=FaultyStore(place.bucket, outage))


def test_a_download_that_breaks_off_leaves_no_checkpoint(place):
    manifest = place.commit(10, 1, local=False)

    def outage(called, name):
        if called == "download" and name.endswith("trainer_state.json"):
            raise StorageError("reset")

    store = FaultyStore(place.bucket, outage)
    with pytest.raises(StorageError, match="reset"):
        fetch(manifest, place.folder / str(manifest.name), store, RUN)
    assert len(store.names_of("download")) == 3  # the two parts had come
    assert take_inventory(place.folder, None, RUN).is_empty
    assert place.choose() == manifest  # the next try gets it whole


def test_objects_of_another_attempt_do_not_count(place):
    manifest = place.commit(10, 1)
    path = place.object_file(manifest)
    path.parent.rename(path.parent.with_name("attempt2"))
    assert len(damaged_objects(manifest, place.bucket, RUN)) == len(manifest.files)


def test_other_files_and_runs_are_not_taken_for_checkpoints(place):
    manifest = place.commit(10, 1)
    upload_checkpoint(place.bucket, "other", place.folder, manifest)
    place.bucket.create(f"{RUN}/notes/manifest.json", b"{}")
    place.bucket.create(f"{RUN}/{manifest.name}/attempt1/more/manifest.json", b"{}")
    (place.folder / "checkpoint-old").mkdir()
    (place.folder / "checkpoint-old" / MANIFEST_FILE).write_text("{")
    (place.folder / "checkpoint-epoch0-step99-files99").mkdir()  # never committed
    inventory = take_inventory(place.folder, place.bucket, RUN)
    assert set(inventory.local) == set(inventory.bucket) == {manifest.name}
    assert inventory.damaged == {}
