"""How much memory training takes, in bytes per component, counted tensor by tensor. No torch here.

A step is walked from its forward pass to its update, and at each moment that can be the fullest what is alive then is
added up: `peak` is the largest. What a forward pass saves is `activations.py`. Counted is what torch's allocator hands
out in eager mode; CUDA's own share is `FRAMEWORK_BYTES`. torch.compile may keep less. Sizes below: c bytes of compute
precision, P parameters, N ranks. Building an engine is no fuller than a step: weights come one parameter at a time.

Counted against torch's tracker (one rank) and DeepSpeed's real allocations (ZeRO-1 and 2, two ranks) by tests. Derived
from how they work, and not measured: `ddp`'s messages, ZeRO-0, ZeRO-3, offloading and FSDP:

                 weights                       masters, moments   gradients held             gradients at most
    ddp          c·P                           12·P               4·P if accumulating        4·P
    ZeRO-0       c·P                           12·P               c·P if accumulating        c·P, + 4·P in half
    ZeRO-3       c·P/N + gathered              12·P/N             c·P/N                      c·P/N + buckets
    FSDP         gathered                      12·P/N             4·P if accumulating        4·P/N
                                                                  (4·P/N by the micro-step)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from pretrain.activations import FP32_BYTES, Activations
from pretrain.config import BatchConfig, OptimConfig
from pretrain.model_config import ModelConfig, parameter_shapes
from pretrain.optim_config import largest_state_bytes, moments_bytes, newton_schulz_bytes

COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 2}  # fp8's weights and activations are kept in bf16
NORM_BYTES = 8  # DeepSpeed squares each gradient in fp64

# CUDA's context and kernels, cuBLAS's workspace, and with several GPUs NCCL's channels. Assumed, not measured by us.
FRAMEWORK_BYTES = {"alone": 1_000_000_000, "with others": 2_000_000_000}
RESERVE = 0.10  # of the card: fragmentation of torch's allocator, and what nobody counted

COMPONENTS = {
    # field of Moment: what a reader calls it
    "weights": "compute weights",
    "masters": "master weights (fp32)",
    "gradients": "gradients",
    "moments": "optimizer moments (fp32)",
    "activations": "activations",
    "logits": "logits and loss",
    "communication": "communication buffers",
}


@dataclass(frozen=True)
class Sharding:
    """Which engine holds the tensors, and what of them it divides over the ranks.

    Args:
        engine: "native", "single", "ddp", "fsdp" or "deepspeed".
        stage: of ZeRO: 0 divides nothing, 1 master weights and moments, 2 gradients too, 3 weights too; FSDP is a 3.
        bucket_elements: elements of one of DeepSpeed's reduction buffers.
        buckets: how many of those there are; two where communication overlaps the backward pass.
        offload: master weights and moments lie in host memory.
        keeps_gradients: FSDP reduces once a step, and keeps whole gradients until then.
        live_elements: of whole weights that ZeRO-3 may gather ahead of their use.
        ranks: that a share is divided over, where they are fewer than all: the ranks of a node in HSDP; 0: all.
    """

    engine: str = "native"
    stage: int = 0
    bucket_elements: int = 0
    buckets: int = 0
    offload: bool = False
    keeps_gradients: bool = True
    live_elements: int = 0
    ranks: int = 0

    @classmethod
    def of_deepspeed(cls, settings: dict[str, Any]) -> Sharding:
        """From DeepSpeed's configuration, as `deepspeed_settings` gives it."""
        zero = settings["zero_optimization"]
        stage, offload = int(zero["stage"]), "offload_optimizer" in zero
        elements = int(zero.get("reduce_bucket_size", 5e8)) if zero.get("contiguous_gradients", True) else 0
        if stage == 0:
            return cls("deepspeed", 0)
        buckets = 2 if zero.get("overlap_comm") and stage < 3 else 1
        live = int(zero.get("stage3_prefetch_bucket_size", 5e7)) if stage == 3 else 0
        return cls("deepspeed", stage, elements, buckets, offload, live_elements=live)

    @property
    def is_plain(self) -> bool:
        """Whether every rank has everything, under plain torch."""
        return self.engine in ("native", "single", "ddp")

    @property
    def title(self) -> str:
        """As a reader knows it: "deepspeed ZeRO-2"."""
        if self.engine != "deepspeed":
            return f"{self.engine} hybrid" if self.ranks else self.engine
        return f"deepspeed ZeRO-{self.stage}{' offload' if self.offload else ''}"


