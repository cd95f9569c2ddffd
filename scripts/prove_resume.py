"""Prove that nothing is lost: your config, killed at random moments and resumed, against a run that never stopped.

    python scripts/prove_resume.py --config test --kills 5
    python scripts/prove_resume.py --config production --ranks 2 --precision bf16
    python scripts/prove_resume.py --config test --data gs://bucket/prefix --checkpoints gs://bucket/Checkpoints

Every option of train.py works as well. The model's family, the precision, the engine, the optimizer, dropout and the
data order are the config's own; the shape, the batch and the number of steps are made small, unless --full_size is
given. Without --data the shards are made here; without --checkpoints a folder stands for the bucket. A kill is
SIGKILL to all processes at once, at moments spread over the time of the steps and of the saves behind them.

Exit codes: 0 all is the same to the last bit, no window was repeated or skipped; 1 something differs; 2 wrong
settings; another of train.py's where a run ended by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import secrets
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pretrain.arguments import ROOT, gives_sources, parse, to_yaml
from pretrain.batches import Batches
from pretrain.checks import Check, publish
from pretrain.config import Config
from pretrain.errors import ConfigError, TrainerError
from pretrain.files import make_writable
from pretrain.listings import print_fields, print_table
from pretrain.mixture import lay_out, open_for_a_look
from pretrain.proof import (
    MADE_EPOCHS,
    differing_records,
    differing_tensors,
    make_shards,
    missing_steps,
    small_batch,
    small_model,
    small_schedule,
    windows_off,
)
from pretrain.trial import Record, Trial, random_moments

MADE_HERE = "made-here"
STEPS, SAVES, MIN_STEPS = 60, 8, 8
MAX_FILES = 4  # of given shards, at small scale
PROBLEMS_SHOWN = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options, more = parse_options(argv)
    console = Console(stderr=options.json, highlight=False, emoji=False, markup=False)
    try:
        with work_folder(options.keep) as folder:
            return prove(options, more, folder, console)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code


def parse_options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those of train.py."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [--section.field VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--config", default="test", metavar="NAME", help="configs/NAME.yaml, or a path (test)")
    parser.add_argument("--kills", type=int, default=5, metavar="K", help="kill -9 so many times (5)")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="processes of the run (1)")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="S", help=f"steps of each run ({STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; the run's own is --run.seed (0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs there: logs, checkpoints, output")
    parser.add_argument("--full_size", action="store_true", help="the config's own shape and batch")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    options, more = parser.parse_known_args(argv)
    for name, least in (("kills", 0), ("ranks", 1), ("steps", MIN_STEPS)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return options, more


@contextlib.contextmanager
def work_folder(keep: Path | None) -> Iterator[Path]:
    """Where the runs live: a folder that is kept, or one that is gone afterwards."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="prove_resume-") as folder:
            yield Path(folder)
        return
    make_writable(keep, "--keep")
    if any(keep.iterdir()):
        raise ConfigError(f"--keep {keep} is not empty", "Name a folder that is, or that isn't there yet.")
    yield keep.resolve()


def prove(options: argparse.Namespace, more: Sequence[str], folder: Path, console: Console) -> int:
    """Run both, compare, tell; the exit code."""
    given, config = settings(options, more, folder)
    changes = changed(given, config)
    print_fields("Settings of the proof that are not the config's own", changes, console)
    if config.data.source == str(folder / "shards"):
        n_tokens = int(options.steps * config.tokens_per_step / MADE_EPOCHS)
        make_shards(folder / "shards", n_tokens, config.model.vocab_size, config.run.seed)
    path = folder / "proof.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    launcher = ["-m", "pretrain.launch", f"--nproc_per_node={options.ranks}"] if options.ranks > 1 else []
    words = [sys.executable, *launcher, str(ROOT / "train.py"), "--config", str(path)]
    whole, killed = run_both(options, words, folder)
    print_kills(killed, console)
    return tell(options, config, whole, killed, console, changes)


