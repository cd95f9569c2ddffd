"""Tokens to a loss: the recipe of configs/fast.yaml against the classic one of configs/production.yaml.

    python benchmarks/bench_recipe.py [--seeds 3] [--work DIR] [--ablations] [--picture FILE] [--json] [--save]

Both train a model of the same size (parameters within 2 %) on the same tokens, in the same batches and as many of them,
for each seed by train.py itself: AdamW, cosine, dropout 0.1, learned positions, LayerNorm and GELU on one side, what
configs/fast.yaml says on the other. The text is this Python's standard library (scripts/make_demo_data.py), read less
than once. The learning rate of each side was tuned for it: benchmarks/NOTES.md has the sweeps.

The figure is the ratio of tokens: those of the classic run over those at which the fast run of the same seed passes the
classic run's final validation loss, by a line between two validations. Token counts are no matter of the machine's
speed. With --work a run that is finished there is not made again, so the benchmark can be made in pieces.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from pretrain.arguments import parse
from pretrain.checks import Check, publish
from pretrain.config import Config
from pretrain.errors import ConfigError, TrainerError
from pretrain.listings import print_table
from pretrain.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[1]
GOAL, SAME_SIZE = 1.4, 0.02
TOKENS, VOCAB, SHARDS, BATCH, SEQ_LEN, VALIDATIONS = 2**19, 2048, 8, 8, 256, 16
STEP = BATCH * SEQ_LEN  # tokens
# What is equal on both sides: the width and depth, the batch, the precision, the engine.
EQUAL = {
    "model.size": "custom",
    "model.n_layer": 4,
    "model.n_head": 3,
    "model.d_model": 192,
    "model.vocab_size": VOCAB,
    "model.seq_len": SEQ_LEN,
    "model.activation_checkpointing": "none",
    "batch.global_size": BATCH,
    "batch.micro_size": BATCH,
    "data.shuffle_shards": SHARDS,
    "engine.name": "native",
    "train.precision": "bf16",
    "train.eval_sequences": 64,
    "checkpoint.every_files": 0,
    "log.wandb": "false",
    "log.report": "false",
    "log.telemetry": "false",
    "log.tensorboard": "false",
}
# (config, what is set beside it): production.yaml's recipe with what so small a model and so short a run need.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "classic": ("production", {"optim.lr": 1e-3, "optim.warmup_steps": 10}),
    "fast": ("fast", {}),
}
# The fast recipe with one part of it taken back.
ABLATIONS: dict[str, dict[str, Any]] = {
    "AdamW for Muon": {"optim.name": "adamw", "optim.lr": 1e-3},  # the classic side's
    "cosine for WSD": {"optim.schedule": "cosine", "optim.cooldown_fraction": 0.2, "optim.cooldown": "sqrt"},
    "learned positions for RoPE": {"model.position": "learned"},
    "LayerNorm and GELU for RMSNorm and SwiGLU": {
        "model.norm": "layernorm",
        "model.activation": "gelu_tanh",
        "model.d_ff": 768,
    },
    "no QK-norm": {"model.qk_norm": "false"},
    "no zero-init": {"model.zero_init": "false"},
    "dropout 0.1": {"model.dropout": 0.1},
}


@dataclass(frozen=True)
class Run:
    """One training, as it went.

    Args:
        tokens, losses: of its validations, parallel; losses in nats per token.
        parameters: of its model.
    """

    recipe: str
    seed: int
    tokens: tuple[int, ...]
    losses: tuple[float, ...]
    parameters: int

    def tokens_to(self, loss: float) -> float:
        """Tokens at which the validation loss first passes this one, by a line between two validations; inf: never."""
        for number, found in enumerate(self.losses):
            if found <= loss:
                if not number:
                    return float(self.tokens[0])
                before, tokens = self.losses[number - 1], self.tokens[number - 1]
                return tokens + (self.tokens[number] - tokens) * (before - loss) / (before - found)
        return float("inf")


def options_of(recipe: str, seed: int, tokens: int, more: dict[str, Any]) -> list[str]:
    """The words of train.py's command line, but for the places."""
    config, changes = RECIPES[recipe]
    steps = tokens // STEP
    length = {"train.max_steps": steps, "train.max_tokens": 0, "train.eval_interval": max(1, steps // VALIDATIONS)}
    settings = {**EQUAL, **length, "run.seed": seed, **changes, **more}
    return ["--config", config, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]


def config_of(words: list[str]) -> Config:
    """The config that train.py makes of these words."""
    return parse([*words, "--data", "corpus"]).config


def train(recipe: str, seed: int, tokens: int, work: Path, more: dict[str, Any]) -> Run:
    """Train by one recipe, or read what was trained in `work` before.

    Raises:
        ConfigError: train.py ended with an error.
    """
    words = options_of(recipe, seed, tokens, more)
    settings = config_of(words)
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True, default=str).encode()).hexdigest()[:8]
    name = f"{recipe}-{seed}-{digest}"
    places = {
        "data": work / "data" / "shards",
        "data.val_source": work / "data" / "val",
        "data.cache_dir": work / "cache",
        "log.dir": work / "logs",
        "checkpoint.dir": work / "checkpoints",
    }
    if not _is_finished(work / "logs" / name):
        where = [word for key, path in places.items() for word in (f"--{key}", str(path))]
        _python(ROOT / "train.py", *words, *where, "--run", name, "--resume", "auto")
    records = read_metrics(work / "logs" / name / METRICS_FILE)
    validated = [(r["step"] * STEP, r["val_loss"]) for r in records if r.get("val_loss") is not None]
    steps, losses = zip(*validated, strict=True)
    return Run(recipe, seed, steps, losses, settings.model.n_parameters)


