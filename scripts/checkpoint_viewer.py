"""Look at the checkpoints of all runs, on this machine and in the bucket.

    python scripts/checkpoint_viewer.py list
    python scripts/checkpoint_viewer.py view --run test
    python scripts/checkpoint_viewer.py compare checkpoint-epoch0-step50-files5 checkpoint-epoch0-step100-files10
    python scripts/checkpoint_viewer.py plot --save curves.png
    python scripts/checkpoint_viewer.py verify --url gs://bucket/Checkpoints
    python scripts/checkpoint_viewer.py clean --delete

NAME is a checkpoint's name, RUN/NAME, or latest. Nothing is changed but by `clean --delete`, and that touches nothing
that is committed. Exit codes: 0 done, 2 wrong settings, 4 storage, 5 a checkpoint that is missing or damaged.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from pretrain.catalog import METADATA_FILE, Entry
from pretrain.charts import draw_text, save_png
from pretrain.comparison import WeightChange, by_layer, weight_changes
from pretrain.curves import saved_curve, with_log
from pretrain.errors import CheckpointError, ConfigError
from pretrain.leftovers import Leftover, find_leftovers, remove_leftover
from pretrain.listings import NOTHING, age_text, figure_text, print_fields, print_table, size_text, time_text
from pretrain.places import (
    Place,
    Report,
    add_place_options,
    check_run,
    damage,
    print_checkpoints,
    run_command,
)
from pretrain.run_lock import sole_use
from pretrain.settings import differing_settings

CURVES_FILE = "training_metrics.json"
CHART_ROWS = (14, 8)  # of the loss and of the learning rate, in lines of a terminal
MAX_CHART_COLUMNS = 110


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    return run_command(parse(argv), "checkpoint_viewer")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace, Place, Console], Report], says: str) -> Any:
        command = commands.add_parser(name, help=says, description=says[0].upper() + says[1:] + ".")
        command.set_defaults(command=run)
        return command

    listing = add("list", list_checkpoints, "a table of all checkpoints")
    listing.add_argument("--no_verify", action="store_true", help="don't read the files to verify them")
    viewing = add("view", view, "everything that a checkpoint says of itself")
    compare_ = add("compare", compare, "checkpoints side by side: figures, settings, weights layer by layer")
    compare_.add_argument("checkpoints", metavar="NAME", nargs="+")
    compare_.add_argument("--parameters", action="store_true", help="show each parameter rather than each layer")
    plotting = add("plot", plot, "loss and learning rate over all restarts, as text or as a picture")
    for command in (viewing, plotting):
        command.add_argument("checkpoint", metavar="NAME", nargs="?", default="latest", help="latest, if left out")
    plotting.add_argument("--save", type=Path, metavar="PNG", help="write a picture instead of drawing on the terminal")
    verifying = add("verify", verify, "compare every file with its manifest; exit 5 if any is damaged")
    verifying.add_argument("checkpoint", metavar="NAME", nargs="?", help="all that are committed, if left out")
    cleaning = add("clean", clean, "what killed processes left behind: saves and uploads that were never committed")
    cleaning.add_argument("--delete", action="store_true", help="remove it; otherwise it is only listed")
    cleaning.add_argument(
        "--older_than_hours", type=float, default=1.0, metavar="H", help="keep what may still be written (1)"
    )
    for command in commands.choices.values():
        add_place_options(command)
        command.add_argument("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    return parser.parse_args(argv)


def list_checkpoints(options: argparse.Namespace, place: Place, console: Console) -> Report:
    """All checkpoints, one table a run."""
    entries = place.catalog.entries(place.run)
    check_run(place, entries)
    rows = [place.catalog.describe(entry, verify=not options.no_verify) for entry in entries]
    print_checkpoints(rows, place, console)
    return {"checkpoints": rows}


# ---- view and compare ----


def view(options: argparse.Namespace, place: Place, console: Console) -> Report:
    """One checkpoint's metadata.json, in words."""
    entry = place.catalog.find(options.checkpoint, place.run)
    metadata = place.catalog.document(entry, METADATA_FILE)
    for title, fields in sections(entry, metadata).items():
        console.print()
        print_fields(title, fields, console)
    return {"checkpoint": entry.label, "where": entry.where, "bytes": entry.bytes, "metadata": metadata}


