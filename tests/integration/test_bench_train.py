"""bench_train at a size that says nothing of speed: it measures what it says, and compares no different models."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import bench_train
from pretrain.errors import ConfigError, TrainerError
from tests.runs import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
TINY = [sys.executable, str(ROOT / "benchmarks" / "bench_train.py"), "--configs", "tiny", "--json"]


def side(parameters: int = 10, first_loss: float = 5.5) -> SimpleNamespace:
    return SimpleNamespace(name="it", hello={"parameters": parameters, "first_loss": first_loss})


def test_ours_is_what_train_py_builds_and_is_saved_beside_other_rows(tmp_path):
    command = [*TINY, "--rounds", "2", "--eager", "--save"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0, ended.stderr
    (path,) = tmp_path.glob("benchmarks/results/*/train.json")
    assert path.read_text() == ended.stdout
    tree = json.loads(ended.stdout)
    row = tree["rows"].pop("tiny bf16")
    assert row["parameters"] == 256 * 32 + 32 * 32 + 2 * (12 * 32 * 32 + 13 * 32) + 64
    assert row["tokens_per_second"] > 0 and not row["compiled"]
    assert row["matrix_tflops"] > 0
    phases = row["phases_ms"]
    assert 0 < phases["forward_ms"] + phases["backward_ms"] + phases["optimizer_ms"] < phases["step_ms"]
    path.write_text(json.dumps({**tree, "rows": {"tiny fp32": row}}))
    again = subprocess.run(
        [*command, "--rounds", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert list(json.loads(again.stdout)["rows"]) == ["tiny fp32", "tiny bf16"], again.stderr


@pytest.mark.slow
def test_a_plain_loop_runs_beside_it(tmp_path):
    command = [*TINY, "--rounds", "1", "--peers", "plain"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode in (0, 1), ended.stderr  # 1: a goal was missed, and that is no matter here
    found = json.loads(ended.stdout)["rows"]["tiny bf16"]["peers"]["plain"]
    assert found["documented"]["tokens_per_second"] > 0 and found["best"]["tokens_per_second"] > 0


@pytest.mark.parametrize("other", [side(parameters=11), side(first_loss=5.9)])
def test_another_model_is_not_compared(other):
    bench_train.check_same(side(), side(first_loss=5.6))
    with pytest.raises(ConfigError, match="it trains another model than ours"):
        bench_train.check_same(side(), other)


def test_a_side_that_dies_is_told_with_its_last_line(tmp_path):
    spec = bench_train.make_spec(bench_train.CPU_SHAPES["tiny"], "bf16", "nowhere", str(tmp_path))
    with pytest.raises(TrainerError, match=r"the side ours ended with 1: .*nowhere"):
        bench_train.Side("ours", "ours.py", sys.executable, spec)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--configs", "huge"], "--configs 'huge' is none of small, 125M, tiny"),
        (["--precision", "fp64"], "--precision 'fp64' is none of bf16, fp32"),
        (["--peers", "nanogpt"], "--peers 'nanogpt' is none of trainer, litgpt, accelerate, plain"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--eager", "--peers", "plain"], "--eager is of ours alone"),
    ],
)
def test_what_it_cannot_do_is_refused(words, told, capsys):
    assert bench_train.main(words) == 2
    assert told in capsys.readouterr().err


def test_goals_are_held_against_the_rows():
    ratios = {"documented": {"ours_is_faster": 1.3}, "best": {"ours_is_faster": 1.05}}
    rows = {
        "125M bf16": {"of_matrix_rate": 0.6, "tokens_per_second": 500.0, "peers": {"plain": ratios}},
        "125M fp32": {"of_matrix_rate": 0.6, "tokens_per_second": 500.0},
    }
    checks = bench_train.checks_of(rows, bench_train.CPU_SHAPES)
    assert [(check.name, check.goal, check.passed) for check in checks] == [
        ("125M_bf16_of_matrix_rate", 0.7, False),
        ("125M_bf16_over_plain_documented", 1.25, True),
        ("125M_bf16_over_plain_best", 1.1, False),
    ]
    on_a_gpu = bench_train.checks_of({"125M bf16": rows["125M bf16"]}, bench_train.GPU_SHAPES)
    assert on_a_gpu[0].name == "125M_bf16_speed" and not on_a_gpu[0].passed
