from __future__ import annotations

import errno
import sys
import threading
import time
import types
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pretrain import storage_checks
from pretrain.config import CheckpointConfig, LogConfig, StorageConfig
from pretrain.doctor import Finding, Question, answer
from pretrain.errors import StorageError
from pretrain.storage import open_store
from tests.fault_proxy import FaultProxy

QUICK = StorageConfig(deadline_s=1.0, timeout_s=10.0, max_backoff_s=0.1)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(storage_checks, "DISK_PROBE_BYTES", 2**20)
    monkeypatch.setattr(storage_checks, "BUCKET_PROBE_BYTES", 2**16)
    monkeypatch.setattr(storage_checks, "SLOW_DISK_MB_PER_S", 0)


def statuses(findings) -> dict[str, str]:
    return {finding.name: finding.status for finding in findings}


# ---- disks ----


def test_a_disk_is_tried_and_a_folder_that_was_not_there_is_gone_again(tmp_path):
    folder = tmp_path / "a" / "b"
    found = storage_checks.cache_disk(str(folder))
    assert found.status == "ok" and str(folder) in found.found
    assert found.figures["write_mb_per_s"] > 0 and found.figures["read_mb_per_s"] > 0
    assert storage_checks.log_folder(LogConfig(dir=str(folder))).status == "ok"
    assert list(tmp_path.iterdir()) == []
    folder.mkdir(parents=True)
    storage_checks.cache_disk(str(folder))
    assert folder.is_dir() and not any(folder.iterdir())


def test_a_folder_that_cannot_be_made_is_a_fail(tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = answer(
        Question("log_folder", storage_checks.log_folder, (LogConfig(dir=str(tmp_path / "file" / "logs")),))
    )
    assert (found.status, found.exit_code) == ("fail", 4) and "--log.dir" in found.mend


def test_a_full_disk_is_a_fail(tmp_path, monkeypatch):
    def full(folder: Path, n_bytes: int) -> tuple[float, float]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage_checks, "_time_disk", full)
    (found,) = answer(Question("cache_disk", storage_checks.cache_disk, (str(tmp_path),)))
    assert (found.status, found.exit_code) == ("fail", 4) and "the disk is full" in found.found


def test_a_slow_disk_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_checks, "SLOW_DISK_MB_PER_S", 50)
    monkeypatch.setattr(storage_checks, "_time_disk", lambda folder, n_bytes: (1.0, 0.001))
    found = storage_checks.cache_disk(str(tmp_path))
    assert found.status == "warn" and "1 MB/s written" in found.found and "--data.cache_dir" in found.mend


def look_at_room(tmp_path, monkeypatch, room: float, url: str = "", nodes: int = 1) -> Finding:
    """With so many checkpoints' room: what is found for a run that keeps three of them, of 1 GB."""
    monkeypatch.setattr(storage_checks, "free_disk_bytes", lambda folder: int(room * 1e9))
    return storage_checks.checkpoint_disk(CheckpointConfig(dir=str(tmp_path), keep=3, url=url), "run", 10**9, nodes)


@pytest.mark.parametrize(("room", "status"), [(1.5, "fail"), (3, "warn"), (5, "ok")])
def test_room_for_checkpoints(tmp_path, monkeypatch, room, status):
    found = look_at_room(tmp_path, monkeypatch, room)
    assert found.status == status and "a checkpoint of 1.0 GB takes" in found.found
    assert ("--checkpoint.dir" in found.mend) == (status != "ok")


@pytest.mark.parametrize(
    ("room", "committed", "unfinished", "status"),
    [
        (1.2, 3, 0, "ok"),  # as a run in its steady state leaves the disk
        (1.2, 1, 0, "warn"),
        (0.8, 3, 0, "fail"),
        (0.8, 3, 1, "ok"),  # killed in the middle of a save, which will be made again in its place
        (1.5, 0, 1, "warn"),
    ],
)
def test_the_runs_own_checkpoints_are_part_of_the_room(tmp_path, monkeypatch, room, committed, unfinished, status):
    monkeypatch.setattr(storage_checks, "folder_bytes", lambda folder: 10**9)
    for step in range(committed + unfinished):
        name = f"checkpoint-epoch0-step{step}-files0"
        folder = tmp_path / "run" / (name if step < committed else f".{name}.saving")
        folder.mkdir(parents=True)
        if step < committed:
            (folder / "manifest.json").write_text("{}")
    (tmp_path / "another" / "checkpoint-epoch0-step1-files0").mkdir(parents=True)
    found = look_at_room(tmp_path, monkeypatch, room)
    assert found.status == status
    assert (f"{committed}.0 GB of this run's are there" in found.found) == (committed > 0)
    assert status != "fail" or "no room for one more" in found.found


def test_each_of_several_nodes_needs_room_for_its_part_unless_they_share_a_disk(tmp_path, monkeypatch):
    found = look_at_room(tmp_path, monkeypatch, 1.1, "gs://bucket/x", nodes=4)
    assert found.status == "ok" and "part of a checkpoint, 1 of 4, of 250.0 MB takes" in found.found
    assert look_at_room(tmp_path, monkeypatch, 1.1, nodes=4).status == "fail"


# ---- the bucket ----


