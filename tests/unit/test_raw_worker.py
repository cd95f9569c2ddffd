"""The process that prepares raw text beside the training: what its parent learns of it, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys

import psutil
import pytest

from pretrain import failpoints, raw_worker
from pretrain.config import StorageConfig
from pretrain.errors import ShardError, StorageError
from pretrain.raw_source import folder_of, is_claimed
from pretrain.raw_worker import RawWorker
from tests.unit.test_raw_source import VOCAB_SIZE, data, texts  # noqa: F401 - fixtures

STORAGE = StorageConfig(deadline_s=0.2, max_backoff_s=0.01)
PATIENCE_S = 240
HOW = {"vocab_size": VOCAB_SIZE, "may_be_larger": False, "rank": 0}


def ended(worker: RawWorker) -> RawWorker:
    worker._reader.join(PATIENCE_S)
    assert not worker._reader.is_alive() and worker.claimed.is_set()
    return worker


def test_it_prepares_says_so_and_ends(data):  # noqa: F811
    worker = ended(RawWorker(data, STORAGE, **HOW))
    assert worker.failure is None and worker.arrived > 0
    assert (folder_of(data) / "shards" / "manifest.json").exists()
    worker.close()


def test_its_death_is_a_failure_and_its_end_by_its_parent_is_none(data, monkeypatch):  # noqa: F811
    monkeypatch.setenv(failpoints.VARIABLE, "prepare.after_journal:1:hang")
    data = dataclasses.replace(data, raw_shard_tokens=1000)
    for is_killed in (True, False):
        worker = RawWorker(data, STORAGE, **HOW)
        assert worker.claimed.wait(PATIENCE_S) and is_claimed(folder_of(data))
        process = psutil.Process(worker._process.pid)
        process.send_signal(signal.SIGTERM)  # to all processes of a job, say: it is not for this one to obey
        children = process.children(recursive=True)
        if is_killed:
            other = RawWorker(data, STORAGE, **HOW)  # of another run: it finds what is decided, and waits for the first
            assert other.claimed.wait(PATIENCE_S) and other.failure is None and other._process.poll() is None
            other.close()
            process.kill()
            assert isinstance(ended(worker).failure, StorageError)
            assert "was killed by SIGKILL. Start again" in str(worker.failure)
        worker.close()
        assert bool(worker.failure) == is_killed
        assert not psutil.wait_procs(children, timeout=PATIENCE_S)[1]


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"source": "no/such/*.json.gz"}, ShardError, r"no raw text behind .*no/such"),
        ({"cache_dir": "/proc/x"}, StorageError, r"/proc/x/prepared-.* can't be written"),
        ({"source": "gs://away/*.json.gz"}, StorageError, r"list gs://away: gave up .*storage.deadline_s"),
    ],
)
def test_what_it_meets_is_the_same_error_here(data, changes, error, says, monkeypatch):  # noqa: F811
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")  # nobody is there
    worker = ended(RawWorker(dataclasses.replace(data, **changes), STORAGE, **HOW))
    assert type(worker.failure) is error
    with pytest.raises(error, match=says):
        raise worker.failure
    worker.close()


def test_one_whose_parent_has_gone_does_nothing(data):  # noqa: F811
    request = {**HOW, "parent": 1, "data": dataclasses.asdict(data), "storage": dataclasses.asdict(STORAGE)}
    words = [sys.executable, "-m", raw_worker.__name__]
    ended = subprocess.run(words, input=json.dumps(request).encode(), cwd=raw_worker.ROOT, capture_output=True)
    assert (ended.returncode, ended.stdout) == (1, b"") and not folder_of(data).exists()


def test_a_wait_is_said_once_a_minute(caplog, monkeypatch):
    worker = RawWorker.__new__(RawWorker)
    now = [100.0]
    monkeypatch.setattr(raw_worker.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(raw_worker.logger, "propagate", True)
    monkeypatch.setattr(raw_worker.log.get(), "propagate", True)
    vars(worker).update(_source="c4", _n_bytes=2_000_000, _total=8_000_000, _text_bytes=0, _said_s=90.0, _said_bytes=0)
    worker._has_said = worker._is_done = False
    caplog.set_level("INFO")
    for second in range(100, 170):
        now[0] = float(second)
        worker._text_bytes += 3_000_000
        worker.tell_wait()
    lines = [record.getMessage() for record in caplog.records]
    worker._is_done, now[0] = True, 999.0
    worker.tell_wait()
    assert len(lines) == len(caplog.records) == 2
    assert lines[1] == "data: waiting for raw text: 2.0 MB of 8.0 MB of c4 are prepared, 3.0 MB/s of text"
