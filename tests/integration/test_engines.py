"""The same run, whatever runs it: every engine beside plain torch, and every checkpoint in every engine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pretrain.engine import zero
from pretrain.engine.base import EngineState
from tests.engine_matrix import OPTIM, Bench
from tests.helpers_training import run_ranks, single_rank

ON_ONE = ["single", "fsdp", "zero3"]
ALL_ON_ONE = ["single", "ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
ON_TWO = ["ddp", "fsdp", "fsdp, reducing at every micro-step", "zero0", "zero1", "zero2", "zero3"]
STEPS = 50
TIMEOUT_S = 400  # beside other work; seconds on an idle machine

PREPARE = """
from pathlib import Path
from tests.engine_matrix import *
options = json.loads(sys.argv[2])
bench = Bench(me, Path(sys.argv[1]), options.get("precision", "fp32"), options.get("family", "gpt"))
"""
CURVES = (
    PREPARE
    + """
print(json.dumps({kind: bench.train(bench.build(kind), range(options["steps"])) for kind in options["kinds"]}))
"""
)
RESUMED = (
    PREPARE
    + """
print(json.dumps(resume_in_each_other(bench, options["kinds"], options.get("reference", ""))))
"""
)
COUNTED = (
    PREPARE
    + """
bench.shape = ModelConfig(size="custom", **{**SHAPE, **options["shape"]}).resolve()
whole = sum(p.numel() * 4 for p in GPT(bench.shape).parameters())
largest = max(p.numel() * 4 for p in GPT(bench.shape).parameters())
apart = {kind: build_counted(bench, kind, whole=False) for kind in options["kinds"]}
together = build_counted(bench, "fsdp", whole=True)
print(json.dumps({"whole": whole, "largest": largest, "apart": apart, "together": together}))
"""
)
FIRST = (
    PREPARE
    + """
torch.manual_seed(3)
expected = dict(GPT(FAMILIES[bench.family]).named_parameters())
wrong = {}
for kind in options["kinds"]:
    found = copied_states(bench.build(kind, seed=3))
    assert list(found) == list(expected)
    wrong[kind] = [name for name in found if not found[name]["weight"].equal(expected[name])]
    wrong[kind] += [name for name in found for key in ("exp_avg", "exp_avg_sq") if found[name][key].any()]
print(json.dumps(wrong))
"""
)
EVALUATED = (
    PREPARE
    + """
from pretrain.engine.validation import validation_loss
losses = {}
for kind in options["kinds"]:
    engine = bench.build(kind)
    mine = bench.tokens(0)[: options["sequences"][me.rank]]
    losses[kind] = [validation_loss(engine, mine, 2, me), bench.train(engine, range(1))[0][0]]
print(json.dumps(losses))
"""
)
SKIPPED = (
    PREPARE
    + """
import os
from pretrain import failpoints
outcome = {}
for kind in options["kinds"]:
    engine, untouched = bench.build(kind), bench.build(kind)
    before = copied_states(engine)
    if options["scale"]:
        engine._loss_scale.scale = options["scale"]
        if hasattr(engine, "_scaler"):
            engine._scaler.cur_scale = options["scale"]
    else:  # one rank alone: every rank must leave the update out
        os.environ["PRETRAIN_FAILPOINT"] = "loss.poison:1:poison@1"
        failpoints.arm(me.rank)
    result = engine.train_step(bench.tokens(0).split(2), 1e-2)
    after = copied_states(engine)
    changed = [name for name in before for key in before[name] if not before[name][key].equal(after[name][key])]
    outcome[kind] = [result.applied, str(result.grad_norm), changed, engine.state().to_json()]
