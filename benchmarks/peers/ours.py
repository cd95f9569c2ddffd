"""Our own trainer: what `python train.py --compile` builds, and its steps one after the other, records and all.

    python benchmarks/peers/ours.py SPEC

Best is with --compile, documented without. Beside the seconds of a turn it tells the phases of its steps, and the rate
of matrix products that was measured right after them.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py does

from worker import WARM_UP_STEPS, Conversation, Spec, read_spec

PHASES = ("data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "step_ms")


def arguments(spec: Spec) -> list[str]:
    """The command line of train.py."""
    stage = spec.engine.removeprefix("zero")
    engine = {"engine.name": "deepspeed", "engine.zero_stage": stage} if stage != spec.engine else {}
    words = {
        "run.name": "bench",
        "model.family": "gpt",
        "model.size": spec.size,
        "model.n_layer": spec.n_layer,
        "model.n_head": spec.n_head,
        "model.d_model": spec.d_model,
        "model.vocab_size": spec.vocab_size,
        "model.seq_len": spec.seq_len,
        "model.position": spec.position,
        "model.dropout": 0.0,
        "data.source": str(Path(spec.data).parent),
        "data.cache_dir": f"{spec.folder}/cache",
        "batch.global_size": spec.global_size,
        "batch.micro_size": spec.micro_size or "auto",
        "optim.lr": spec.lr,
        "optim.warmup_steps": 0,
        "optim.schedule": "constant",
        "optim.weight_decay": spec.weight_decay,
        "optim.clip": spec.clip,
        "train.max_steps": 1_000_000,
        "train.precision": spec.precision,
        "train.compile": str(spec.is_best).lower(),
        "engine.name": spec.engine,
        **engine,
        "checkpoint.dir": f"{spec.folder}/checkpoints",
        "log.dir": f"{spec.folder}/logs",
        "log.report": "false",
        "log.version_check": "false",  # a machine with a GPU may have another torch
    }
    return [part for name, value in words.items() for part in (f"--{name}", str(value))]


def phases_of(metrics: Path, steps: int) -> dict[str, float]:
    """Milliseconds by phase: medians of the last steps' records."""
    lines = metrics.read_text(encoding="utf-8").splitlines()
    records = [record for line in lines if "step_ms" in (record := json.loads(line))][-steps:]
    return {name: statistics.median(record[name] for record in records) for name in PHASES}


def main() -> None:
    """Train when told to."""
    spec = read_spec()
    talk = Conversation()
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the tree this file is in, not one that is installed
    import train
    from pretrain.arguments import parse
    from pretrain.hardware import DTYPES, measure_flops
    from pretrain.stopping import stop_request

    run = train.build(parse(arguments(spec)))
    with run.metrics, run.keeper, run.telemetry, stop_request() as stop:
        unit = "bf16" if spec.precision == "fp8" else spec.precision  # MFU of fp8 is against bf16, too
        stream: Any = run.corpus.batches.stream(run.progress.position, 0, 1)

        def take(steps: int) -> None:
            run.timer.lap()  # what lay between two orders is no step
            for _ in range(steps):
                run.await_batch(stream, stop)
                train.take_step(run, stream)

        take(WARM_UP_STEPS)
        model = run.config.model
        talk.say(
            parameters=model.n_parameters,
            first_loss=run.history.first_loss,
            flops_per_token=model.flops_per_token,
            causal_flops_per_token=model.causal_flops_per_token,
            micro_size=run.config.batch.micro_size,
            peak_flops=run.peak_flops,
        )
        for steps in talk.orders():
            take(steps)
            found = talk.taken()
            rate = measure_flops(run.device, DTYPES[unit])
            talk.say(**found, rate=rate, phases=phases_of(run.metrics.folder / "metrics.jsonl", steps))
        stream.close()


if __name__ == "__main__":
    main()
