from __future__ import annotations

import os
import shutil
import threading
import time

import pytest
import torch.distributed as dist

from pretrain.checkpoint_manifest import MANIFEST_FILE, Manifest
from pretrain.errors import CheckpointError, StorageError
from pretrain.storage import LocalStore
from pretrain.upload_queue import UploadQueue
from pretrain.uploads import BucketManifest, UploadJob, list_commits, old_commits
from tests.helpers_training import FaultyStore, single_rank, upload_checkpoint, write_checkpoint

RUN = "run"
PATIENCE_S = 120


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with single_rank() as only:
        yield only


class Uploads:
    """An upload queue over a bucket that can fail, and what it told."""

    def __init__(self, tmp_path, keep=0, before=None):
        self.folder = tmp_path / "local"
        self.store = FaultyStore(LocalStore(tmp_path / "bucket"), before)
        self.told = []
        self.queue = UploadQueue(
            self.store,
            RUN,
            list_commits(self.store, RUN),
            keep=keep,
            rank=0,
            world_size=1,
            group=dist.group.WORLD,
            workers=2,
            on_commit=lambda manifest: self.told.append(("commit", str(manifest.name))),
            on_failure=lambda name, problem: self.told.append(("failure", name, problem)),
        )

    def put(self, step, sequence, attempt="attempt1"):
        shutil.rmtree(self.folder / f"checkpoint-epoch0-step{step}-files{step}", ignore_errors=True)
        manifest = write_checkpoint(self.folder, step, sequence, attempt)
        self.queue.put(UploadJob(manifest, self.folder / str(manifest.name), tuple(manifest.files)))
        return manifest

    def commit(self, step, sequence, attempt="attempt1"):
        manifest = self.put(step, sequence, attempt)
        self.queue.wait()
        assert self.queue.failure is None and self.queue.waiting == []
        return manifest

    def commits(self):
        return {str(name): commit.manifest for name, commit in list_commits(self.store.store, RUN).items()}


def target(manifest: Manifest) -> str:
    return f"{RUN}/{manifest.name}/{MANIFEST_FILE}"


def test_the_manifest_is_created_after_every_file(tmp_path):
    uploads = Uploads(tmp_path)
    manifest = uploads.commit(5, 1)
    uploads.queue.close()
    writes = [call for call in uploads.store.calls if call[0] in ("upload", "create")]
    assert writes[-1] == ("create", target(manifest))
    assert sorted(writes[:-1]) == sorted(
        ("upload", f"{RUN}/{manifest.name}/attempt1/{file}") for file in manifest.files
    )
    assert uploads.commits() == {str(manifest.name): manifest}
    assert uploads.queue.committed == [manifest]
    assert uploads.told == [("commit", str(manifest.name))]


@pytest.mark.parametrize("method", ["upload", "create"])
def test_an_upload_that_fails_commits_nothing_and_is_counted_and_the_next_one_goes_on(tmp_path, method):
    def before(called, name):
        if called == method and "step5-" in name and name.endswith(("trainer_state.json", MANIFEST_FILE)):
            raise StorageError("503 for too long", "Wait.")

    uploads = Uploads(tmp_path, before=before)
    failed, good = uploads.put(5, 1), uploads.put(10, 2)
    uploads.queue.close()
    assert uploads.commits() == {str(good.name): good}
    assert uploads.queue.waiting == [str(failed.name)]
    assert uploads.queue.failure is None  # the training goes on
    assert uploads.told[0][:2] == ("failure", str(failed.name)) and "503 for too long" in uploads.told[0][2]
    assert uploads.told[1] == ("commit", str(good.name))
    assert (uploads.folder / str(failed.name) / MANIFEST_FILE).is_file()  # it stays here for the next start


def test_a_file_that_changed_since_its_manifest_is_not_committed(tmp_path):
    uploads = Uploads(tmp_path)
    manifest = write_checkpoint(uploads.folder, 5, 1)
    (uploads.folder / str(manifest.name) / "trainer_state.json").write_text('{"step": 6}\n')
    uploads.queue.put(UploadJob(manifest, uploads.folder / str(manifest.name), tuple(manifest.files)))
    uploads.queue.close()
    assert uploads.commits() == {}
    assert "trainer_state.json is not what the manifest says" in uploads.told[0][2]


def test_a_commit_of_somebody_else_stops_the_run_and_is_not_overwritten(tmp_path):
    uploads = Uploads(tmp_path)
    theirs = write_checkpoint(tmp_path / "theirs", 5, 1, attempt="theirs")
    upload_checkpoint(uploads.store.store, RUN, tmp_path / "theirs", theirs)  # after we have started
    uploads.put(5, 1)
    later = uploads.put(10, 2)
    uploads.queue.close()
    assert isinstance(uploads.queue.failure, CheckpointError) and uploads.queue.failure.shared
    assert "somebody else is writing this run" in uploads.queue.failure.what
    assert uploads.commits() == {str(theirs.name): theirs}
    assert str(later.name) not in uploads.commits()  # nothing more is written