@dataclass(frozen=True)
class Setup:
    """What decides a rank's memory.

    Args:
        model: a resolved ModelConfig.
        precision: a value of `train.precision`.
        batch: its micro size counts, and whether gradients accumulate.
        world_size: ranks; document_mask: whether documents are kept apart; optim: of it the optimizer's name.
    """

    model: ModelConfig
    precision: str
    batch: BatchConfig
    world_size: int = 1
    sharding: Sharding = Sharding()
    document_mask: bool = False
    optim: OptimConfig = field(default_factory=OptimConfig)

    def with_micro_size(self, micro_size: int) -> Setup:
        """The same with another micro batch."""
        return dataclasses.replace(self, batch=dataclasses.replace(self.batch, micro_size=micro_size))

    def with_checkpointing(self, kind: Literal["none", "selective", "full"]) -> Setup:
        """The same with another kind of activation checkpointing."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, activation_checkpointing=kind))

    @property
    def accumulates(self) -> bool:
        """Whether a step has more than one micro-batch."""
        return self.batch.accumulation(self.world_size) > 1

    @property
    def micro_sizes(self) -> list[int]:
        """The micro batches that the global batch divides into, smallest first."""
        per_rank = self.batch.global_size // self.world_size
        return [size for size in range(1, per_rank + 1) if self.batch.global_size % (size * self.world_size) == 0]

    @property
    def framework(self) -> int:
        """Bytes that CUDA and NCCL take beside torch's allocator."""
        return FRAMEWORK_BYTES["alone" if self.world_size == 1 else "with others"]

    @property
    def optimizer_ranks(self) -> int:
        """Ranks that divide the master weights and the moments among themselves."""
        return (self.sharding.ranks or self.world_size) if self.sharding.stage >= 1 else 1

    @property
    def gradient_ranks(self) -> int:
        """Ranks that divide the gradients among themselves."""
        return self.optimizer_ranks if self.sharding.stage >= 2 else 1


@dataclass(frozen=True)
class Moment:
    """Bytes alive on one rank at one moment of a step, by component; `when` names it."""

    when: str
    weights: int
    masters: int
    moments: int
    gradients: int = 0
    activations: int = 0
    logits: int = 0
    communication: int = 0

    @property
    def total(self) -> int:
        """Bytes of all components."""
        return sum(self.components().values())

    def components(self) -> dict[str, int]:
        """Bytes by field name, in the order of COMPONENTS."""
        return {name: getattr(self, name) for name in COMPONENTS}


def peak(setup: Setup) -> Moment:
    """The fullest moment of a step."""
    return max(timeline(setup), key=lambda moment: moment.total)


def required_bytes(setup: Setup) -> int:
    """Bytes of one GPU's memory: the peak and the framework."""
    return peak(setup).total + setup.framework


def available_bytes(card_bytes: int) -> int:
    """Bytes of a card that a plan may use: all but the reserve."""
    return int(card_bytes * (1 - RESERVE))


def largest_micro_size(setup: Setup, available: int) -> int:
    """The largest micro batch that the global batch divides into and that fits in `available` bytes; 0: none does."""
    fitting = [size for size in setup.micro_sizes if required_bytes(setup.with_micro_size(size)) <= available]
    return max(fitting, default=0)


def parameter_sizes(model: ModelConfig) -> list[int]:
    """Elements of every parameter in the order of the module, the vocabulary padded as it is in memory."""
    return [math.prod(shape) for _, shape in parameter_shapes(model)]


