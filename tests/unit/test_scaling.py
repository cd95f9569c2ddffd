from __future__ import annotations

import dataclasses
import json

import pytest

from pretrain import scaling
from pretrain.config import BatchConfig, EngineConfig
from pretrain.memory import Setup, parameter_sizes
from pretrain.model_config import ModelConfig
from pretrain.plan import make_setup
from pretrain.scaling import (
    NETWORKS,
    Collectives,
    Rates,
    collectives,
    predict,
    rates_of,
    seconds_of,
    step_time,
    wire_bytes,
)
from scripts import plan as plan_script
from tests.engine_matrix import BATCH, FAMILIES, KINDS, OPTIM
from tests.helpers_training import run_ranks

MODEL = ModelConfig(size="125M").resolve()
N = sum(parameter_sizes(MODEL))
FAST, SLOW = NETWORKS["8 × 400 Gb/s"], NETWORKS["1 × 400 Gb/s"]


def setup_of(ranks: int = 8, global_size: int = 128, micro_size: int = 8, **engine) -> Setup:
    batch = BatchConfig(global_size=global_size, micro_size=micro_size)
    return make_setup(MODEL, batch, EngineConfig(**engine), OPTIM, "bf16", ranks)


def test_one_rank_moves_nothing():
    alone = setup_of(1, name="ddp")
    assert collectives(alone) == Collectives() and wire_bytes(alone) == 0
    assert predict(setup_of(1, name="ddp"), "H100 SXM", FAST).efficiency == 1


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        ({"name": "ddp"}, {"all_reduced": 4 * N}),  # fp32 gradients, once
        ({"name": "deepspeed", "zero_stage": 0}, {"all_reduced": 2 * N}),
        ({"name": "deepspeed", "zero_stage": 1}, {"all_reduced": 2 * N, "gathered_after": 2 * N}),
        ({"name": "deepspeed", "zero_stage": 2}, {"all_reduced": 2 * 2 * N, "gathered_after": 2 * N, "passes": 2}),
        (
            {"name": "deepspeed", "zero_stage": 3},
            {"reduce_scattered": 2 * 2 * N, "gathered_behind": 2 * 2 * N, "passes": 2},
        ),
    ],
)
def test_what_a_step_of_two_micro_batches_moves(engine, expected):
    assert dataclasses.asdict(collectives(setup_of(**engine))) == dataclasses.asdict(Collectives(**expected))


COUNTED = """
    from pathlib import Path
    from tests.engine_matrix import Bench
    from tests.traffic_count import TrafficCount
    bench = Bench(me, Path(sys.argv[1]), "bf16")
    counted = {}
    for kind in sys.argv[2:]:
        engine = bench.build(kind)
        bench.train(engine, range(1))  # ZeRO-3 learns the order of its weights and gathers more
        with TrafficCount() as count:
            bench.train(engine, range(1, 2))
        counted[kind] = dict(count.bytes)
    print(json.dumps(counted))
"""


@pytest.mark.parametrize(
    "kinds",
    [
        ("ddp", "fsdp", "fsdp, reducing at every micro-step"),
        pytest.param(("zero0", "zero1", "zero2", "zero3"), marks=pytest.mark.slow),
    ],
    ids=["native", "deepspeed"],
)
def test_the_bytes_are_those_that_the_engines_really_hand_over(tmp_path, kinds):
    for counted in run_ranks(COUNTED, 2, arguments=(str(tmp_path), *kinds), timeout_s=280):
        for kind, found in counted.items():
            moved = collectives(make_setup(FAMILIES["gpt"], BATCH, EngineConfig(**KINDS[kind]), OPTIM, "bf16", 2))
            gathered = moved.gathered_behind + moved.gathered_after
            expected = {"all_reduce": moved.all_reduced, "reduce_scatter": moved.reduce_scattered}
            for collective, size in {**expected, "all_gather": gathered}.items():
                # what an engine pads, and what is too small to be counted
                assert found.get(collective, 0) == pytest.approx(size, rel=0.05), (kind, collective)
            assert set(found) <= {*expected, "all_gather"}


def test_rings_put_twice_an_all_reduce_on_the_wire_and_once_the_rest():
    assert sum(seconds_of(Collectives(all_reduced=100), Rates.of_rings(2, 1.0))) == 100
    moved = Collectives(all_reduced=100, gathered_after=10)
    assert sum(seconds_of(moved, Rates.of_rings(4, 1.0))) == pytest.approx(0.75 * 210)


