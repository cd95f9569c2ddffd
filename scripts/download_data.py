"""Stage training shards on this machine: disk check, parallel download, verification, manifest.

    python scripts/download_data.py --data gs://bucket/prefix --output_dir data/training

Nested folders are kept. A shard whose size and crc32c are right already is not fetched again. Each new one is opened
and read to its end, every bad one is named, and only when all are good is OUTPUT_DIR/manifest.json written: the
source's, where it says what was found. --verify_only looks at what is there in the same way, and writes nothing.
Exit codes: 0 all shards are there and good, 2 wrong settings, 3 bad or missing shards, 4 storage.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pretrain.config import StorageConfig
from pretrain.errors import ConfigError, ShardError, StorageError, TrainerError
from pretrain.files import crc32c_of_file, disk_problem, free_disk_bytes, new_file
from pretrain.manifest import MANIFEST_NAME, TOKENIZER_NAME, DataManifest, ShardEntry
from pretrain.npz import check_vocab, read_npz
from pretrain.shards import missing_shards, read_manifest, select_shards
from pretrain.storage import LocalStore, ObjectInfo, ObjectStore, checked_name, open_store
from pretrain.transfers import TransferProgress

DISK_RESERVE_BYTES = 256 * 2**20  # a disk filled to the last byte breaks more than this download


@dataclass(frozen=True)
class Staged:
    """What became of the shards."""

    shards: int
    """That should be there."""
    tokens: int
    bytes: int
    downloaded: int
    bad: tuple[ShardError, ...]
    """One for each shard that is damaged or missing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(argv)
    console = Console(stderr=options.json, highlight=False, emoji=False, markup=False, soft_wrap=True)
    try:
        check(options)
        stager = Stager(open_store(options.data, StorageConfig()), options, console)
        staged = stager.stage() if not options.dry_run else stager.plan()
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    for problem in staged.bad:
        print(problem.line(), file=sys.stderr)
    if options.json:
        print(json.dumps(report(staged), indent=1))
    if staged.bad:
        print(
            f"data error: {len(staged.bad)} of {staged.shards} shards are bad or missing; no manifest written",
            file=sys.stderr,
        )
        return ShardError.exit_code
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, metavar="URL", help="where the shards are: gs://bucket/prefix, a folder, s3://, hf://…"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder they go to")
    parser.add_argument("--pattern", default="*.npz", help="which files are shards, by their base name (*.npz)")
    parser.add_argument("--max_files", type=int, default=0, help="only the first so many by name; 0: all")
    parser.add_argument("--workers", type=int, default=8, help="parallel downloads (8)")
    parser.add_argument(
        "--vocab_size", type=int, default=0, help="of the model; 0: as the source's manifest says, if any"
    )
    parser.add_argument("--pad_token_id", type=int, default=-1, help="as data.pad_token_id of train.py (-1: none)")
    parser.add_argument("--verify", action="store_true", help="open again also the shards that an earlier run verified")
    parser.add_argument(
        "--verify_only", action="store_true", help="compare what is there with the source and open it; write nothing"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Every setting out of range, in one go. Raises ConfigError."""
    limits = {"max_files": 0, "workers": 1, "vocab_size": 0, "pad_token_id": -1}
    problems = [
        f"--{name} {getattr(options, name)} must be at least {least}"
        for name, least in limits.items()
        if getattr(options, name) < least
    ]
    if problems:
        raise ConfigError(problems)


def report(staged: Staged) -> dict[str, Any]:
    """The object that --json prints."""
    good = staged.shards - len(staged.bad)
    check = {"name": "shards_good", "value": good, "goal": staged.shards, "unit": "shards", "passed": not staged.bad}
    figures = {"tokens": staged.tokens, "bytes": staged.bytes, "downloaded": staged.downloaded}
    return {
        "name": "download_data",
        "device": f"cpu-{os.cpu_count()}core",
        "checks": [check],
        "passed": not staged.bad,
        **figures,
        "bad": [problem.what for problem in staged.bad],
    }


class Stager:
    """One source into one folder.

    Raises:
        ShardError: no shards there, or a manifest that disagrees with the vocabulary.
        StorageError: the source can't be listed.
    """

    def __init__(self, store: ObjectStore, options: argparse.Namespace, console: Console) -> None:
        self.store = store
        self.options = options
        self.console = console
        self.folder: Path = options.output_dir
        listed = store.list()
        self.objects = select_shards(listed, options.pattern, options.max_files, store.url)
        self.source_manifest = read_manifest(store, listed)
        if self.source_manifest and options.vocab_size:
            self.source_manifest.check_vocab_size(options.vocab_size, f"{store.url}/{MANIFEST_NAME}")
        declared = self.source_manifest.vocab_size if self.source_manifest else 0
        self.vocab_size = options.vocab_size or declared
        self.verified = {} if options.verify or options.verify_only else self._verified_before()

    def plan(self) -> Staged:
        """Say what a run would do."""
        absent = self._absent()
        n_bytes = sum(info.size for info in absent)
        free = free_disk_bytes(self.folder)
        room = "enough" if free >= n_bytes + DISK_RESERVE_BYTES else "NOT ENOUGH"
        self.console.print(self.store.describe())
        self.console.print(
            f"would download {len(absent)} of {len(self.objects)} shards, {gib(n_bytes)}, to {self.folder}: "
            f"{gib(free)} free, {room}"
        )
        missing = tuple(self._missing())
        return Staged(len(self.objects) + len(missing), 0, n_bytes, 0, missing)

    def stage(self) -> Staged:
        """Download, verify and write the manifest; with --verify_only nothing but verify.

        Raises:
            StorageError: no room, or the source or the folder can't be used; what was complete stays.
        """
        self.console.print(self.store.describe())
        writes = not self.options.verify_only
        if writes:
            self._check_room()
        entries, bad, downloaded = self._stage_all()
        n_bytes = sum(info.size for info in self.objects)
        n_tokens = sum(entry.tokens for entry in entries)
        missing = self._missing()
        bad += missing
        staged = Staged(len(self.objects) + len(missing), n_tokens, n_bytes, downloaded, tuple(bad))
        if not bad and writes:
            self._stage_tokenizer()
            self._write_manifest(tuple(entries))
        if not bad:
            self.console.print(
                f"{len(entries)} shards in {self.folder}: {n_tokens:,} tokens, {gib(n_bytes)}, all verified, "
                f"{downloaded} downloaded now"
            )
        return staged

    def _stage_tokenizer(self) -> None:
        """Bring tokenizer.json along where it lies beside the shards: checkpoints carry it on."""
        found, path = self.store.stat(TOKENIZER_NAME), self.folder / TOKENIZER_NAME
        in_place = isinstance(self.store, LocalStore) and (self.store.root / TOKENIZER_NAME).resolve() == path.resolve()
        if found and not in_place:
            self.store.download(TOKENIZER_NAME, path)

    def _absent(self) -> list[ObjectInfo]:
        """Shards that are not there in their size: what needs room."""
        return [info for info in self.objects if not _has_size(self._path(info), info.size)]

    def _missing(self) -> list[ShardError]:
        """One error for each shard that the source's manifest names and the source lacks."""
        names = missing_shards(self.source_manifest, self.objects, self.options.pattern, self.options.max_files)
        mend = f"Restore it, or delete {MANIFEST_NAME} there and run this again"
        found = f"not there, though {MANIFEST_NAME} names it"
        return [ShardError(f"shard {self.store.url}/{name}: {found}", mend) for name in names]

    def _check_room(self) -> None:
        absent = self._absent()
        needed, free = sum(info.size for info in absent) + DISK_RESERVE_BYTES, free_disk_bytes(self.folder)
        if absent and free < needed:
            raise StorageError(
                f"{self.folder} has {gib(free)} free, {len(absent)} shards need {gib(needed)}",
                "Free some, choose another --output_dir, or take fewer with --max_files",
            )

    def _stage_all(self) -> tuple[list[ShardEntry], list[ShardError], int]:
        """(entries of the good shards by name, errors of the bad ones, number of downloads)."""
        bad: list[ShardError] = []
        done: list[tuple[ShardEntry, bool]] = []
        n_bytes = sum(info.size for info in self.objects)
        pool = ThreadPoolExecutor(self.options.workers, thread_name_prefix="stage")
        try:
            with TransferProgress("staged", len(self.objects), n_bytes, self.console) as progress:
                futures = [pool.submit(self._stage_one, info, progress) for info in self.objects]
                for future in as_completed(futures):
                    self._collect(future, done, bad)
        finally:
            pool.shutdown(cancel_futures=True)
        done.sort(key=lambda item: item[0].name)
        bad.sort(key=lambda error: error.what)
        return [entry for entry, _ in done], bad, sum(fetched for _, fetched in done)

    def _collect(
        self, future: Future[tuple[ShardEntry, bool]], done: list[tuple[ShardEntry, bool]], bad: list[ShardError]
    ) -> None:
        """A bad shard is noted and the others go on; a store or disk that fails ends it all."""
        try:
            done.append(future.result())
        except ShardError as error:
            bad.append(error)
        except OSError as error:
            if problem := disk_problem(error, self.folder):
                raise problem from error
            raise

    def _stage_one(self, info: ObjectInfo, progress: TransferProgress) -> tuple[ShardEntry, bool]:
        """(the shard's entry, whether it was downloaded now). Raises ShardError where it is bad."""
        path = self._path(info)
        crc32c = info.crc32c or self._known_crc32c(info)
        is_damaged = not _has_size(path, info.size) or (bool(crc32c) and crc32c_of_file(path) != crc32c)
        if is_damaged and self.options.verify_only:
            found = "not what is stored" if path.exists() else "not there"
            raise ShardError(f"shard {path} is {found}", "Without --verify_only this command fetches it")
        fetched = (is_damaged or not crc32c) and not self.options.verify_only  # no checksum: nothing vouches for it
        if fetched:
            crc32c = self.store.download(info.name, path, progress.add_bytes).crc32c or crc32c
        else:
            progress.add_bytes(info.size)
        entry = self.verified.get((info.name, crc32c)) or self._open(info, path, crc32c)
        progress.add_file()
        return entry, fetched

    def _known_crc32c(self, info: ObjectInfo) -> str:
        """Of an object whose store keeps none: a folder's file is read, else the source's manifest may tell; or ""."""
        if isinstance(self.store, LocalStore):
            return crc32c_of_file(self.store.root / info.name)
        entries = self.source_manifest.shards if self.source_manifest else ()
        return next((entry.crc32c for entry in entries if (entry.name, entry.bytes) == (info.name, info.size)), "")

    def _open(self, info: ObjectInfo, path: Path, crc32c: str) -> ShardEntry:
        tokens, lengths = read_npz(path, pad_token_id=self.options.pad_token_id)
        if self.vocab_size:
            check_vocab(tokens, self.vocab_size, str(path))
        return ShardEntry(info.name, len(tokens), len(lengths), info.size, crc32c)

    def _path(self, info: ObjectInfo) -> Path:
        return self.folder / checked_name(info.name)

    def _verified_before(self) -> dict[tuple[str, str], ShardEntry]:
        """Entries of the folder's own manifest, which is only written when every shard is good."""
        path = self.folder / MANIFEST_NAME
        try:
            manifest = DataManifest.from_json(path.read_bytes(), str(path))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ShardError as error:
            self.console.print(f"every shard is opened again: {error.what}")
            return {}
        if (manifest.vocab_size, manifest.pad_token_id) != (self.vocab_size, self.options.pad_token_id):
            return {}
        return {(entry.name, entry.crc32c): entry for entry in manifest.shards}

    def _write_manifest(self, entries: tuple[ShardEntry, ...]) -> None:
        """Keep the source's manifest where it says what was found; else write what was found."""
        source = self.source_manifest
        manifest = dataclasses.replace(
            source or DataManifest(tokenizer="", vocab_size=0, eot_id=None, shards=()),
            vocab_size=self.vocab_size,
            shards=entries,
            pad_token_id=self.options.pad_token_id,
        )
        if source and set(source.shards) != set(entries):
            chosen = {info.name for info in self.objects}
            wrong = sorted(entry.name for entry in set(source.shards) - set(entries) if entry.name in chosen)
            why = f"says otherwise of {len(wrong)} shards, such as {wrong[0]}" if wrong else "is of other shards too"
            self.console.print(f"a new {MANIFEST_NAME} is written: the source's {why}")
        with new_file(self.folder / MANIFEST_NAME) as file:
            file.write(manifest.to_json().encode())


def _has_size(path: Path, n_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == n_bytes


def gib(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