def test_one_who_is_behind_somebody_else_stops_though_their_commit_of_that_step_is_pruned(tmp_path):
    uploads = Uploads(tmp_path)
    uploads.commit(5, 1)
    ahead = write_checkpoint(tmp_path / "theirs", 20, 4, attempt="theirs")
    upload_checkpoint(uploads.store.store, RUN, tmp_path / "theirs", ahead)
    late = uploads.put(10, 2)
    uploads.queue.close()
    assert isinstance(uploads.queue.failure, CheckpointError)
    assert f"somebody else is writing this run: {uploads.store.url}/{RUN}/{ahead.name} is new" in str(
        uploads.queue.failure
    )
    assert str(late.name) not in uploads.commits() and str(ahead.name) in uploads.commits()


def test_one_that_slept_before_its_commit_takes_it_back_where_others_have_gone_on(tmp_path):
    """Stopped between its look at the bucket and its commit, whose name the others have pruned meanwhile."""
    ahead = write_checkpoint(tmp_path / "theirs", 20, 4, attempt="theirs")

    def before(called, name):
        if called == "create" and "step10" in name and not uploads.commits():
            upload_checkpoint(uploads.store.store, RUN, tmp_path / "theirs", ahead)

    uploads = Uploads(tmp_path, before=before)
    uploads.put(10, 2)
    uploads.queue.close()
    assert isinstance(uploads.queue.failure, CheckpointError) and f"{ahead.name} is new" in uploads.queue.failure.what
    assert uploads.commits() == {str(ahead.name): ahead}


@pytest.mark.parametrize("torn", [False, True])
def test_a_commit_that_was_there_at_the_start_is_superseded(tmp_path, torn):
    store = LocalStore(tmp_path / "bucket")
    before = write_checkpoint(tmp_path / "before", 5, 1, attempt="before")
    upload_checkpoint(store, RUN, tmp_path / "before", before)
    if torn:
        (store.root / target(before)).write_text("{")
    uploads = Uploads(tmp_path)
    manifest = uploads.commit(5, 2)
    uploads.queue.close()
    assert uploads.commits() == {str(manifest.name): manifest}


@pytest.mark.parametrize("method", ["delete", "create"])
def test_one_that_could_not_be_superseded_at_once_is_no_conflict_later(tmp_path, method):
    store = LocalStore(tmp_path / "bucket")
    before = write_checkpoint(tmp_path / "before", 5, 1, attempt="before")
    upload_checkpoint(store, RUN, tmp_path / "before", before)
    failing = [StorageError("503 for too long")]

    def fail_once(called, name):
        if called == method and name == target(before) and failing:
            raise failing.pop()

    uploads = Uploads(tmp_path, before=fail_once)
    manifest = uploads.put(5, 2)
    uploads.queue.wait()
    assert uploads.queue.waiting == [str(manifest.name)] and uploads.queue.failure is None
    uploads.commit(10, 3)
    uploads.queue.close()
    assert uploads.queue.failure is None and uploads.commits()[str(manifest.name)] == manifest


def test_a_bucket_that_is_away_costs_one_deadline_and_not_one_for_each_file(tmp_path):
    begun = []
    barrier = threading.Barrier(2)  # of both workers

    def away(called, name):
        if called == "upload":
            begun.append(name)
            barrier.wait(timeout=PATIENCE_S)
            raise StorageError("503 for too long")

    uploads = Uploads(tmp_path, before=away)
    manifest = uploads.put(5, 1)
    uploads.queue.close()
    assert len(manifest.files) > 2 and len(begun) == 2
    assert "503 for too long" in uploads.told[0][2]


def test_one_that_changed_since_the_start_is_not_superseded(tmp_path):
    store = LocalStore(tmp_path / "bucket")
    before = write_checkpoint(tmp_path / "before", 5, 1, attempt="before")
    upload_checkpoint(store, RUN, tmp_path / "before", before)
    uploads = Uploads(tmp_path)
    theirs = write_checkpoint(tmp_path / "theirs", 5, 3, attempt="theirs")
    (store.root / target(before)).unlink()
    upload_checkpoint(store, RUN, tmp_path / "theirs", theirs)
    uploads.put(5, 2)
    uploads.queue.close()
    assert isinstance(uploads.queue.failure, CheckpointError)
    assert uploads.commits() == {str(theirs.name): theirs}


def test_a_leftover_of_an_earlier_process_is_superseded_when_its_step_is_reached_again(tmp_path):
    uploads = Uploads(tmp_path)
    uploads.commit(10, 2, attempt="killed")  # a leftover, uploaded by this process for the one that was killed
    again = uploads.commit(10, 3, attempt="now")
    uploads.queue.close()
    assert uploads.commits() == {str(again.name): again}


def test_the_same_commit_twice_is_no_conflict(tmp_path):
    uploads = Uploads(tmp_path)
    manifest = uploads.commit(5, 1)
    uploads.queue.put(UploadJob(manifest, uploads.folder / str(manifest.name), tuple(manifest.files)))
    uploads.queue.close()
    assert uploads.queue.failure is None and uploads.queue.waiting == []
    assert uploads.commits() == {str(manifest.name): manifest}


