"""The folder of a preparation's unfinished work: one process at a time, one recipe, nothing half-written kept."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain import log
from pretrain.errors import ConfigError, StorageError
from pretrain.files import PART_SUFFIX, crc32c_of_bytes, crc32c_of_file, lock, new_file
from pretrain.raw_files import RawFile
from pretrain.recipes import RECIPE_NAME, as_json, claim, differences, parsed
from pretrain.shard_writer import SPLITS
from pretrain.storage import LocalStore, ObjectStore

WORK_FOLDER = ".prepare"
SCRATCH, OPEN_SHARDS = "scratch", "open"  # in it
CHECKSUM_THREADS = 4

logger = log.get(__name__)


def work_folder(given: str, store: ObjectStore) -> Path:
    """Where unfinished work lies: a folder of its own, for it is removed in the end, in the one that was given, in the
    output, or here where that is a bucket."""
    if isinstance(store, LocalStore) and not given:
        return store.root / WORK_FOLDER
    return (
        Path(given).expanduser().absolute()
        / WORK_FOLDER
        / crc32c_of_bytes(store.url.encode()).strip("=").replace("/", "_")
    )


class InUse(StorageError):
    """Another process does this work."""


@contextmanager
def sole_use(work: Path) -> Iterator[None]:
    """Keep a second process off the same work; the lock ends with this one, whatever ends it."""
    descriptor = os.open(work, os.O_RDONLY)
    try:
        if not lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            logger.warning("%s: no locks there, so nothing keeps a second process off the same work", work)
        yield
    except BlockingIOError as error:
        raise InUse(f"another process prepares in {work}", "Let it end, or choose another --work_dir") from error
    finally:
        os.close(descriptor)


def remove_leftovers(work: Path, store: ObjectStore) -> None:
    """Remove what a killed process had not given its name yet: files from a bucket, and copies into the output."""
    scratch = work / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    if isinstance(store, LocalStore):
        for folder in (store.root, *(store.root / split for split in SPLITS)):
            for path in folder.glob(f".*{PART_SUFFIX}"):
                path.unlink()


def claim_both(store: ObjectStore, work: Path, recipe: dict[str, Any]) -> None:
    """Make the output and the working folder this recipe's. Raises ConfigError where one of them is another's."""
    path = work / RECIPE_NAME
    try:
        claim(store, recipe)
    except ConfigError:
        if not path.exists():  # nothing but checksums is in it
            shutil.rmtree(work)
        raise
    recipe = {**recipe, "output": store.url}
    if not path.exists():
        with new_file(path) as file:
            file.write(as_json(recipe).encode())
    elif differing := differences(parsed(path.read_bytes(), str(path)), recipe):
        raise ConfigError(
            f"{work} holds unfinished work with other options or input: {'; '.join(differing[:5])}",
            "Give the same, or choose another --output_dir, or delete that folder",
        )


def with_checksums(files: Sequence[RawFile], work: Path, on_bytes: Callable[[int], None]) -> list[RawFile]:
    """The files with the checksum of their content; those that an earlier process read and that are as they were are
    not read again."""
    path = work / "checksums.json"
    known: dict[str, list[Any]] = {}
    if path.exists():
        known = parsed(path.read_bytes(), str(path))

    def checked(file: RawFile) -> RawFile:
        if not file.is_local and not file.crc32c and file.generation:
            return file  # to read all of a hub only for its checksums would fetch it twice
        *seen, crc32c = known.get(f"{file.folder}/{file.key}", [""])
        if file.crc32c or seen == [file.size, file.generation]:
            return dataclasses.replace(file, crc32c=file.crc32c or crc32c)
        with file.on_disk() as local:
            return dataclasses.replace(file, crc32c=crc32c_of_file(local))

    done: list[RawFile] = []
    n_bytes = 0
    with ThreadPoolExecutor(CHECKSUM_THREADS) as pool:
        for file in pool.map(checked, files):
            done.append(file)
            n_bytes += file.size
            on_bytes(n_bytes)
    with new_file(path) as out:
        out.write(json.dumps({f"{f.folder}/{f.key}": [f.size, f.generation, f.crc32c] for f in done}).encode())
    return done
