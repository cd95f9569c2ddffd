from __future__ import annotations

import json
import shutil
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pretrain import checkpoint, keeper, local_writer, upload_queue
from pretrain.checkpoint import CheckpointReader, damaged_files, read_manifest
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName
from pretrain.config import CheckpointConfig, StorageConfig
from pretrain.errors import CheckpointError, ShardError, StorageError
from pretrain.failpoints import arm
from pretrain.keeper import Keeper
from pretrain.run_lock import TRAINER_FILE, sole_use
from pretrain.storage import LocalStore
from tests.helpers_training import (
    FaultyStore,
    TinyModel,
    differing,
    flip_a_byte,
    run_two_ranks,
    single_rank,
    states_of,
    upload_checkpoint,
    write_checkpoint,
)

RUN = "run"
PATIENCE_S = 120
DOCUMENTS = {"trainer_state.json": "{}\n", "config.yaml": "run: {}\n"}


@pytest.fixture(scope="module", autouse=True)
def ranks():
    with single_rank() as only:
        yield only


class SavedEngine:
    """What the keeper asks of an engine: its tensors, which tell the step."""

    states_stay = False

    def __init__(self, step):
        self.step = step

    def parameter_states(self):
        return iter(states_of(self.step))


class Runs:
    """The starts of one run, one after the other."""

    def __init__(self, tmp_path, ranks, monkeypatch):
        self.folder = tmp_path / "local" / RUN
        self.store = FaultyStore(LocalStore(tmp_path / "bucket"))
        self.config = CheckpointConfig(dir=str(tmp_path / "local"), url=str(tmp_path / "bucket"), keep=3)
        self.ranks = ranks
        monkeypatch.setattr(keeper, "open_store", lambda url, config: self.store)

    def start(self, **changes):
        return Keeper(replace(self.config, **changes), StorageConfig(), RUN, self.ranks)

    def local_steps(self):
        return sorted(CheckpointName.parse(path.parent.name).step for path in self.folder.glob(f"*/{MANIFEST_FILE}"))

    def bucket_steps(self):
        names = [info.name.split("/") for info in self.store.store.list(f"{RUN}/")]
        return sorted(CheckpointName.parse(name[1]).step for name in names if name[2:] == [MANIFEST_FILE])


@pytest.fixture
def runs(tmp_path, ranks, monkeypatch):
    return Runs(tmp_path, ranks, monkeypatch)


def save(kept, step):
    return kept.save(CheckpointName(0, step, step), SavedEngine(step), DOCUMENTS)


def test_a_save_is_committed_here_and_in_the_bucket_and_resumed_to_the_last_bit(runs):
    kept = runs.start()
    assert kept.resume() is None
    save(kept, 5)
    kept.wait()
    kept.check()
    name = "checkpoint-epoch0-step5-files5"
    assert kept.committed == kept.verified() == [name] and kept.uploads_failed == [] and kept.last_saved_step == 5
    assert [kind for kind, _ in kept.events()] == ["checkpoint_saved", "checkpoint_committed"]
    assert list(kept.events()) == []
    kept.close()
    shutil.rmtree(runs.folder)
    again = runs.start(resume="auto")
    reader = again.resume()
    assert reader.manifest.name == CheckpointName(0, 5, 5)
    loaded = {parameter: reader.parameter_state(parameter) for parameter, _ in TinyModel().named_parameters()}
    assert differing(dict(states_of(5)), loaded) == []
    assert set(DOCUMENTS) <= set(reader.manifest.files)
    again.close()


def test_without_a_bucket_checkpoints_are_kept_here(runs):
    kept = runs.start(url="", keep=2)
    for step in (5, 10, 15):
        save(kept, step)
    kept.close()
    kept.check()
    assert kept.committed == [f"checkpoint-epoch0-step{step}-files{step}" for step in (5, 10, 15)]
    assert sorted(kept.verified()) == ["checkpoint-epoch0-step10-files10", "checkpoint-epoch0-step15-files15"]
    assert runs.local_steps() == [10, 15]
    flip_a_byte(runs.folder / "checkpoint-epoch0-step15-files15" / "config.yaml")
    assert kept.verified() == ["checkpoint-epoch0-step10-files10"]


