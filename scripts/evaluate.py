"""How well a checkpoint predicts: loss, perplexity and bits per byte on shards or raw text, and benchmark tasks.

    python scripts/evaluate.py checkpoints/test --data data/validation
    python scripts/evaluate.py gs://bucket/Checkpoints/run1 --text book.txt corpus/ --stride 256
    python scripts/evaluate.py checkpoints/test --data data/validation --stride 1 --max_tokens 100000 --json
    python scripts/evaluate.py checkpoints/test --tasks hellaswag,arc_easy --limit 100

CHECKPOINT is a checkpoint's folder, a run's folder (its newest that verifies), the gs:// url of either, or a folder in
the layout of Hugging Face. Windows of the model's context advance by --stride and only their last --stride tokens are
scored: a smaller stride gives every token more context, and takes longer. A model that was trained with
data.document_mask keeps documents apart here, too. Bits per byte count the end of each document as nats without bytes.
Tasks run on an export by lm-eval-harness, an extra for Python 3.11 and newer: pip install -r requirements.txt -r
requirements-eval.txt. Exit codes: 0 done, 2 wrong settings, 3 bad data, 4 storage, 5 no checkpoint or a damaged one, 6
the loss is not finite, 130 stopped by Ctrl+C.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pretrain import log
from pretrain.config import DataConfig
from pretrain.errors import ConfigError, TrainerError
from pretrain.listings import NOTHING, figure_text, print_table

if TYPE_CHECKING:
    from pretrain.evaluation import Score, Source
    from pretrain.harness import TaskFigure
    from pretrain.pretrained import Pretrained

LINE_EVERY_S = 10.0
EXIT_INTERRUPTED = 130  # as a shell counts a program that ended by SIGINT
OF_SOURCE: dict[str, dict[str, Any]] = {
    # options that only one kind of source has, with what they are where they are not given
    "data": {"pattern": "*.npz", "max_files": 0, "pad_token_id": -1},
    "text": {"text_key": "text"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py has it
    options = parse(argv)
    console = Console(stderr=options.json, highlight=False, emoji=False, markup=False, soft_wrap=True)
    try:
        check(options)
        found = run(options, console)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped by Ctrl+C", file=sys.stderr)
        return EXIT_INTERRUPTED
    if options.json:
        print(json.dumps(found, indent=1))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a checkpoint, a run or a Hugging Face folder; or a gs:// url")
    add("--stride", type=int, default=0, metavar="N", help="tokens scored in each window; 0: the context (0)")
    add("--max_tokens", type=int, default=0, metavar="N", help="score only the first so many of each source; 0: all")
    add("--batch_size", type=int, default=8, metavar="N", help="windows in one forward pass (8)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    add("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--data", metavar="URL", help="where the shards are: gs://bucket/prefix or a folder")
    shards.add_argument("--pattern", default="*.npz", help="which files are shards, by their base name (*.npz)")
    shards.add_argument("--max_files", type=int, default=0, help="only the first so many by name; 0: all")
    shards.add_argument("--pad_token_id", type=int, default=-1, help="as data.pad_token_id of train.py (-1: none)")
    shards.add_argument("--cache_dir", default="cache", help="folder of the mapped copies of the shards (cache)")
    text = parser.add_argument_group("raw text")
    text.add_argument(
        "--text", nargs="+", metavar="PATH", help="files, folders, globs or gs://, as prepare_data.py reads"
    )
    text.add_argument("--text_key", default="text", metavar="KEY", help="key or column of the text (text)")
    text.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, where the checkpoint has none")
    tasks = parser.add_argument_group("tasks of lm-eval-harness")
    tasks.add_argument("--tasks", metavar="NAME,…", help="such as hellaswag,arc_easy; their data sets are downloaded")
    tasks.add_argument("--task_path", type=Path, metavar="DIR", help="folder with the YAML of tasks of your own")
    tasks.add_argument("--limit", type=int, metavar="N", help="only the first so many documents of each task")
    tasks.add_argument("--num_fewshot", type=int, metavar="N", help="examples before each question (as the task says)")
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Every setting that can't be right, in one go, before torch is imported. Raises ConfigError."""
    least = {"stride": 0, "max_tokens": 0, "batch_size": 1, "max_files": 0, "pad_token_id": -1}
    least |= {name: bound for name, bound in (("limit", 1), ("num_fewshot", 0)) if getattr(options, name) is not None}
    problems = [
        f"--{name} {getattr(options, name)} must be at least {bound}"
        for name, bound in least.items()
        if getattr(options, name) < bound
    ]
    if not (options.data or options.text or options.tasks):
        problems.append("there is nothing to evaluate on: give --data, --text or --tasks")
    given = [name for name in ("task_path", "limit", "num_fewshot") if getattr(options, name) is not None]
    if given and not options.tasks:
        problems.append(f"--{' and --'.join(given)} mean nothing without --tasks")
    for source, of_it in OF_SOURCE.items():
        given = [name for name, default in of_it.items() if getattr(options, name) != default]
        if given and not getattr(options, source):
            problems.append(f"--{' and --'.join(given)} mean nothing without --{source}")
    if options.task_path and not options.task_path.is_dir():
        problems.append(f"--task_path {options.task_path} is no folder")
    if problems:
        raise ConfigError(problems)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Evaluate and show; the object that --json prints."""
    from pretrain.hardware import choose_device
    from pretrain.harness import check_harness
    from pretrain.pretrained import is_hf_folder, open_checkpoint

    if not options.json:  # the log goes to stdout, which then is for the object alone
        log.setup(0, None)
    device, options.dtype = choose_device(options.device, options.dtype)
    options.device = device.type
    if options.tasks:
        check_harness()
        if not is_hf_folder(
            options.checkpoint
        ):  # named once: a run that goes on has a newer one by the time of the tasks
            options.checkpoint = str(open_checkpoint(options.checkpoint).folder)
    found = measure(options, console)
    if options.tasks:
        figures = tasks_of(options, console)
        show_tasks(figures, console)
        found["tasks"] = [asdict(figure) for figure in figures]
    return found


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Score --data and --text; the model is freed on return, as the tasks load their own."""
    import torch

    from pretrain.engine.base import PRECISION_DTYPES
    from pretrain.evaluation import check_stride
    from pretrain.pretrained import is_hf_folder, load_pretrained

    device = torch.device(options.device)
    pretrained = load_pretrained(options.checkpoint, device=device, dtype=PRECISION_DTYPES[options.dtype], packed=True)
    if options.tasks and pretrained.tokenizer is None and not is_hf_folder(options.checkpoint):
        raise ConfigError(f"{pretrained.name} has no tokenizer.json, which --tasks needs", "Leave out --tasks.")
    stride = options.stride or pretrained.config.seq_len
    check_stride(stride, pretrained.config.seq_len)
    found: dict[str, Any] = {
        "name": "evaluate",
        "checkpoint": pretrained.name,
        "step": pretrained.step,
        "parameters": pretrained.model.n_parameters(),
        "device": options.device,
        "dtype": options.dtype,
        "seq_len": pretrained.config.seq_len,
        "stride": stride,
        "evaluations": [],
        "tasks": [],
    }
    for source in sources(options, pretrained):
        started_s = time.monotonic()
        score = score_of(source, pretrained, stride, options, console)
        found["evaluations"].append(row_of(source, score, time.monotonic() - started_s))
    show(found, console)
    return found


