"""Look at training data: what fed a step of a run, and what a set of shards holds.

    python scripts/inspect_data.py --step 120 --run test
    python scripts/inspect_data.py --step 120 --config production --data gs://bucket/shards --window 3
    python scripts/inspect_data.py --stats --data gs://bucket/shards --save shards.png

Options that are not listed below are settings of train.py (--data, --batch.global_size, --seed, …); a step is found by
the same ones that trained it. With --run they come from the newest checkpoint of that run, which also knows the
roll-backs: these pass over data, and then a step's place does not follow from its number. --step fetches the shards of
that step into the cache, as train.py does; --stats reads one after the other and keeps none. Of raw text both look at
the shards that train.py has made of it, and make none.

Exit codes: 0 done, 2 wrong settings, 3 bad or missing shards, 4 storage, 5 a checkpoint that does not tell.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer

from pretrain.arguments import parse as parse_settings
from pretrain.batches import Batches, Position
from pretrain.catalog import Catalog, Entry
from pretrain.config import CheckpointConfig, Config, StorageConfig
from pretrain.data_stats import DataStats, ShardStats, save_png
from pretrain.data_views import StepView, print_stats, token_text
from pretrain.errors import EXIT_DONE, CheckpointError, ConfigError, ShardError, TrainerError
from pretrain.lookup import Saved, local_copy, planned, recorded, windows_at
from pretrain.manifest import TOKENIZER_NAME, DataManifest
from pretrain.mixture import alone, as_given, lay_out, open_for_a_look
from pretrain.raw_source import check_prepared
from pretrain.shards import ShardSet, missing_shards, read_manifest, select_shards
from pretrain.storage import ObjectStore, open_store
from pretrain.tokenizers import load_tokenizer

STATE_FILE, CONFIG_FILE = "trainer_state.json", "config.yaml"


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        config: of train.py.
        source: of the settings and of the position, in words.
        entry: the run's newest checkpoint; None where no run was named.
        states: trainer_state.json of the run's checkpoints on the newest one's branch, it first, by name.
    """

    config: Config
    source: str
    entry: Entry | None
    states: dict[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options, settings = parse(argv)
    console = Console(stderr=options.json, highlight=False, emoji=False, markup=False, soft_wrap=True)
    try:
        catalog = open_catalog(options)
        subject = find_subject(options, settings, catalog)
        places = {name: open_store(one.source, subject.config.storage) for name, one in alone(subject.config.data)}
        if options.stats and len(places) > 1:
            raise ConfigError("--stats counts one source, and data.sources names several", "Name one: --data URL")
        for store in places.values():
            console.print(f"data: {store.describe()}")
        tokenizer = find_tokenizer(options, places, catalog, subject)
        if options.stats:
            return show_stats(options, subject.config, store, tokenizer, console)
        return show_step(options, subject, places, tokenizer, console)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(our options, those of train.py); argparse ends the program with 2 where ours are wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, metavar="K", help="what fed step K, as the metrics count: the first is 1")
    what.add_argument("--stats", action="store_true", help="tokens, documents, padding and frequencies of all shards")
    add("--window", type=int, metavar="N", help="the whole text of the step's N-th window, from 0")
    add("--config", metavar="NAME", help="settings of configs/NAME.yaml, or a path (train.py's default)")
    add("--run", metavar="RUN", help="settings and position from the newest checkpoint of this run")
    add("--checkpoints_dir", default=CheckpointConfig().dir, metavar="FOLDER", help="of the checkpoints (checkpoints)")
    add("--url", default="", metavar="URL", help="where they are committed, if not in that folder: gs://bucket/prefix")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (the one beside the shards, or the run's)")
    add("--top", type=int, default=20, metavar="N", help="most frequent tokens shown by --stats (20)")
    add("--save", type=Path, metavar="PNG", help="write a picture of --stats")
    add("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    options, settings = parser.parse_known_args(argv)
    if options.run and options.config:
        parser.error("--run takes the settings of the run's checkpoint: leave out --config")
    if options.stats and options.window is not None:
        parser.error("--window is a part of a step: give --step")
    if options.save and not options.stats:
        parser.error("--save draws what --stats counts")
    if options.top < 1:
        parser.error("--top must be at least 1")
    return options, settings


# ---- what is looked at ----


def open_catalog(options: argparse.Namespace) -> Catalog:
    """The checkpoints that the options name."""
    store = open_store(options.url, StorageConfig()) if options.url else None
    return Catalog(Path(options.checkpoints_dir), store)


def find_subject(options: argparse.Namespace, settings: list[str], catalog: Catalog) -> Subject:
    """The settings, and what a run's checkpoints say.

    Raises:
        ConfigError: the settings are wrong.
        CheckpointError: the run has no checkpoint.
    """
    if not options.run:
        config = parse_settings([*(["--config", options.config] if options.config else []), *settings]).config
        return Subject(config, "the settings alone, which know of no roll-back (--run RUN does)", None, {})
    entry = catalog.find("latest", options.run)
    with tempfile.TemporaryDirectory(prefix="inspect_data-") as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_text(catalog.text(entry, CONFIG_FILE), encoding="utf-8")
        config = parse_settings(["--config", str(path), *settings]).config
    states = {entry.label: catalog.document(entry, STATE_FILE)}
    lowest = entry.name.step
    for other in reversed([each for each in catalog.entries(options.run) if each.manifest and each != entry]):
        if other.name.step <= lowest:  # else it is on a branch that a roll-back left
            lowest = other.name.step
            try:
                states[other.label] = catalog.document(other, STATE_FILE)
            except CheckpointError:  # the newest one tells as a rule; `recorded` says so where it doesn't
                continue
    return Subject(config, f"checkpoint {entry.label}", entry, states)


def find_tokenizer(
    options: argparse.Namespace, places: Mapping[str, ObjectStore], catalog: Catalog, subject: Subject
) -> Tokenizer | None:
    """The one that was named, the one beside the shards, the run's; None where there is none.

    Raises:
        ShardError: what should be one is none.
    """
    if options.tokenizer:
        return load_tokenizer(options.tokenizer)
    if store := next((store for store in places.values() if store.stat(TOKENIZER_NAME)), None):
        with local_copy(store, TOKENIZER_NAME) as path:
            return load_tokenizer(path)
    if subject.entry and subject.entry.manifest and TOKENIZER_NAME in subject.entry.manifest.files:
        with tempfile.TemporaryDirectory(prefix="inspect_data-") as folder:
            path = Path(folder) / TOKENIZER_NAME
            path.write_text(catalog.text(subject.entry, TOKENIZER_NAME), encoding="utf-8")
            return load_tokenizer(path)
    return None


# ---- a step ----


def show_step(
    options: argparse.Namespace,
    subject: Subject,
    places: Mapping[str, ObjectStore],
    tokenizer: Tokenizer | None,
    console: Console,
) -> int:
    """Shards, windows and documents of one step; the exit code."""
    config = subject.config
    how: dict[str, Any] = {"vocab_size": config.model.vocab_size, "may_be_larger": bool(config.model.init_from)}
    shards = open_for_a_look(config.data, config.storage, **how)
    for shard in (shard for each in shards.values() for shard in each.skipped):
        console.print(f"left out, as data.on_bad_shard says: {shard}")
    order = {"seq_len": config.model.seq_len, "global_size": config.batch.global_size, "seed": config.run.seed}
    batches = lay_out(config.data, shards, **order)
    position = find_position(options.step, subject, batches, shards)
    windows = windows_at(batches, position)
    if options.window is not None and not 0 <= options.window < len(windows):
        raise ConfigError(f"step {options.step} has no window {options.window}", f"They are 0 to {len(windows) - 1}")
    view = StepView(places, config.data, tokenizer)
    chosen = windows if options.window is None else [windows[options.window]]
    console.print(
        f"step {options.step}: {len(windows)} windows of {batches.seq_len} tokens from epoch {position.epoch}, shard "
        f"{position.shard} of its order, window {position.window} on; found by {subject.source}"
    )
    if options.json:
        found = {"step": options.step, "found_by": subject.source, "position": asdict(position)}
        tree = {**found, "shards": view.shards(windows), "windows": [view.tree(window) for window in chosen]}
        print(json.dumps({"name": "inspect_data step", **tree}, indent=1))
    elif options.window is None:
        view.print_step(windows, console)
    else:
        view.print_window(chosen[0], console)
    return EXIT_DONE


def find_position(step: int, subject: Subject, batches: Batches, shards: Mapping[str, ShardSet]) -> Position:
    """Where the step's windows begin.

    Raises:
        CheckpointError: the run was trained in another order, or its checkpoints don't tell.
    """
    if not subject.entry:
        return planned(batches, step)
    from pretrain.progress import DataOrder  # here, because it imports torch

    config = subject.config
    order = DataOrder.of(config.data, shards, config.run.seed, config.model.seq_len)
    newest, *older = (Saved.from_state(state, label) for label, state in subject.states.items())
    order.check(subject.states[newest.name].get("order", {}), newest.name)
    return recorded(batches, step, newest, older)


# ---- statistics ----


def show_stats(
    options: argparse.Namespace, config: Config, store: ObjectStore, tokenizer: Tokenizer | None, console: Console
) -> int:
    """Counts over all shards; the exit code, 3 where one is bad and data.on_bad_shard is stop."""
    stats = gather(config, store)
    if options.json:
        good, total = len(stats.good), len(stats.shards)
        check = {"name": "shards_good", "value": good, "goal": total, "unit": "shards", "passed": good == total}
        tree = {"checks": [check], "passed": good == total, "source": store.url, **stats.to_json(options.top)}
        tree["top_tokens"] = [
            [token, count, token_text(token, tokenizer)] for token, count in stats.top_tokens(options.top)
        ]
        print(json.dumps({"name": "inspect_data stats", **tree}, indent=1))
    else:
        print_stats(stats, options.top, tokenizer, console)
    if options.save and stats.good:
        title = f"{store.url}: {stats.n_tokens:,} tokens in {stats.n_documents:,} documents"
        save_png(stats, options.save, title)
        console.print(f"written: {options.save}")
    for shard in stats.bad:
        print(f"data error: {shard.problem}", file=sys.stderr)
    return ShardError.exit_code if stats.bad and config.data.on_bad_shard == "stop" else EXIT_DONE


def gather(config: Config, store: ObjectStore) -> DataStats:
    """Read every shard, one at a time.

    Raises:
        ShardError: there is none.
        StorageError: the store can't be read.
    """
    [(_, given)], [(_, data)] = as_given(config.data), alone(config.data)
    check_prepared(given)
    listed = store.list()
    objects = select_shards(listed, data.pattern, data.max_files, store.url)
    manifest: DataManifest | None = read_manifest(store, listed)
    entries = {entry.name: entry for entry in manifest.shards} if manifest else {}
    vocab_size = (manifest.vocab_size if manifest else 0) or config.model.vocab_size
    stats = DataStats()
    console = Console(stderr=True)
    for info in track(objects, "shards", console=console, transient=True, disable=not console.is_terminal):
        with local_copy(store, info.name) as path:
            how = {"pad_token_id": config.data.pad_token_id, "vocab_size": vocab_size}
            stats.add(info.name, path, **how, expected=entries.get(info.name))
    for name in missing_shards(manifest, objects, data.pattern, data.max_files):
        stats.shards.append(ShardStats(name, 0, problem=f"shard {name}: not there, though manifest.json names it"))
    return stats


if __name__ == "__main__":
    sys.exit(main())