def test_a_bucket_is_written_read_and_left_as_it_was(bucket_url):
    findings = storage_checks.checkpoint_store(bucket_url, "run", StorageConfig())
    names = ("checkpoint_store", "checkpoint_write", "checkpoint_read", "checkpoint_delete")
    assert statuses(findings) == dict.fromkeys(names, "ok")
    assert "anonymous (emulator)" in findings[0].found
    assert findings[1].figures["mb_per_s"] > 0 and findings[2].figures["mb_per_s"] > 0
    assert open_store(bucket_url, StorageConfig()).list() == []


def test_a_folder_does_as_well_and_no_url_is_skipped(tmp_path):
    findings = storage_checks.checkpoint_store(str(tmp_path), "run", StorageConfig())
    assert {finding.status for finding in findings} == {"ok"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert statuses(storage_checks.checkpoint_store("", "run", StorageConfig())) == {"checkpoint_store": "skip"}


@pytest.mark.parametrize(
    ("match", "permission", "failed", "left"),
    [
        ("GET /storage.*prefix", "storage.objects.list", ["checkpoint_store"], 0),
        ("POST /upload", "storage.objects.create", ["checkpoint_write"], 0),
        ("GET /(download|storage).*probe", "storage.objects.get", ["checkpoint_read"], 0),
        ("DELETE ", "storage.objects.delete", ["checkpoint_delete"], 1),
    ],
)
def test_a_right_that_is_missing_is_named_with_the_command_that_grants_it(
    bucket_url, fault_proxy: FaultProxy, match, permission, failed, left
):
    fault_proxy.inject("403", match=match, times=-1)
    findings = storage_checks.checkpoint_store(bucket_url, "run", QUICK)
    fails = [finding for finding in findings if finding.status == "fail"]
    assert [finding.name for finding in fails] == failed
    assert permission in fails[0].found and fails[0].exit_code == 4
    assert "gcloud storage buckets add-iam-policy-binding gs://fake" in fails[0].mend
    fault_proxy.clear()
    names = [info.name for info in open_store(bucket_url, StorageConfig()).list()]
    assert len(names) == left
    assert all(name in fails[0].found for name in names)  # what could not be deleted is named


def test_a_missing_bucket_and_one_out_of_reach(bucket_url, fault_proxy: FaultProxy):
    (found, *_) = storage_checks.checkpoint_store("gs://no-such-bucket/x", "run", QUICK)
    assert (found.status, found.exit_code) == ("fail", 4)
    assert "there is no bucket no-such-bucket" in found.found and "buckets create" in found.mend
    fault_proxy.inject("503", times=-1)
    (found, *_) = storage_checks.checkpoint_store(bucket_url, "run", QUICK)
    assert found.status == "fail" and "gave up" in found.found


def test_damage_on_the_way_is_found(bucket_url, monkeypatch):
    store = open_store(bucket_url, StorageConfig())
    monkeypatch.setattr(type(store), "read_bytes", lambda self, name, max_bytes: b"\0" * max_bytes)
    findings = storage_checks.checkpoint_store(bucket_url, "run", QUICK)
    assert statuses(findings)["checkpoint_read"] == "fail" and statuses(findings)["checkpoint_delete"] == "ok"


def test_a_check_of_the_bucket_gives_up_after_seconds():
    patient = StorageConfig(deadline_s=300, timeout_s=60)
    assert storage_checks.impatient(patient).deadline_s == storage_checks.PATIENCE_S
    assert storage_checks.impatient(QUICK) == QUICK


# ---- the clock ----


@pytest.fixture
def clock(monkeypatch) -> Iterator[types.SimpleNamespace]:
    """A bucket's server with a clock of its own: `clock.ahead_s`."""
    state = types.SimpleNamespace(ahead_s=0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(404)
            self.send_header("Date", formatdate(time.time() + state.ahead_s, usegmt=True))
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(("ahead_s", "status"), [(0, "ok"), (30, "warn"), (-30, "warn"), (-4000, "fail")])
def test_the_clock_is_held_against_the_buckets(clock, ahead_s, status):
    clock.ahead_s = ahead_s
    found = storage_checks.clock(["", "gs://bucket/x"])
    assert found.status == status
    assert found.figures["skew_s"] == pytest.approx(-ahead_s, abs=4)
    assert status == "ok" or (("behind" if ahead_s > 0 else "ahead of") in found.found and "ntp" in found.mend)


def test_without_a_bucket_there_is_no_clock_and_out_of_reach_is_a_fail(monkeypatch):
    assert storage_checks.clock(["folder", "s3://b"]).status == "skip"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="does not answer"):
        storage_checks.clock(["gs://b"])


# ---- W&B ----


def play_wandb(monkeypatch, viewer: object) -> None:
    module = types.ModuleType("wandb")
    module.__version__ = "1"  # type: ignore[attr-defined]
    module.Api = lambda timeout: viewer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


class Refused:
    @property
    def viewer(self) -> object:
        raise ValueError("HTTP 401: wandb_v1_secretsecret is not valid")


def test_the_login_to_wandb(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    on = LogConfig(wandb=True)
    play_wandb(monkeypatch, types.SimpleNamespace(viewer=types.SimpleNamespace(username="ada")))
    assert storage_checks.wandb_login(LogConfig()).status == "skip"
    offline = storage_checks.wandb_login(on)
    assert offline.status == "warn" and "stays offline" in offline.found and "wandb login" in offline.mend
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert "logged in as ada" in storage_checks.wandb_login(on).found
    play_wandb(monkeypatch, Refused())
    refused = storage_checks.wandb_login(on)
    assert refused.status == "warn" and "401" in refused.found and "secretsecret" not in refused.found
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert storage_checks.wandb_login(on).status == "ok"
