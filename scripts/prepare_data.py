"""Turn raw text into shards to train on: a tokenizer, .npz files, manifests and the story of how they came to be.

    python scripts/prepare_data.py --input_dir raw --output_dir data --tokenizer_type bpe --vocab_size 8192
    python scripts/prepare_data.py --input 'c4/*.json.gz' --output_dir gs://bucket/c4 --tokenizer tiktoken:gpt2
    python scripts/prepare_data.py --input_dir snapshot --output_dir data --val_fraction 0.005 --dedup --on_bad skip

Reads .txt, .jsonl, .ndjson and .json (an object a line), each also .gz or .zst, .parquet, .arrow and data sets of
Hugging Face (saved by save_to_disk, or a snapshot), in folders or in gs://. Writes OUTPUT_DIR/shards/*.npz and, with
--val_fraction, OUTPUT_DIR/val/*.npz, with a manifest.json each, tokenizer.json beside the first, and metadata.json.

The same input and options give the same bytes, whatever --num_workers. Stopped or killed, the same command goes on
where it was. Every document that is read is written or counted as skipped, by reason. Exit codes: 0 done, 2 wrong
settings, 3 text that can't be used, 4 storage or disk, 75 stopped by a signal: the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pretrain import failpoints
from pretrain.checks import Check
from pretrain.errors import EXIT_DONE, EXIT_STOPPED, TrainerError
from pretrain.listings import size_text
from pretrain.preparation import Preparation, Watcher, prepare
from pretrain.recipes import documents_accounted

LINE_EVERY_S = 10.0
SHOWN_REJECTED = 5


class Stopped(BaseException):
    """A signal asked to stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(argv)
    as_json = options.pop("json")
    console = Console(stderr=as_json, highlight=False, emoji=False, markup=False, soft_wrap=True)
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = ProgressWatcher(console)
    try:
        failpoints.arm(0)
        metadata = prepare(Preparation(**options), console.print, watcher)
    except TrainerError as error:
        watcher.end()
        print(error.line(), file=sys.stderr)
        return error.exit_code
    except Stopped:
        watcher.end()
        print("stopped; the same command goes on from here", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        watcher.end()
        for number, handler in before.items():
            signal.signal(number, handler)
    show(metadata["result"], str(options["output_dir"]), console)
    if as_json:
        print(json.dumps(report(metadata["result"]), indent=1))
    return EXIT_DONE


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stopped


def parse(argv: Sequence[str] | None) -> dict[str, Any]:
    """The command line by option; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    where = parser.add_argument_group("input and output")
    where.add_argument("--input_dir", default="", metavar="DIR", help="a folder or gs://bucket/prefix, read whole")
    where.add_argument("--input", nargs="+", default=[], metavar="GLOB", help="files, folders or globs, also gs://")
    where.add_argument("--output_dir", required=True, metavar="DIR", help="a folder or gs://bucket/prefix")
    where.add_argument(
        "--work_dir", default="", help="unfinished work on this disk (OUTPUT_DIR/.prepare, or ./.prepare)"
    )
    where.add_argument("--split", default="train", help="of Hugging Face data sets that have several (train)")
    add("--text_key", default="text", help="key or column of the text (text)")
    add("--txt_documents", choices=("file", "line", "paragraph"), default="file", help="what of a .txt is one (file)")
    add("--max_document_mb", type=int, default=64, help="a longer document or line can't be used (64)")
    add("--on_bad", choices=("stop", "skip"), default="stop", help="text that can't be used: stop, or count it (stop)")
    add("--dedup", action="store_true", help="leave out exact duplicates; about 110 bytes of memory a document")
    add("--val_fraction", type=float, default=0.0, help="share of documents, chosen by their hash, to validate on (0)")
    tokenizer = parser.add_argument_group("tokenizer")
    kinds = ("bpe", "wordpiece", "tiktoken")
    tokenizer.add_argument("--tokenizer_type", choices=kinds, default="bpe", help="what to train, or tiktoken (bpe)")
    tokenizer.add_argument("--vocab_size", type=int, default=32000, help="ids of one that is trained (32000)")
    tokenizer.add_argument(
        "--sample_mb", type=int, default=100, help="of text, evenly from the input, to train it (100)"
    )
    tokenizer.add_argument("--tokenizer", default="", metavar="PATH", help="use this tokenizer.json, or tiktoken:gpt2")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--shard_tokens", type=int, default=10_000_000, help="tokens that fill a shard (10000000)")
    shards.add_argument(
        "--max_length", type=int, default=0, help="write padded rows of so many tokens; 0: a stream (0)"
    )
    shards.add_argument("--stride", type=int, default=0, help="tokens that a row shares with the one before (0)")
    running = parser.add_argument_group("running")
    running.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (one per processor)")
    running.add_argument(
        "--ray", default="", metavar="ADDRESS", help="work on this Ray cluster; every disk must see DIR"
    )
    running.add_argument("--unit_mb", type=float, default=16.0, help="of input that a worker takes at a time (16)")
    add("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    options = vars(parser.parse_args(argv))
    return {**options, "input": tuple(options["input"])}


class ProgressWatcher(Watcher):
    """A bar with MB/s, tokens/s and the time that is left; plain lines where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._title, self._total = "", 0
        self._started_s = self._line_s = time.monotonic()
        self._first_bytes = -1

    def begin(self, title: str, n_bytes: int) -> None:
        """See Watcher."""
        self.end()
        self._title, self._total = title, n_bytes
        self._started_s = self._line_s = time.monotonic()
        self._first_bytes = -1
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rates]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._task = self._bar.add_task(title, total=n_bytes or None, rates="")
            self._bar.start()

    def update(self, n_bytes: int, text_bytes: int, n_tokens: int) -> None:
        """See Watcher."""
        now = time.monotonic()
        if self._first_bytes < 0:
            self._first_bytes = n_bytes
        rates = self._rates(now - self._started_s, n_bytes, text_bytes, n_tokens)
        if self._bar:
            self._bar.update(self._task, completed=n_bytes, rates=rates)
        elif now - self._line_s >= LINE_EVERY_S:
            self._line_s = now
            left = self._left(now - self._started_s, n_bytes)
            self._console.print(f"{self._title}: {n_bytes / 1e6:.1f}/{self._total / 1e6:.1f} MB, {rates}{left}")

    def end(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _rates(self, elapsed_s: float, n_bytes: int, text_bytes: int, n_tokens: int) -> str:
        read = text_bytes or n_bytes
        rates = f"{read / 1e6 / max(elapsed_s, 1e-9):.1f} MB/s"
        return f"{rates}, {n_tokens / max(elapsed_s, 1e-9):,.0f} tokens/s" if n_tokens else rates

    def _left(self, elapsed_s: float, n_bytes: int) -> str:
        """By the rate since the first call: what an earlier process did took this one no time."""
        done = n_bytes - self._first_bytes
        return f", {elapsed_s * (self._total - n_bytes) / done:.0f} s left" if done else ""


def show(result: dict[str, Any], output: str, console: Console) -> None:
    """What came of it, in a few lines."""
    for split, told in result["splits"].items():
        if told["shards"]:
            size = size_text(sum(shard["bytes"] for shard in told["shards"]))
            console.print(
                f"{output.rstrip('/')}/{split}: {len(told['shards'])} shards, {told['tokens']:,} tokens, "
                f"{told['documents']:,} documents, {size}"
            )
    skipped = ", ".join(f"{n:,} {reason}" for reason, n in result["skipped"].items()) or "none skipped"
    console.print(f"documents: {result['documents']:,} read, {skipped}")
    for line in result["shown"][:SHOWN_REJECTED]:
        console.print(f"  {line}")
    if result["unknown_tokens"]:
        console.print(f"{result['unknown_tokens']:,} tokens are [UNK]: the tokenizer doesn't know those characters")


def report(result: dict[str, Any]) -> dict[str, Any]:
    """The object that --json prints."""
    check = Check("documents_accounted", documents_accounted(result), "=", result["documents"], "documents")
    return {
        "name": "prepare_data",
        "device": f"cpu-{os.cpu_count()}core",
        "checks": [check.to_json()],
        "passed": check.passed,
        **result,
    }


if __name__ == "__main__":
    sys.exit(main())