def _is_finished(logs: Path) -> bool:
    try:
        return bool(json.loads((logs / "summary.json").read_text(encoding="utf-8"))["finished"])
    except (OSError, ValueError, KeyError):
        return False


def _python(script: Path, *words: str) -> None:
    """Run one of the project's own commands; its output goes where it says something, into the error."""
    ended = subprocess.run([sys.executable, str(script), *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        last = (ended.stderr.strip() or ended.stdout.strip() or "no output").splitlines()[-1]
        raise ConfigError(f"{script.name} ended with exit code {ended.returncode}: {last}")


def compare(options: argparse.Namespace, work: Path) -> tuple[list[Run], list[tuple[str, Run]]]:
    """The runs of both recipes for each seed, and the ablations, where they are asked for."""
    tokens = options.tokens // STEP * STEP
    needed = tokens + STEP  # the last window wants one more token, and shards don't divide evenly
    data = ["--output_dir", str(work / "data"), "--tokens", str(needed), "--vocab_size", str(VOCAB)]
    _python(ROOT / "scripts" / "make_demo_data.py", *data, "--shards", str(SHARDS))
    plan: list[tuple[str, str, int, dict[str, Any]]] = [
        ("", recipe, seed, {}) for seed in range(1, options.seeds + 1) for recipe in RECIPES
    ]
    if options.ablations:
        plan += [(title, "fast", 1, changes) for title, changes in ABLATIONS.items()]
    runs: list[Run] = []
    ablations: list[tuple[str, Run]] = []
    for title, recipe, seed, changes in track(plan, "runs", console=Console(stderr=True), transient=True):
        run = train(recipe, seed, tokens, work, changes)
        if title:
            ablations.append((title, run))
        else:
            runs.append(run)
    return runs, ablations


def ratios_of(runs: Sequence[Run]) -> list[float]:
    """For each seed the tokens of the classic run over those that the fast one needs to its final loss; 0: never."""
    found = []
    for classic in (run for run in runs if run.recipe == "classic"):
        (fast,) = (run for run in runs if run.recipe == "fast" and run.seed == classic.seed)
        found.append(classic.tokens[-1] / fast.tokens_to(classic.losses[-1]))
    return found


def checks_of(runs: Sequence[Run]) -> list[Check]:
    """The figure and what makes it fair."""
    sizes = {run.recipe: run.parameters for run in runs}
    difference = abs(sizes["fast"] / sizes["classic"] - 1)
    ratios = ratios_of(runs)
    return [
        Check("tokens_to_the_classic_loss", round(statistics.median(ratios), 3), "≥", GOAL, "x"),
        Check("worst_seed", round(min(ratios), 3), "≥", 1.0, "x"),
        Check("difference_of_parameters", round(100 * difference, 2), "≤", 100 * SAME_SIZE, "%"),
    ]


def show(runs: Sequence[Run], ablations: Sequence[tuple[str, Run]], console: Console) -> None:
    """Print what each run came to."""
    head = ("recipe", "seed", "parameters", "tokens", "validation loss")
    rows = [(run.recipe, run) for run in runs] + [(f"fast, {title}", run) for title, run in ablations]
    cells = [
        [title, str(run.seed), *(f"{n:,}" for n in (run.parameters, run.tokens[-1])), f"{run.losses[-1]:.4f}"]
        for title, run in rows
    ]
    print_table(head, cells, console, right=head[1:], title="Runs")


def draw(runs: Sequence[Run], path: Path) -> None:
    """A picture of the validation curves, of all seeds, and of the tokens that the fast recipe needs.

    Raises:
        ConfigError: matplotlib is not installed, or it can't write a file of that name.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("--picture needs matplotlib, which is not installed", "Run bash setup_env.sh.") from error
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    colors = {"classic": "#d62728", "fast": "#1f77b4"}
    for run in runs:
        label = f"{run.recipe} (configs/{RECIPES[run.recipe][0]}.yaml)" if run.seed == 1 else None
        xs = [tokens / 1e3 for tokens in run.tokens]
        axes.plot(xs, run.losses, color=colors[run.recipe], marker="o", markersize=3, linewidth=1.4, label=label)
    goal = statistics.fmean(run.losses[-1] for run in runs if run.recipe == "classic")
    axes.axhline(goal, color="#888888", linewidth=1.0, linestyle=":", label="where the classic runs end, their mean")
    axes.set(xlabel="thousand tokens", ylabel="validation loss (nats per token)", title=_title(runs))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: {error}", "Name a .png, .pdf or .svg that can be written.") from error
    finally:
        pyplot.close(figure)


def _title(runs: Sequence[Run]) -> str:
    seeds = len({run.seed for run in runs})
    what = f"{runs[0].parameters / 1e6:.1f}M parameters, batches of {STEP:,} tokens, {seeds} seed{'s' * (seeds > 1)}"
    return f"{what}\n{statistics.median(ratios_of(runs)):.1f} × fewer tokens to the classic run's end (median)"


@contextlib.contextmanager
def working_folder(options: argparse.Namespace) -> Iterator[Path]:
    """Where the runs are kept: a folder of the user's, or one that goes when all is done."""
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
        yield options.work.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each recipe (3)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of a run ({TOKENS:,})")
    parser.add_argument("--work", type=Path, help="keep the corpus and the runs here, and go on with those there")
    parser.add_argument("--ablations", action="store_true", help="also the fast recipe with one part taken back")
    parser.add_argument("--picture", type=Path, help="draw the validation curves: a .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/recipe.json")
    options = parser.parse_args(argv)
    try:
        if options.seeds < 1 or options.tokens < VALIDATIONS * STEP:
            raise ConfigError(f"--seeds must be at least 1, and --tokens at least {VALIDATIONS * STEP:,}")
        with working_folder(options) as work:
            runs, ablations = compare(options, work)
        if options.picture:
            draw(runs, options.picture)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    show(runs, ablations, Console(stderr=options.json))
    details = {
        "tokens_per_step": STEP,
        "ratios": [round(ratio, 3) for ratio in ratios_of(runs)],
        "runs": [asdict(run) for run in runs],
        "ablations": [{"without": title, **asdict(run)} for title, run in ablations],
    }
    return publish("recipe", checks_of(runs), as_json=options.json, save=options.save, details=details)


if __name__ == "__main__":
    sys.exit(main())
