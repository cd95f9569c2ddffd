"""Bring checkpoints to the bucket and back by hand, through the same commits as the trainer.

    python scripts/upload_manager.py status --run test --url gs://bucket/Checkpoints
    python scripts/upload_manager.py upload checkpoint-epoch0-step50-files5 --url gs://bucket/Checkpoints
    python scripts/upload_manager.py upload-all --config production --url gs://bucket/Checkpoints
    python scripts/upload_manager.py download latest --run test --url gs://bucket/Checkpoints

A trainer uploads by itself, and its next start uploads what the last one could not: this is for when there is no next
start. While a trainer of this machine uses a run, its checkpoints are neither uploaded nor fetched here. NAME is a
checkpoint's name, RUN/NAME, or latest. Exit codes: 0 done, 2 wrong settings, 4 storage, 5 a checkpoint that is missing
or damaged, or a run in use.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from pretrain.catalog import Entry
from pretrain.errors import TrainerError
from pretrain.listings import print_table, size_text
from pretrain.places import (
    Place,
    Report,
    add_place_options,
    check_run,
    damage,
    print_checkpoints,
    run_command,
)
from pretrain.shipping import bucket_of, download, upload, waiting


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    return run_command(parse(argv), "upload_manager")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace, Place, Console], Report], says: str, named: bool) -> None:
        command = commands.add_parser(name, help=says, description=says[0].upper() + says[1:] + ".")
        if named:
            command.add_argument("checkpoint", metavar="NAME")
        add_place_options(command)
        command.add_argument("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
        command.set_defaults(command=run)

    add("status", status, "what is in the bucket, and what still waits here", False)
    add("list", list_checkpoints, "a table of all checkpoints here and in the bucket", False)
    add("upload", upload_one, "commit one checkpoint in the bucket", True)
    add("upload-all", upload_all, "commit every checkpoint that waits, the oldest first", False)
    add("download", download_one, "bring one checkpoint of the bucket here, verified", True)
    add("verify", verify, "compare what is in the bucket and here with the manifests; exit 5 if any is damaged", False)
    return parser.parse_args(argv)


def status(_options: argparse.Namespace, place: Place, console: Console) -> Report:
    """Counts of each run, and the names of what waits."""
    left = {entry.label for entry in waiting(place.catalog, place.run)} if place.catalog.store else set()
    entries = place.catalog.entries(place.run)
    check_run(place, entries)
    runs = {}
    for run in dict.fromkeys(entry.run for entry in entries):
        of_run = [entry for entry in entries if entry.run == run]
        waits = [entry for entry in of_run if entry.label in left]
        runs[run] = {
            "local": sum(bool(entry.local and entry.local.manifest) for entry in of_run),
            "bucket": sum(bool(entry.bucket and entry.bucket.manifest) for entry in of_run),
            "waiting": [str(entry.name) for entry in waits],
            "waiting_bytes": sum(entry.bytes for entry in waits),
            "not_committed": sum(entry.manifest is None for entry in of_run),
        }
    _print_status(runs, place, console)
    return {"url": place.catalog.store.url if place.catalog.store else None, "runs": runs}


def _print_status(runs: dict[str, dict[str, Any]], place: Place, console: Console) -> None:
    known = place.catalog.store is not None
    rows = [
        [
            run,
            str(each["local"]),
            str(each["bucket"]) if known else "?",
            f"{len(each['waiting'])} ({size_text(each['waiting_bytes'])})" if known else "?",
            str(each["not_committed"]),
        ]
        for run, each in runs.items()
    ]
    columns = ["run", "committed here", "in the bucket", "waiting", "not committed"]
    print_table(columns, rows, console, right=columns[1:])
    for run, each in runs.items():
        for name in each["waiting"]:
            console.print(f"waiting: {run}/{name}", soft_wrap=True)
    where = place.catalog.store.describe() if place.catalog.store else "not looked at (--url gs://bucket/prefix)"
    console.print(f"bucket: {where}", soft_wrap=True)


def list_checkpoints(_options: argparse.Namespace, place: Place, console: Console) -> Report:
    """All checkpoints, one table a run."""
    entries = place.catalog.entries(place.run)
    check_run(place, entries)
    rows = [place.catalog.describe(entry, verify=True) for entry in entries]
    print_checkpoints(rows, place, console)
    return {"checkpoints": rows}


def upload_one(options: argparse.Namespace, place: Place, console: Console) -> Report:
    """Commit one checkpoint; nothing to do is success."""
    bucket_of(place.catalog)
    entry = place.catalog.find(options.checkpoint, place.run)
    return {"uploaded": [entry.label] if _upload(entry, place, console) else []}


def upload_all(_options: argparse.Namespace, place: Place, console: Console) -> Report:
    """Commit all that waits; what fails is named, and the others go on."""
    uploaded, failed, exit_code = [], {}, 0
    entries = waiting(place.catalog, place.run)
    for entry in entries:
        try:
            if _upload(entry, place, console):
                uploaded.append(entry.label)
        except TrainerError as error:
            print(error.line(), file=sys.stderr)
            failed[entry.label] = error.what
            exit_code = exit_code or error.exit_code
    console.print(f"{len(uploaded)} of {len(entries)} uploaded", soft_wrap=True)
    return {"uploaded": uploaded, "failed": failed, "passed": not failed, "exit_code": exit_code}


def _upload(entry: Entry, place: Place, console: Console) -> bool:
    console.print(f"uploading {entry.label}, {size_text(entry.bytes)}", soft_wrap=True)
    started = time.perf_counter()
    was_sent = upload(entry, place.catalog, place.storage)
    end = f"committed in {time.perf_counter() - started:.1f} s" if was_sent else "was already there, whole"
    console.print(f"{entry.label} {end}", soft_wrap=True)
    return was_sent


def download_one(options: argparse.Namespace, place: Place, console: Console) -> Report:
    """Bring one checkpoint here; nothing to do is success."""
    bucket_of(place.catalog)
    entry = place.catalog.find(options.checkpoint, place.run)
    folder = place.catalog.folder_of(entry)
    console.print(f"fetching {entry.label}, {size_text(entry.bytes)}", soft_wrap=True)
    was_fetched = download(entry, place.catalog)
    console.print(f"{'verified and complete' if was_fetched else 'was already here, whole'}: {folder}", soft_wrap=True)
    return {"checkpoint": entry.label, "folder": str(folder), "downloaded": was_fetched}


def verify(_options: argparse.Namespace, place: Place, console: Console) -> Report:
    """Every committed copy against its manifest."""
    entries = place.catalog.entries(place.run)
    check_run(place, entries)
    return damage(entries, place, console)


if __name__ == "__main__":
    sys.exit(main())
