from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard

from pretrain import archive
from pretrain.archive import KINDS, archive_name, check_kind, pack, unpack
from pretrain.checkpoint_manifest import FileEntry
from pretrain.errors import CheckpointError, ConfigError
from pretrain.files import crc32c_of_bytes, crc32c_of_file

ROOT = Path(__file__).resolve().parents[2]
CONTENTS = {"model.safetensors": bytes(range(256)) * 9000, "config.yaml": b"run: {}\n", "empty.json": b""}


def entry_of(data: bytes) -> FileEntry:
    return FileEntry(len(data), crc32c_of_bytes(data))


EXPECTED = {name: entry_of(data) for name, data in CONTENTS.items()}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, data in CONTENTS.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "deep" / "target"
    folder.mkdir(parents=True)
    return folder


def packed(source, path, kind, expected=None):
    with path.open("wb") as file:
        return pack(source, EXPECTED if expected is None else expected, file, kind)


def compressed(data: bytes, kind: str) -> bytes:
    if kind == "tar.gz":
        return gzip.compress(data)
    return zstandard.compress(data) if kind == "tar.zst" else data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_packed_comes_back_and_packing_it_again_gives_the_same_bytes(source, target, tmp_path, kind):
    path = tmp_path / "one"
    entry = packed(source, path, kind)
    assert entry == FileEntry(path.stat().st_size, crc32c_of_file(path))
    unpack(path, f"one.{kind}", EXPECTED, target)
    assert {name: (target / name).read_bytes() for name in CONTENTS} == CONTENTS
    assert everything_below(target) == sorted(CONTENTS)
    for each in source.iterdir():
        each.touch()  # a later time, as another copy of the same checkpoint has
    assert packed(source, tmp_path / "two", kind) == entry
    assert archive_name(3, entry, kind).startswith("rank-00003-") and archive_name(3, entry, kind).endswith(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_any_tar_reads_what_is_packed(source, tmp_path, kind):
    path = tmp_path / "one"
    packed(source, path, kind)
    data = path.read_bytes()
    if kind == "tar.zst":
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert {name: tar.extractfile(name).read() for name in tar.getnames()} == CONTENTS


def test_a_file_that_is_not_what_its_entry_says_is_not_packed(source, tmp_path):
    (source / "empty.json").write_bytes(b"grown")
    with pytest.raises(CheckpointError, match=r"empty.json is not what the manifest says"):
        packed(source, tmp_path / "one", "tar")
    data = bytearray(CONTENTS["model.safetensors"])
    data[0] ^= 1
    (source / "model.safetensors").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"model.safetensors is not what"):
        packed(source, tmp_path / "one", "tar", {"model.safetensors": EXPECTED["model.safetensors"]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [0, 300, 0.5, -700])
def test_a_truncated_archive_is_refused(source, target, tmp_path, kind, cut):
    path = tmp_path / "one"
    packed(source, path, "tar")
    whole = compressed(path.read_bytes()[: -2 * 512 * 18], kind)  # without most of the zeros at a tar's end
    at = int(cut * len(whole)) if isinstance(cut, float) else cut
    path.write_bytes(whole[:at])
    with pytest.raises(CheckpointError):
        unpack(path, f"one.{kind}", EXPECTED, target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_refused(source, target, tmp_path, kind):
    path = tmp_path / "one"
    packed(source, path, kind)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError):
        unpack(path, f"one.{kind}", EXPECTED, target)


DATA = b"12345678"
MALICIOUS = {
    "path traversal": (member("../evil.json", DATA), "outside the destination"),
    "absolute": (member("/tmp/evil.json", DATA), "is no plain file name"),
    "symlink": (member("x.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "no plain file"),
    "hard link": (member("x.json", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "no plain file"),
    "device": (member("x.json", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "no plain file"),
    "fifo": (member("x.json", type=tarfile.FIFOTYPE), "no plain file"),
    "folder": (member("x.json", type=tarfile.DIRTYPE), "no plain file"),
    "sparse": (member("x.json", type=tarfile.GNUTYPE_SPARSE), "no plain file"),
    "another name": (member("other.json", DATA), "does not name"),
    "another size": (member("x.json", DATA + b"9"), "9 bytes, the manifest says 8"),
    "another content": (member("x.json", b"87654321"), "crc32c"),
    "a long name": (member("x" * 200, DATA), "no plain file"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", MALICIOUS)
def test_what_the_manifest_does_not_name_is_not_written(target, tmp_path, kind, what):
    evil, words = MALICIOUS[what]
    path = tmp_path / "evil"
    path.write_bytes(compressed(tar_of(evil), kind))
    before = everything_below(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        unpack(path, f"evil.{kind}", {"x.json": entry_of(DATA)}, target)
    assert everything_below(tmp_path) == before
    assert not Path("/tmp/evil.json").exists()


def test_a_file_twice_and_a_file_too_few_are_refused(target, tmp_path):
    path = tmp_path / "evil"
    path.write_bytes(tar_of(member("x.json", DATA), member("x.json", DATA)))
    with pytest.raises(CheckpointError, match="does not name"):
        unpack(path, "evil.tar", {"x.json": entry_of(DATA)}, target)
    path.write_bytes(tar_of())
    with pytest.raises(CheckpointError, match=r"lacks x.json"):
        unpack(path, "evil.tar", {"x.json": entry_of(DATA)}, target)
    with pytest.raises(CheckpointError, match="no known kind"):
        unpack(path, "evil.zip", {"x.json": entry_of(DATA)}, target)


BOMB = """
import resource, sys
from pathlib import Path
from pretrain.archive import unpack
from pretrain.checkpoint_manifest import FileEntry
from pretrain.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    unpack(Path(sys.argv[1]), "bomb." + sys.argv[2], {"x.json": FileEntry(8, "AAAAAA==")}, Path(sys.argv[3]))
except CheckpointError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("header", ["file", "pax", "long name"])
def test_a_bomb_costs_no_memory(target, tmp_path, kind, header):
    """256 MiB behind a few KiB: as a file, or as an extended header that a tar library would read into memory."""
    n_bytes = 256 << 20
    types = {"file": tarfile.REGTYPE, "pax": tarfile.XHDTYPE, "long name": tarfile.GNUTYPE_LONGNAME}
    info, _ = member("x.json", size=n_bytes, type=types[header])
    path = tmp_path / "bomb"
    with gzip.open(path, "wb", 1) if kind == "tar.gz" else zstandard.open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(n_bytes >> 20):
            file.write(bytes(1 << 20))
    command = [sys.executable, "-c", BOMB, str(path), kind, str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    grown_kb, _, error = done.stdout.partition(" ")
    assert int(grown_kb) < 32 << 10, done.stdout
    assert "the manifest says 8" in error or "no plain file" in error
    assert everything_below(target) == []


def test_without_its_library_a_kind_is_refused_before_anything_is_packed(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for kind in ("none", "tar", "tar.gz"):
        check_kind(kind)
    with pytest.raises(ConfigError, match=r"tar.zst need the package zstandard"):
        check_kind("tar.zst")
    assert archive.KINDS == KINDS
