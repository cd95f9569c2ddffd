"""How fast raw text becomes shards, against what else would tokenize it.

    python benchmarks/bench_prepare.py [--json] [--save]

Three sides encode the same documents with the same byte-level BPE of 8192 ids, each in a process of its own, in turn
and several times; the figures are the medians of the rounds' ratios, and all sides must count the same tokens.

- ours: all of it from the .jsonl to the last manifest, the start of its worker processes included.
- `datasets.map(batched=True, num_proc=2)`: the map alone; reading the .jsonl is not counted against it. Left out, and
  said, where the package is not installed (requirements-eval.txt has it).
- the library alone: `encode_batch` on texts in memory with as many threads, and nothing read or written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from rich.progress import track

from pretrain.errors import ConfigError
from pretrain.preparation import Preparation, prepare
from pretrain.tokenizers import load_tokenizer, save_tokenizer, train_bpe

GOALS = {"datasets": 1.5, "encode_batch": 0.85}
VOCAB_SIZE = 8192
BATCH_DOCUMENTS = 1000  # as datasets.map has it
MEMORY_GOAL = 1.2
SAMPLE_EVERY_S = 0.05
SAMPLE_BYTES, TRAINED_ON = 16_000_000, 4000
LONGEST_CHARS = 4000  # about a page of the web; the sources of the standard library are longer


def texts(n_bytes: int) -> Iterator[str]:
    """Pieces of the standard library's sources, until there are `n_bytes`; numbered, so that none repeats."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]
    left, copy = n_bytes, 0
    while left > 0:
        for path in paths:
            source = path.read_text(encoding="utf-8", errors="ignore")
            for begin in range(0, len(source), LONGEST_CHARS):
                text = f"{copy} {source[begin : begin + LONGEST_CHARS]}"
                left -= len(text.encode())
                yield text
            if left <= 0:
                return
        copy += 1


def run_side(side: str, folder: Path, workers: int) -> tuple[float, int]:
    """(seconds, tokens with an end of text for each document) of one side, in this process."""
    raw, tokenizer_path = folder / "raw.jsonl", folder / "tokenizer.json"
    if side == "ours":
        with tempfile.TemporaryDirectory(dir=folder) as output:
            options = Preparation(
                input=(str(raw),), output_dir=output, tokenizer=str(tokenizer_path), num_workers=workers, unit_mb=2.0
            )
            started = time.perf_counter()
            result = prepare(options, lambda line: None)["result"]
            return time.perf_counter() - started, int(result["splits"]["shards"]["tokens"])
    tokenizer = load_tokenizer(tokenizer_path)
    if side == "encode_batch":
        documents = [json.loads(line)["text"] for line in raw.open(encoding="utf-8")]
        started = time.perf_counter()
        n_tokens = len(documents)
        remaining = iter(documents)
        while batch := list(islice(remaining, BATCH_DOCUMENTS)):
            n_tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch(batch, add_special_tokens=False))
        return time.perf_counter() - started, n_tokens
    datasets: Any = importlib.import_module("datasets")
    datasets.disable_caching()
    datasets.disable_progress_bars()
    table = datasets.load_dataset("json", data_files=str(raw), split="train", cache_dir=str(folder / "datasets"))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [one.ids for one in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}

    started = time.perf_counter()
    mapped = table.map(encode, batched=True, num_proc=workers, remove_columns=table.column_names)
    elapsed = time.perf_counter() - started
    return elapsed, sum(len(ids) for ids in mapped["input_ids"]) + len(mapped)


@dataclass(frozen=True)
class Timing:
    """One run of one side."""

    seconds: float
    tokens: int
    peak_bytes: int