def sources(options: argparse.Namespace, pretrained: Pretrained) -> list[Source]:
    """What --data and --text name, all of it read or mapped before the first is scored."""
    from pretrain.eval_sources import shard_source, text_source
    from pretrain.pretrained import is_hf_folder
    from pretrain.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else pretrained.tokenizer
    vocab_size = pretrained.config.vocab_size
    found = []
    if options.data:
        data = DataConfig(
            source=options.data,
            pattern=options.pattern,
            max_files=options.max_files,
            cache_dir=options.cache_dir,
            pad_token_id=options.pad_token_id,
        )
        # a model of Hugging Face, or a run that began with one, may have ids that its tokenizer never gives
        may_be_larger = bool(pretrained.config.init_from) or is_hf_folder(options.checkpoint)
        found.append(shard_source(data, vocab_size, tokenizer, may_be_larger=may_be_larger))
    if options.text:
        if tokenizer is None:
            raise ConfigError(f"{pretrained.name} has no tokenizer.json, which --text needs", "Give one: --tokenizer")
        read = {"text_key": options.text_key, "max_tokens": options.max_tokens}
        found.append(text_source(options.text, tokenizer, vocab_size, **read))
    return found


def score_of(
    source: Source, pretrained: Pretrained, stride: int, options: argparse.Namespace, console: Console
) -> Score:
    """Score a source below a progress bar; plain lines where there is no terminal."""
    from pretrain.evaluation import evaluate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    line_s = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("tokens", total=None)

        def on_progress(done: int, total: int) -> None:
            nonlocal line_s
            progress.update(bar, completed=done, total=total)
            if not console.is_terminal and time.monotonic() - line_s >= LINE_EVERY_S:
                line_s = time.monotonic()
                console.print(f"{source.title}: {done:,}/{total:,} tokens")

        return evaluate(
            pretrained.model,
            source,
            seq_len=pretrained.config.seq_len,
            stride=stride,
            batch_size=options.batch_size,
            device=next(pretrained.model.parameters()).device,
            max_tokens=options.max_tokens,
            on_progress=on_progress,
        )


