"""How near the plan's memory is to what training takes, for six configs.

    python benchmarks/bench_memory.py [--json] [--save] [--only NAME[,NAME]]

Predicted is the peak of `pretrain.memory`, which knows neither torch nor a GPU. Counted is the peak of torch's own
memory tracker while the native engine takes its real step over fake tensors: shapes and dtypes without data, so that
whole models fit on any machine. Where there is a GPU the same steps run there for real, and `max_memory_allocated` is
measured too; what does not fit there is left out, and said so. The goal is 7 %.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.progress import track

from pretrain import memory
from pretrain.checks import Check, publish
from pretrain.config import BatchConfig
from pretrain.errors import ConfigError
from pretrain.listings import NOTHING, print_table
from pretrain.memory import Setup
from pretrain.memory_count import count_peak, measure_peak
from pretrain.model_config import ModelConfig

GOAL = 7.0
GB = 1e9


def setup_of(precision: str, micro: int, steps: int, model: ModelConfig) -> Setup:
    """A step of so many micro-batches on one rank of the native engine."""
    return Setup(model.resolve(), precision, BatchConfig(micro * steps, micro))


CONFIGS = {
    "125M_fp32": setup_of("fp32", 4, 1, ModelConfig(size="125M", dropout=0.0)),
    "350M_bf16_accumulating": setup_of("bf16", 4, 2, ModelConfig(size="350M")),
    "760M_bf16_recomputing": setup_of("bf16", 8, 1, ModelConfig(size="760M", activation_checkpointing="full")),
    "1.2B_bf16_selective": setup_of("bf16", 4, 1, ModelConfig(size="1.2B", activation_checkpointing="selective")),
    "llama_medium_bf16": setup_of("bf16", 4, 1, ModelConfig(size="medium", dropout=0.0)),
    "qwen3_large_bf16_chunked_loss": setup_of(
        "bf16", 2, 1, ModelConfig(size="large", family="qwen3", loss_chunks=8, dropout=0.0)
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="A,B", help=f"some of {', '.join(CONFIGS)}")
    parser.add_argument("--json", action="store_true", help="print one JSON object to stdout")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DEVICE/memory.json")
    options = parser.parse_args(argv)
    names = options.only.split(",") if options.only else list(CONFIGS)
    if unknown := [name for name in names if name not in CONFIGS]:
        problem = ConfigError(f"--only: there is no config {unknown[0]!r}", f"There are {', '.join(CONFIGS)}.")
        print(problem.line(), file=sys.stderr)
        return problem.exit_code
    console = Console(stderr=options.json, highlight=False, emoji=False, markup=False)
    rows = []
    for name in track(names, "configs", console=Console(stderr=True), transient=True):
        rows.append(compare(name, CONFIGS[name]))
    show(rows, console)
    checks = [
        Check(f"{row['config']}_{kind}", abs(deviation(row, kind)), "≤", GOAL, "%")
        for row in rows
        for kind in ("counted", "measured")
        if row[f"{kind}_gb"] is not None
    ]
    return publish("memory", checks, as_json=options.json, save=options.save, details={"configs": rows})


Row = dict[str, float | str | None]


def compare(name: str, setup: Setup) -> Row:
    """One config, predicted, counted, and measured where there is a GPU that it fits into."""
    moment = memory.peak(setup)
    measured = measured_peak(setup) if torch.cuda.is_available() else None
    return {
        "config": name,
        "parameters": setup.model.n_parameters,
        "micro_batch_size": setup.batch.micro_size,
        "peak_at": moment.when,
        "predicted_gb": moment.total / GB,
        "counted_gb": count_peak(setup) / GB,
        "measured_gb": None if measured is None else measured / GB,
    }


def measured_peak(setup: Setup) -> int | None:
    """Bytes on this machine's first GPU; None where it does not fit."""
    return without_leftovers(lambda: measure_peak(setup, torch.device("cuda", 0)))


def without_leftovers(measure: Callable[[], int]) -> int | None:
    """What `measure` returns, with the GPU's memory given back; None where there was too little."""
    try:
        found: int | None = measure()
    except torch.OutOfMemoryError:
        found = None
    gc.collect()
    torch.cuda.empty_cache()
    return found


def deviation(row: Row, kind: str) -> float:
    """Percent by which the prediction is off, rounded as it is shown; positive: too much."""
    predicted, found = row["predicted_gb"], row[f"{kind}_gb"]
    assert isinstance(predicted, float) and isinstance(found, float)
    return round((predicted / found - 1) * 100, 2)


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table."""
    head = ("config", "parameters", "micro", "fullest at", "predicted GB", "counted GB", "off", "measured GB", "off")
    cells = []
    for row in rows:
        line = [str(row["config"]), f"{row['parameters']:,}", str(row["micro_batch_size"]), str(row["peak_at"])]
        line.append(f"{row['predicted_gb']:.3f}")
        for kind in ("counted", "measured"):
            found = row[f"{kind}_gb"]
            line += [NOTHING, NOTHING] if found is None else [f"{found:.3f}", f"{deviation(row, kind):+.2f} %"]
        cells.append(line)
    print_table(head, cells, console, right=[*head[1:3], *head[4:]], title="Peak memory of one step, one rank")
    if not torch.cuda.is_available():
        console.print("measured: there is no GPU on this machine", soft_wrap=True)
    elif any(row["measured_gb"] is None for row in rows):
        console.print(f"measured: {NOTHING} does not fit into {torch.cuda.get_device_name(0)}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