def timed(side: str, folder: Path, workers: int) -> Timing:
    """The same in a process of its own, so that no side leaves threads or caches to the next."""
    parallel = "true" if side == "encode_batch" else "false"  # elsewhere the processes share the processors
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallel, "RAYON_NUM_THREADS": str(workers)}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    words = [sys.executable, str(Path(__file__).resolve()), "--side", side, "--folder", str(folder)]
    process = subprocess.Popen([*words, "--workers", str(workers)], env=environment, stdout=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(SAMPLE_EVERY_S)
    assert process.stdout
    if process.returncode:
        raise SystemExit(f"{side} ended with {process.returncode}")
    seconds, n_tokens = json.loads(process.stdout.read().splitlines()[-1])
    return Timing(float(seconds), int(n_tokens), peak)


def resident_bytes(pid: int) -> int:
    """Memory of a process and all that it started; pages that several share count for each."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [(root := psutil.Process(pid)), *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
    return total


def write_input(folder: Path, mb: float) -> int:
    """raw.jsonl with so much text, and a tokenizer.json where there is none yet; the number of documents."""
    n_documents = 0
    with (folder / "raw.jsonl").open("w", encoding="utf-8") as file:
        for n_documents, text in enumerate(texts(int(mb * 1e6)), 1):  # noqa: B007 - counts
            file.write(json.dumps({"text": text}) + "\n")
    if not (folder / "tokenizer.json").exists():
        save_tokenizer(train_bpe(islice(texts(SAMPLE_BYTES), TRAINED_ON), VOCAB_SIZE), folder / "tokenizer.json")
    return n_documents


def measure_memory(folder: Path, mb: float, workers: int) -> list[float]:
    """Peak MiB of ours on an eighth of `mb` and on all of it."""
    peaks = []
    for part in (mb / 8, mb):
        write_input(folder, part)
        peaks.append(round(timed("ours", folder, workers).peak_bytes / 2**20, 1))
    return peaks


def compare(options: argparse.Namespace, sides: Sequence[str]) -> int:
    """Run all sides in turn; the exit code."""
    from pretrain.checks import Check, publish

    seconds: dict[str, list[float]] = {side: [] for side in sides}
    counted: dict[str, set[int]] = {side: set() for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        n_documents = write_input(folder, options.mb)
        for _ in track(range(options.rounds), "rounds", disable=options.json, transient=True):
            for side in sides:
                timing = timed(side, folder, options.workers)
                seconds[side].append(timing.seconds)
                counted[side].add(timing.tokens)
        peaks = measure_memory(folder, options.memory_mb, options.workers) if options.memory_mb else []
    checks = []
    for side in sides[1:]:
        ratios = [theirs / ours for theirs, ours in zip(seconds[side], seconds["ours"], strict=True)]
        checks.append(Check(f"speed_over_{side}", round(statistics.median(ratios), 3), "≥", GOALS[side], "x"))
    same = all(found == counted["ours"] for found in counted.values())
    checks.append(Check("sides_with_equal_tokens", len(sides) if same else 0, "=", len(sides), "sides"))
    if peaks:
        checks.append(Check("memory_for_8_times_the_input", round(peaks[1] / peaks[0], 3), "≤", MEMORY_GOAL, "x"))
    (n_tokens,) = counted["ours"]
    rates = {f"{side}_tokens_per_second": round(n_tokens / statistics.median(seconds[side])) for side in sides}
    details = {
        "megabytes": options.mb,
        "documents": n_documents,
        "tokens": n_tokens,
        "workers": options.workers,
        "rounds": options.rounds,
        **rates,
        "peak_mib": peaks,
        "seconds": {side: [round(one, 2) for one in all_] for side, all_ in seconds.items()},
    }
    return publish("prepare", checks, as_json=options.json, save=options.save, details=details)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=40.0, help="of text (40)")
    parser.add_argument("--rounds", type=int, default=3, help="times that all sides run (3)")
    parser.add_argument("--workers", type=int, default=2, help="processes, or threads of the library alone (2)")
    parser.add_argument(
        "--memory_mb", type=float, default=0.0, help="also compare peak memory on so much and an 8th (0)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/prepare.json")
    parser.add_argument("--side", choices=("ours", *GOALS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.side:
        print(json.dumps(run_side(options.side, options.folder, options.workers)))
        return 0
    if options.mb <= 0 or options.rounds < 1 or options.workers < 1:
        problem = ConfigError("--mb must be above 0, --rounds and --workers at least 1")
        print(problem.line(), file=sys.stderr)
        return problem.exit_code
    sides = ["ours", *GOALS]
    if importlib.util.find_spec("datasets") is None:
        print("without datasets, which is not installed: pip install -r requirements-eval.txt", file=sys.stderr)
        sides.remove("datasets")
    return compare(options, sides)


if __name__ == "__main__":
    sys.exit(main())