def test_a_save_returns_before_it_is_written(runs, monkeypatch):
    go_on, begun = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        assert go_on.wait(PATIENCE_S)
        return checkpoint.write_parts(*arguments)

    monkeypatch.setattr(local_writer, "write_parts", slow)
    kept = runs.start()
    save(kept, 5)
    assert begun.wait(PATIENCE_S)
    assert runs.local_steps() == [] and kept.committed == []
    go_on.set()
    save(kept, 10)  # waits for the one before
    kept.close()
    assert runs.local_steps() == runs.bucket_steps() == [5, 10]


@pytest.mark.parametrize("states_stay", [False, True])
def test_what_is_saved_is_the_state_at_the_time_of_saving(runs, monkeypatch, states_stay):
    go_on = threading.Event()

    def slow(*arguments):
        assert go_on.wait(PATIENCE_S)
        return checkpoint.write_parts(*arguments)

    monkeypatch.setattr(local_writer, "write_parts", slow)
    kept = runs.start(url="")
    states = states_of(5)
    engine = SavedEngine(5)
    engine.parameter_states, engine.states_stay = lambda: iter(states), states_stay
    kept.save(CheckpointName(0, 5, 5), engine, DOCUMENTS)
    engine.before_update()
    for _, state in states:
        state["weight"].zero_()  # the training goes on
    go_on.set()
    kept.close()
    reader = runs.start(url="", resume="auto").resume()
    expected = dict(states_of(5))
    assert differing(expected, {name: reader.parameter_state(name) for name in expected}) == []


def test_in_the_foreground_a_save_waits_for_its_upload(runs):
    kept = runs.start(background_upload=False)
    save(kept, 5)
    assert kept.committed == ["checkpoint-epoch0-step5-files5"] and runs.bucket_steps() == [5]
    kept.close()


def test_while_a_save_in_the_foreground_waits_for_its_upload_the_watchdog_is_told(runs, monkeypatch):
    monkeypatch.setattr(keeper, "LOOK_EVERY_S", 0.01)
    told = threading.Event()

    def before(method, name):
        if method == "upload":
            assert told.wait(PATIENCE_S)

    runs.store.before = before
    kept = runs.start(background_upload=False)
    kept.excuse = told.set
    save(kept, 5)
    assert kept.committed == ["checkpoint-epoch0-step5-files5"] and kept._uploads.moved >= len(DOCUMENTS)
    kept.close()


