from __future__ import annotations

import json
import threading

import pytest

from pretrain import log_uploads
from pretrain.config import StorageConfig
from pretrain.errors import ConfigError, StorageError
from pretrain.log_sources import open_sources
from pretrain.log_uploads import LogUploads, join_lines, open_log_uploads
from pretrain.metrics import Metrics
from pretrain.monitor import assess
from pretrain.storage import LocalStore, open_store
from tests.helpers_training import FaultyStore

PATIENCE_S = 120


@pytest.fixture
def store(tmp_path):
    return FaultyStore(LocalStore(tmp_path / "bucket"))


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(log_uploads.logger, "warning", lambda form, *words: found.append(form % words))
    return found


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    for name in ("metrics.jsonl", "training.log", "power.1.csv", "events.out.tfevents.1"):
        (folder / name).write_text(f"{name}\n")
    return folder


def names(store):
    return [info.name for info in store.store.list()]


def test_what_has_changed_is_sent_and_nothing_else(store, folder):
    uploads = LogUploads(folder, store, "run")
    assert uploads.upload() == ["metrics.jsonl", "training.log"]
    assert names(store) == ["run/logs/metrics.jsonl", "run/logs/training.log"]
    assert uploads.upload() == []
    (folder / "metrics.jsonl").write_text("more of it\n")
    (folder / "summary.json").write_text("{}")
    assert uploads.upload() == ["metrics.jsonl", "summary.json"]
    assert store.store.read_bytes("run/logs/metrics.jsonl") == b"more of it\n"
    uploads.close()


def test_the_next_start_goes_on_where_the_last_one_ended(store, folder):
    LogUploads(folder, store, "run").upload()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("of the second start\n")
    LogUploads(folder, store, "run").upload()
    assert store.store.read_bytes("run/logs/metrics.jsonl") == b"metrics.jsonl\nof the second start\n"


def lines(*pairs):
    """Records of (time, step)."""
    return "".join(json.dumps({"time": time, "step": step}) + "\n" for time, step in pairs)


def machine(tmp_path, name, metrics="", log=""):
    folder = tmp_path / name
    folder.mkdir()
    for file, text in (("metrics.jsonl", metrics), ("training.log", log)):
        if text:
            (folder / file).write_text(text)
    return folder


def in_bucket(store, file="metrics.jsonl"):
    return store.store.read_bytes(f"run/logs/{file}").decode()


@pytest.mark.parametrize("fetches", [True, False], ids=["fetched", "bucket away at the start"])
def test_a_new_machine_goes_on_with_the_logs_of_the_old_one(store, tmp_path, fetches):
    old = lines((1, 1), (2, 2))
    entry = "2026-11-26 10:00:0{0},000 ERROR x  {0}\nTraceback\n".format
    LogUploads(machine(tmp_path, "old", old, entry(1)), store, "run").upload()
    new = machine(tmp_path, "new", "", entry(2))
    uploads = LogUploads(new, store, "run")
    if fetches:
        uploads.fetch()
        assert (new / "metrics.jsonl").read_text() == old
        assert (new / "training.log").read_text() == entry(1) + entry(2)
    with (new / "metrics.jsonl").open("a") as file:
        file.write(lines((9, 2)))
    uploads.upload()
    assert in_bucket(store) == old + lines((9, 2)) and in_bucket(store, "training.log") == entry(1) + entry(2)


def test_a_machine_that_comes_back_loses_neither_its_own_lines_nor_those_since(store, tmp_path):
    begin, lost, since = lines((1, 1), (2, 2)), lines((3, 3)), lines((4, 2), (5, 3), (6, 4))
    first = machine(tmp_path, "first", begin)
    LogUploads(first, store, "run").upload()
    LogUploads(machine(tmp_path, "second", begin + since), store, "run").upload()
    (first / "metrics.jsonl").write_text(begin + lost + '{"time": 3.5, "st')  # killed, after its last copy
    uploads = LogUploads(first, store, "run")
    uploads.fetch()
    joined = (first / "metrics.jsonl").read_text()
    assert joined == begin + lost + '{"time": 3.5, "st\n' + since
    uploads.upload()
    assert in_bucket(store) == joined
    before = (first / "metrics.jsonl").stat().st_mtime_ns
    LogUploads(first, store, "run").fetch()
    assert (first / "metrics.jsonl").stat().st_mtime_ns == before  # nothing is lacking any more


