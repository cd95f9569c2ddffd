"""Every engine on the same small GPT and the same tokens: what the processes of test_engines.py run."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model import GPT
from pretrain import optim
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine import zero
from pretrain.engine.base import Engine, EngineState, ParameterState
from pretrain.engine.build import build_engine
from pretrain.model_config import ModelConfig
from pretrain.pretrained import first_weights
from pretrain.ranks import Ranks
from tests.helpers_training import copied_states

BROADCAST = torch.distributed.broadcast
CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-2, clip=0.2, weight_decay=0.1, warmup_steps=0)
BATCH = BatchConfig(global_size=8, micro_size=2)  # accumulation 4 on one rank, 2 on two
SHAPE: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 4,
    "d_model": 16,
    "d_ff": 44,
    "vocab_size": 40,
    "seq_len": 12,
    "dropout": 0.0,
}
FAMILIES = {
    "gpt": ModelConfig(size="custom", **SHAPE).resolve(),
    # odd sizes, which two ranks can't divide evenly; grouped heads; an untied head
    "llama": ModelConfig(
        family="llama", size="custom", n_kv_head=2, tie_embeddings=False, **{**SHAPE, "d_ff": 33}
    ).resolve(),
}
KINDS: dict[str, dict[str, Any]] = {
    "single": {"name": "single"},
    "native": {"name": "native"},
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "fsdp, reducing at every micro-step": {"name": "fsdp", "fsdp_reduce": "micro_step"},
    "hybrid": {"name": "fsdp", "fsdp_shard": "hybrid"},
    **{f"zero{stage}": {"name": "deepspeed", "zero_stage": stage} for stage in (0, 1, 2, 3)},
    **{
        f"zero{stage}, offloading": {"name": "deepspeed", "zero_stage": stage, "offload_optimizer": True}
        for stage in (1, 2, 3)
    },
}


@dataclass
class Bench:
    """Builds engines and trains them, on this rank of a run.

    Args:
        folder: for the ds_config.json; the same on all ranks.
        shape: instead of the family's.
    """

    ranks: Ranks
    folder: Path
    precision: str = "fp32"
    family: str = "gpt"
    shape: ModelConfig | None = None

    def build(self, kind: str, seed: int | None = 0, *, whole: bool = False) -> Engine:
        """An engine as train.py builds it; DeepSpeed's fp16 is let run on a CPU, which can multiply it.

        Args:
            seed: of the weights; None: it has none yet.
            whole: over a model that was built whole before.
        """
        file = self.folder / f"ds{self.ranks.rank}.json"
        # small buckets, so that there are several, and no parameter that stage 3 leaves whole
        small = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
        file.write_text(json.dumps({"zero_optimization": small}))
        settings = EngineConfig(**KINDS[kind], ds_config=str(file), initial_loss_scale=1024.0, loss_scale_window=3)
        if settings.name == "deepspeed":
            zero.prepare_import(CPU)
            from deepspeed.accelerator import get_accelerator

            get_accelerator().is_fp16_supported = lambda: True
        shape = self.shape or FAMILIES[self.family]
        torch.manual_seed(seed or 0)
        with torch.device("cpu" if whole else "meta"):
            model = GPT(shape, "sdpa")
        engine = build_engine(model, settings, OPTIM, BATCH, self.precision, CPU, self.ranks)
        assert engine.name == settings.name
        if seed is not None and not whole:
            engine.initialise(first_weights(shape, seed))
        return engine

    def tokens(self, step: int) -> Tensor:
        """This rank's share of a step's tokens."""
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(SHAPE["vocab_size"], (8, SHAPE["seq_len"] + 1), generator=generator)
        return tokens.chunk(self.ranks.world_size)[self.ranks.rank]

    def train(self, engine: Engine, steps: range) -> list[list[float]]:
        """[loss over all ranks, gradient norm] of each step."""
        curve = []
        for step in steps:
            result = engine.train_step(self.tokens(step).split(BATCH.micro_size), 1e-2 / (1 + step / 10))
            assert result.applied
            curve.append([self.ranks.mean(float(result.loss)), result.grad_norm])
        return curve


class Memory:
    """Counts the bytes that torch's CPU allocator gives out, by its profiler; `highest` above what was out before."""

    highest = 0

    def __enter__(self) -> Memory:
        gc.collect()  # what an engine before left in circles must not be freed meanwhile
        self._trace = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._trace.__exit__(None, None, None)
        events = [event for event in self._trace.profiler.kineto_results.events() if event.name() == "[memory]"]
        alive = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            self.highest = max(self.highest, alive)