def timeline(setup: Setup) -> Iterator[Moment]:
    """The moments of a step that can be its fullest."""
    model, size = setup.model, sum(parameter_sizes(setup.model))
    acts = Activations(model, COMPUTE_BYTES[setup.precision], setup.batch.micro_size, setup.document_mask)
    head = acts.c * model.padded_vocab_size * model.d_model  # gradient of the output head
    still = Moment(
        "",
        weights=_weights(setup),
        masters=0 if setup.sharding.offload else FP32_BYTES * size // setup.optimizer_ranks,
        moments=0 if setup.sharding.offload else moments_bytes(setup.optim, model) // setup.optimizer_ranks,
    )
    held, flowing = _held_gradients(setup), _reduction_buffers(setup)

    def at(when: str, gradients: int, activations: int = 0, logits: int = 0, communication: int = 0) -> Moment:
        return dataclasses.replace(
            still,
            when=when,
            gradients=gradients,
            activations=activations,
            logits=logits,
            communication=communication,
        )

    if model.loss_chunks == 1:
        yield at("the loss, backward", held, acts.kept, acts.loss)
        yield at("the output head, backward", held + head, acts.kept + acts.stream, acts.logits)
    else:  # the stream's gradient is collected, the head's is added up from chunk to chunk: sum, summand, new sum
        yield at("the loss, backward", held + head, acts.kept + acts.stream, acts.loss)
        yield at("the output head, backward", held + 3 * head, acts.kept + acts.stream)
    recomputed = acts.saved_by_block - acts.kept_of_block
    # by then done: the head, its norm, the last mask
    done = 2 * acts.stream + (acts.tokens * model.d_model if model.dropout else 0)
    yield at("the last block, backward", held + head, acts.kept + recomputed - done + acts.passing, 0, flowing)
    # a tied head's gradient waits until the end for the embedding's own; autograd adds the two into a third
    tables = (3 if model.tie_embeddings else 1) * head
    yield at("the embedding, backward", _all_gradients(setup) + tables, acts.stream, 0, flowing)
    for when, gradients, communication in _update(setup):
        yield at(when, gradients, 0, 0, communication)


# ---- weights and gradients, as the engine keeps them ----


