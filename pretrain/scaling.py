"""What communication costs: bytes of a step by engine, and the time of a step on so many nodes. Predicted, no torch.

The model, for a step of A micro-batches on W ranks:

    step = computing
         + reductions, as far as they outlast the backward passes that they run behind
         + gatherings, as far as they outlast the passes that they run behind, and all of what runs behind nothing
         + messages × latency

A collective of S bytes by rings puts f·(W-1)/W·S on each rank's link: f = 2 for an all-reduce, 1 for a reduce-scatter
or an all-gather (Thakur et al. 2005). Over nodes the same bytes leave each node once for all of its GPUs together, and
the slower of the two kinds of link decides; hybrid FSDP's shares stay within a node, and their sums alone leave it.
`benchmarks/bench_scaling.py` holds the model against measured steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pretrain.activations import FP32_BYTES
from pretrain.gpus import dense_tflops, expected_mfu
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
        all_reduced_across: a share of them, with those who have the same share on other nodes; the same.
        gathered_behind: weights, behind forward and backward passes.
        gathered_after: weights, after the update, while nothing computes.
        passes: backward passes that gradients travel behind.
    """

    all_reduced: float = 0.0
    reduce_scattered: float = 0.0
    all_reduced_across: float = 0.0
    gathered_behind: float = 0.0
    gathered_after: float = 0.0
    passes: int = 1

    @property
    def handed_over(self) -> float:
        """All of it."""
        reduced = self.all_reduced + self.reduce_scattered + self.all_reduced_across
        return reduced + self.gathered_behind + self.gathered_after


@dataclass(frozen=True)
class Rates:
    """Seconds that each kind of collective needs for a byte that it is handed.

    Args:
        across: of an all-reduce among those who have the same share on other nodes.
    """

    all_reduce: float
    reduce_scatter: float
    all_gather: float
    across: float = 0.0

    @classmethod
    def of_rings(cls, ranks: int, link: float, nodes: int = 1, link_across: float = 0.0) -> Rates:
        """Of rings of so many ranks, on so many nodes where the shares of each stay on it.

        Args:
            link, link_across: seconds of a byte on a rank's wire, within the ring and between nodes.
        """
        once = (ranks - 1) / ranks * link
        return cls(2 * once, once, once, 2 * (nodes - 1) / nodes * link_across)


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
        share = reduced / sharding.ranks if sharding.ranks else 0.0
        return Collectives(reduce_scattered=reduced, all_reduced_across=share, gathered_behind=gathered, passes=passes)
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


def ring_ranks(setup: Setup) -> int:
    """Ranks of a ring: all, or those of a node where hybrid FSDP divides the weights among them."""
    return setup.sharding.ranks or setup.world_size


def wire_bytes(setup: Setup) -> float:
    """Bytes that each rank sends in a step, and receives."""
    ring = ring_ranks(setup)
    return sum(seconds_of(collectives(setup), Rates.of_rings(ring, 1.0, setup.world_size // ring, 1.0)))


def seconds_of(moved: Collectives, rates: Rates) -> tuple[float, float, float]:
    """What reducing takes, gathering behind passes, and gathering behind nothing."""
    reducing = moved.all_reduced * rates.all_reduce + moved.reduce_scattered * rates.reduce_scatter
    reducing += moved.all_reduced_across * rates.across
    return reducing, moved.gathered_behind * rates.all_gather, moved.gathered_after * rates.all_gather


def step_time(
    moved: Collectives, computing_s: float, accumulation: int, rates: Rates, latency_s: float, overlap: float = 1.0
) -> StepTime:
    """The model.

    Args:
        computing_s: of a step without communication.
        latency_s: of one message among all ranks.
        overlap: the share of the passes behind which something can travel: 0 where the cores move it themselves.
    """
    reducing, behind, after = seconds_of(moved, rates)
    one_pass = computing_s / accumulation
    room = overlap * BACKWARD_SHARE * one_pass * moved.passes
    # gradients have the backward passes to travel behind; what gathers weights has all passes, and the rest of these
    exposed = max(0.0, reducing - room) + max(0.0, behind - (overlap * computing_s - min(reducing, room))) + after
    messages = math.ceil(moved.handed_over / MESSAGE_BYTES)
    return StepTime(computing_s, reducing + behind + after, exposed, messages * latency_s)


def rates_of(setup: Setup, network: Network) -> Rates:
    """What the links of such a cluster give the setup's collectives."""
    ring = ring_ranks(setup)
    inside = 1 / (network.inside * LINK_SHARE)
    between = 1 / (network.between * LINK_SHARE)
    if ring > network.node:  # the bytes of each rank's ring leave the node once, not once for each of its GPUs
        return Rates.of_rings(ring, max(inside, between))
    # each GPU of a node has a ring of its own to the other nodes, and they share the ports
    return Rates.of_rings(ring, inside, setup.world_size // ring, max(inside, ring * between))


def predict(setup: Setup, gpu: str, network: Network) -> StepTime:
    """The step of a setup on such GPUs and links.

    Args:
        gpu: key of PEAK_FLOPS.
    """
    ranks = setup.world_size
    rate = dense_tflops(gpu, setup.precision) * 1e12 * expected_mfu(gpu, setup.model.n_parameters).mfu
    tokens = setup.batch.global_size * setup.model.seq_len / ranks
    hops = 2 * math.ceil(math.log2(ranks)) if ranks > 1 else 0
    computing_s, accumulation = tokens * setup.model.flops_per_token / rate, setup.batch.accumulation(ranks)
    return step_time(collectives(setup), computing_s, accumulation, rates_of(setup, network), hops * LATENCY_S)


def scaling_row(setup: Setup, gpu: str, network: Network) -> dict[str, Any]:
    """One row of a table, as plain values; predicted."""
    time = predict(setup, gpu, network)
    tokens = setup.batch.global_size * setup.model.seq_len
    return {
        "engine": setup.sharding.title,
        "gpus": setup.world_size,
        "micro_batch_size": setup.batch.micro_size,
        "accumulation": setup.batch.accumulation(setup.world_size),
        "gb_a_step": round(wire_bytes(setup) / GB, 2),
        "computing_ms": round(time.computing * 1e3, 1),
        "communicating_ms": round(time.communicating * 1e3, 1),
        "step_ms": round(time.total * 1e3, 1),
        "efficiency": round(time.efficiency, 3),
        "tokens_per_second": round(tokens / time.total),
    }