def test_an_upload_that_stands_still_for_longer_than_it_is_retried_is_a_hang(runs, monkeypatch):
    kept, clock, moved, told = runs.start(), SimpleNamespace(now_s=1000.0), SimpleNamespace(moved=0), []
    limit_s = StorageConfig().deadline_s + StorageConfig().timeout_s

    def wait(timeout_s):
        clock.now_s += 10
        moved.moved += clock.now_s <= 3000
        return clock.now_s >= 5000

    with monkeypatch.context() as fake:
        fake.setattr(keeper, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
        fake.setattr(kept, "wait", wait)
        fake.setattr(kept, "_uploads", moved)
        fake.setattr(kept, "excuse", lambda: told.append(clock.now_s))
        kept._wait_in_the_loop()
    assert told == [*range(1010, int(3000 + limit_s), 10)]
    kept.close()


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_a_fresh_start_over_an_existing_run_is_refused(runs, place):
    kept = runs.start()
    save(kept, 5)
    kept.close()
    shutil.rmtree(runs.folder if place == "bucket" else runs.store.store.root)
    with pytest.raises(CheckpointError, match=r"run run already has checkpoints .*step5") as caught:
        runs.start().resume()
    assert "--resume auto" in caught.value.mend and "--run NAME" in caught.value.mend
    assert caught.value.shared


def test_resuming_by_name_what_is_not_there_is_an_error_and_auto_is_not(runs):
    with pytest.raises(CheckpointError, match="no checkpoint checkpoint-epoch0-step5-files5"):
        runs.start(resume="checkpoint-epoch0-step5-files5").resume()
    assert runs.start(resume="auto").resume() is None


def test_the_sequence_goes_on_after_a_restart(runs):
    kept = runs.start()
    save(kept, 5)
    save(kept, 10)
    kept.close()
    again = runs.start(resume="checkpoint-epoch0-step5-files5")
    again.resume()
    save(again, 7)
    again.close()
    assert read_manifest(runs.folder / "checkpoint-epoch0-step7-files7").sequence == 3
    newest = runs.start(resume="auto").resume()
    assert newest.manifest.name.step == 7


def test_an_error_of_the_writer_reaches_the_run_and_earlier_checkpoints_hold(runs, monkeypatch):
    kept = runs.start()
    save(kept, 5)
    kept.wait()

    def full(snapshot, folder, *ranks):
        (folder / "model.part").write_bytes(b"half")
        raise StorageError("can't write it: No space left on device", "Free space.")

    monkeypatch.setattr(local_writer, "write_parts", full)
    save(kept, 10)
    kept.wait()
    with pytest.raises(StorageError, match="No space left") as caught:
        kept.check()
    assert caught.value.mend == "Free space." and caught.value.shared
    save(kept, 15)  # is not tried, and blocks nobody
    kept.close()
    assert runs.local_steps() == runs.bucket_steps() == [5]
    assert [path.name for path in runs.folder.iterdir()] == ["checkpoint-epoch0-step5-files5"]  # nothing half-written


def test_an_unexpected_error_of_the_writer_reaches_the_run_too(runs, monkeypatch):
    kept = runs.start()
    monkeypatch.setattr(local_writer, "write_parts", lambda *arguments: 1 / 0)
    save(kept, 5)
    kept.close()
    with pytest.raises(ZeroDivisionError):
        kept.check()


def test_an_upload_that_fails_is_an_event_and_is_uploaded_at_the_next_start(runs):
    def outage(method, name):
        if method == "upload":
            raise StorageError("503")

    kept = runs.start()
    runs.store.before = outage
    save(kept, 5)
    kept.close()
    kept.check()  # no reason to stop
    assert kept.uploads_failed == ["checkpoint-epoch0-step5-files5"] and kept.committed == []
    assert [kind for kind, _ in kept.events()] == ["checkpoint_saved", "upload_failed"]
    runs.store.before = lambda method, name: None
    again = runs.start(resume="auto")
    assert again.resume().manifest.name.step == 5
    again.upload_leftovers()
    again.close()
    assert again.committed == again.verified() == ["checkpoint-epoch0-step5-files5"]
    last = runs.start(resume="auto")
    last.upload_leftovers()
    last.close()
    assert last.committed == []  # nothing was left over


def test_damaged_leftovers_are_not_uploaded(runs):
    manifest = write_checkpoint(runs.folder, 5, 1)
    flip_a_byte(runs.folder / str(manifest.name) / "trainer_state.json")
    kept = runs.start(resume="auto")
    kept.upload_leftovers()
    kept.close()
    assert runs.bucket_steps() == []


def test_a_complete_run_is_not_done_while_its_last_checkpoint_is_here_only_however_often_it_is_started(runs):
    def away(method, name):
        if method == "upload":
            raise StorageError("503 for too long")

    runs.store.before = away
    first = runs.start()
    save(first, 5)
    first.close()
    with pytest.raises(StorageError, match="step5-files5 did not reach"):
        first.check_last_commit()
    for is_away in (True, False):
        runs.store.before = away if is_away else lambda method, name: None
        again = runs.start(resume="auto")
        assert again.resume().manifest.name.step == 5
        again.upload_leftovers()
        again.close()
        if is_away:
            with pytest.raises(StorageError, match="step5-files5 did not reach"):
                again.check_last_commit()
        else:
            again.check_last_commit()


def test_archives_that_a_kill_left_half_made_do_not_pile_up(runs):
    def leave_a_copy(method, name):
        if name.endswith(".tar"):
            [part] = runs.folder.glob(".*.part")
            shutil.copy(part, part.with_stem(f"{part.stem}0"))

    runs.store.before = leave_a_copy
    first = runs.start(archive="tar")
    save(first, 5)
    first.close()
    assert len(list(runs.folder.glob(".*.part"))) == 1
    runs.start(resume="auto").close()
    assert not list(runs.folder.glob(".*.part")) and runs.local_steps() == runs.bucket_steps() == [5]


def test_without_a_bucket_a_second_trainer_on_the_same_disk_is_refused(runs):
    first = runs.start(url="")
    with pytest.raises(CheckpointError, match="in use by another trainer") as caught:
        runs.start(url="", resume="auto")
    assert caught.value.shared
    save(first, 5)
    first.close()
    first.check()
    second = runs.start(url="", resume="auto")
    assert second.resume().manifest.name.step == 5
    second.close()


def test_what_waited_for_the_bucket_is_committed_in_order_with_the_next_save(runs):
    outage = ["upload"]

    def before(method, name):
        if method in outage:
            raise StorageError("503")

    runs.store.before = before
    kept = runs.start(keep=1)
    save(kept, 5)
    save(kept, 10)
    kept.wait()
    outage.clear()
    assert runs.local_steps() == [5, 10]  # what is not in the bucket is never pruned
    save(kept, 15)
    kept.close()
    assert [CheckpointName.parse(name).step for name in kept.committed] == [5, 10, 15]
    assert runs.bucket_steps() == runs.local_steps() == [15]
    assert kept.uploads_failed == []


def test_a_commit_of_the_same_name_by_another_attempt_does_not_count(runs, tmp_path):
    theirs = write_checkpoint(tmp_path / "theirs", 5, 1, attempt="theirs")
    upload_checkpoint(runs.store.store, RUN, tmp_path / "theirs", theirs)
    ours = write_checkpoint(runs.folder, 5, 1, attempt="ours")
    kept = runs.start(keep=1, resume="auto")
    save(kept, 10)
    kept.close()
    assert damaged_files(ours, runs.folder / str(ours.name)) == []
    assert runs.local_steps() == [5, 10]


def test_local_checkpoints_of_an_earlier_process_are_removed_once_they_are_in_the_bucket(runs):
    kept = runs.start(keep=1)
    save(kept, 5)
    kept.close()
    again = runs.start(keep=1, resume="auto")
    again.resume()
    save(again, 10)
    again.close()
    assert runs.local_steps() == runs.bucket_steps() == [10]


def test_a_folder_that_can_not_be_removed_stops_nothing(runs, monkeypatch):
    def busy(folder):
        raise OSError("busy")

    monkeypatch.setattr(local_writer, "remove_folder", busy)
    kept = runs.start(keep=1)
    save(kept, 5)
    save(kept, 10)
    kept.close()
    kept.check()
    assert runs.bucket_steps() == [10]


def test_somebody_else_writing_the_run_reaches_the_run(runs, tmp_path):
    kept = runs.start()
    theirs = write_checkpoint(tmp_path / "theirs", 5, 1, attempt="theirs")
    upload_checkpoint(runs.store.store, RUN, tmp_path / "theirs", theirs)
    save(kept, 5)
    kept.close()
    with pytest.raises(CheckpointError, match="somebody else is writing this run"):
        kept.check()


def test_a_bucket_that_can_not_be_listed_is_an_error_at_the_start(runs):
    def outage(method, name):
        raise StorageError("403", "Ask for storage.objects.list.")

    runs.store.before = outage
    with pytest.raises(StorageError, match="403"):
        runs.start()


def test_while_it_is_open_tools_are_kept_out(runs):
    kept = runs.start()
    with pytest.raises(CheckpointError, match="in use by a trainer"), sole_use(runs.folder):
        pass
    kept.close()
    with sole_use(runs.folder), pytest.raises(CheckpointError, match="in use by a tool"):
        runs.start()


def test_a_save_that_may_be_skipped_is_left_out_while_the_one_before_is_written(runs, monkeypatch):
    go_on = threading.Event()

    def slow(*arguments):
        assert go_on.wait(PATIENCE_S)
        return checkpoint.write_parts(*arguments)

    monkeypatch.setattr(local_writer, "write_parts", slow)
    kept = runs.start(url="", when_busy="skip")
    assert kept.save(CheckpointName(0, 5, 5), SavedEngine(5), DOCUMENTS, may_skip=True) is not None
    assert kept.save(CheckpointName(0, 10, 10), SavedEngine(10), DOCUMENTS, may_skip=True) is None
    assert kept.skipped == ["checkpoint-epoch0-step10-files10"] and kept.last_saved_step == 5
    assert ("checkpoint_skipped", {"name": kept.skipped[0]}) in list(kept.events())
    threading.Timer(0.05, go_on.set).start()
    assert kept.save(CheckpointName(0, 12, 12), SavedEngine(12), DOCUMENTS) > 0  # the last one waits
    kept.close()
    assert runs.local_steps() == [5, 12]


def test_there_is_one_copy_of_the_state_and_a_save_waits_for_it(runs, monkeypatch):
    go_on, written = threading.Event(), []

    def slow(snapshot, folder, *arguments):
        assert go_on.wait(PATIENCE_S)
        written.append({name: tensor.clone() for name, tensor in snapshot.weights.items()})
        return checkpoint.write_parts(snapshot, folder, *arguments)

    def now_s():
        if not written:  # a save has just begun: the one before goes on a moment later
            threading.Timer(0.05, go_on.set).start()
        return 57.0 if written else 50.0

    monkeypatch.setattr(local_writer, "write_parts", slow)
    kept = runs.start(url="")
    save(kept, 5)
    monkeypatch.setattr(keeper, "time", SimpleNamespace(perf_counter=now_s, monotonic=time.monotonic))
    assert save(kept, 10) == 7000.0  # ms
    kept.close()
    for weights, step in zip(written, (5, 10), strict=True):
        expected = dict(states_of(step))
        assert all(weights[name].equal(expected[name]["weight"]) for name in weights)


def metadata(loss, validations=()):
    return {**DOCUMENTS, "metadata.json": json.dumps({"current_loss": loss, "validation_losses": list(validations)})}


def test_with_the_bucket_away_what_waits_here_is_bounded_and_later_committed_in_order(runs, caplog):
    away = [True]

    def before(method, name):
        if away and "probe-" not in name and method in ("upload", "create"):
            raise StorageError("503")

    runs.store.before = before
    kept = runs.start(max_waiting=3, keep=0)
    losses = [5.0, 4.0, 1.0, 3.0, 2.5, 2.0, 2.2, 2.1]
    for step, loss in enumerate(losses, 1):
        kept.save(CheckpointName(0, step, step), SavedEngine(step), metadata(loss))
        kept.wait()
        assert len(runs.local_steps()) <= 3
    kept.check()
    assert runs.local_steps() == [3, 7, 8]  # the best, and the newest
    assert [CheckpointName.parse(name).step for name in kept.dropped] == [1, 2, 4, 5, 6]
    assert [kind for kind, _ in kept.events()].count("checkpoint_dropped") == 5
    assert "checkpoint-epoch0-step1-files1 is removed: more than 3 wait for the bucket" in caplog.text
    away.clear()
    save(kept, 9)
    kept.close()
    kept.check()
    assert [CheckpointName.parse(name).step for name in kept.committed] == runs.bucket_steps() == [3, 8, 9]
    assert kept.uploads_failed == [] and len(kept.verified()) == 3


def test_an_error_in_the_loop_ends_after_what_is_saved_is_committed(runs):
    go_on = threading.Event()

    def before(method, name):
        if method == "upload":
            assert go_on.wait(PATIENCE_S)

    runs.store.before = before
    with pytest.raises(ShardError, match="bad shard"), runs.start() as kept:
        save(kept, 5)
        threading.Timer(0.1, go_on.set).start()
        raise ShardError("bad shard")
    assert runs.bucket_steps() == [5] and kept.committed == ["checkpoint-epoch0-step5-files5"]
    with sole_use(runs.folder):
        pass
    kept.abandon()  # a second time, as after close, is nothing


def test_what_never_ends_is_abandoned_in_time(runs, monkeypatch):
    go_on, begun = threading.Event(), threading.Event()

    def before(method, name):
        if method == "upload":
            begun.set()
            go_on.wait(PATIENCE_S)

    runs.store.before = before
    monkeypatch.setattr(upload_queue, "TICK_S", 0.1)
    kept = runs.start()
    save(kept, 5)
    assert begun.wait(PATIENCE_S)
    started = time.monotonic()
    kept.abandon(0.1)
    assert time.monotonic() - started < PATIENCE_S / 2
    go_on.set()
    assert runs.local_steps() == [5]


@pytest.mark.parametrize("right", ["create", "delete"])
def test_a_bucket_that_can_not_be_written_is_found_at_the_start(runs, right):
    def before(method, name):
        if method == right:
            raise StorageError(f"lacks storage.objects.{right}", "Grant it.")

    runs.store.before = before
    with pytest.raises(StorageError, match=rf"lacks storage.objects.{right}") as caught:
        runs.start()
    assert caught.value.shared


def test_nothing_of_the_probe_is_left(runs):
    runs.start().close()
    assert runs.store.names_of("create")[0].startswith(f"{RUN}/probe-")
    assert runs.store.store.list() == []


@pytest.mark.parametrize(
    ("name", "ends_with", "bucket"),
    [
        ("snapshot.after_copy", StorageError, [5]),
        ("checkpoint.before_write", StorageError, [5]),
        ("checkpoint.after_write", StorageError, [5]),
        ("checkpoint.after_manifest", StorageError, [5]),
        ("upload.before_files", None, [5, 10, 15]),
        ("upload.after_files", None, [5, 10, 15]),
        ("upload.before_commit", None, [5, 10, 15]),
        ("upload.after_commit", None, [5, 10, 15]),
        ("prune.bucket_after_manifest", None, [10, 15]),
        ("prune.local_before", None, [10, 15]),
    ],
)
def test_a_disk_that_fails_at_any_point_is_told_or_outlasted(runs, monkeypatch, name, ends_with, bucket):
    count = 1 if name.startswith("prune") else 2
    monkeypatch.setenv("PRETRAIN_FAILPOINT", f"{name}:{count}:raise")
    arm(0)
    try:
        kept = runs.start(keep=2 if name.startswith("prune") else 3)
        for step in (5, 10, 15):
            save(kept, step)
            kept.wait()
        kept.close()
    finally:
        monkeypatch.delenv("PRETRAIN_FAILPOINT")
        arm(0)
    if ends_with:
        with pytest.raises(ends_with, match=r"failpoint of PRETRAIN_FAILPOINT"):
            kept.check()
    else:
        kept.check()
        assert kept.uploads_failed == []
    assert runs.bucket_steps() == bucket
    newest = runs.start(resume="auto").resume()
    assert newest.manifest.name.step >= max(bucket)


@pytest.mark.parametrize(
    ("point", "found"),
    [("checkpoint.before_write", 5), ("checkpoint.after_write", 5), ("checkpoint.before_rename", 50)],
)
@pytest.mark.parametrize("others", [(), (8,)], ids=["the only one", "beside one that it went back from"])
def test_a_save_that_takes_a_checkpoints_name_never_leaves_the_run_without_it(runs, monkeypatch, point, found, others):
    first = runs.start(url="")
    for step in (5, *others):
        save(first, step)
    first.close()
    again = runs.start(url="", resume="auto")
    monkeypatch.setenv("PRETRAIN_FAILPOINT", f"{point}:1:raise")
    arm(0)
    try:
        with monkeypatch.context() as kill:
            kill.setattr(local_writer, "remove_folder", lambda folder: None)  # a killed process clears nothing away
            again.save(CheckpointName(0, 5, 5), SavedEngine(50), DOCUMENTS)
            again.close()
    finally:
        monkeypatch.delenv("PRETRAIN_FAILPOINT")
        arm(0)
    assert len(list(runs.folder.iterdir())) > 2 + len(others)  # with .trainer.lock
    last = runs.start(url="", resume="auto")
    assert runs.local_steps() == [5, *others]
    folder = runs.folder / "checkpoint-epoch0-step5-files5"
    reader = CheckpointReader(folder, read_manifest(folder))
    expected = dict(states_of(found))
    assert differing(expected, {name: reader.parameter_state(name) for name in expected}) == []
    assert last.resume().manifest.name.step == (5 if found == 50 or not others else 8)
    names = {f"checkpoint-epoch0-step{step}-files{step}" for step in (5, *others)}
    assert {path.name for path in runs.folder.iterdir()} == {TRAINER_FILE, *names}
    last.close()


TWO_RANKS = """
    from pathlib import Path
    from pretrain.checkpoint_manifest import CheckpointName
    from pretrain.config import CheckpointConfig, StorageConfig
    from pretrain.keeper import Keeper
    from pretrain.errors import StorageError
    from tests.helpers_training import TinyModel, states_of

    local, bucket, fails = sys.argv[1], sys.argv[2], sys.argv[3] == "fails"
    folder = Path(local if me.local_world_size == 2 else f"{local}{me.rank}")

    class Engine:
        states_stay = False
        def __init__(self, step):
            self.step = step
        def parameter_states(self):
            return iter(states_of(self.step))

    def start(resume=""):
        config = CheckpointConfig(dir=str(folder), url=bucket, keep=1, resume=resume)
        return Keeper(config, StorageConfig(), "run", me)

    def steps():
        names = [path.parent.name for path in folder.glob("run/*/manifest.json")]
        return sorted(CheckpointName.parse(name).step for name in names)

    result = {}
    first = start()
    for step in (5, 10):
        first.save(CheckpointName(0, step, step), Engine(step), {"trainer_state.json": "{}"})
    first.close()
    result["first"] = steps()
    result["folders"] = len(list(folder.glob("run/*")))
    second = start("auto")
    reader = second.resume()
    result["resumed"] = reader.manifest.name.step
    states = dict(states_of(10))
    result["same"] = all(torch.equal(reader.parameter_state(n)[k], s[k]) for n, s in states.items() for k in s)
    result["files"] = sorted(reader.manifest.files)
    if fails and me.rank == 1:
        import pretrain.local_writer
        def full(*arguments):
            raise StorageError("disk of rank 1 is full", "Free it.")
        pretrain.local_writer.write_parts = full
    second.save(CheckpointName(0, 15, 15), Engine(15), {"trainer_state.json": "{}"})
    second.close()
    result["second"] = steps()
    try:
        second.check()
    except StorageError as error:
        result["error"] = [error.what, error.shared]
    print(json.dumps(result))
"""


UNEXPECTED = """
    from pathlib import Path
    import pretrain.local_writer
    from pretrain.checkpoint_manifest import CheckpointName
    from pretrain.config import CheckpointConfig, StorageConfig
    from pretrain.keeper import Keeper
    from tests.helpers_training import states_of

    class Engine:
        states_stay = False
        def parameter_states(self):
            return iter(states_of(5))

    def broken(*arguments):
        raise RuntimeError("of rank 1")

    if me.rank == 1:
        pretrain.local_writer.write_parts = broken
    kept = Keeper(CheckpointConfig(dir=sys.argv[1], url=sys.argv[2]), StorageConfig(), "run", me)
    kept.save(CheckpointName(0, 5, 5), Engine(), {})
    kept.close()
    try:
        kept.check()
    except Exception as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


def test_an_unexpected_error_on_one_rank_leaves_no_other_waiting_at_the_end(tmp_path):
    told = run_two_ranks(UNEXPECTED, arguments=(str(tmp_path / "local"), str(tmp_path / "bucket")))
    assert told == [["StorageError", "rank 1: RuntimeError: of rank 1"], ["RuntimeError", "of rank 1"]]


def test_two_ranks_write_one_checkpoint_and_fail_together(tmp_path):
    results = run_two_ranks(TWO_RANKS, arguments=(str(tmp_path / "local"), str(tmp_path / "bucket"), "fails"))
    for result in results:
        assert result["resumed"] == 10 and result["same"]
        assert [name for name in result["files"] if "-of-" in name] == [
            f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("model", "optimizer") for rank in (1, 2)
        ]
        assert result["error"] == ["disk of rank 1 is full", True]
        assert result["first"] == result["second"] == [10]


def test_each_node_prunes_its_own_disk_and_gets_what_it_lacks(tmp_path):
    arguments = (str(tmp_path / "node"), str(tmp_path / "bucket"), "holds")
    results = run_two_ranks(TWO_RANKS, nodes=2, arguments=arguments)
    for result in results:
        assert "error" not in result
        assert result["resumed"] == 10 and result["same"]
        assert result["first"] == [10] and result["folders"] == 1
        assert result["second"] == [15]
