"""Files made to harm who reads them, read in a process of its own; run by test_hostile.py, which watches what happens.

    python tests/chaos/hostile.py FOLDER      prints {CASE: {"error": TYPE, "told": TEXT, "grown_mb": PEAK}, …}

Each case writes its file to a folder and returns the reader that would meet it. Code in a pickle, were it run, would
leave the folder `owned` behind; a path that leads outside would leave the file `escaped`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.archive import unpack
from pretrain.checkpoint import CheckpointReader, damaged_files, read_manifest, write_manifest
from pretrain.checkpoint_manifest import CheckpointName, FileEntry, Manifest
from pretrain.files import crc32c_of_bytes
from pretrain.npz import read_npz

GIB = 1 << 30
NAME = CheckpointName(0, 5, 0)
Reader = Callable[[], object]
Case = Callable[[Path], Reader]


class Payload:
    """What unpickling would run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.mkdir, (str(self.folder / "owned"),)


# ---- shards ----


def npy(shape: str, dtype: str, body: bytes) -> bytes:
    """An .npy file whose header says what it is told to."""
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


def shard(folder: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Reader:
    path = folder / "shard.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return partial(read_npz, path)


def npz_with_a_pickle(folder: Path) -> Reader:
    array = np.array([Payload(folder)], dtype=object)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return shard(folder, {"input_ids.npy": buffer.getvalue()})


def npz_that_is_a_pickle(folder: Path) -> Reader:
    return shard(folder, {"input_ids.npy": pickle.dumps(Payload(folder))})


def npz_bomb(folder: Path) -> Reader:
    path = folder / "shard.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("input_ids.npy", "w") as member:
        member.write(npy(f"({GIB},)", "|u1", b""))
        for _ in range(1024):
            member.write(bytes(1 << 20))
    return partial(read_npz, path)


def npz_with_a_lying_header(folder: Path) -> Reader:
    return shard(folder, {"input_ids.npy": npy(f"({2048 * GIB // 2},)", "<u2", bytes(100))})


def npz_with_a_thousand_members(folder: Path) -> Reader:
    return shard(folder, {f"{number}.npy": b"" for number in range(1000)})


def npz_with_a_path(folder: Path) -> Reader:
    return shard(folder, {"../../escaped.npy": npy("(1,)", "<u2", bytes(2))})


# ---- checkpoints ----


def checkpoint(folder: Path, name: str, data: bytes, claims: dict[str, FileEntry] | None = None) -> Path:
    """A checkpoint of one file, with a manifest that vouches for it."""
    path = folder / str(NAME)
    path.mkdir()
    (path / name).write_bytes(data)
    entry = FileEntry(len(data), crc32c_of_bytes(data))
    write_manifest(Manifest(NAME, "attempt", 1, claims or {name: entry}), path)
    return path


def read(path: Path) -> object:
    """What a resume does with a folder: the manifest, the checksums, every tensor."""
    manifest = read_manifest(path)
    assert damaged_files(manifest, path) == []
    reader = CheckpointReader(path, manifest)
    return [reader.weight(name) for name in reader.parameter_names]


def safetensors(header: bytes, length: int | None = None, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def pt_in_place_of_weights(folder: Path) -> Reader:
    return partial(read, checkpoint(folder, "model-00001-of-00001.safetensors", pickle.dumps(Payload(folder))))


def pt_beside_the_weights(folder: Path) -> Reader:
    path = checkpoint(folder, "pytorch_model.pt", pickle.dumps(Payload(folder)))
    return lambda: refuse(f"nothing of it was read: {read(path)}")


def header_longer_than_the_file(folder: Path) -> Reader:
    return partial(read, checkpoint(folder, "model-00001-of-00001.safetensors", safetensors(b"{}", length=1 << 60)))


def header_of_a_huge_tensor(folder: Path) -> Reader:
    tree = {"tok_emb.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}}
    return partial(read, checkpoint(folder, "model-00001-of-00001.safetensors", safetensors(json.dumps(tree).encode())))


def header_of_overlapping_tensors(folder: Path) -> Reader:
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    tree = {"a.weight": one, "b.weight": one}
    data = safetensors(json.dumps(tree).encode(), body=bytes(16))
    return partial(read, checkpoint(folder, "model-00001-of-00001.safetensors", data))


def header_that_is_no_json(folder: Path) -> Reader:
    return partial(read, checkpoint(folder, "model-00001-of-00001.safetensors", safetensors(b"[" * 100_000)))


def manifest_that_names_a_path(folder: Path) -> Reader:
    (folder.parent / "secret.safetensors").write_bytes(b"")
    return partial(read, checkpoint(folder, "a.json", b"{}", {"../../secret.safetensors": FileEntry(0, "AAAAAA==")}))


def manifest_of_a_huge_file(folder: Path) -> Reader:
    path = checkpoint(folder, "a.json", b"{}", {"a.json": FileEntry(1 << 60, "AAAAAA==")})
    return lambda: refuse("; ".join(damaged_files(read_manifest(path), path)))


def refuse(why: str) -> None:
    """Where nothing is raised because nothing was touched."""
    if why:
        raise ValueError(why)


# ---- archives ----


def archive(folder: Path, member: tarfile.TarInfo, data: bytes = b"", kind: str = "tar", **claims: int) -> Reader:
    """An archive of one member, unpacked as the manifest claims it to be."""
    path, target = folder / f"files.{kind}", folder / "unpacked"
    member.size = len(data) if member.isreg() else 0
    mode: Any = {"tar": "w", "tar.gz": "w:gz"}[kind]
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(data))
    expected = {name: FileEntry(n_bytes, "AAAAAA==") for name, n_bytes in claims.items()}
    target.mkdir()
    whole = {member.name: FileEntry(len(data), crc32c_of_bytes(data))}
    return partial(unpack, path, path.name, expected or whole, target)


def linked(name: str, kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def tar_out_of_its_folder(folder: Path) -> Reader:
    return archive(folder, tarfile.TarInfo("../../escaped"), b"x")


def tar_with_an_absolute_path(folder: Path) -> Reader:
    return archive(folder, tarfile.TarInfo(str(folder.parent / "escaped")), b"x", model=1)


def tar_with_a_symlink(folder: Path) -> Reader:
    return archive(folder, linked("model", tarfile.SYMTYPE, "/etc/passwd"))


def tar_with_a_hard_link(folder: Path) -> Reader:
    return archive(folder, linked("model", tarfile.LNKTYPE, "/etc/passwd"))


def tar_with_a_device(folder: Path) -> Reader:
    return archive(folder, linked("model", tarfile.CHRTYPE, ""))


def tar_with_an_unnamed_file(folder: Path) -> Reader:
    return archive(folder, tarfile.TarInfo("extra"), b"x", model=1)


def tar_gz_bomb(folder: Path) -> Reader:
    return archive(folder, tarfile.TarInfo("model"), bytes(GIB // 2), "tar.gz", model=1000)


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        npz_with_a_pickle,
        npz_that_is_a_pickle,
        npz_bomb,
        npz_with_a_lying_header,
        npz_with_a_thousand_members,
        npz_with_a_path,
        pt_in_place_of_weights,
        pt_beside_the_weights,
        header_longer_than_the_file,
        header_of_a_huge_tensor,
        header_of_overlapping_tensors,
        header_that_is_no_json,
        manifest_that_names_a_path,
        manifest_of_a_huge_file,
        tar_out_of_its_folder,
        tar_with_an_absolute_path,
        tar_with_a_symlink,
        tar_with_a_hard_link,
        tar_with_a_device,
        tar_with_an_unnamed_file,
        tar_gz_bomb,
    )
}


def peak_mb() -> float:
    """The largest resident memory of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def forget_peak() -> None:
    """From here on the peak is that of the reader, not of what wrote its file (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def meet(case: Case, folder: Path) -> dict[str, Any]:
    """Run one case; what its reader raised, and how far the peak of the resident memory grew."""
    folder.mkdir(parents=True)
    reader = case(folder)
    forget_peak()
    before = peak_mb()
    try:
        reader()
    except Exception as error:  # noqa: BLE001 (which one is what the test asks)
        return {"error": type(error).__name__, "told": str(error)[:300], "grown_mb": peak_mb() - before}
    return {"error": "", "told": "", "grown_mb": peak_mb() - before}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    print(json.dumps({name: meet(case, root / name / "here") for name, case in CASES.items()}))
