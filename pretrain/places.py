"""Where the checkpoints are that a tool looks at: its options, and the catalog they lead to."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pretrain.arguments import parse
from pretrain.catalog import Catalog, Entry
from pretrain.config import CheckpointConfig, LogConfig, StorageConfig
from pretrain.errors import EXIT_DONE, CheckpointError, TrainerError
from pretrain.listings import figure_text, print_table, size_text, time_text
from pretrain.storage import open_store

Report = dict[str, Any]  # what a command found: the object of --json; "passed" or "exit_code" decide how it ends

COLUMNS = ("checkpoint", "step", "loss", "tokens", "files", "size", "committed", "verified", "where", "saved (UTC)")
FIGURES = ("step", "loss", "tokens", "files", "size")


@dataclass(frozen=True)
class Place:
    """What the options of a tool lead to.

    Args:
        run: the only run to look at; empty: all of them.
        logs: folder of the runs' logs.
        storage: how patiently the bucket is used.
    """

    catalog: Catalog
    run: str
    logs: Path
    storage: StorageConfig


def add_place_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where the checkpoints are."""
    group = parser.add_argument_group("where the checkpoints are")
    group.add_argument("--config", metavar="NAME", help="take the options below from configs/NAME.yaml, or a path")
    group.add_argument("--run", metavar="NAME", help="this run only (all)")
    group.add_argument("--checkpoints_dir", metavar="FOLDER", help="folder of the local ones (checkpoints)")
    group.add_argument(
        "--url", metavar="URL", help="where they are committed: gs://bucket/prefix or a folder (the bucket is left out)"
    )
    group.add_argument("--logs_dir", metavar="FOLDER", help="folder of the logs (logs)")


def run_command(options: argparse.Namespace, script: str) -> int:
    """Run the command that a tool's parser has put into `options.command`; the exit code."""
    console = Console(stderr=options.json, highlight=False, emoji=False, markup=False)
    try:
        command: Callable[[argparse.Namespace, Place, Console], Report] = options.command
        found = command(options, open_place(options), console)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps({"name": f"{script} {options.what}", **found}, indent=1))
    return int(found.get("exit_code", EXIT_DONE if found.get("passed", True) else CheckpointError.exit_code))


def open_place(options: argparse.Namespace) -> Place:
    """The place that the options name.

    Raises:
        ConfigError: the config or the url is wrong.
        StorageError: the credentials can't be used.
    """
    if options.config:
        # Shards are none of a tool's business, but a config without them is not valid.
        config = parse(["--config", options.config, "--data.source", "unused"]).config
        run, checkpoint, logs, storage = config.run.name, config.checkpoint, config.log.dir, config.storage
    else:
        run, checkpoint, logs, storage = "", CheckpointConfig(), LogConfig().dir, StorageConfig()
    url = checkpoint.url if options.url is None else options.url
    catalog = Catalog(Path(options.checkpoints_dir or checkpoint.dir), open_store(url, storage) if url else None)
    return Place(catalog, options.run or run, Path(options.logs_dir or logs), storage)


def check_run(place: Place, entries: Sequence[Entry]) -> None:
    """Raises CheckpointError where a run is named and there is nothing of it: a misspelt name is no empty run."""
    if place.run and not entries:
        runs = ", ".join(place.catalog.runs()) or "none"
        raise CheckpointError(f"there is no checkpoint of run {place.run}; runs with checkpoints: {runs}")


def print_checkpoints(rows: Sequence[dict[str, Any]], place: Place, console: Console) -> None:
    """One table a run, what is damaged, and what was not looked at.

    Args:
        rows: of `Catalog.describe`.
    """
    if not rows:
        console.print(f"no checkpoints in {place.catalog.folder}", soft_wrap=True)
    for run in dict.fromkeys(row["run"] for row in rows):
        shown = [_cells(row) for row in rows if row["run"] == run]
        print_table(COLUMNS, shown, console, right=FIGURES, title=f"Run {run}")
        console.print()
    for row in rows:
        for problem in row["problems"]:
            console.print(f"{row['run']}/{row['name']}: {problem}", soft_wrap=True)
    where = place.catalog.store.describe() if place.catalog.store else "not looked at (--url gs://bucket/prefix)"
    console.print(f"bucket: {where}", soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    words = {True: "yes", False: "NO", None: "–"}
    return [
        row["name"],
        figure_text(row["step"], ","),
        figure_text(row["loss"], ".4f"),
        figure_text(row["tokens"], ","),
        figure_text(row["files"], ","),
        size_text(row["bytes"]),
        words[row["committed"]],
        words[row["verified"]],
        row["where"],
        time_text(row["timestamp"]),
    ]


def damage(entries: Sequence[Entry], place: Place, console: Console) -> dict[str, Any]:
    """Verify every committed copy of some checkpoints, say how each is, and report it.

    Returns:
        {"checks": [...], "passed": ..., "damaged": {RUN/NAME: {place: [problem]}}}.

    Raises:
        StorageError: the bucket can't be listed.
    """
    damaged: dict[str, dict[str, list[str]]] = {}
    copies = 0
    for entry in entries:
        for where, problems in place.catalog.problems(entry).items():
            copies += 1
            console.print(f"{entry.label}  {where:<6}  {'; '.join(problems) or 'whole'}", soft_wrap=True)
            if problems:
                damaged.setdefault(entry.label, {})[where] = problems
    bad = sum(map(len, damaged.values()))
    console.print(f"{copies - bad} of {copies} copies are whole", soft_wrap=True)
    check = {"name": "copies_whole", "value": copies - bad, "goal": copies, "unit": "copies", "passed": not bad}
    return {"checks": [check], "passed": not bad, "damaged": damaged}