def row_of(source: Source, score: Score, seconds: float) -> dict[str, Any]:
    """A source's figures; JSON has no infinity."""
    return {
        "source": source.title,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "loss": score.loss,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "bits_per_byte": score.bits_per_byte,
        "tokens_per_second": score.tokens / seconds,
        "note": source.note,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The table of the sources, and why a figure is missing."""
    console.print(
        f"{found['checkpoint']}: step {found['step']:,}, {found['parameters']:,} parameters, {found['dtype']} on "
        f"{found['device']}, context {found['seq_len']:,}, stride {found['stride']:,}"
    )
    if not found["evaluations"]:
        return
    columns = ("source", "tokens", "bytes", "loss (nats/token)", "perplexity", "bits per byte", "tokens/s")
    forms = {"tokens": ",", "bytes": ",", "loss": ".4f", "perplexity": ",.2f", "bits_per_byte": ".4f"}
    forms["tokens_per_second"] = ",.0f"
    rows = [
        [row["source"], *(figure_text(row[key], form) for key, form in forms.items())] for row in found["evaluations"]
    ]
    print_table(columns, rows, console, right=columns[1:])
    for row in found["evaluations"]:
        if row["note"]:
            console.print(f"{row['source']}: {row['note']}")


def tasks_of(options: argparse.Namespace, console: Console) -> list[TaskFigure]:
    """Run the tasks on an export that lasts as long as they do; a Hugging Face folder is what they need already."""
    from pretrain.export import export
    from pretrain.harness import run_tasks
    from pretrain.pretrained import is_hf_folder, open_checkpoint

    with tempfile.TemporaryDirectory(prefix="evaluate-") as temporary:
        folder = Path(options.checkpoint)
        if not is_hf_folder(options.checkpoint):
            folder = Path(temporary) / "model"
            export(open_checkpoint(options.checkpoint), folder, dtype=options.dtype, say=console.print)
        return run_tasks(
            folder,
            options.tasks.split(","),
            task_path=options.task_path,
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            batch_size=options.batch_size,
            device=options.device,
            dtype=options.dtype,
        )


def show_tasks(figures: Sequence[TaskFigure], console: Console) -> None:
    """The table of the tasks."""
    rows = [
        [
            figure.task,
            figure.metric + (f" ({figure.filter})" if figure.filter != "none" else ""),
            f"{figure.value:.4f}",
            NOTHING if figure.stderr is None else f"± {figure.stderr:.4f}",
        ]
        for figure in figures
    ]
    print_table(("task", "metric", "value", "standard error"), rows, console, right=("value", "standard error"))


if __name__ == "__main__":
    sys.exit(main())