def broadcast_and_let_go(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
    """Torch's broadcast, back only when no thread of gloo holds the tensor: the profiler can't see one free it."""
    holders = tensor._use_count  # type: ignore[attr-defined]  # torch's stubs leave it out
    before = holders()
    done = BROADCAST(tensor, *arguments, **options)
    while holders() > before:
        os.sched_yield()
    return done


def build_counted(bench: Bench, kind: str, *, whole: bool) -> dict[str, int]:
    """Bytes while an engine is built up to its optimizer, and while it takes its first weights (0: built whole)."""
    module = zero if KINDS[kind]["name"] == "deepspeed" else optim  # where it is called
    build = optim.build_adamw
    with contextlib.ExitStack() as until_the_optimizer:
        building = until_the_optimizer.enter_context(Memory())

        def build_adamw(*arguments: Any) -> torch.optim.AdamW:
            until_the_optimizer.close()
            return build(*arguments)

        with (
            mock.patch.object(module, "build_adamw", build_adamw),
            mock.patch.object(torch.distributed, "broadcast", broadcast_and_let_go),
        ):
            engine = bench.build(kind, seed=None, whole=whole)
    with Memory() as beginning:
        if not whole:
            engine.initialise(first_weights(bench.shape, 0))
    return {"building": building.highest, "beginning": beginning.highest}


def keep(folder: Path, name: str, states: dict[str, ParameterState], state: EngineState, rank: int) -> None:
    """Write what an engine gave, as a checkpoint has it, for processes of another run."""
    if rank == 0:
        tensors = {f"{key}/{parameter}": tensor for parameter, of in states.items() for key, tensor in of.items()}
        save_file(tensors, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(state.to_json()))


def kept(folder: Path, name: str) -> tuple[dict[str, ParameterState], EngineState]:
    """What `keep` wrote."""
    states: dict[str, ParameterState] = {}
    for key, tensor in load_file(folder / f"{name}.safetensors").items():
        kind, _, parameter = key.partition("/")
        states.setdefault(parameter, {})[kind] = tensor
    return states, EngineState(**json.loads((folder / f"{name}.json").read_text()))


def resume_in_each_other(bench: Bench, kinds: list[str], reference: str = "") -> dict[str, list[list[float]]]:
    """{"A -> B@ranks": curve of steps 3 to 5} where A took the first three; states pass as they are, to the last bit.

    Args:
        reference: of what `keep` wrote, which every engine resumes, too.
    """
    engines = {kind: bench.build(kind, seed=0) for kind in kinds}
    sources = {}
    for kind, engine in engines.items():
        bench.train(engine, range(3))
        sources[kind] = copied_states(engine), engine.state()
        keep(bench.folder, f"{kind}@{bench.ranks.world_size}", *sources[kind], bench.ranks.rank)
    if reference:
        sources[reference] = kept(bench.folder, reference)
    curves = {}
    for source, (states, state) in sources.items():
        for kind, trained in engines.items():
            engine = bench.build(kind, seed=None) if source == reference else trained  # as a resumed run has none yet
            engine.load(states.__getitem__, state)
            after = copied_states(engine)
            wrong = [name for name in after for key in after[name] if not after[name][key].equal(states[name][key])]
            assert not wrong, f"{source} -> {kind}: {wrong}"
            assert engine.state() == state
            curves[f"{source} -> {kind}@{bench.ranks.world_size}"] = bench.train(engine, range(3, 6))
    return curves