def _weights(setup: Setup) -> int:
    """Bytes of compute weights: all, or with divided weights what is gathered, and in ZeRO-3 the share it is made from.

    Gathered are at most what lies outside the blocks, a block that computes and the one that comes next.
    """
    c, size = COMPUTE_BYTES[setup.precision], sum(parameter_sizes(setup.model))
    if setup.sharding.stage < 3:
        return c * size
    block = _block_size(setup.model)
    gathered = size - setup.model.n_layer * block + 2 * block
    if setup.sharding.engine == "fsdp":  # its share is the master weights themselves
        return c * gathered
    return c * (size // setup.optimizer_ranks + min(size, gathered + setup.sharding.live_elements))


def _held_gradients(setup: Setup) -> int:
    """Bytes of gradients that earlier micro-batches left when the last one begins its backward pass."""
    c, size = COMPUTE_BYTES[setup.precision], sum(parameter_sizes(setup.model))
    if setup.sharding.engine == "deepspeed" and setup.sharding.stage == 3:  # one buffer, there from the start
        return c * size // setup.gradient_ranks
    if not setup.accumulates:
        return 0
    if setup.sharding.engine == "deepspeed":
        return c * size // setup.gradient_ranks
    return FP32_BYTES * size // (1 if setup.sharding.keeps_gradients else setup.gradient_ranks)


def _all_gradients(setup: Setup) -> int:
    """Bytes of gradients at the end of the backward pass, the embedding's and the head's not counted."""
    c, sizes, sharding = COMPUTE_BYTES[setup.precision], parameter_sizes(setup.model), setup.sharding
    if sharding.is_plain and setup.world_size == 1:
        return _held_gradients(setup) + c * sum(sizes[1:])
    if sharding.is_plain:  # the masters have them as soon as they travel
        return FP32_BYTES * sum(sizes)
    if sharding.engine == "fsdp":  # what is reduced is freed
        return max(_held_gradients(setup), FP32_BYTES * sum(sizes) // setup.gradient_ranks)
    if setup.gradient_ranks == 1:  # ZeRO-0 and 1 accumulate in place
        return c * sum(sizes[1:])
    if sharding.stage == 3:
        return _held_gradients(setup)
    return _held_gradients(setup) + c * sum(sizes) // setup.gradient_ranks  # ZeRO-2: a new share each micro-batch


def _reduction_buffers(setup: Setup) -> int:
    """Bytes in which gradients travel during the backward pass, and with divided weights the next block's weights.

    DeepSpeed has its buckets, and the copy that it reduces; FSDP a block's gradients as they are, in fp32 as they
    travel, and the buffer that a block is gathered in.
    """
    c, sizes, sharding = COMPUTE_BYTES[setup.precision], parameter_sizes(setup.model), setup.sharding
    if sharding.engine == "fsdp":
        return (2 * c + FP32_BYTES) * _block_size(setup.model)
    if sharding.is_plain:
        return MESSAGES * FP32_BYTES * _largest_message(sizes) if setup.world_size > 1 else 0
    copied = min(sharding.bucket_elements, sum(sizes)) if setup.world_size > 1 else 0
    return c * (sharding.buckets * sharding.bucket_elements + copied)


def _update(setup: Setup) -> Iterator[tuple[str, int, int]]:
    """(moment, bytes of gradients, bytes of communication) from the end of the backward pass to the new weights."""
    c, sizes, sharding = COMPUTE_BYTES[setup.precision], parameter_sizes(setup.model), setup.sharding
    size, fp32, orthogonal = sum(sizes), FP32_BYTES * sum(sizes), newton_schulz_bytes(setup.optim, setup.model)
    copied = ("a checkpoint's copy", 0, largest_state_bytes(setup.optim, setup.model))
    if sharding.is_plain:
        if setup.world_size == 1:
            moved = 0 if c == FP32_BYTES else c * size  # fp32 gradients become the masters' without a copy
            start = fp32 + moved if setup.accumulates else max(fp32, moved + FP32_BYTES * sizes[0])
            yield "gradients to the masters", 2 * fp32 if c == FP32_BYTES and setup.accumulates else start, 0
        yield "the all-reduce", fp32, _reduction_buffers(setup)
        if orthogonal:
            yield "the update", fp32 + orthogonal, 0
    elif sharding.engine == "fsdp":
        yield "the update", fp32 // setup.gradient_ranks + orthogonal, 0
        yield copied
    elif sharding.stage == 0:  # a copy of all gradients travels; in half precision they are then copied to fp32
        yield "the all-reduce", c * size, c * min(size, ZERO_0_MESSAGE_ELEMENTS) if setup.world_size > 1 else 0
        yield "the update", c * size + (fp32 if c != FP32_BYTES else 0), 0
    else:
        share = size // setup.optimizer_ranks
        left = c * (size // setup.gradient_ranks)
        yield "the gradient norm", left + NORM_BYTES * min(max(sizes), share), 0
        flat = FP32_BYTES * share if c != FP32_BYTES and not sharding.offload else 0
        yield "the update", left + c * share + flat, 0
        yield copied


def _block_size(model: ModelConfig) -> int:
    """Elements of the parameters of one block."""
    return sum(math.prod(shape) for name, shape in parameter_shapes(model) if name.startswith("blocks.0."))


MESSAGES = 2  # engine/reduction.py's, as the next one: a test holds them together
NATIVE_MESSAGE_ELEMENTS = 16 * 2**20
ZERO_0_MESSAGE_ELEMENTS = 500_000_000  # DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE


def _largest_message(sizes: list[int]) -> int:
    """Elements of the native engine's largest message: parameters are added, the last first, until it is full."""
    largest = message = 0
    for size in reversed(sizes):
        message += size
        largest = max(largest, message)
        if message >= NATIVE_MESSAGE_ELEMENTS:
            message = 0
    return largest
