"""Is this machine ready to train? Looks at everything that a training needs, and says what to mend.

    python scripts/doctor.py                                       # the machine alone
    python scripts/doctor.py --config production --data gs://bucket/shards --checkpoints gs://bucket/Checkpoints
    python scripts/doctor.py --config my.yaml --ranks 8 --json

Every option of train.py works as well, so that it is your model, your shards and your bucket that are looked at: it
writes a small object below --checkpoints and deletes it again, and reads the first shard. prod_train.sh runs it first,
and starts where nothing failed but storage (4), which may come back.

Each line is ok; warn: training runs, but this should be mended; FAIL: it won't run; or –: there is nothing to look at.
Exit codes: 0 no fail. Otherwise the lowest code of what failed: 2 machine or settings, 3 data, 4 storage, as train.py
has them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from pretrain import data_checks, gpu_checks, log, machine_checks, plan, storage_checks, torch_checks
from pretrain.arguments import ROOT, Invocation, parse
from pretrain.checks import device_title, result
from pretrain.config import Config
from pretrain.config_checks import NO_SOURCE
from pretrain.doctor import Examiner, Finding, Question, exit_code
from pretrain.errors import EXIT_STOPPED, ConfigError, ShardError, StorageError, TrainerError
from pretrain.kernels import Masking
from pretrain.memory import Setup

# status: (what is printed, its style)
SHOWN = {"ok": ("ok", "green"), "warn": ("warn", "bold yellow"), "fail": ("FAIL", "bold red"), "skip": ("–", "dim")}
NAME_WIDTH = 18
DATA_OPTIONS = ("--config", "--data", "--data.source", "--data.sources")
UNNAMED = "unnamed"


def main(argv: Sequence[str] | None = None) -> int:
    """Look at everything, print it, and return the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py has it
    options, words = parse_options(argv)
    console = Console(stderr=options.json, highlight=False, emoji=False, markup=False)
    try:
        gpus = gpu_checks.count_gpus()
        ranks = options.ranks or max(gpus, 1)
        invocation = read_words(words, ranks * options.nodes)
        questions = chosen(questions_for(invocation, gpus, ranks, options.nodes), options.only)
        findings = examine(questions, console, options.debug)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; what was tried is cleaned up, but for a probe that may be left in the bucket", file=sys.stderr)
        return EXIT_STOPPED
    return conclude(findings, console, options.json)


