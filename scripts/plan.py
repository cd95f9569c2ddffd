"""Know before you pay: memory, speed, time, energy, money and checkpoints of a run. Needs no GPU and no torch.

    python scripts/plan.py --model 1.2B --gpus 8 --gpu h100-80gb --tokens 22B
    python scripts/plan.py --model 7B --gpus 8 --gpu h100-80gb --tokens 22B --compare
    python scripts/plan.py --model 1.2B --gpu h100-80gb --scaling
    python scripts/plan.py --models

Every option of train.py works as well (`--model.n_layer 30`, `--engine native`). Exit code 0: the run fits into the
GPUs' memory, 2: it does not, or a setting is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from pretrain import memory, plan
from pretrain.arguments import gives_sources, parse
from pretrain.config import Config, EngineConfig
from pretrain.errors import ConfigError, TrainerError
from pretrain.gpus import CARDS
from pretrain.listings import print_table, show_rows
from pretrain.memory import Setup
from pretrain.model_config import MODEL_SIZES, ModelConfig
from pretrain.optim_config import FP32_BYTES, moments_bytes, optim_problems
from pretrain.plan import GB, Gpu, Speed
from pretrain.plan_views import (
    comparison_row,
    course_rows,
    feasibility_rows,
    gigabytes,
    memory_rows,
    scaling_cells,
    setting_rows,
)
from pretrain.scaling import NETWORKS, Network, scaling_row

EXIT_FEASIBLE, EXIT_INFEASIBLE = 0, 2
# option: the field of train.py that it sets
SHORT_FORMS = {
    "--micro_batch_size": "batch.micro_size",
    "--global_batch_size": "batch.global_size",
    "--seq_len": "model.seq_len",
    "--vocab_size": "model.vocab_size",
    "--family": "model.family",
    "--activation_checkpointing": "model.activation_checkpointing",
    "--zero_stage": "engine.zero_stage",
    "--price_per_gpu_hour": "train.price_per_gpu_hour",
}
SHAPE = ("n_layer", "n_head", "n_kv_head", "d_model", "head_dim", "d_ff")
COMPARED_SIZES = 5
NODES = (1, 2, 4, 8, 16, 32, 64)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan that the command line asks for and return the exit code."""
    options, others = build_parser().parse_known_args(argv)
    console = Console(highlight=False, emoji=False, markup=False)
    try:
        config = read_config(options, others)
        if options.models:
            return show_models(config.model, options.family or "", console, options.json)
        gpu = Gpu.named(options.gpu)
        setup = setup_of(config, config.engine, options.gpus)
        if config.batch.is_auto:
            largest = memory.largest_micro_size(setup, memory.available_bytes(gpu.memory_bytes))
            setup = setup.with_micro_size(largest or 1)
        if options.scaling:
            return show_scaling(setup, gpu, config, console, options.json)
        if options.compare:
            return show_comparison(setup, gpu, config, console, options.json)
        return show_plan(setup, gpu, config, options, console)
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code


