"""Files of raw text: which there are below a folder, behind a glob or in a bucket, and how they are cut into units.

A unit is what one worker takes at a time: a range of lines of a plain file, some row groups of a parquet file, or a
whole file where it can only be read from its beginning (compressed, Arrow) or has to be fetched from a bucket first.
The units of all files in their order are all documents in their order, whatever the cuts.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from pretrain.config import StorageConfig
from pretrain.errors import ConfigError, ShardError
from pretrain.storage import Listing, LocalStore, ObjectStore, open_store

SUFFIXES = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
READ_HERE = ".txt, .jsonl, .ndjson and .json (an object a line), each also .gz or .zst, .parquet and .arrow"
SAVED_STATE, SAVED_SPLITS = "state.json", "dataset_dict.json"  # what Hugging Face's save_to_disk writes
NOT_TEXT = {SAVED_STATE, SAVED_SPLITS, "dataset_info.json", "dataset_infos.json"}
SPLIT_FILE = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}")  # of a snapshot from the hub


@dataclass(frozen=True)
class RawFile:
    """One file of raw text."""

    name: str
    """As errors and metadata.json call it."""
    folder: str
    """URL of the store that it lies in."""
    key: str
    """Its name in that store."""
    size: int
    """Bytes."""
    generation: int
    """Changes when the file is written again."""
    crc32c: str = ""
    """Of its content; empty: not known yet."""
    storage: StorageConfig = field(default_factory=StorageConfig, compare=False, repr=False)
    """How patiently it is fetched."""

    @property
    def compression(self) -> str:
        """gz, zst or empty."""
        return COMPRESSIONS.get(PurePosixPath(self.key.lower()).suffix, "")

    @property
    def format(self) -> str:
        """txt, jsonl, parquet or arrow; empty: not read here."""
        path = PurePosixPath(self.key.lower())
        if not self.compression:
            return SUFFIXES.get(path.suffix, "")
        inner = PurePosixPath(path.stem).suffix
        kind = SUFFIXES.get(inner, "jsonl" if not inner or inner[1:].isdecimal() else "")  # 00.zst holds lines of JSON
        return kind if kind in ("txt", "jsonl") else ""

    @property
    def is_local(self) -> bool:
        return "://" not in self.folder

    @property
    def version(self) -> tuple[int, int]:
        """(size, generation)."""
        return self.size, self.generation

    @property
    def identity(self) -> str:
        """What tells its content from another: its checksum, or where its store has none, what it says of versions."""
        return self.crc32c or f"version {self.generation}"

    @contextmanager
    def on_disk(self, scratch: str = "") -> Iterator[Path]:
        """The file on this machine, fetched for the time of the block where it lies in a bucket.

        Args:
            scratch: a folder for what is fetched; empty: the system's.

        Raises:
            ShardError: it is not the file that was listed.
            StorageError: it can't be fetched.
        """
        if self.is_local:
            path = Path(self.folder) / self.key
            self._check(path)
            yield path
            self._check(path)
            return
        with tempfile.TemporaryDirectory(prefix="raw-", dir=scratch or None) as folder:
            path = Path(folder) / "file"
            info = open_store(self.folder, self.storage).download(self.key, path)
            if (info.crc32c != self.crc32c) if self.crc32c else (info.size, info.generation) != self.version:
                raise self._changed()
            yield path

    def _check(self, path: Path) -> None:
        try:
            status = path.stat()
        except OSError as error:
            raise ShardError(f"can't read {self.name}: {error.strerror}", "Check that the file is there") from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self.generation):
            raise self._changed()

    def _changed(self) -> ShardError:
        return ShardError(f"{self.name} changed since it was listed", "Let its writer end, and start again")


@dataclass(frozen=True)
class Unit:
    """A part of a file. `start` and `stop` count bytes or row groups; both 0: the whole file."""

    index: int
    file: RawFile
    start: int = 0
    stop: int = 0
    n_bytes: int = 0
    """Of the file that this unit stands for, for the progress."""


# ---- which files ----


def list_inputs(
    input_dir: str,
    patterns: Sequence[str],
    *,
    split: str = "train",
    outside: Path | None = None,
    storage: StorageConfig | None = None,
) -> tuple[list[RawFile], list[str]]:
    """The files to read, in order, and the names of what is passed over.

    Folders are read whole, by name; hidden files and folders are not. Of data sets that hold several splits, one is
    taken.

    Args:
        input_dir: a folder or gs://bucket/prefix; empty: none.
        patterns: paths, folders or globs, local or gs://. In gs:// a `*` crosses slashes.
        split: of Hugging Face data sets.
        outside: a folder whose files are no input: the output, where it lies within.
        storage: how patiently buckets are listed, and the files fetched later.

    Raises:
        ShardError: nothing to read, or a name that holds no known format.
    """
    storage = storage or StorageConfig()
    files: list[RawFile] = []
    passed: list[str] = []
    if input_dir:
        found, left = _below(input_dir, "", split, outside, storage)
        files, passed = files + found, passed + left
        if not found:
            others = f", only {len(left)} others such as {left[0]}" if left else ""
            raise ShardError(f"no raw text below {input_dir}{others}", f"Read here: {READ_HERE}")
    for pattern in patterns:
        found, left = _matching(pattern, split, outside, storage)
        if not found:
            others = f", only {left[0]}" if left else ""
            raise ShardError(f"no raw text behind {pattern}{others}", f"Read here: {READ_HERE}")
        files, passed = files + found, passed + left
    unique = {(file.folder, file.key): replace(file, storage=storage) for file in files}
    return list(unique.values()), passed


def _matching(
    pattern: str, split: str, outside: Path | None, storage: StorageConfig
) -> tuple[list[RawFile], list[str]]:
    wild = re.search(r"[*?\[]", pattern)
    if "://" in pattern:
        if not wild and not _named(pattern):
            return _below(pattern, f"{pattern.rstrip('/')}/", split, outside, storage)
        folder = (pattern[: wild.start()] if wild else pattern).rpartition("/")[0]
        store = open_store(folder, storage)
        within = pattern[len(folder) + 1 :]
        listed = [info for info in store.list() if fnmatchcase(info.name, within)]
        return _select(store, listed, f"{folder}/", split)
    files: list[RawFile] = []
    passed: list[str] = []
    for path in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
        if os.path.isdir(path):
            found, left = _below(path, f"{path.rstrip('/')}/", split, outside, storage)
        else:
            store = LocalStore(Path(path).parent)
            info = store.stat(Path(path).name)
            found, left = _select(store, [info] if info else [], f"{os.path.dirname(path) or '.'}/", split)
        files, passed = files + found, passed + left
    return files, passed


def _named(url: str) -> bool:
    return bool(RawFile("", "", url, 0, 0).format)


def _below(
    url: str, prefix: str, split: str, outside: Path | None, storage: StorageConfig
) -> tuple[list[RawFile], list[str]]:
    store = open_store(url, storage)
    listed = store.list()
    if outside and isinstance(store, LocalStore):
        listed = [info for info in listed if outside.absolute() not in (store.root / info.name).parents]
    return _select(store, listed, prefix, split)


def _select(store: ObjectStore, listed: Listing, prefix: str, split: str) -> tuple[list[RawFile], list[str]]:
    """Of what is listed, the files with a format, and the names of the others."""
    wanted = _of_split(store, [info.name for info in listed], split)
    files, passed = [], []
    for info in listed:
        if any(part.startswith(".") for part in info.name.split("/")):
            continue
        file = RawFile(prefix + info.name, store.url, info.name, info.size, info.generation, info.crc32c)
        if file.format and info.name in wanted:
            files.append(file)
        else:
            passed.append(file.name)
    return files, passed


def _of_split(store: ObjectStore, names: list[str], split: str) -> set[str]:
    """Of Hugging Face's data sets only one split, and of a saved one only its data; all else as it is."""
    kept = {name for name in names if PurePosixPath(name).name not in NOT_TEXT}
    for name in names:
        folder, _, base = name.rpartition("/")
        inside = f"{folder}/" if folder else ""
        if base == SAVED_SPLITS:
            splits = _json_object(store, name).get("splits", [])
            if split not in splits:
                raise ConfigError(f"{store.url}/{name}: there is no split {split!r}", f"--split one of {splits}")
            wanted = f"{inside}{split}/"
            others = tuple(f"{inside}{other}/" for other in splits if other != split)
            kept = {one for one in kept if one.startswith(wanted) or not one.startswith(others)}
        elif base == SAVED_STATE and f"{inside}dataset_info.json" in names:
            data = {inside + part["filename"] for part in _json_object(store, name).get("_data_files", [])}
            if lost := sorted(data - set(names)):
                raise ShardError(f"{store.url}/{name} names {lost[0]}, which is not there", "Copy the data set again")
            kept = {one for one in kept if one in data or one.rpartition("/")[0] != folder}
    splits_of = {name: found["split"] for name in kept if (found := SPLIT_FILE.match(PurePosixPath(name).name))}
    folders = {name.rpartition("/")[0] for name, found in splits_of.items() if found == split}
    return {name for name in kept if splits_of.get(name, split) == split or name.rpartition("/")[0] not in folders}


