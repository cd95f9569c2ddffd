"""How fast it trains: tokens/s, MFU, share of the machine's own matrix rate, memory, time by phase; and beside others.

    python benchmarks/bench_train.py [--configs NAME,NAME] [--precision bf16,fp32] [--rounds N] [--eager]
                                     [--json] [--save]
    python benchmarks/bench_train.py --peers [trainer,litgpt,accelerate,plain] …
    python benchmarks/bench_train.py --engines [ddp,fsdp,zero2] …

Ours is what `train.py --compile` builds and the steps that it takes, with its data pipeline, telemetry and records. The
rate of matrix products is measured in the same process after each turn. `--peers` trains the same model on the same
tokens, in the same precision and with AdamW, by others, each in a process of its own, as its documentation starts it
and at its best flags. The sides take turns, a few steps each, and their order changes from round to round; a ratio is
the median of the rounds'. Every side says how many parameters it trains and what its first loss was, and they must
agree. Environments of the peers are made at the first use, in .venv/peers. `--engines` has our own engines take turns
with the plain one, all on one rank, where nothing is communicated: what an engine costs by itself.

With --save the rows of other configs and precisions that the results file has are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))  # where the sides find it, too

from environments import python_of
from worker import Spec

from pretrain.checks import RESULTS, Check, device_title, publish, save_result
from pretrain.errors import ConfigError, TrainerError
from pretrain.listings import print_table
from pretrain.model_config import MODEL_SIZES

HERE = Path(__file__).resolve().parent / "peers"
GOAL_DOCUMENTED, GOAL_BEST = 1.25, 1.1
WINDOWS = 1024  # in the stream of tokens that everybody trains on
SAME_LOSS = 0.15  # nats that the first losses of two draws of the same model may lie apart
SHARED_MICRO_SIZE = 4  # beside peers, for three processes then share the card that one would fill
BATCH_TOKENS = 2**19  # of a step on a GPU


@dataclass(frozen=True)
class Shape:
    """A model that is measured.

    Args:
        size: an alias of MODEL_SIZES, or "custom" with the three numbers.
        micro_size: sequences of a micro-batch; 0: the largest that fits.
        global_size: sequences of a step.
        steps: of a turn.
        tokens_goal: tokens/s that a bf16 run should reach; 0: none.
        fp8_goal: the same for an fp8 run.
        rate_goal: share of the matrix rate that a bf16 run should reach; 0: none.
    """

    seq_len: int
    micro_size: int
    global_size: int
    steps: int
    size: str = "custom"
    n_layer: int = 0
    n_head: int = 0
    d_model: int = 0
    vocab_size: int = 50257
    tokens_goal: float = 0.0
    fp8_goal: float = 0.0
    rate_goal: float = 0.0


CPU_SHAPES = {
    "small": Shape(256, 8, 8, 4, n_layer=6, n_head=6, d_model=384, vocab_size=8192),
    "125M": Shape(512, 4, 4, 1, size="125M", rate_goal=0.7),
    "tiny": Shape(32, 2, 4, 2, n_layer=2, n_head=2, d_model=32, vocab_size=256),
}
GPU_SHAPES = {  # not run here: the goals are those of the project's plan for one H100
    "125M": Shape(1024, 0, BATCH_TOKENS // 1024, 2, size="125M", tokens_goal=520e3),
    "350M": Shape(1024, 0, BATCH_TOKENS // 1024, 1, size="350M", tokens_goal=190e3),
    "760M": Shape(2048, 0, BATCH_TOKENS // 2048, 1, size="760M", tokens_goal=92e3),
    "1.2B": Shape(
        2048, 0, BATCH_TOKENS // 2048, 1, n_layer=22, n_head=16, d_model=2048, tokens_goal=62e3, fp8_goal=80e3
    ),
}
DEFAULT_CONFIGS = ("small", "125M")  # on a CPU; on a GPU all


@dataclass(frozen=True)
class Peer:
    """Another trainer.

    Args:
        title: as people know it.
        environment: `requirements-NAME.txt` of it; '': that of the benchmark.
        position: how its model knows where a token is; ours that it is held against does so, too.
        flags: that it runs with.
        engine: of ours.
    """

    title: str
    script: str
    environment: str
    position: str = "learned"
    flags: tuple[str, ...] = ("documented", "best")
    engine: str = "single"


PEERS = {
    "trainer": Peer("transformers Trainer", "hf_trainer.py", "hf"),
    "litgpt": Peer("litgpt", "litgpt_loop.py", "litgpt", "rope"),
    "accelerate": Peer("Accelerate", "accelerate_loop.py", "hf"),
    "plain": Peer("a plain loop", "plain.py", ""),
}
ENGINES = {
    name: Peer(f"ours by {name}", "ours.py", "", flags=("best",), engine=name)
    for name in ("ddp", "fsdp", "zero0", "zero1", "zero2", "zero3")
}
PRECISIONS = ("bf16", "fp32", "fp8")


class Side:
    """A process that trains when it is told to; a context manager, whose end ends it.

    Args:
        script: of benchmarks/peers.

    Attributes:
        hello: what it said of its model.
    """

    def __init__(self, name: str, script: str, python: str, spec: Spec) -> None:
        self.name, self.turns = name, list[dict[str, Any]]()
        folder = Path(spec.folder) / name.replace(" ", "-")
        folder.mkdir()
        self._log = folder / "output.txt"
        self._errors: IO[bytes] = self._log.open("wb")
        command = [python, str(HERE / script), json.dumps(asdict(replace(spec, folder=str(folder))))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        try:
            self.hello = self._listen()
        except BaseException:
            self.close()
            raise

    def turn(self, steps: int) -> None:
        """Have it take so many steps."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: _listen says how
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        self.turns.append(self._listen())

    def _listen(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            said: dict[str, Any] = json.loads(line)
            return said
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        said_last = lines[-1].strip() if lines else "it said nothing"
        raise TrainerError(f"the side {self.name} ended with {self._process.wait()}: {said_last}")

    def close(self) -> None:
        """End of its input: it ends; one that doesn't is ended."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_spec(shape: Shape, precision: str, position: str, folder: str, flags: str = "best") -> Spec:
    """What the sides are told; the tokens are written here."""
    alias = MODEL_SIZES.get(shape.size)
    layers, heads, width = (
        (alias.n_layer, alias.n_head, alias.d_model) if alias else (shape.n_layer, shape.n_head, shape.d_model)
    )
    data = Path(folder) / "data" / "tokens.npz"
    data.parent.mkdir(exist_ok=True)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, WINDOWS * shape.seq_len + 1, dtype=np.uint16)
    np.savez(data, input_ids=tokens)
    sizes: dict[str, Any] = {"micro_size": shape.micro_size, "global_size": shape.global_size, "seq_len": shape.seq_len}
    model: dict[str, Any] = {"n_layer": layers, "n_head": heads, "d_model": width, "vocab_size": shape.vocab_size}
    return Spec(
        size=shape.size, **model, **sizes, position=position, precision=precision, flags=flags, data=str(data),
        folder=folder,
    )  # fmt: skip


def take_turns(sides: Sequence[Side], rounds: int, steps: int, title: str, quiet: bool) -> None:
    """Each side once a round; who begins changes."""
    for number in track(range(rounds), title, disable=quiet, transient=True):
        first = number % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            side.turn(steps)


def describe(ours: Side, shape: Shape) -> dict[str, Any]:
    """Our row of the table."""
    hello, turns = ours.hello, ours.turns
    tokens = shape.steps * shape.global_size * shape.seq_len
    speeds = [tokens / turn["seconds"] for turn in turns]
    flops = hello["flops_per_token"]
    speed = statistics.median(speeds)
    return {
        "parameters": hello["parameters"],
        "micro_size": hello["micro_size"],
        "tokens_per_second": round(speed, 1),
        "mfu": round(speed * flops / hello["peak_flops"], 3),
        "mfu_causal": round(speed * hello["causal_flops_per_token"] / hello["peak_flops"], 3),
        "of_matrix_rate": round(
            statistics.median(v * flops / t["rate"] for v, t in zip(speeds, turns, strict=True)), 3
        ),
        "matrix_tflops": round(statistics.median(turn["rate"] for turn in turns) / 1e12, 3),
        "peak_memory_gb": round(turns[-1]["peak_memory_gb"], 2),
        "phases_ms": {
            name: round(statistics.median(turn["phases"][name] for turn in turns), 1) for name in turns[0]["phases"]
        },
    }


def check_same(ours: Side, other: Side) -> None:
    """Refuse to compare different models.

    Raises:
        ConfigError: they differ in size or in their first loss.
    """
    mine, theirs = ours.hello, other.hello
    if mine["parameters"] != theirs["parameters"] or abs(mine["first_loss"] - theirs["first_loss"]) > SAME_LOSS:
        of = "parameters {parameters:,}, first loss {first_loss:.3f}".format
        raise ConfigError(f"{other.name} trains another model than ours: {of(**theirs)} against {of(**mine)}")


def measure(shape: Shape, precision: str, flags: str, rounds: int, title: str, quiet: bool) -> dict[str, Any]:
    """Our row, alone on the machine."""
    with tempfile.TemporaryDirectory() as folder:
        spec = make_spec(shape, precision, "learned", folder, flags)
        with Side("ours", "ours.py", sys.executable, spec) as ours:
            take_turns([ours], rounds, shape.steps, title, quiet)
            return describe(ours, shape)


def compare(shape: Shape, precision: str, peer: Peer, rounds: int, title: str, quiet: bool) -> dict[str, Any]:
    """A peer's row: its tokens/s by flags, and how many times as fast ours is."""
    python = python_of(peer.environment)
    shape = shape if shape.micro_size else replace(shape, micro_size=SHARED_MICRO_SIZE)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        spec = make_spec(shape, precision, peer.position, folder)
        ours = stack.enter_context(Side("ours", "ours.py", sys.executable, spec))
        others = [
            stack.enter_context(
                Side(f"{peer.title} {flags}", peer.script, python, replace(spec, flags=flags, engine=peer.engine))
            )
            for flags in peer.flags
        ]
        for other in others:
            check_same(ours, other)
        take_turns([ours, *others], rounds, shape.steps, title, quiet)
        tokens = shape.steps * shape.global_size * shape.seq_len

        def speed(side: Side) -> float:
            return float(round(statistics.median(tokens / turn["seconds"] for turn in side.turns), 1))

        def times(other: Side, of: str) -> list[float]:
            return [round(b[of] / a[of], 3) for a, b in zip(ours.turns, other.turns, strict=True)]

        row: dict[str, Any] = {"ours_tokens_per_second": speed(ours)}
        for flags, other in zip(peer.flags, others, strict=True):
            ratios = times(other, "seconds")
            row[flags] = {
                "tokens_per_second": speed(other),
                "ours_is_faster": round(statistics.median(ratios), 3),
                "ratios": ratios,
                "cpu_time_ratio": round(statistics.median(times(other, "cpu_seconds")), 3),
                "peak_memory_gb": round(other.turns[-1]["peak_memory_gb"], 2),
            }
        return row


def checks_of(rows: dict[str, dict[str, Any]], shapes: dict[str, Shape]) -> list[Check]:
    """What has a goal, of all rows."""
    checks = []
    for key, row in rows.items():
        name, _, precision = key.partition(" ")
        shape, title = shapes[name], key.replace(" ", "_")
        if shape.rate_goal and precision == "bf16":
            checks.append(Check(f"{title}_of_matrix_rate", row["of_matrix_rate"], "≥", shape.rate_goal, "of 1"))
        if goal := {"bf16": shape.tokens_goal, "fp8": shape.fp8_goal}.get(precision, 0.0):
            checks.append(Check(f"{title}_speed", row["tokens_per_second"], "≥", goal, "tokens/s"))
        for peer, found in row.get("peers", {}).items():
            for flags, goal in (("documented", GOAL_DOCUMENTED), ("best", GOAL_BEST)):
                checks.append(Check(f"{title}_over_{peer}_{flags}", found[flags]["ours_is_faster"], "≥", goal, "x"))
    return checks


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Our rows as a table for people."""
    columns = ("config", "tokens/s", "MFU", "causal", "of matrix rate", "memory GB", "forward", "backward", "optimizer")
    lines = [
        [
            key,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['mfu']:.1%}",
            f"{row['mfu_causal']:.1%}",
            f"{row['of_matrix_rate']:.1%}",
            f"{row['peak_memory_gb']:.2f}",
            *(f"{row['phases_ms'][f'{phase}_ms']:.0f} ms" for phase in columns[-3:]),
        ]
        for key, row in rows.items()
    ]
    print_table(columns, lines, Console(), right=columns[1:])


def known_rows(device: str, name: str) -> dict[str, dict[str, Any]]:
    """The rows of a results file, by "CONFIG PRECISION"; none where there is no file."""
    path = RESULTS / device / f"{name}.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
    return rows


def run_all(options: argparse.Namespace, shapes: dict[str, Shape]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("CONFIG PRECISION", its row), one after the other."""
    for name in options.configs:
        for precision in options.precision:
            key, shape, quiet = f"{name} {precision}", shapes[name], options.json
            flags = "documented" if options.eager else "best"
            row = {"compiled": not options.eager, **measure(shape, precision, flags, options.rounds, key, quiet)}
            if options.peers:
                row["peers"] = {
                    peer: compare(shape, precision, PEERS[peer], options.rounds, f"{key} and {peer}", quiet)
                    for peer in options.peers
                }
            yield key, {**row, "rounds": options.rounds, "steps": shape.steps}


def run_engines(options: argparse.Namespace, shapes: dict[str, Shape]) -> Iterator[tuple[str, dict[str, Any]]]:
    """("CONFIG PRECISION", {engine: its row beside the plain one}), one after the other."""
    for name in options.configs:
        for precision in options.precision:
            key = f"{name} {precision}"
            row = {
                engine: compare(
                    shapes[name], precision, ENGINES[engine], options.rounds, f"{key} and {engine}", options.json
                )
                for engine in options.engines
            }
            yield key, row


def show_engines(rows: dict[str, dict[str, Any]]) -> None:
    """What each engine costs, as a table for people."""
    columns = ("config", "engine", "tokens/s", "plain", "plain is faster", "memory GB")
    lines = [
        [
            key,
            engine,
            f"{found['best']['tokens_per_second']:,.0f}",
            f"{found['ours_tokens_per_second']:,.0f}",
            f"{found['best']['ours_is_faster']:.2f} x",
            f"{found['best']['peak_memory_gb']:.2f}",
        ]
        for key, row in rows.items()
        for engine, found in row.items()
    ]
    print_table(columns, lines, Console(), right=columns[2:])


def words(text: str) -> list[str]:
    """Of a list with commas."""
    return [word for word in text.split(",") if word]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    shapes = GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES
    default = [name for name in shapes if name in DEFAULT_CONFIGS or torch.cuda.is_available()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=words, default=default, help=f"of {', '.join(shapes)} ({','.join(default)})")
    parser.add_argument("--precision", type=words, default=["bf16"], help=f"of {', '.join(PRECISIONS)} (bf16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (5)")
    beside = (
        ("--peers", PEERS, "others to run beside it"),
        ("--engines", ENGINES, "our engines to run beside the plain one"),
    )
    for option, names, what in beside:
        parser.add_argument(
            option, type=words, nargs="?", const=list(names), default=[], help=f"{what}: {', '.join(names)}"
        )
    parser.add_argument("--eager", action="store_true", help="ours without torch.compile; not with --peers")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/train.json, engines.json")
    options = parser.parse_args(argv)
    try:
        known_words = {"configs": shapes, "precision": PRECISIONS, "peers": PEERS, "engines": ENGINES}
        for option, known in known_words.items():
            if unknown := [word for word in getattr(options, option) if word not in known]:
                raise ConfigError(f"--{option} {unknown[0]!r} is none of {', '.join(known)}")
        if options.eager and options.peers:
            raise ConfigError("--eager is of ours alone, and --peers compares with ours at its best", "Leave one out.")
        if options.engines and (options.eager or options.peers):
            raise ConfigError("--engines is a comparison of its own", "Leave out --peers and --eager.")
        if options.rounds < 1:
            raise ConfigError("--rounds must be at least 1")
        return measure_all(options, shapes)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code


def measure_all(options: argparse.Namespace, shapes: dict[str, Shape]) -> int:
    """Row by row; each is saved as soon as it is there, for they take minutes."""
    name, run, view = ("engines", run_engines, show_engines) if options.engines else ("train", run_all, show)
    rows = known_rows(device_title(), name) if options.save else {}
    checks: list[Check] = []
    for key, row in run(options, shapes):
        rows[key] = row
        checks = [] if options.engines else checks_of(rows, shapes)
        if options.save:
            save_result(name, checks, {"rows": rows})
    if not options.json:
        view(rows)
    return publish(name, checks, as_json=options.json, save=options.save, details={"rows": rows})


if __name__ == "__main__":
    sys.exit(main())