def test_the_newest_by_sequence_are_kept(tmp_path):
    uploads = Uploads(tmp_path, keep=2)
    for sequence, step in enumerate((10, 30, 20, 15), 1):
        uploads.commit(step, sequence)
    uploads.queue.close()
    assert sorted(manifest.sequence for manifest in uploads.commits().values()) == [3, 4]
    left = {info.name.split("/")[1] for info in uploads.store.store.list(f"{RUN}/")}
    assert left == {"checkpoint-epoch0-step20-files20", "checkpoint-epoch0-step15-files15"}


def test_pruning_deletes_the_manifest_first_and_failing_at_it_stops_nothing(tmp_path):
    def before(called, name):
        if called == "delete" and name.endswith("trainer_state.json"):
            raise StorageError("403 on delete")

    uploads = Uploads(tmp_path, keep=1, before=before)
    old = uploads.commit(5, 1)
    new = uploads.commit(10, 2)
    uploads.queue.close()
    assert uploads.store.names_of("delete")[0] == target(old)
    assert uploads.commits() == {str(new.name): new}
    assert uploads.queue.failure is None


def test_what_a_pruning_that_was_cut_off_has_left_is_pruned_later_and_nothing_that_is_under_way(tmp_path):
    """By the same process, and by a later one."""
    fails = []

    def before(called, name):
        if called == "delete" and name.endswith("trainer_state.json") and fails:
            raise StorageError(fails.pop())

    def names(uploads):
        return {info.name.split("/")[1].split("-")[2] for info in uploads.store.store.list(f"{RUN}/")}

    uploads = Uploads(tmp_path, keep=1, before=before)
    uploads.commit(5, 1)
    fails.append("403 on delete")
    uploads.commit(10, 2)
    assert names(uploads) == {"step5", "step10"} and len(uploads.commits()) == 1
    uploads.commit(15, 3)
    assert names(uploads) == {"step15"}
    fails.append("killed")
    uploads.commit(20, 4)
    uploads.queue.close()
    assert names(uploads) == {"step15", "step20"}

    again = Uploads(tmp_path, keep=1)
    again.store.store.create(f"{RUN}/checkpoint-epoch0-step7-files7/theirs/config.yaml", b"under way")
    again.commit(25, 5)
    assert names(again) == {"step7", "step15", "step25"}  # for all it knows somebody is uploading both
    two_days_ago_s = time.time() - 48 * 3600
    for path in (again.store.store.root / RUN / "checkpoint-epoch0-step15-files15").rglob("*"):
        os.utime(path, (two_days_ago_s, two_days_ago_s))
    again.commit(30, 6)
    assert names(again) == {"step7", "step30"}
    again.queue.close()


def test_a_commit_that_is_pruned_while_the_bucket_is_listed_is_none(tmp_path):
    uploads = Uploads(tmp_path)
    first, second = uploads.commit(5, 1), uploads.commit(10, 2)
    uploads.queue.close()

    def before(called, name):
        if called == "read_bytes" and name == target(first):
            store.store.delete(name)

    store = FaultyStore(uploads.store.store, before)
    assert [commit.manifest for commit in list_commits(store, RUN).values()] == [second]


def test_pruning_is_done_before_another_rank_may_go_on(tmp_path):
    """Rank 0 tells how a commit ended only after pruning: the next upload may lie under a name that is pruned."""
    uploads = Uploads(tmp_path, keep=1)
    told_at_delete = []
    uploads.store.before = lambda called, name: told_at_delete.append(len(uploads.told)) if called == "delete" else None
    uploads.commit(5, 1)
    uploads.commit(10, 2)
    uploads.queue.close()
    assert set(told_at_delete) == {1}


def test_putting_returns_at_once_and_waiting_waits(tmp_path):
    go_on, begun = threading.Event(), threading.Event()

    def before(called, name):
        if called == "upload":
            begun.set()
            assert go_on.wait(PATIENCE_S)

    uploads = Uploads(tmp_path, before=before)
    uploads.put(5, 1)
    assert begun.wait(PATIENCE_S)
    assert uploads.queue.committed == []
    waiter = threading.Thread(target=uploads.queue.wait)
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    go_on.set()
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive() and len(uploads.queue.committed) == 1
    uploads.queue.close()


def test_an_unexpected_error_in_the_thread_reaches_the_run(tmp_path):
    def before(called, name):
        if called == "upload":
            raise ZeroDivisionError("a bug")

    uploads = Uploads(tmp_path, before=before)
    uploads.put(5, 1)
    uploads.queue.close()
    assert isinstance(uploads.queue.failure, ZeroDivisionError)


def test_keep_0_keeps_all_and_torn_manifests_are_never_pruned(tmp_path):
    manifests = [write_checkpoint(tmp_path, step, step) for step in range(1, 5)]
    commits = {manifest.name: BucketManifest(1, manifest) for manifest in manifests}
    assert old_commits(commits, 0) == []
    assert [name for name, _ in old_commits(commits, 3)] == [manifests[0].name]
    commits[manifests[3].name] = BucketManifest(1, None, "torn")
    assert old_commits(commits, 3) == []