print(json.dumps(outcome))
"""
)


@pytest.fixture(scope="module", autouse=True)
def deepspeed_runs_here():
    before = dict(os.environ)  # DeepSpeed's import sets some; other tests must not inherit them
    zero.prepare_import(torch.device("cpu"))
    problem = zero.cpu_op_problem()
    os.environ.clear()
    os.environ.update(before)
    if problem:
        pytest.skip(problem)


def run(body: str, world_size: int, folder: Path, *, nodes: int = 1, **options: object):
    """What rank 0 of the processes found."""
    arguments = (str(folder), json.dumps(options))
    return run_ranks(body, world_size, nodes=nodes, arguments=arguments, timeout_s=TIMEOUT_S)[0]


def plain_torch(folder: Path, steps: int, precision: str = "fp32", family: str = "gpt") -> list[list[float]]:
    """The curve of the plainest engine, which tests/unit/test_engines.py holds against a plain loop."""
    with single_rank() as only:
        bench = Bench(only, folder, precision, family)
        return bench.train(bench.build("single", whole=True), range(steps))


def assert_same(found: list[list[float]], expected: list[list[float]], tolerance: float, what: str) -> None:
    """Losses and gradient norms, relative."""
    assert len(found) == len(expected)
    for step, (pair, other) in enumerate(zip(found, expected, strict=True)):
        assert pair == pytest.approx(other, rel=tolerance), f"{what}, step {step}"


@pytest.mark.parametrize(("family", "precision"), [("gpt", "fp32"), ("llama", "bf16")])
def test_engines_begin_with_the_weights_of_a_model_that_was_built_whole(tmp_path, family, precision):
    kinds = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
    assert run(FIRST, 2, tmp_path, kinds=kinds, family=family, precision=precision) == {kind: [] for kind in kinds}


def test_engines_that_divide_the_weights_never_hold_a_whole_model(tmp_path):
    """On a CPU the device's memory is the host's: what is counted here is the sum of both on a GPU."""
    shape = {"n_layer": 16, "d_model": 64, "d_ff": 256}
    counted = run(COUNTED, 2, tmp_path, kinds=["fsdp", "zero3"], shape=shape)
    whole, largest = counted["whole"], counted["largest"]
    assert largest < whole / 20
    assert counted["together"]["building"] > whole  # so the count sees a whole model where there is one
    for kind, found in counted["apart"].items():
        assert whole / 2 <= found["building"] <= whole / 2 + 3 * largest, kind  # of two ranks
        assert 0 < found["beginning"] <= 4 * largest, kind


@pytest.mark.slow  # fifty steps by fourteen engines
def test_engines_take_the_same_run(tmp_path):
    expected = plain_torch(tmp_path, STEPS)
    assert sum(norm > OPTIM.clip for _, norm in expected) > STEPS / 2  # so clipping is at work
    for world_size, kinds in ((1, ALL_ON_ONE), (2, ON_TWO)):
        for kind, curve in run(CURVES, world_size, tmp_path, kinds=kinds, steps=STEPS).items():
            losses = [[loss] for loss, _ in curve]
            assert_same(losses, [[loss] for loss, _ in expected], 1e-5, f"{kind} on {world_size}")
            assert_same(curve, expected, 1e-3, f"{kind} on {world_size}")


def test_engines_resume_every_checkpoint_of_each_other_on_one_rank_and_on_two(tmp_path):
    expected = plain_torch(tmp_path, 6)[3:]
    curves = run(RESUMED, 1, tmp_path, kinds=ON_ONE)
    curves |= run(RESUMED, 2, tmp_path, kinds=ON_TWO, reference="single@1")
    assert len(curves) == len(ON_ONE) ** 2 + (len(ON_TWO) + 1) * len(ON_TWO)
    for kind in ON_TWO:
        back = run_one_rank(tmp_path, f"{kind}@2")
        curves[f"{kind}@2 -> single"] = back
    for passage, curve in curves.items():
        assert_same(curve, expected, 1e-5, passage)


@pytest.mark.slow
def test_engines_resume_on_one_rank_what_each_of_them_wrote_and_what_two_did(tmp_path):
    expected = plain_torch(tmp_path, 6)[3:]
    run(RESUMED, 2, tmp_path, kinds=["zero3"])
    curves = run(RESUMED, 1, tmp_path, kinds=ALL_ON_ONE, reference="zero3@2")
    assert len(curves) == (len(ALL_ON_ONE) + 1) * len(ALL_ON_ONE)
    for passage, curve in curves.items():
        assert_same(curve, expected, 1e-5, passage)


def run_one_rank(folder: Path, name: str) -> list[list[float]]:
    """Steps 3 to 5 of a single rank that resumes what a run of two wrote."""
    from tests.engine_matrix import kept

    with single_rank() as only:
        bench = Bench(only, folder)
        engine = bench.build("single", seed=None)
        states, state = kept(folder, name)
        engine.load(states.__getitem__, state)
        assert state == EngineState(3)
        return bench.train(engine, range(3, 6))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_engines_in_half_precision_stay_near_the_run_in_fp32(tmp_path, precision):
    expected = plain_torch(tmp_path, 10)
    kinds = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
    curves = run(CURVES, 2, tmp_path, kinds=kinds, steps=10, precision=precision)
    tolerance = {"bf16": 1e-2, "fp16": 2e-3}[precision]
    for kind, curve in curves.items():
        assert_same([[loss] for loss, _ in curve], [[loss] for loss, _ in expected], tolerance, kind)
        # fp16's scale doubles at steps 3, 6 and 9: an update divided by the wrong scale would show
        assert_same(curve, expected, 5 * tolerance, kind)


@pytest.mark.slow
def test_engines_share_a_llama_with_odd_sizes_and_an_untied_head(tmp_path):
    expected = plain_torch(tmp_path, 5, family="llama")
    curves = run(CURVES, 2, tmp_path, kinds=["ddp", "fsdp", "zero3"], steps=5, family="llama")
    passages = run(RESUMED, 2, tmp_path, kinds=["fsdp", "zero3"], family="llama")
    for kind, curve in curves.items():
        assert_same(curve, expected, 1e-4, kind)
    for passage, curve in passages.items():
        assert_same(curve[:2], expected[3:], 1e-4, passage)


@pytest.mark.slow
def test_engines_offload_the_optimizer_and_take_the_same_run(tmp_path):
    expected = plain_torch(tmp_path, 6)
    kinds = ["zero1, offloading", "zero2, offloading", "zero3, offloading"]
    for kind, curve in run(CURVES, 2, tmp_path, kinds=kinds, steps=6).items():
        assert_same(curve, expected, 1e-4, kind)
    for passage, curve in run(RESUMED, 2, tmp_path, kinds=kinds).items():
        assert_same(curve, expected[3:], 1e-5, passage)


@pytest.mark.slow
def test_engines_share_over_the_ranks_of_a_node_and_repeat_over_nodes(tmp_path):
    expected = plain_torch(tmp_path, 5)
    curves = run(CURVES, 4, tmp_path, nodes=2, kinds=["hybrid"], steps=5)
    assert_same(curves["hybrid"], expected, 1e-4, "two nodes of two ranks")


def test_engines_validate_over_ranks_with_different_numbers_of_sequences(tmp_path):
    kinds = ["ddp", "fsdp", "zero3"]
    losses = run(EVALUATED, 2, tmp_path, kinds=kinds, sequences=[4, 1])  # two forward passes, and one
    with single_rank() as only:
        bench = Bench(only, tmp_path)
        engine = bench.build("single")
        sequences = torch.cat([bench.tokens(0)[:4], bench.tokens(0)[4:5]])
        expected = engine.evaluate(sequences)
        first = bench.train(engine, range(1))[0][0]
    for kind in kinds:
        assert losses[kind] == pytest.approx([expected, first], rel=1e-5), kind


@pytest.mark.parametrize(
    ("precision", "scale"),
    [("fp32", 0), pytest.param("bf16", 0, marks=pytest.mark.slow), ("fp16", 2.0**24)],
)
def test_engines_leave_out_an_update_that_is_not_finite_and_fp16_halves_its_scale(tmp_path, precision, scale):
    kinds = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]
    state = {"optimizer_steps": 0, "loss_scale": scale / 2, "finite_steps": 0}
    for kind, outcome in run(SKIPPED, 2, tmp_path, kinds=kinds, precision=precision, scale=scale).items():
        assert outcome == [False, "inf", [], state], kind