def parse_options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and those of train.py."""
    parser = argparse.ArgumentParser(
        prog="doctor.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [--section.field VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, default=0, metavar="N", help="processes on this node (its GPUs, or 1)")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="nodes of the run; each runs its own (1)")
    parser.add_argument("--only", metavar="A,B", help="look at these lines only, named as --json names them")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout, all else to stderr")
    parser.add_argument("--debug", action="store_true", help="show the tracebacks of checks that went wrong")
    options, words = parser.parse_known_args(argv)
    if options.ranks < 0 or options.nodes < 1:
        parser.error("--ranks and --nodes must be at least 1")
    return options, words


def read_words(words: Sequence[str], world_size: int) -> Invocation:
    """What train.py would make of these options; without any word of data, a run that has none.

    Raises:
        ConfigError: all that is wrong with them.
    """
    names_data = any(word.split("=")[0] in DATA_OPTIONS for word in words)
    try:
        return parse([*words, *([] if names_data else ["--data", ""])], world_size)
    except ConfigError as error:
        if error.problems != [NO_SOURCE]:
            raise
    invocation = parse([*words, "--data", UNNAMED], world_size)
    config = invocation.config
    return replace(invocation, config=replace(config, data=replace(config.data, source="")))


def questions_for(invocation: Invocation, gpus: int, ranks: int, nodes: int) -> list[Question]:
    """Everything to look at, each with its own section of the config."""
    config = invocation.config
    precision, masked, world_size = config.train.precision, config.data.document_mask, ranks * nodes
    setup = plan.make_setup(config.model, config.batch, config.engine, config.optim, precision, world_size, masked)
    machine = [
        Question("python", machine_checks.python),
        Question("packages", machine_checks.packages, (ROOT / "requirements.txt", config.log.version_check)),
        Question("host_memory", machine_checks.host, (setup, ranks, "cuda" if gpus else "cpu")),
        Question("shared_memory", machine_checks.shared_memory, (ranks if gpus else 0,)),
        Question("limits", machine_checks.limits, (nodes,)),
        Question("driver", gpu_checks.driver),
        Question("gpu_health", gpu_checks.health),
    ]
    return [*machine, *torch_questions(invocation, setup, gpus, ranks), *storage_questions(config, nodes)]


def torch_questions(invocation: Invocation, setup: Setup, gpus: int, ranks: int) -> list[Question]:
    """What torch does on this machine."""
    config = invocation.config
    train, model = config.train, config.model
    compiled = train.compiles
    masking = Masking(model.dropout, compiled) if config.data.document_mask else None
    kernel = (model.attention, train.precision, model.head_dim, masking)
    return [
        Question("torch", torch_checks.build, (gpus,), timeout_s=60),
        Question("precision", torch_checks.precision, (train.precision,), timeout_s=60),
        Question("attention", torch_checks.attention, kernel, timeout_s=60),
        Question("compile", torch_checks.compilation, (compiled,), timeout_s=120),
        Question("engine", torch_checks.engine, (config.engine,), timeout_s=60),
        Question("gpu_memory", torch_checks.gpu_memory, (setup, invocation.force)),
        Question("all_reduce", torch_checks.reduction, (setup, gpus, ranks), timeout_s=90),
    ]


def storage_questions(config: Config, nodes: int) -> list[Question]:
    """What disks, buckets and shards say."""
    data, checkpoint, storage = config.data, config.checkpoint, config.storage
    size = plan.CHECKPOINT_BYTES * plan.padded_parameters(config.model)
    urls = [data.source, *(each.source for each in data.sources), checkpoint.url]
    disk, bucket = (checkpoint, config.run.name, size, nodes), (checkpoint.url, config.run.name, storage)
    corpus_s = 120.0 * max(1, len(data.sources))  # one source after the other
    return [
        Question("cache_disk", storage_checks.cache_disk, (data.cache_dir,), StorageError, 60),
        Question("checkpoint_disk", storage_checks.checkpoint_disk, disk, StorageError, 60),
        Question("log_folder", storage_checks.log_folder, (config.log,), StorageError),
        Question("clock", storage_checks.clock, (urls,), StorageError),
        Question("checkpoint_store", storage_checks.checkpoint_store, bucket, StorageError, 90),
        Question("wandb", storage_checks.wandb_login, (config.log,), StorageError, 45),
        Question("shards", data_checks.corpus, (data, storage, config.model), ShardError, corpus_s),
        Question("validation_shards", data_checks.validation, (data, storage), ShardError, 60),
    ]


def chosen(questions: Sequence[Question], only: str | None) -> list[Question]:
    """The questions that `--only` names; all without it. Raises ConfigError for a name that there isn't."""
    if only is None:
        return list(questions)
    names = {question.name: question for question in questions}
    if unknown := [name for name in only.split(",") if name not in names]:
        raise ConfigError(f"--only {only}: there is no check {unknown[0]!r}", f"There are {', '.join(names)}.")
    return [question for question in questions if question.name in only.split(",")]


def examine(questions: Sequence[Question], console: Console, debug: bool) -> list[Finding]:
    """Ask one question after the other, and print each finding when it is there."""
    findings: list[Finding] = []
    with Examiner() as examiner, console.status("") as status:
        for number, question in enumerate(questions, 1):
            status.update(f"{question.name.replace('_', ' ')} ({number} of {len(questions)}) …")
            for finding in examiner.ask(question):
                findings.append(finding)
                show(finding, console)
                if debug and finding.trace:
                    console.print(log.mask(finding.trace), soft_wrap=True)
    return findings


def show(finding: Finding, console: Console) -> None:
    """Print one finding, and its mend below it."""
    word, style = SHOWN[finding.status]
    name = finding.name.replace("_", " ")
    line = Text(f"{word:<5}", style=style).append(f" {name:<{NAME_WIDTH}}", style="default")
    line.append(log.mask(finding.found), style="dim" if finding.status == "skip" else "default")
    console.print(line, soft_wrap=True)
    if finding.mend:
        console.print(Text(f"{'':<{NAME_WIDTH + 6}}→ {log.mask(finding.mend)}", style=style), soft_wrap=True)


def conclude(findings: Sequence[Finding], console: Console, as_json: bool) -> int:
    """Print how many there are of each, and the object of --json; the exit code."""
    code = exit_code(findings)
    counts = {status: sum(finding.status == status for finding in findings) for status in SHOWN}
    console.print(
        f"{counts['ok']} ok, {counts['warn']} to mend, {counts['fail']} failed, {counts['skip']} not here: "
        f"{'ready to train' if not counts['fail'] else f'not ready (exit code {code})'}",
        soft_wrap=True,
    )
    if as_json:
        found = [finding.to_json() for finding in findings]
        tree = result("doctor", device_title(gpu_checks.first_gpu()), found, not counts["fail"])
        print(json.dumps({**tree, "exit_code": code}, indent=1))
    return code


if __name__ == "__main__":
    sys.exit(main())