def sections(entry: Entry, metadata: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Title -> name -> value, of everything that metadata.json says."""
    progress, system = _tree(metadata, "training_progress"), _tree(metadata, "system_info")
    validation = _tree(metadata, "validation_metrics")
    curve = saved_curve(metadata, entry.label)
    source = "validation" if curve.validation_losses else "average training"
    rates, losses = curve.learning_rates, curve.losses
    return {
        f"{entry.name}": {
            "run": entry.run,
            "saved": f"{time_text(metadata.get('timestamp'))} UTC",
            "where": entry.where,
            "size": size_text(entry.bytes),
            "step": figure_text(metadata.get("step"), ","),
            "epoch": figure_text(metadata.get("epoch"), ","),
            "files": figure_text(progress.get("files_processed"), ","),
            "tokens": figure_text(progress.get("tokens"), ","),
            "parameters": figure_text(metadata.get("parameters"), ","),
            "engine": str(metadata.get("engine", NOTHING)),
            "world size": figure_text(metadata.get("world_size"), ","),
            "precision": str(system.get("mixed_precision", NOTHING)),
            "device": str(system.get("device_name", NOTHING)),
        },
        "Training": {
            "current loss": figure_text(metadata.get("current_loss"), ".6f"),
            "best loss": f"{figure_text(metadata.get('best_loss'), '.6f')} at step {metadata.get('best_step')}",
            "mean loss": f"{figure_text(curve.mean, '.6f')} over {len(losses):,} points since step {curve.first_step}",
            "standard deviation": figure_text(curve.std, ".6f"),
            "trend": str(validation.get("loss_trend", NOTHING)),
            "learning rate": figure_text(rates[-1] if rates else None, ".2e"),
            "history": f"{len(losses):,} losses, {len(rates):,} learning rates",
        },
        "Validation" if curve.validation_losses else "Validation: there was none, so the training's own": {
            f"{source} loss": figure_text(validation.get("current_avg_loss"), ".6f"),
            f"best {source} loss": figure_text(validation.get("best_avg_loss"), ".6f"),
            "steps since best": figure_text(validation.get("steps_since_best"), ","),
            "validations": f"{len(curve.validation_losses):,}",
        },
    }


def _tree(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    tree = metadata.get(key)
    return tree if isinstance(tree, dict) else {}


def compare(options: argparse.Namespace, place: Place, console: Console) -> Report:
    """Figures, settings and weights of several checkpoints, in the order in which they are named."""
    if len(options.checkpoints) < 2:
        raise ConfigError("compare needs at least two checkpoints", "Name them: compare A B")
    entries = [place.catalog.find(name, place.run) for name in options.checkpoints]
    one_run = len({entry.run for entry in entries}) == 1
    labels = [str(entry.name) if one_run else entry.label for entry in entries]
    described = [sections(entry, place.catalog.document(entry, METADATA_FILE)) for entry in entries]
    columns = [{key: value for fields in each.values() for key, value in fields.items()} for each in described]
    rows = [[key, *(column.get(key, NOTHING) for column in columns)] for key in columns[0] if key != "history"]
    print_table(["", *labels], rows, console, title="Figures")
    settings = differing_settings([place.catalog.text(entry, "config.yaml") for entry in entries])
    console.print()
    if settings:
        shown = [[key, *(str(value) or "''" for value in values)] for key, values in settings.items()]
        print_table(["", *labels], shown, console, title="Settings that differ")
    else:
        console.print("The settings are the same.")
    pairs = list(pairwise(entries))
    weights = [changes_between(before, after, options.parameters, place, console) for before, after in pairs]
    return {
        "checkpoints": [place.catalog.describe(entry, verify=False) for entry in entries],
        "settings": settings,
        "weights": [
            {"before": before.label, "after": after.label, "changes": found and [_plain(each) for each in found]}
            for (before, after), found in zip(pairs, weights, strict=True)
        ],
    }


def changes_between(
    before: Entry, after: Entry, parameters: bool, place: Place, console: Console
) -> list[WeightChange] | None:
    """Show how the weights changed; None where they are not all on this machine."""
    console.print()
    readers = [place.catalog.reader(entry) for entry in (before, after)]
    if readers[0] is None or readers[1] is None:
        far = next(entry for entry, reader in zip((before, after), readers, strict=True) if reader is None)
        fetch = f"python scripts/upload_manager.py download {far.label} --url …"
        console.print(
            f"Weights of {before.name} and {after.name} are not compared: fetch them first\n    {fetch}", soft_wrap=True
        )
        return None
    each = weight_changes(readers[0], readers[1])
    changes = each if parameters else by_layer(each)
    columns = ["parameter" if parameters else "layer", "norm before", "norm after", "relative change", "largest change"]
    rows = [
        [
            change.name,
            f"{change.norm_before:.4f}",
            f"{change.norm_after:.4f}",
            f"{change.relative:.2%}",
            f"{change.largest:.2e}",
        ]
        for change in changes
    ]
    print_table(columns, rows, console, right=columns[1:], title=f"Weights from {before.name} to {after.name}")
    return changes


def _plain(change: WeightChange) -> dict[str, Any]:
    relative = change.relative if math.isfinite(change.relative) else None  # JSON has no infinity
    return {**asdict(change), "relative": relative}


# ---- plot ----


def plot(options: argparse.Namespace, place: Place, console: Console) -> Report:
    """The curves of the run that a checkpoint is of."""
    entry = place.catalog.find(options.checkpoint, place.run)
    saved = saved_curve(place.catalog.document(entry, CURVES_FILE), entry.label)
    curve = with_log(saved, place.logs / entry.run)
    if not curve.steps:
        raise CheckpointError(f"{entry.label} has no loss yet: nothing to plot")
    resumed = f"; resumed at step {', '.join(map(str, curve.restarts))}" if curve.restarts else ""
    console.print(f"{len(curve.steps):,} points from {curve.source}{resumed}", soft_wrap=True)
    if options.save:
        save_png(curve, options.save, f"Run {entry.run}", entry.name.step)
        console.print(f"written: {options.save}", soft_wrap=True)
    else:
        width = min(console.width, MAX_CHART_COLUMNS)
        for values, title, height in zip(
            (curve.losses, curve.learning_rates), ("loss (nats per token)", "learning rate"), CHART_ROWS, strict=True
        ):
            console.print(f"\n{draw_text(curve.steps, values, title, width, height)}", soft_wrap=True)
    return {"checkpoint": entry.label, "saved": str(options.save) if options.save else None, "curve": asdict(curve)}


# ---- verify and clean ----


def verify(options: argparse.Namespace, place: Place, console: Console) -> Report:
    """Every committed copy against its manifest."""
    if options.checkpoint:
        entries = [place.catalog.find(options.checkpoint, place.run)]
    else:
        entries = place.catalog.entries(place.run)
        check_run(place, entries)
    return damage(entries, place, console)


def clean(options: argparse.Namespace, place: Place, console: Console) -> Report:
    """List what is not committed; with --delete, remove what is old enough."""
    found = find_leftovers(place.catalog, place.run)
    rows, went = [], []
    with contextlib.ExitStack() as stack:
        if options.delete:
            for run in sorted({leftover.run for leftover in found}):
                if (place.catalog.folder / run).is_dir():
                    stack.enter_context(sole_use(place.catalog.folder / run))
        for leftover in found:
            fate = _fate(leftover, options, place)
            went.append({**{key: value for key, value in asdict(leftover).items() if key != "objects"}, "fate": fate})
            size, age = size_text(leftover.bytes), age_text(leftover.age_s)
            rows.append([leftover.place, leftover.path, leftover.why, size, age, fate])
    if rows:
        print_table(["where", "what", "why", "size", "age", "fate"], rows, console, right=("size", "age"))
        going = sum(each["bytes"] for each in went if each["fate"] in ("would go", "removed"))
        hint = "" if options.delete or not going else "; --delete removes it"
        console.print(f"\n{size_text(going)} {'removed' if options.delete else 'to remove'}{hint}", soft_wrap=True)
    else:
        console.print("nothing to clean: all that is there is committed")
    return {"leftovers": went, "deleted": options.delete}


def _fate(leftover: Leftover, options: argparse.Namespace, place: Place) -> str:
    if not leftover.age_s >= options.older_than_hours * 3600:
        return f"kept: younger than {options.older_than_hours:g} h"
    if not options.delete:
        return "would go"
    return "removed" if remove_leftover(leftover, place.catalog) else "kept: committed meanwhile"


if __name__ == "__main__":
    sys.exit(main())
