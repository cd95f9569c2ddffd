"""What the queue does beyond one upload after the other, which test_uploads.py shows: it tries again, and it looks."""

from __future__ import annotations

import pytest

from pretrain import upload_queue
from pretrain.checkpoint_manifest import MANIFEST_FILE
from pretrain.errors import CheckpointError, StorageError
from pretrain.storage import LocalStore
from pretrain.upload_queue import _Round
from tests.helpers_training import run_two_ranks, single_rank, upload_checkpoint, write_checkpoint
from tests.unit.test_uploads import PATIENCE_S, RUN, Uploads


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with single_rank() as only:
        yield only


class Away:
    """A bucket that nothing can be written to while `is_away`, or up to its next refusal of `last_refused`."""

    def __init__(self):
        self.is_away, self.last_refused = True, ""

    def __call__(self, method, name):
        if self.is_away and method in ("upload", "create"):
            self.is_away = not self.last_refused or self.last_refused not in name
            raise StorageError("503")


def steps(uploads):
    return [manifest.name.step for manifest in uploads.queue.committed]


def wait_until(condition):
    import time

    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_waits_is_tried_again_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(upload_queue, "TICK_S", 0.01)
    monkeypatch.setattr(upload_queue, "RETRY_S", 0.05)
    away = Away()
    uploads = Uploads(tmp_path, before=away)
    for step in (5, 10, 15):
        uploads.put(step, step)
    uploads.queue.wait()
    assert len(uploads.queue.waiting) == 3 and steps(uploads) == []
    away.last_refused = "step15-"  # a round that fails ends with the newest, and the next begins with the oldest
    wait_until(lambda: len(steps(uploads)) == 3)
    assert steps(uploads) == [5, 10, 15] and uploads.queue.waiting == []
    uploads.queue.close()
    assert uploads.queue.failure is None  # our own older ones are no other trainer's


def test_one_that_can_never_be_uploaded_blocks_no_other(tmp_path):
    uploads = Uploads(tmp_path)
    bad = uploads.put(5, 1)
    (uploads.folder / str(bad.name) / "trainer_state.json").unlink()
    for sequence in (2, 3, 4):
        uploads.put(5 * sequence, sequence)
    uploads.queue.close()
    assert sorted(steps(uploads)) == [10, 15, 20]  # which goes first depends on what was put when the bad one failed
    assert uploads.queue.waiting == [str(bad.name)]
    assert [told[0] for told in uploads.told].count("failure") == 1  # said once, however often it is tried


def test_what_was_dropped_is_not_uploaded(tmp_path):
    away = Away()
    uploads = Uploads(tmp_path, before=away)
    for step in (5, 10, 15):
        uploads.put(step, step)
        uploads.queue.wait()
    assert uploads.queue.too_many(2) == [5]
    assert [job.manifest.sequence for job in uploads.queue.drop([5])] == [5]
    away.is_away = False
    uploads.put(20, 20)
    uploads.queue.close()
    assert steps(uploads) == [10, 15, 20]


def test_a_commit_whose_reply_was_lost_is_found_to_be_ours(tmp_path):
    uploads = Uploads(tmp_path)
    create, lost = uploads.store.store.create, [True]

    def create_and_lose(name, data):
        info = create(name, data)
        if lost.pop() if lost else False:
            raise StorageError("connection reset")
        return info

    uploads.store.store.create = create_and_lose
    first = uploads.put(5, 1)
    uploads.queue.wait()
    second = uploads.put(10, 2)
    uploads.queue.close()
    assert uploads.queue.failure is None and uploads.queue.committed == [first, second]


def test_somebody_ahead_is_noticed_between_two_commits(tmp_path, monkeypatch):
    monkeypatch.setattr(upload_queue, "TICK_S", 0.01)
    monkeypatch.setattr(upload_queue, "POLL_S", 0.05)
    uploads = Uploads(tmp_path)
    uploads.commit(5, 2)
    behind = write_checkpoint(tmp_path / "theirs", 4, 1, attempt="theirs")
    upload_checkpoint(uploads.store.store, RUN, tmp_path / "theirs", behind)
    looks = len(uploads.store.names_of("list"))
    wait_until(lambda: len(uploads.store.names_of("list")) > looks + 1)
    assert uploads.queue.failure is None  # the other one is behind, so it is the one to stop
    ahead = write_checkpoint(tmp_path / "theirs", 10, 3, attempt="theirs")
    upload_checkpoint(uploads.store.store, RUN, tmp_path / "theirs", ahead)
    wait_until(lambda: uploads.queue.failure is not None)
    assert isinstance(uploads.queue.failure, CheckpointError)
    assert f"somebody else is writing this run: {uploads.store.url}/{RUN}/{ahead.name}" in str(uploads.queue.failure)