def build_parser() -> argparse.ArgumentParser:
    """The options of the plan itself; what they leave over is train.py's."""
    parser = argparse.ArgumentParser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", metavar="SIZE", help=f"one of {', '.join(MODEL_SIZES)} (default: the config's)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs in all (default: 8)")
    parser.add_argument("--gpu", default="h100-80gb", help=f"one of {', '.join(CARDS)} (default: h100-80gb)")
    parser.add_argument("--tokens", help="22B, 1.5T, 500M (default: the config's)")
    parser.add_argument("--config", default="production", help="configs/NAME.yaml or a path (default: production)")
    for option, field in SHORT_FORMS.items():
        parser.add_argument(option, help=f"as --{field}")
    parser.add_argument("--shards", type=int, default=0, help="files that hold the tokens, for the bucket's traffic")
    parser.add_argument("--compare", action="store_true", help="engines × activation checkpointing × micro batch")
    parser.add_argument("--scaling", action="store_true", help="engines × 1 to 64 nodes: bytes, step, efficiency")
    parser.add_argument("--models", action="store_true", help="every size with its exact count")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def read_config(options: argparse.Namespace, others: list[str]) -> Config:
    """The settings that train.py would have with these options.

    Raises:
        ConfigError: all that is wrong with them.
    """
    if options.gpus < 1:
        raise ConfigError(f"--gpus is {options.gpus}, expected at least 1")
    argv = ["--config", options.config, *([] if gives_sources(others) else ["--data", "planned"])]
    if options.model:
        argv += ["--model.size", options.model]
        argv += [] if options.family else ["--model.family", ""]
        argv += [word for part in SHAPE for word in (f"--model.{part}", "0")]  # a config's own shape is another model
    if options.tokens:
        argv += ["--max-tokens", str(plan.read_tokens(options.tokens)), "--max-steps", "0"]
    for option, field in SHORT_FORMS.items():
        if (value := getattr(options, option.removeprefix("--"))) is not None:
            argv += [f"--{field}", value]
    return parse(argv + others, world_size=options.gpus).config


def setup_of(config: Config, engine: EngineConfig, world_size: int) -> Setup:
    """What decides the memory of a run with these settings on another engine or number of GPUs."""
    batch, optim, masked = config.batch, config.optim, config.data.document_mask
    return plan.make_setup(config.model, batch, engine, optim, config.train.precision, world_size, masked)


# ---- one plan ----


def show_plan(setup: Setup, gpu: Gpu, config: Config, options: argparse.Namespace, console: Console) -> int:
    """Print the plan of one run."""
    if not (config.train.max_tokens or config.train.max_steps):
        raise ConfigError("the plan does not know how many tokens to train on", "Give --tokens 22B.")
    budget, speed = plan.budget(setup, gpu), plan.expected_speed(setup, gpu)
    course = course_of(setup, gpu, speed, config, options)
    mends = [] if budget.feasible else plan.mends(setup, gpu)
    if options.json:
        tree = {"memory": budget.to_json(), "course": course, "mends": mends}
        print(json.dumps(tree, indent=1))
    else:
        what = f"{config.model.size}: {config.model.n_parameters:,} parameters on {setup.world_size} × {gpu.name}"
        show_rows(console, what, setting_rows(setup))
        show_rows(console, "Memory of one GPU", memory_rows(budget))
        show_rows(console, "Feasibility", feasibility_rows(budget, mends))
        show_rows(console, "The run", course_rows(course))
    return EXIT_FEASIBLE if budget.feasible else EXIT_INFEASIBLE


def course_of(setup: Setup, gpu: Gpu, speed: Speed, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """What the run takes, as plain values; None where it can't be known."""
    steps = config.total_steps(0)
    tokens = steps * config.tokens_per_step
    hours = tokens / speed.tokens_per_second / 3600
    weights = FP32_BYTES * plan.padded_parameters(config.model)
    checkpoint = weights + moments_bytes(config.optim, config.model)
    count = checkpoints_of(config, steps, options.shards)
    return {
        "tokens": tokens,
        "steps": steps,
        "tokens_per_step": config.tokens_per_step,
        "tokens_per_parameter": round(tokens / config.model.n_parameters, 2),
        "tokens_per_second": round(speed.tokens_per_second),
        "mfu": round(speed.mfu, 4),
        "mfu_source": speed.source,
        "peak_tflops_per_gpu": plan.peak_tflops(gpu, setup.precision),
        "hours": round(hours, 2),
        "gpu_hours": round(hours * setup.world_size, 1),
        "energy_kwh": round(hours * setup.world_size * gpu.power_w / 1000, 1),
        "power_w_per_gpu": gpu.power_w,
        "cost": round(hours * setup.world_size * config.train.price_per_gpu_hour, 2) or None,
        "checkpoint_gb": round(checkpoint / GB, 2),
        "checkpoints": count,
        "downloaded_gb": round(plan.token_bytes(config.model) * tokens / GB, 1),
        "uploaded_gb": None if count is None else round(count * checkpoint / GB, 1),
        "kept_gb": round((config.checkpoint.keep or count or 1) * checkpoint / GB, 1),
        "keep": config.checkpoint.keep,
        "every_files": config.checkpoint.every_files,
        "every_steps": config.checkpoint.every_steps,
    }


def checkpoints_of(config: Config, steps: int, shards: int) -> int | None:
    """Checkpoints that the run saves, the last one included; None where the number of shards decides and is unknown."""
    files, every_steps = config.checkpoint.every_files, config.checkpoint.every_steps
    if files and not shards:
        return None
    by_files = -(-shards // files) if files else 0
    by_steps = -(-steps // every_steps) if every_steps else 0
    return max(1, by_files + by_steps)


# ---- tables ----


def show_comparison(setup: Setup, gpu: Gpu, config: Config, console: Console, as_json: bool) -> int:
    """Print the memory of every engine with every kind of activation checkpointing, over the micro batches."""
    rows = [compared(row, gpu) for row in choices(setup, config)]
    offered, model = memory.available_bytes(gpu.memory_bytes), config.model
    if as_json:
        tree = {"gpu": gpu.name, "gpus": setup.world_size, "available_gb": offered / GB, "rows": rows}
        print(json.dumps(tree, indent=1))
    else:
        head = ["engine", "ckpt", *rows[0]["required_gb"], "max", "tok/s"]
        body = [comparison_row(row, offered / GB) for row in rows]
        what = f"{model.size}, {model.n_parameters:,} parameters, {setup.precision}, on {setup.world_size} × {gpu.name}"
        console.print(what, soft_wrap=True)
        print_table(head, body, console, right=head[1:], title="GB of one GPU, by micro batch")
        source = f"{rows[0]['mfu_source']}; less with activation checkpointing (ckpt)"
        console.print(f"! does not fit: {gigabytes(offered)} are available. max: the largest micro batch that does.")
        console.print(f"Tokens/s are predicted: {source}.", soft_wrap=True)
    return EXIT_FEASIBLE if any(row["largest_micro_batch_size"] for row in rows) else EXIT_INFEASIBLE


def compared(setup: Setup, gpu: Gpu) -> dict[str, Any]:
    """One row of the comparison, as plain values; the micro batches are powers of two."""
    sizes = [size for size in setup.micro_sizes if size & (size - 1) == 0][:COMPARED_SIZES]
    speed = plan.expected_speed(setup, gpu)
    required = {str(size): round(memory.required_bytes(setup.with_micro_size(size)) / GB, 3) for size in sizes}
    return {
        "engine": setup.sharding.title,
        "activation_checkpointing": setup.model.activation_checkpointing,
        "required_gb": required,
        "largest_micro_batch_size": plan.budget(setup, gpu).largest_micro_size,
        "tokens_per_second": round(speed.tokens_per_second),
        "mfu_source": speed.source,
    }


def show_scaling(setup: Setup, gpu: Gpu, config: Config, console: Console, as_json: bool) -> int:
    """Print what every engine's communication costs on 1 to 64 nodes of eight GPUs, with two kinds of network."""
    plan.checked_tflops(gpu, setup.precision)
    tables = {name: scaling_rows(setup, gpu, config, network) for name, network in NETWORKS.items()}
    if as_json:
        print(json.dumps({"gpu": gpu.name, "tables": tables}, indent=1))
        return EXIT_FEASIBLE
    model, batch = setup.model, setup.batch
    what = f"{model.size}, {model.n_parameters:,} parameters, {setup.precision}, on {gpu.name}"
    console.print(f"{what}; {batch.global_size} × {model.seq_len} tokens a step. Predicted", soft_wrap=True)
    head = ["engine", "nodes", "micro", "acc", "GB/step", "comp ms", "comm ms", "step ms", "eff %", "tok/s"]
    for name, rows in tables.items():
        body = [scaling_cells(row) for row in rows]
        print_table(
            head, body, console, right=head[1:], title=f"{name} between nodes of 8 GPUs, NVLink 450 GB/s inside"
        )
    limit = f"At most {batch.global_size} GPUs divide {batch.global_size} sequences."
    console.print(f"GB/step: on each GPU's wire. {limit} Memory is not looked at: --compare.", soft_wrap=True)
    return EXIT_FEASIBLE


def scaling_rows(setup: Setup, gpu: Gpu, config: Config, network: Network) -> list[dict[str, Any]]:
    """Every engine on every number of nodes that the batch divides among, with the config's micro batch at most."""
    rows = []
    for choice in scaling_choices(setup, config, network):
        for nodes in NODES[1:] if choice.sharding.ranks else NODES:  # on one node hybrid is nothing of its own
            many = dataclasses.replace(choice, world_size=nodes * network.node)
            if sizes := [size for size in many.micro_sizes if size <= setup.batch.micro_size]:
                rows.append(scaling_row(many.with_micro_size(max(sizes)), gpu.peak, network))
    return rows


def scaling_choices(setup: Setup, config: Config, network: Network) -> list[Setup]:
    """The setup on every engine, FSDP both over all ranks and over those of a node."""
    found = []
    for each in choices(setup, config)[::3]:
        ranks = (0, network.node) if each.sharding.engine == "fsdp" else (0,)
        found += [dataclasses.replace(each, sharding=dataclasses.replace(each.sharding, ranks=n)) for n in ranks]
    return found


def choices(setup: Setup, config: Config) -> list[Setup]:
    """The setup on every engine, with every kind of activation checkpointing; DeepSpeed as ds_config.json has it."""
    changes: list[dict[str, Any]] = [{"name": "ddp"}, {"name": "fsdp"}]
    if config.train.precision != "fp8":  # DeepSpeed does not train in it
        changes += [{"name": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)]
    changes = [change for change in changes if not optim_problems(config.optim, change["name"])]
    if config.engine.offload_optimizer:  # ZeRO-0 has nothing that it could leave on the host
        changes = [change for change in changes if change.get("zero_stage") != 0]
    engines = [dataclasses.replace(config.engine, **change) for change in changes]
    changed = [setup_of(config, engine, setup.world_size) for engine in engines]
    return [each.with_checkpointing(kind) for each in changed for kind in ("none", "selective", "full")]


def show_models(model: ModelConfig, family: str, console: Console, as_json: bool) -> int:
    """Print every size alias with its exact counts, at the config's vocabulary and sequence length.

    Args:
        family: of all of them; empty: each size's own.
    """
    wanted: Any = family
    shapes = {
        size: ModelConfig(family=wanted, size=size, vocab_size=model.vocab_size, seq_len=model.seq_len).resolve()
        for size in MODEL_SIZES
    }
    if as_json:
        tree = {
            size: {**{part: getattr(shape, part) for part in ("family", *SHAPE)}, "parameters": shape.n_parameters}
            for size, shape in shapes.items()
        }
        print(json.dumps(tree, indent=1))
        return EXIT_FEASIBLE
    body = [
        [
            size,
            shape.family,
            *(str(getattr(shape, part)) for part in SHAPE),
            f"{shape.n_parameters:,}",
            f"{plan.CHECKPOINT_BYTES * plan.padded_parameters(shape) / GB:.2f}",
            f"{plan.CHINCHILLA_RATIO * shape.n_parameters / 1e9:.1f}B",
        ]
        for size, shape in shapes.items()
    ]
    numbers = ["layers", "heads", "of keys", "width", "of a head", "d_ff", "parameters", "saved GB", "20 × N"]
    title = f"Vocabulary {model.vocab_size:,}, context {model.seq_len}; --family shows the sizes in another family"
    print_table(["size", "family", *numbers], body, console, right=numbers, title=title)
    return EXIT_FEASIBLE


if __name__ == "__main__":
    sys.exit(main())