def test_the_order_of_a_side_is_kept_whatever_its_clock_said():
    theirs = lines((50, 1), (51, 2), (7, 3), (8, 4)).encode()  # the second machine's clock was behind
    assert join_lines(b"", theirs) == theirs
    assert join_lines(lines((50, 1)).encode(), theirs) == theirs
    longer = theirs + lines((9, 5)).encode()
    assert join_lines(longer, theirs) == longer


def test_earlier_logs_that_can_not_be_fetched_end_nothing(store, folder, warnings):
    def away(method, name):
        raise StorageError("the bucket is away")

    store.before = away
    LogUploads(folder, store, "run").fetch()
    assert len(warnings) == 1 and "could not be fetched" in warnings[0]


def test_a_trainer_that_was_left_behind_never_writes_over_the_newer_one(store, folder, warnings):
    old, new = LogUploads(folder, store, "run"), LogUploads(folder, store, "run")
    old.upload()
    (folder / "metrics.jsonl").write_text("metrics.jsonl\nnew\n")
    new.upload()
    (folder / "metrics.jsonl").write_text("old\n")
    assert old.upload() == [] and old.is_off
    assert store.store.read_bytes("run/logs/metrics.jsonl") == b"metrics.jsonl\nnew\n"
    assert len(warnings) == 1 and "another process" in warnings[0]
    calls = len(store.calls)
    assert old.upload() == [] or len(store.calls) == calls


def test_a_bucket_that_is_away_is_one_warning_and_is_tried_again(store, folder, warnings):
    def away(method, name):
        raise StorageError("the bucket is away")

    store.before = away
    uploads = LogUploads(folder, store, "run")
    assert uploads.upload() == uploads.upload() == []
    assert len(warnings) == 1 and "the bucket is away" in warnings[0]
    store.before = lambda method, name: None
    assert uploads.upload() == ["metrics.jsonl", "training.log"]


def test_a_reply_that_was_lost_is_no_other_process(store, folder, warnings, bucket_url):
    uploads = LogUploads(folder, open_store(bucket_url, StorageConfig()), "run")
    uploads.upload()
    inner = uploads._store

    class LosesReplies(FaultyStore):
        def replace(self, name, data, generation):
            inner.replace(name, data, generation)
            raise StorageError("no reply came")

    uploads._store = LosesReplies(inner)
    (folder / "metrics.jsonl").write_text("two\n")
    assert uploads.upload() == [] and "no reply came" in warnings[0]
    uploads._store = inner
    (folder / "metrics.jsonl").write_text("three\n")
    assert uploads.upload() == ["metrics.jsonl"] and not uploads.is_off
    assert inner.read_bytes("run/logs/metrics.jsonl") == b"three\n"


def test_of_the_power_the_last_rows_are_sent_and_show_each_device(store, folder, monkeypatch):
    monkeypatch.setattr(log_uploads, "POWER_TAIL_BYTES", 100)
    names = "time,step,phase,gpu,power_w\n"
    rows = [f"{second}.0,{second},forward,{gpu},{gpu}00.0\n" for second in range(1000, 1100) for gpu in (1, 2)]
    (folder / "power.csv").write_text(names + "".join(rows))
    assert LogUploads(folder, store, "run").upload() == ["metrics.jsonl", "training.log", "power.csv"]
    assert in_bucket(store, "power.csv") == names + "".join(rows[-3:])
    with open_sources([f"file://{store.url}/run"], folder, StorageConfig()) as (source,):
        assert [row["device"] for row in assess(source.refresh(), 1100.0).devices] == ["GPU 1", "GPU 2"]
    (folder / "power.csv").write_text(names + rows[0])
    LogUploads(folder, store, "run").upload()
    assert in_bucket(store, "power.csv") == names + rows[0]


def test_a_file_that_is_too_big_stays_here(store, folder, warnings, monkeypatch):
    monkeypatch.setattr(log_uploads, "MAX_BYTES", 13)
    assert LogUploads(folder, store, "run").upload() == ["training.log"]
    assert len(warnings) == 1 and "metrics.jsonl" in warnings[0]


