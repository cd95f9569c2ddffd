"""The bound on the cache and its locks: who is put out, who is not, and what a killed process leaves."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cache import Hold, _Record
from pretrain.room import FileLock, Room, lock

ROOT = Path(__file__).resolve().parents[2]
HOLDS = """
import sys
from pathlib import Path
from pretrain.room import FileLock
lock = FileLock.take(Path(sys.argv[1]))
lock.set_aside(500)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "0123456789abcdef"
    path.mkdir()
    return path


def put(folder, name, n_bytes, used_s):
    """A shard's tokens and their record; returns the tokens' path."""
    path = folder / f"{name}.bin"
    path.write_bytes(bytes(n_bytes))
    path.with_suffix(".json").write_text("{}")
    os.utime(path, (used_s, used_s))
    return path


def held(path):
    file = path.open("rb")
    lock(file.fileno(), fcntl.LOCK_SH)
    return Hold(file, _Record(path.stat().st_size // 2, 1, "uint16", 1, "", ""))


def set_aside(room, folder, n_bytes, must=False):
    with FileLock.take(folder / "new.lock") as building:
        return room.set_aside(building, n_bytes, must=must)


def test_one_has_a_lock_at_a_time_and_its_file_goes_with_it(tmp_path):
    path = tmp_path / "x.lock"
    with FileLock.take(path):
        assert FileLock.take(path) is None
    assert not path.exists()
    FileLock.take(path).release()


def test_a_killed_process_leaves_nothing_locked_and_its_room_is_cleared_away(folder):
    path, part = folder / "x.lock", folder / "..x.npz.part.abc.part"
    other, command = folder / ".y.bin.abc.part", [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        part.touch()
        other.touch()
        room = Room(folder.parent, 1000)
        assert FileLock.take(path) is None
        assert room.used_bytes() == 500
        process.send_signal(signal.SIGKILL)
    assert room.used_bytes() == 0
    assert not path.exists() and not part.exists() and other.exists()


def test_the_least_recently_used_go_first_and_what_is_known_of_them_stays(folder):
    old, new, middle = put(folder, "a", 400, 100), put(folder, "b", 300, 300), put(folder, "c", 200, 200)
    assert set_aside(Room(folder.parent, 1000), folder, 500)
    assert (old.exists(), middle.exists(), new.exists()) == (False, True, True)
    assert old.with_suffix(".json").exists()


def test_what_somebody_has_mapped_stays_until_it_is_let_go(folder):
    old, new = put(folder, "a", 400, 100), put(folder, "b", 400, 300)
    hold, room = held(old), Room(folder.parent, 1000)
    assert set_aside(room, folder, 400)
    assert old.exists() and not new.exists()
    assert not set_aside(room, folder, 700)
    hold.release()  # although its map lives on
    assert old.stat().st_mtime > 1000
    assert set_aside(room, folder, 700)
    assert not old.exists() and hold.tokens.sum() == 0


def test_what_is_fetched_just_now_counts_and_stays(folder):
    path = put(folder, "a", 400, 100)
    with FileLock.take(path.with_suffix(".lock")) as building:
        room = Room(folder.parent, 1000)
        assert room.set_aside(building, 450, must=False)
        assert not set_aside(room, folder, 400)
        assert path.exists()


def test_the_bound_gives_way_where_it_must_and_that_is_said_once(folder, caplog):
    hold, room = held(put(folder, "a", 400, 100)), Room(folder.parent, 500)
    with caplog.at_level(logging.WARNING):
        assert set_aside(room, folder, 300, must=True) and set_aside(room, folder, 300, must=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    hold.release()


def test_only_tokens_that_a_record_vouches_for_are_removed(folder, tmp_path):
    orphan, foreign = folder / "x.bin", tmp_path / "models" / "weights.bin"
    foreign.parent.mkdir()
    for path in (orphan, foreign, foreign.with_suffix(".json")):
        path.write_bytes(bytes(400))
    assert not set_aside(Room(tmp_path, 100), folder, 300)
    assert orphan.exists() and foreign.exists()


def test_without_a_bound_there_is_always_room(folder):
    put(folder, "a", 400, 100)
    assert set_aside(Room(folder.parent, 0), folder, 1 << 60)
    assert (folder / "a.bin").exists()
