"""What a run will need and take: memory, time, energy, money, checkpoints. Predicted, and each figure says from what.

No torch and no GPU here: `scripts/plan.py` prints it before anything is paid for, train.py at the start of a run.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from pretrain import memory
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.engine.ds_settings import deepspeed_settings
from pretrain.errors import ConfigError
from pretrain.gpus import CARDS, dense_tflops, expected_mfu
from pretrain.memory import Moment, Setup, Sharding
from pretrain.model_config import ModelConfig
from pretrain.optim_config import optim_problems

GB = 1e9
CHINCHILLA_RATIO = 20  # tokens a parameter, arXiv 2203.15556
CHECKPOINT_BYTES = 12  # a parameter: fp32 weight and two moments
# by which activation checkpointing lengthens a step: a second forward pass is a third of the step's FLOPs; norms and
# non-linearities alone are hardly any FLOPs, but memory traffic (assumed, not measured)
RECOMPUTED = {"selective": 1.05, "full": 4 / 3}
ZERO_2 = "--engine deepspeed --engine.zero_stage 2"
RECOMPUTING: tuple[Literal["none", "selective", "full"], ...] = ("none", "selective", "full")
MULTIPLES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
MOST_GPUS = 1024
GPUS_OF_A_NODE = 8  # assumed, for shares within a node
CHUNKS = 8  # of the loss, where a mend proposes them
NOTHING_FITS = "No engine and no GPU known here has the room"


@dataclass(frozen=True)
class Gpu:
    """The GPU that a plan is for.

    Args:
        name: as the user or the driver says it.
        peak: key of PEAK_FLOPS; '' where its rate is unknown.
        memory_bytes: of one card.
        power_w: of one card at most; 0: unknown.
    """

    name: str
    peak: str
    memory_bytes: int
    power_w: int = 0

    @classmethod
    def named(cls, name: str) -> Gpu:
        """A GPU of the table.

        Raises:
            ConfigError: it is not in the table; lists what is.
        """
        if (card := CARDS.get(name.lower())) is None:
            raise ConfigError(f"there is no GPU {name!r} in the table", f"Known are {', '.join(CARDS)}.")
        return cls(name.lower(), card.peak, card.memory_gb * 10**9, card.power_w)


@dataclass(frozen=True)
class Speed:
    """The rate to expect of all GPUs together.

    Args:
        tokens_per_second: of the whole run.
        mfu: 0 to 1; recomputed activations do not count as useful work.
        source: where the MFU is from.
    """

    tokens_per_second: float
    mfu: float
    source: str


@dataclass(frozen=True)
class Budget:
    """Memory of one GPU: what the setup requires and what the card offers; all in bytes."""

    setup: Setup
    gpu: Gpu
    peak: Moment
    required: int
    available: int
    largest_micro_size: int

    @property
    def feasible(self) -> bool:
        """Whether it fits."""
        return self.required <= self.available

    def to_json(self) -> dict[str, Any]:
        """Plain values; GB of 10^9 bytes."""
        components = {name: round(size / GB, 3) for name, size in self.peak.components().items()}
        return {
            "engine": self.setup.sharding.title,
            "precision": self.setup.precision,
            "activation_checkpointing": self.setup.model.activation_checkpointing,
            "micro_batch_size": self.setup.batch.micro_size,
            "gpus": self.setup.world_size,
            "gpu": self.gpu.name,
            "components_gb": {**components, "framework": round(self.setup.framework / GB, 3)},
            "peak_at": self.peak.when,
            "peak_gb": round(self.peak.total / GB, 3),
            "required_gb": round(self.required / GB, 3),
            "available_gb": round(self.available / GB, 3),
            "feasible": self.feasible,
            "largest_micro_batch_size": self.largest_micro_size,
        }


def make_setup(
    model: ModelConfig,
    batch: BatchConfig,
    engine: EngineConfig,
    optim: OptimConfig,
    precision: str,
    world_size: int,
    document_mask: bool = False,
) -> Setup:
    """The setup of a run.

    Raises:
        ConfigError: ds_config.json can't be used.
    """
    batch = batch.settled
    sharding = Sharding(engine.name)
    if engine.name == "fsdp":
        node = min(GPUS_OF_A_NODE, world_size) if engine.fsdp_shard == "hybrid" else 0
        sharding = Sharding("fsdp", 3, keeps_gradients=engine.fsdp_reduce == "step", ranks=node)
    elif engine.name == "deepspeed":
        settings, problems = deepspeed_settings(engine, optim, batch, precision, world_size)
        if problems:
            raise ConfigError(problems)
        sharding = Sharding.of_deepspeed(settings)
    return Setup(model, precision, batch, world_size, sharding, document_mask, optim)


def budget(setup: Setup, gpu: Gpu) -> Budget:
    """What the setup requires of each GPU, against what the card offers."""
    available = memory.available_bytes(gpu.memory_bytes)
    largest = memory.largest_micro_size(setup, available)
    return Budget(setup, gpu, memory.peak(setup), memory.required_bytes(setup), available, largest)


def peak_tflops(gpu: Gpu, precision: str) -> float:
    """TFLOP/s of the data sheet; see gpus.dense_tflops."""
    return dense_tflops(gpu.peak, precision)


def checked_tflops(gpu: Gpu, precision: str) -> float:
    """See peak_tflops.

    Raises:
        ConfigError: the GPU has no units for the precision.
    """
    if rate := peak_tflops(gpu, precision):
        return rate
    able = "bf16" if precision == "fp8" and peak_tflops(gpu, "bf16") else "fp16"
    raise ConfigError(f"{gpu.name} can't multiply in {precision}", f"Give --precision {able}.")


def expected_speed(setup: Setup, gpu: Gpu) -> Speed:
    """The rate to expect of the setup on such GPUs.

    Raises:
        ConfigError: the GPU has no units for the precision.
    """
    peak = checked_tflops(gpu, setup.precision)
    efficiency = expected_mfu(gpu.peak, setup.model.n_parameters)
    mfu, source = efficiency.mfu, efficiency.source
    if setup.precision == "fp8":
        source = f"{source}, in bf16: what fp8 gains is not known here"
    kind = setup.model.activation_checkpointing
    if kind != "none":
        mfu, source = mfu / RECOMPUTED[kind], f"{source}; / {RECOMPUTED[kind]:.3g} for {kind} activation checkpointing"
    rate = mfu * peak * 1e12 * setup.world_size / setup.model.flops_per_token
    return Speed(rate, mfu, source)


def advice(setup: Setup, gpu: Gpu, *others: str) -> str:
    """What would make an impossible setup fit, in a sentence for those who start a run.

    Args:
        others: what they may do besides.
    """
    ways = mends(setup, gpu, for_plan=False)
    sentences = [] if ways else [f"{NOTHING_FITS}: take a smaller model or a shorter --model.seq_len."]
    if ways or others:
        sentences.append(f"Give {', or '.join([*ways, *others])}.")
    return " ".join(sentences)


def mends(setup: Setup, gpu: Gpu, for_plan: bool = True) -> list[str]:
    """What would make an impossible setup fit, cheapest first; each is options of train.py, or another machine and
    options; none where no GPU of the table would do.

    Args:
        for_plan: name machines by the options of scripts/plan.py, which train.py does not have, instead of in words.
    """
    available = memory.available_bytes(gpu.memory_bytes)
    chunked = dataclasses.replace(setup, model=dataclasses.replace(setup.model, loss_chunks=CHUNKS))
    full = setup.with_checkpointing("full")
    options = [("", setup)]  # a smaller micro batch alone costs next to nothing
    if setup.precision == "fp32":
        options.append(("--precision bf16", dataclasses.replace(setup, precision="bf16")))
    if setup.model.loss_chunks == 1:
        options.append((f"--model.loss_chunks {CHUNKS}", chunked))
    if setup.model.activation_checkpointing == "none":
        options.append(("--model.activation_checkpointing selective", setup.with_checkpointing("selective")))
    if setup.model.activation_checkpointing != "full":
        options.append(("--model.activation_checkpointing full", full))
    if setup.precision == "fp32" and setup.model.activation_checkpointing != "full":
        half = dataclasses.replace(full, precision="bf16")
        options.append(("--precision bf16 --model.activation_checkpointing full", half))
    found = [
        f"{name} --batch.micro_size {size}".strip()
        for name, changed in options
        if (size := memory.largest_micro_size(changed, available))
    ]
    return found or [*_other_engines(setup, available), *_larger_machines(full, gpu, for_plan)]


def _other_engines(setup: Setup, available: int) -> list[str]:
    """Engines that divide more among the same GPUs, or leave the optimizer on the host; each with the least recomputing
    with which it fits."""
    sharding, divides, found = setup.sharding, setup.world_size > 1, []
    changes: list[tuple[str, EngineConfig]] = []
    stage: Literal[0, 1, 2, 3]
    if sharding.engine == "deepspeed":
        for stage in (1, 2, 3):
            if divides and stage > sharding.stage:
                changes.append((f"--engine.zero_stage {stage}", EngineConfig(zero_stage=stage)))
    elif divides and sharding.engine != "fsdp":
        changes += [(ZERO_2, EngineConfig(zero_stage=2)), ("--engine fsdp", EngineConfig(name="fsdp"))]
    if not sharding.offload:
        offloading = EngineConfig(zero_stage=2, offload_optimizer=True)
        changes.append((f"{ZERO_2} --engine.offload_optimizer true", offloading))
    changes = [change for change in changes if not optim_problems(setup.optim, change[1].name)]
    for words, engine in changes:
        for kind in RECOMPUTING[RECOMPUTING.index(setup.model.activation_checkpointing) :]:
            how = (setup.optim, setup.precision, setup.world_size, setup.document_mask)
            changed = make_setup(setup.model, setup.batch, engine, *how)
            if size := memory.largest_micro_size(changed.with_checkpointing(kind), available):
                more = (
                    f" --model.activation_checkpointing {kind}" if kind != setup.model.activation_checkpointing else ""
                )
                found.append(f"{words}{more} --batch.micro_size {size}")
                break
    return found


def _larger_machines(setup: Setup, gpu: Gpu, for_plan: bool) -> list[str]:
    """More of the same GPUs, where the engine divides anything among them, or the smallest card that will do."""
    found, changes = [], "--model.activation_checkpointing full --batch.micro_size 1"
    available = memory.available_bytes(gpu.memory_bytes)
    for count in range(setup.world_size + 1, min(setup.batch.global_size, MOST_GPUS) + 1):
        more = dataclasses.replace(setup, world_size=count).with_micro_size(1)
        if setup.sharding.stage and more.micro_sizes and memory.required_bytes(more) <= available:
            found.append(f"--gpus {count} {changes}" if for_plan else f"{count} GPUs, with {changes}")
            break
    needed = memory.required_bytes(setup.with_micro_size(1))
    cards = [(card.memory_gb, name) for name, card in CARDS.items() if card.memory_gb * GB * 0.9 >= needed]
    if cards:
        name = min(cards)[1]
        found.append(f"--gpu {name} {changes}" if for_plan else f"{name} instead of {gpu.name}, with {changes}")
    return found


def read_tokens(text: str) -> int:
    """22B, 1.5T, 500M, 64K or a plain number as tokens.

    Raises:
        ConfigError: it is none of them.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([KMBT]?)", text.strip().upper())
    count = round(float(re.sub("[_,]", "", found[1])) * MULTIPLES[found[2]]) if found else 0
    if not count:
        raise ConfigError(f"{text!r} is no number of tokens", "Write 22B, 1.5T, 500M or 22_000_000_000.")
    return count


def token_bytes(model: ModelConfig) -> int:
    """Bytes of a token in the cache of the shards."""
    return 2 if model.vocab_size <= 2**16 else 4


def padded_parameters(model: ModelConfig) -> int:
    """Parameters as they lie in memory and in checkpoints, the vocabulary's padding included."""
    return sum(memory.parameter_sizes(model))