def test_somebody_ahead_is_noticed_though_something_waits_for_the_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(upload_queue, "TICK_S", 0.01)
    monkeypatch.setattr(upload_queue, "POLL_S", 0.05)
    uploads = Uploads(tmp_path)
    bad = uploads.put(5, 1)
    (uploads.folder / str(bad.name) / "trainer_state.json").unlink()  # it will wait for ever
    uploads.queue.wait()
    assert uploads.queue.waiting == [str(bad.name)]
    ahead = write_checkpoint(tmp_path / "theirs", 10, 3, attempt="theirs")
    upload_checkpoint(uploads.store.store, RUN, tmp_path / "theirs", ahead)
    wait_until(lambda: uploads.queue.failure is not None)
    assert "somebody else is writing this run" in str(uploads.queue.failure)
    uploads.queue.close()


def test_a_commit_costs_a_look_before_and_one_behind(tmp_path):
    uploads = Uploads(tmp_path)
    uploads.commit(5, 1)
    uploads.commit(10, 2)
    del uploads.store.calls[:]
    uploads.commit(15, 3)
    called = [method for method, _ in uploads.store.calls if method != "upload"]
    assert called == ["list", "create", "list"]
    uploads.queue.close()


def test_a_round_is_cut_short_where_the_bucket_is_away():
    a_round = _Round()
    assert a_round.next({1, 2, 3, 4}, {4}) == 1
    a_round.ended(1, failed=True)
    assert a_round.next({1, 2, 3, 4}, {4}) == 4  # the newest is tried whatever the others do
    a_round.ended(4, failed=True)
    assert a_round.next({1, 2, 3, 4}, {4}) is None
    assert a_round.next({1, 2, 3, 4}, set()) is None  # not before some time has passed
    assert a_round.next({1, 2, 3, 4, 5}, {5}) == 1  # or something new has come
    a_round.ended(1, failed=False)
    assert a_round.next({2, 3, 4, 5}, {5}) == 2


TWO_RANKS = """
    import time
    from pathlib import Path
    import torch.distributed as dist
    from pretrain import upload_queue
    from pretrain.storage import LocalStore
    from pretrain.uploads import UploadJob, list_commits
    from pretrain.ranks import background_group
    from tests.helpers_training import FaultyStore, write_checkpoint
    from pretrain.errors import StorageError

    root, ends = Path(sys.argv[1]), sys.argv[2]
    away = [True]
    def before(method, name):
        if away and method == "upload" and me.rank == 1:
            raise StorageError("503 on rank 1 only")
    store = FaultyStore(LocalStore(root / "bucket"), before)
    queue = upload_queue.UploadQueue(
        store, "run", {}, keep=0, rank=me.rank, world_size=2, group=background_group(), workers=2,
        on_commit=lambda manifest: None, on_failure=lambda name, problem: None)
    def put(step):
        manifest = write_checkpoint(root / f"rank{me.rank}", step, step)
        mine = tuple(sorted(manifest.files))[me.rank::2]
        queue.put(UploadJob(manifest, root / f"rank{me.rank}" / str(manifest.name), mine))
    for step in (1, 2, 3):
        put(step)
        time.sleep(0.05 * me.rank)  # the ranks are never quite together
    queue.wait()
    result = {"failed": queue.waiting, "early": [m.name.step for m in queue.committed]}
    too_many = me.from_first({"gone": queue.too_many(2)})["gone"]
    queue.drop(too_many)
    away.clear()
    put(4)
    if ends == "close":
        queue.close()
    else:
        queue.wait()
        if me.rank == 1:
            queue.abandon()
        queue._thread.join(180)  # the group's own patience is much longer
        result["ended"] = not queue._thread.is_alive()
    result["committed"] = [m.name.step for m in queue.committed]
    print(json.dumps(result))
"""


@pytest.mark.parametrize("ends", ["close", "abandon"])
def test_two_ranks_wait_try_again_and_end_together(tmp_path, ends):
    for result in run_two_ranks(TWO_RANKS, arguments=(str(tmp_path), ends)):
        assert len(result["failed"]) == 3 and result["early"] == []
        assert result["committed"] == [2, 3, 4]
        assert result.get("ended", True)
    names = [info.name for info in LocalStore(tmp_path / "bucket").list(f"{RUN}/")]
    assert sum(name.endswith(MANIFEST_FILE) for name in names) == 3