def settings(options: argparse.Namespace, more: Sequence[str], folder: Path) -> tuple[Config, Config]:
    """The config as it is given, and as it is proved."""
    # a placeholder comes first, so what the user gives wins; a bucket that only the config names is left alone
    made_here = [] if gives_sources(more) else ["--data.source", MADE_HERE]
    made_here += ["--checkpoint.url", MADE_HERE]
    given = parse(["--config", options.config, *made_here, *more], options.ranks).config
    has_data, has_url = given.data.source != MADE_HERE, given.checkpoint.url != MADE_HERE
    replace, steps = dataclasses.replace, options.steps
    source = given.data.source if has_data else str(folder / "shards")
    config = replace(
        given,
        data=replace(given.data, source=source, cache_dir=str(folder / "cache")),
        train=replace(
            given.train,
            max_steps=steps,
            max_tokens=0,
            max_rollbacks=0,  # windows that a roll-back passes over would count as lost
            deterministic=given.train.deterministic or torch.cuda.is_available(),
        ),
        checkpoint=replace(
            given.checkpoint,
            dir=str(folder / "checkpoints"),
            url=given.checkpoint.url if has_url else str(folder / "bucket"),
            every_files=0,
            every_steps=max(2, steps // SAVES),
        ),
        log=replace(given.log, dir=str(folder / "logs"), interval=1, tensorboard=False, wandb=False, sample_prompt=""),
    )
    if not has_data:  # validation shards are of another vocabulary than those made here
        made = replace(config.data, val_source="", pad_token_id=-1, max_files=0, pattern="*.npz", tokenizer="")
        made = replace(made, eot_token_id=0 if made.document_mask else -1)
        config = replace(config, data=made)
    return given, config if options.full_size else made_small(config, steps, options.ranks, has_data)


def made_small(config: Config, steps: int, ranks: int, has_data: bool) -> Config:
    """The config with a shape, a batch and shards that take minutes."""
    max_files = min(config.data.max_files or MAX_FILES, MAX_FILES) if has_data else 0
    return dataclasses.replace(
        config,
        model=small_model(config.model, keep_vocabulary=has_data),
        batch=small_batch(config.batch, ranks),
        optim=small_schedule(config.optim, steps),
        data=dataclasses.replace(config.data, max_files=max_files),
    )


def changed(given: Config, config: Config) -> dict[str, str]:
    """ "section.field" -> "before → after", of the settings that differ; folders of the proof's own are left out."""
    found = {}
    for section in dataclasses.fields(Config):
        before, after = getattr(given, section.name), getattr(config, section.name)
        for each in dataclasses.fields(after):
            one, other = getattr(before, each.name), getattr(after, each.name)
            if one != other and one != MADE_HERE and each.name not in ("dir", "cache_dir"):
                found[f"{section.name}.{each.name}"] = f"{one!r} → {other!r}"
    return found


def run_both(options: argparse.Namespace, words: Sequence[str], folder: Path) -> tuple[Trial, Trial]:
    """The uninterrupted run, then the one that is killed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    mark = secrets.token_hex(3)  # in a bucket, each proof has runs of its own
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        trials = []
        for title in ("whole", "killed"):
            task = progress.add_task(f"{title}: starting", total=options.steps, start=False)

            def on_step(step: int, task: Any = task, title: str = title) -> None:
                progress.start_task(task)
                progress.update(task, completed=step, description=f"{title}: step")

            trials.append(Trial(folder, f"proof-{mark}-{title}", words, on_step))
        whole, killed = trials
        whole.start()
        for number, moment in enumerate(random_moments(whole.starts[0].records, options.kills, options.seed), 1):
            if killed.start(moment):
                return whole, killed  # it was over before the moment came; the check of the kills says so
            progress.update(progress.task_ids[1], description=f"killed: {number} of {options.kills}, starting again")
        killed.start()
    return whole, killed


def print_kills(killed: Trial, console: Console) -> None:
    """One row a kill: when, and what it cost."""
    rows = [
        [str(number), f"{at['after_step']} + {at['later_ms']:.0f} ms", *(str(at[key]) for key in list(at)[2:])]
        for number, at in enumerate(kills(killed), 1)
    ]
    console.print()
    columns = ("kill", "after step", "last step recorded", "resumed at", "steps done again")
    print_table(columns, rows, console, right=columns, title="Kills")
    console.print()


def kills(killed: Trial) -> list[dict[str, Any]]:
    """When each kill came, and what it cost."""
    pairs = zip(killed.starts, killed.starts[1:], strict=False)
    return [
        {
            "after_step": before.killed_at.step,
            "later_ms": before.killed_at.later_s * 1e3,
            "last_step": before.last_step,
            "resumed_at": after.first_step,
            "steps_again": before.last_step - after.first_step,
        }
        for before, after in pairs
        if before.killed_at
    ]


def tell(
    options: argparse.Namespace, config: Config, whole: Trial, killed: Trial, console: Console, changes: dict[str, str]
) -> int:
    """Compare the two runs and publish the checks; the exit code."""
    expected = whole.starts[0].records
    found: list[Record] = [record for start in killed.starts for record in start.records]
    n_tensors, tensors = differing_tensors(whole, killed)
    repeated, skipped = windows_off(batches_of(config), killed, options.steps)
    costs = kills(killed)
    problems = differing_records(expected, found)
    missing = missing_steps(expected, found)
    for problem in [*problems[:PROBLEMS_SHOWN], *tensors[:PROBLEMS_SHOWN]]:
        console.print(f"differs: {problem}", soft_wrap=True)
    checks = [
        Check("kills", len(costs), "=", options.kills, "kills"),
        Check("steps_compared", len(expected) - len(missing), "=", options.steps, "steps"),
        Check("figures_that_differ", len(problems), "=", 0, "figures"),
        Check("final_tensors_that_differ", len(tensors), "=", 0, f"of {n_tensors}"),
        Check("windows_repeated", repeated, "=", 0, "windows"),
        Check("windows_skipped", skipped, "=", 0, "windows"),
    ]
    again = [each["steps_again"] for each in costs]
    details = {
        "lost_work": {"steps_again": sum(again), "most_in_one_kill": max(again, default=0)},
        "save_interval_steps": config.checkpoint.every_steps,
        "records_compared": len(found),
        "ranks": options.ranks,
        "deterministic": config.train.deterministic,
        "settings": changes,
        "kills": costs,
    }
    code = publish("prove_resume", checks, as_json=options.json, details=details)
    console.print(
        f"\n{len(found)} records compared, {sum(again)} steps done again after {len(costs)} kills, "
        f"a checkpoint every {config.checkpoint.every_steps} steps",
        soft_wrap=True,
    )
    return code


def batches_of(config: Config) -> Batches:
    """The data order of both runs, from the cache that they filled."""
    size, may_be_larger = config.model.vocab_size, bool(config.model.init_from)
    shards = open_for_a_look(config.data, config.storage, vocab_size=size, may_be_larger=may_be_larger)
    how = {"seq_len": config.model.seq_len, "global_size": config.batch.global_size, "seed": config.run.seed}
    return lay_out(config.data, shards, **how)


if __name__ == "__main__":
    sys.exit(main())