def test_commits_are_followed_behind_the_training_and_the_end_is_waited_for(store, tmp_path):
    sent, go_on = threading.Event(), threading.Event()

    def slow(method, name):
        if method == "replace":
            sent.set()
            assert go_on.wait(PATIENCE_S)

    store.before = slow
    folder = tmp_path / "logs" / "run"
    with Metrics(folder, []) as metrics:
        metrics.add(LogUploads(folder, store, "run"))
        metrics.record({"step": 1, "loss": 2.0})
        assert not sent.is_set()
        metrics.event("checkpoint_committed", name="checkpoint-epoch0-step1-files1")
        assert sent.wait(PATIENCE_S)
        metrics.record({"step": 2, "loss": 1.0})  # not kept waiting by the bucket
        go_on.set()
        metrics.ended(stopped=False)
    with open_sources([f"file://{tmp_path}/bucket/run"], tmp_path, StorageConfig()) as (source,):
        run = source.refresh()
        assert [record["step"] for record in run.records] == [1, 2] and run.ended["exit_code"] == 0


def test_the_end_waits_only_so_long(store, folder, warnings, monkeypatch):
    monkeypatch.setattr(log_uploads, "FAREWELL_S", 0.05)
    go_on = threading.Event()
    store.before = lambda method, name: go_on.wait(PATIENCE_S)
    uploads = LogUploads(folder, store, "run")
    uploads.close()
    assert "did not reach the bucket" in warnings[0]
    go_on.set()


def test_logs_have_a_patience_of_their_own(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        log_uploads, "open_store", lambda url, config: seen.update(url=url, config=config) or LocalStore(tmp_path)
    )
    open_log_uploads(tmp_path, "gs://bucket/x", StorageConfig(deadline_s=300.0), "run").close()
    assert (seen["url"], seen["config"].deadline_s) == ("gs://bucket/x", log_uploads.DEADLINE_S)


# ---- and read again ----


def write_run(folder, step=1):
    with Metrics(folder, []) as metrics:
        metrics.record({"step": step, "loss": 2.0})


def test_runs_are_found_by_name_by_folder_and_in_a_bucket(tmp_path, monkeypatch):
    logs, bucket = tmp_path / "logs", tmp_path / "bucket"
    write_run(logs / "one")
    write_run(logs / "two")
    (logs / "none").mkdir()
    for run in ("one", "three"):
        LogUploads(logs / "one", LocalStore(bucket), run).upload()
    (bucket / "deep" / "er" / "logs").mkdir(parents=True)
    (bucket / "deep" / "er" / "logs" / "metrics.jsonl").write_text("")

    def found(*words):
        with open_sources(words, logs, StorageConfig()) as sources:
            return [(source.logs.name, source.is_copy, len(source.refresh().records)) for source in sources]

    assert sorted(found()) == [("one", False, 1), ("two", False, 1)]
    assert found("two", str(logs / "one")) == [("two", False, 1), ("one", False, 1)]
    assert found(f"file://{bucket}") == [("one", True, 1), ("three", True, 1)]
    assert found(f"file://{bucket}/three/") == [("three", True, 1)]
    monkeypatch.chdir(logs / "one")
    assert found(".") == [("one", False, 1)]


@pytest.mark.parametrize(
    ("word", "says"), [("onw", "Did you mean one"), ("x", "there are one"), ("file:///nowhere/x", "no logs of a run")]
)
def test_a_run_that_is_not_there_is_a_wrong_setting(tmp_path, word, says):
    write_run(tmp_path / "one")
    with pytest.raises(ConfigError) as raised, open_sources([word], tmp_path, StorageConfig()):
        pass
    assert says in raised.value.line()
    with pytest.raises(ConfigError, match="there is no run"), open_sources([], tmp_path / "x", StorageConfig()):
        pass


def test_of_a_bucket_only_what_has_changed_is_fetched_again(tmp_path):
    folder = tmp_path / "logs" / "one"
    write_run(folder)
    uploads = LogUploads(folder, LocalStore(tmp_path / "bucket"), "one")
    uploads.upload()
    with open_sources([f"file://{tmp_path}/bucket/one"], tmp_path, StorageConfig()) as (source,):
        run = source.refresh()
        source._store = store = FaultyStore(source._store)
        source.refresh()
        assert store.names_of("download") == []
        with Metrics(folder, [], first_step=1) as metrics:
            metrics.record({"step": 2, "loss": 1.0})
        uploads.upload()
        assert [record["step"] for record in source.refresh().records] == [1, 2]
        assert store.names_of("download") == ["logs/events.jsonl", "logs/metrics.jsonl"]
        assert run.restart_steps == (1,) and source.changed_s > 0
        kept = run.folder
    assert not kept.exists()
