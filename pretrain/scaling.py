"""What communication costs: bytes of a step by engine, and the time of a step on so many nodes. Predicted, no torch.

The model, for a step of A micro-batches on W ranks:

    step = computing
         + reductions, as far as they outlast the backward passes that they run behind
         + gatherings, as far as they outlast the passes that they run behind, and all of what runs behind nothing
         + messages × latency

A collective of S bytes by rings puts f·(W-1)/W·S on each rank's link: f = 2 for an all-reduce, 1 for a reduce-scatter
or an all-gather (Thakur et al. 2005). Over nodes the same bytes leave each node once for all of its GPUs together, and
the slower of the two kinds of link decides. `benchmarks/bench_scaling.py` holds the model against measured steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pretrain.activations import FP32_BYTES
from pretrain.gpus import PEAK_FLOPS, expected_mfu
from pretrain.memory import COMPUTE_BYTES, Setup, parameter_sizes
from pretrain.model_config import parameter_shapes

GB = 1e9
LINK_SHARE = 0.8  # of its data sheet that a link gives a collective; assumed, not measured by us
REUSE_ELEMENTS = 1_000_000_000  # DeepSpeed's stage3_max_reuse_distance and stage3_max_live_parameters
LATENCY_S = 10e-6  # of one hop; assumed
BACKWARD_SHARE = 2 / 3  # of a pass: twice the FLOPs of the forward pass
MESSAGE_BYTES = 64 * 2**20  # of one message, where weights or gradients travel in buckets


@dataclass(frozen=True)
class Collectives:
    """Bytes that one step hands to each kind of collective, on every rank; whole tensors, before rings divide them.

    Args:
        all_reduced, reduce_scattered: gradients, behind backward passes.
        gathered_behind: weights, behind forward and backward passes.
        gathered_after: weights, after the update, while nothing computes.
        passes: backward passes that gradients travel behind.
    """

    all_reduced: float = 0.0
    reduce_scattered: float = 0.0
    gathered_behind: float = 0.0
    gathered_after: float = 0.0
    passes: int = 1


@dataclass(frozen=True)
class Network:
    """The links of a cluster, in bytes/s of one direction by their data sheets.

    Args:
        node: GPUs of a node.
        inside: of one GPU to the others of its node.
        between: of one node to the others, all of its ports together.
    """

    node: int = 8
    inside: float = 450e9
    between: float = 50e9


# NVLink 4: 900 GB/s both ways (H100 data sheet); 400 Gb/s: one port a node, or one for each GPU, as a DGX H100 has
NETWORKS = {"1 × 400 Gb/s": Network(), "8 × 400 Gb/s": Network(between=400e9)}


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by what they go to."""

    computing: float
    communicating: float
    exposed: float
    latency: float

    @property
    def total(self) -> float:
        """The whole step."""
        return self.computing + self.exposed + self.latency

    @property
    def efficiency(self) -> float:
        """The share of the step that computes, 0 to 1."""
        return self.computing / self.total


def collectives(setup: Setup) -> Collectives:
    """What a step of the setup moves; nothing on one rank."""
    if setup.world_size == 1:
        return Collectives()
    sharding, c = setup.sharding, COMPUTE_BYTES[setup.precision]
    elements, accumulation = sum(parameter_sizes(setup.model)), setup.batch.accumulation(setup.world_size)
    weights = float(c * elements)
    blocks = c * sum(math.prod(shape) for name, shape in parameter_shapes(setup.model) if name.startswith("blocks."))
    if sharding.is_plain:
        return Collectives(all_reduced=FP32_BYTES * elements)
    if sharding.engine == "fsdp":
        passes = 1 if sharding.keeps_gradients else accumulation
        reduced = float(passes * FP32_BYTES * elements)
        # what lies outside the blocks stays whole from the forward to the backward pass
        gathered = accumulation * (weights + blocks)
        return Collectives(reduce_scattered=reduced, gathered_behind=gathered, passes=passes)
    if sharding.stage == 0:
        return Collectives(all_reduced=weights)
    passes = accumulation if sharding.stage >= 2 else 1
    if sharding.stage == 3:
        # gathered for the forward pass, and again for the backward pass where it was not kept until then
        again = max(0.0, weights - c * REUSE_ELEMENTS)
        gathered = accumulation * (weights + again)
        return Collectives(reduce_scattered=passes * weights, gathered_behind=gathered, passes=passes)
    # DeepSpeed all-reduces each bucket and every rank keeps its share (use_multi_rank_bucket_allreduce)
    return Collectives(all_reduced=passes * weights, gathered_after=weights, passes=passes)