def _json_object(store: ObjectStore, name: str) -> dict[str, Any]:
    try:
        tree = json.loads(store.read_bytes(name))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{store.url}/{name} is not JSON: {error}", "Copy the data set again") from error
    if not isinstance(tree, dict):
        raise ShardError(f"{store.url}/{name} is no JSON object", "Copy the data set again")
    return tree


# ---- how they are cut ----


def cut_units(files: Sequence[RawFile], unit_bytes: int, *, lines_of_txt: bool = False) -> list[Unit]:
    """All files as units of about `unit_bytes`.

    Args:
        lines_of_txt: a line of a .txt is a document of its own.

    Raises:
        ConfigError: parquet files, and pyarrow is missing.
    """
    units: list[Unit] = []
    for file in files:
        by_lines = file.format == "jsonl" or (file.format == "txt" and lines_of_txt)
        cuts: list[tuple[int, int, int]] = []
        if file.is_local and by_lines and not file.compression:
            cuts = [
                (start, min(start + unit_bytes, file.size), min(unit_bytes, file.size - start))
                for start in range(0, file.size, unit_bytes)
            ]
        elif file.is_local and file.format == "parquet":
            cuts = _cut_row_groups(file, unit_bytes)
        for start, stop, n_bytes in cuts or [(0, 0, file.size)]:
            units.append(Unit(len(units), file, start, stop, n_bytes))
    return units


def _cut_row_groups(file: RawFile, unit_bytes: int) -> list[tuple[int, int, int]]:
    """(first row group, end, bytes) of each unit; none where the file can't be read: its reader will say why."""
    from pretrain.tables import parquet_group_bytes

    cuts: list[tuple[int, int, int]] = []
    start, held = 0, 0
    sizes = parquet_group_bytes(Path(file.folder) / file.key)
    for index, n_bytes in enumerate(sizes):
        held += n_bytes
        if held >= unit_bytes or index == len(sizes) - 1:
            cuts.append((start, index + 1, held))
            start, held = index + 1, 0
    return cuts