def test_what_fits_behind_the_backward_passes_costs_nothing_and_the_rest_does():
    ask = {"computing_s": 3.0, "accumulation": 1, "rates": Rates.of_rings(2, 1.0), "latency_s": 0.0}
    assert step_time(Collectives(all_reduced=2.0), **ask).total == 3
    assert step_time(Collectives(all_reduced=2.5), **ask).total == 3.5
    assert step_time(Collectives(gathered_after=1.0), **ask).total == 3.5  # nothing computes meanwhile
    assert step_time(Collectives(all_reduced=2.0, gathered_behind=2.0), **ask).total == 3  # and the forward pass
    assert step_time(Collectives(all_reduced=2.0, gathered_behind=4.0), **ask).total == 4
    assert step_time(Collectives(all_reduced=2.0), **ask, overlap=0.0).total == 5
    # of four micro-batches the last one alone has room for what is reduced once
    assert step_time(Collectives(all_reduced=2.0), **{**ask, "accumulation": 4}).exposed == 1.5


def test_more_of_the_slower_link_costs_more_and_a_larger_batch_less():
    def efficiency(ranks, network, global_size=128):
        return predict(setup_of(ranks, global_size, 1, name="ddp"), "H100 SXM", network).efficiency

    assert efficiency(8, SLOW) == efficiency(8, FAST)  # within a node there is no network
    assert efficiency(64, SLOW) < efficiency(64, FAST) < efficiency(8, FAST)
    assert efficiency(64, SLOW) < efficiency(64, SLOW, 1024)


def test_hybrid_leaves_a_node_with_its_shares_of_the_sums_alone():
    whole, hybrid = (setup_of(32, micro_size=4, name="fsdp", fsdp_shard=kind) for kind in ("full", "hybrid"))
    moved = collectives(hybrid)
    assert moved == dataclasses.replace(collectives(whole), all_reduced_across=4 * N / 8)
    # rings of eight, and of the four nodes for an eighth of the gradients
    inside = moved.reduce_scattered + moved.gathered_behind
    assert wire_bytes(hybrid) == pytest.approx(7 / 8 * inside + 2 * 3 / 4 * 4 * N / 8)
    rates = rates_of(hybrid, SLOW)
    assert rates.all_gather == pytest.approx(7 / 8 / (0.8 * 450e9))
    # the eight rings of a node share its port
    assert rates.across == pytest.approx(2 * 3 / 4 * 8 / (0.8 * 50e9))


def test_hybrid_pays_with_accumulation_and_not_without():
    def communicating(kind, global_size):
        setup = setup_of(32, global_size, 1, name="fsdp", fsdp_shard=kind)
        return predict(setup, "H100 SXM", SLOW).communicating

    assert communicating("hybrid", 1024) < communicating("full", 1024) / 4
    # fp32 sums twice, against bf16 weights twice and fp32 sums once
    assert communicating("hybrid", 32) == pytest.approx(communicating("full", 32), rel=0.1)


def test_a_row_is_plain_values_of_the_same_model():
    setup = setup_of(16, name="deepspeed")
    row = scaling.scaling_row(setup, "H100 SXM", FAST)
    assert (row["engine"], row["gpus"], row["accumulation"]) == ("deepspeed ZeRO-2", 16, 1)
    assert row["gb_a_step"] == round(wire_bytes(setup) / 1e9, 2)
    assert row["step_ms"] >= row["computing_ms"] and 0 < row["efficiency"] <= 1


def test_fp8_scales_as_the_plan_counts_it_and_not_on_a_card_without_units(capsys):
    words = ["--model", "1.2B", "--scaling", "--precision", "fp8", "--engine", "ddp", "--json", "--gpu"]
    assert plan_script.main([*words, "h100-80gb"]) == 0
    rows = [row for table in json.loads(capsys.readouterr().out)["tables"].values() for row in table]
    assert {row["engine"] for row in rows} == {"ddp", "fsdp", "fsdp hybrid"} and min(r["step_ms"] for r in rows) > 0
    setup = dataclasses.replace(setup_of(8, name="ddp"), precision="fp8")
    bf16 = dataclasses.replace(setup, precision="bf16")
    assert predict(setup, "H100 SXM", FAST).computing == predict(bf16, "H100 SXM", FAST).computing
    assert plan_script.main([*words, "a100-80gb"]) == 2
    assert "a100-80gb can't multiply in fp8. Give --precision bf16." in capsys.readouterr().err