def wire_bytes(moved: Collectives, world_size: int) -> float:
    """Bytes that each rank sends in a step, and receives."""
    once = moved.reduce_scattered + moved.gathered_behind + moved.gathered_after
    return (world_size - 1) / world_size * (2 * moved.all_reduced + once)


def step_time(
    moved: Collectives,
    computing_s: float,
    accumulation: int,
    world_size: int,
    seconds_a_byte: float,
    latency_s: float,
    overlap: float = 1.0,
) -> StepTime:
    """The model.

    Args:
        computing_s: of a step without communication.
        seconds_a_byte: that a collective needs for a byte on a rank's wire.
        latency_s: of one message among all ranks.
        overlap: the share of the passes behind which something can travel: 0 where the cores move it themselves.
    """
    share = (world_size - 1) / world_size * seconds_a_byte
    reducing = share * (2 * moved.all_reduced + moved.reduce_scattered)
    behind, after = share * moved.gathered_behind, share * moved.gathered_after
    one_pass = computing_s / accumulation
    room = overlap * BACKWARD_SHARE * one_pass * moved.passes
    # gradients have the backward passes to travel behind; what gathers weights has all passes, and the rest of these
    exposed = max(0.0, reducing - room) + max(0.0, behind - (overlap * computing_s - min(reducing, room))) + after
    sent = moved.all_reduced + moved.reduce_scattered + moved.gathered_behind + moved.gathered_after
    messages = math.ceil(sent / MESSAGE_BYTES)
    return StepTime(computing_s, reducing + behind + after, exposed, messages * latency_s)


def predict(setup: Setup, gpu: str, network: Network) -> StepTime:
    """The step of a setup on such GPUs and links.

    Args:
        gpu: key of PEAK_FLOPS.
    """
    ranks = setup.world_size
    rate = getattr(PEAK_FLOPS[gpu], setup.precision) * 1e12 * expected_mfu(gpu, setup.model.n_parameters).mfu
    tokens = setup.batch.global_size * setup.model.seq_len / ranks
    nodes = math.ceil(ranks / network.node)
    a_byte = 1 / (network.inside * LINK_SHARE)
    if nodes > 1:  # the bytes of each rank's ring leave the node once, not once for each of its GPUs
        a_byte = max(a_byte, 1 / (network.between * LINK_SHARE))
    hops = 2 * math.ceil(math.log2(ranks)) if ranks > 1 else 0
    accumulation = setup.batch.accumulation(ranks)
    moved = collectives(setup)
    return step_time(moved, tokens * setup.model.flops_per_token / rate, accumulation, ranks, a_byte, hops * LATENCY_S)


def scaling_row(setup: Setup, gpu: str, network: Network) -> dict[str, Any]:
    """One row of a table, as plain values; predicted."""
    time = predict(setup, gpu, network)
    tokens = setup.batch.global_size * setup.model.seq_len
    return {
        "engine": setup.sharding.title,
        "gpus": setup.world_size,
        "micro_batch_size": setup.batch.micro_size,
        "accumulation": setup.batch.accumulation(setup.world_size),
        "gb_a_step": round(wire_bytes(collectives(setup), setup.world_size) / GB, 2),
        "computing_ms": round(time.computing * 1e3, 1),
        "communicating_ms": round(time.communicating * 1e3, 1),
        "step_ms": round(time.total * 1e3, 1),
        "efficiency": round(time.efficiency, 3),
        "tokens_per_second": round(tokens / time.total),
    }
