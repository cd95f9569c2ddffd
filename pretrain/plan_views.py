"""A plan for people: rows of label, value and note."""

from __future__ import annotations

from typing import Any

from pretrain import memory, plan
from pretrain.listings import Row
from pretrain.memory import COMPONENTS, Setup
from pretrain.plan import GB, Budget


def setting_rows(setup: Setup) -> list[Row]:
    """What the plan is for."""
    model, batch = setup.model, setup.batch
    parts = f"{batch.micro_size} micro × {batch.accumulation(setup.world_size)} accumulated × {setup.world_size} GPUs"
    checkpointing = f"activation checkpointing: {model.activation_checkpointing}"
    heads = f"{model.n_head} heads" + (f" ({model.n_kv_head} of keys)" if model.n_kv_head != model.n_head else "")
    return [
        ("shape", f"{model.family}, {model.n_layer} layers, {heads}", f"{model.d_model} wide, {model.d_ff} inside"),
        ("batch", f"{batch.global_size} × {model.seq_len} tokens", parts),
        ("engine", f"{setup.sharding.title}, {setup.precision}", checkpointing),
    ]


def memory_rows(budget: Budget) -> list[Row]:
    """Bytes by component."""
    parts = budget.peak.components()
    rows = [(COMPONENTS[name], gigabytes(size), "") for name, size in parts.items()]
    return [
        *rows,
        ("peak of the tensors", gigabytes(budget.peak.total), f"at {budget.peak.when}"),
        ("framework", gigabytes(budget.setup.framework), "CUDA context, NCCL; assumed"),
    ]


def feasibility_rows(budget: Budget, mends: list[str]) -> list[Row]:
    """Required against available."""
    reserve = f"{gigabytes(budget.gpu.memory_bytes)} less {memory.RESERVE:.0%}"
    rows = [
        ("required", gigabytes(budget.required), ""),
        ("available", gigabytes(budget.available), reserve),
        ("utilization", f"{budget.required / budget.available:.1%}", ""),
        ("feasible", "yes" if budget.feasible else "NO", ""),
        ("largest micro batch", str(budget.largest_micro_size or "none fits"), "at this global batch"),
    ]
    if not (budget.feasible or mends):
        return [*rows, ("would fit", plan.NOTHING_FITS, "")]
    return rows + [("would fit" if number == 0 else "or", mend, "") for number, mend in enumerate(mends)]


def course_rows(course: dict[str, Any]) -> list[Row]:
    """What the run takes."""
    ratio = course["tokens_per_parameter"]
    every = " and ".join(
        f"every {course[key]} {unit}"
        for key, unit in (("every_files", "shards"), ("every_steps", "steps"))
        if course[key]
    )
    uploaded = "give --shards N" if course["uploaded_gb"] is None else gigabytes(course["uploaded_gb"] * GB)
    count = "" if course["checkpoints"] is None else f"{course['checkpoints']:,} checkpoints"
    rows = [
        ("tokens", f"{course['tokens']:,}", f"{course['steps']:,} steps of {course['tokens_per_step']:,}"),
        ("tokens a parameter", f"{ratio:g}", f"Chinchilla: {plan.CHINCHILLA_RATIO}"),
        ("tokens/s", f"{course['tokens_per_second']:,}", "predicted, all GPUs"),
        ("MFU", f"{course['mfu']:.1%}", course["mfu_source"]),
        ("time", days(course["hours"]), f"{course['gpu_hours']:,} GPU hours; without saving and restarts"),
        ("energy", f"{course['energy_kwh']:,} kWh", f"at most: {course['power_w_per_gpu']} W a GPU, without the host"),
        ("cost", f"{course['cost']:,.2f}" if course["cost"] else "give --price_per_gpu_hour", ""),
        ("a checkpoint", gigabytes(course["checkpoint_gb"] * GB), f"{every or 'at the end'}; fp32 weights and moments"),
        (
            "shards to download",
            gigabytes(course["downloaded_gb"] * GB),
            "to each node, as bare tokens",
        ),
        ("uploaded in all", uploaded, count),
        (
            "kept in the bucket",
            gigabytes(course["kept_gb"] * GB),
            f"the newest {course['keep']}" if course["keep"] else "all",
        ),
    ]
    return rows


def comparison_row(row: dict[str, Any], offered_gb: float) -> list[str]:
    """One row of the comparison for people; ! marks what does not fit."""
    return [
        row["engine"].removeprefix("deepspeed "),
        row["activation_checkpointing"],
        *(f"{required:.1f}{' ' if required <= offered_gb else '!'}" for required in row["required_gb"].values()),
        str(row["largest_micro_batch_size"] or "–"),
        f"{row['tokens_per_second']:,}",
    ]


def gigabytes(n_bytes: float) -> str:
    """Bytes for people, in GB of 10^9."""
    return f"{n_bytes / GB:,.2f} GB"


def days(hours: float) -> str:
    """Hours for people."""
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} hours"


def scaling_cells(row: dict[str, Any]) -> list[str]:
    """One row of the scaling table, from `scaling.scaling_row`."""
    return [
        row["engine"].removeprefix("deepspeed "),
        str(row["gpus"] // 8),
        str(row["micro_batch_size"]),
        str(row["accumulation"]),
        f"{row['gb_a_step']:.1f}",
        f"{row['computing_ms']:.0f}",
        f"{row['communicating_ms']:.0f}",
        f"{row['step_ms']:.0f}",
        f"{row['efficiency'] * 100:.0f}",
        f"{row['tokens_per_second']:,}",
    ]
