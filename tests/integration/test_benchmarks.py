"""The benchmarks run to their end at a tiny scale; what they say there of speed is no matter."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_generate, bench_growth, bench_startup, bench_telemetry, bench_train
from tests.runs import ROOT, plain_environment

CHECKPOINT = ROOT / "benchmarks" / "bench_checkpoint.py"


def run(script: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *options]
    return subprocess.run(command, cwd=folder, env=plain_environment(), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(CHECKPOINT)))


def test_bench_checkpoint_saves_by_every_side(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    ended = run(CHECKPOINT, tmp_path, "--parameters", "3e5", "--rounds", "2", "--json", "--save", "--dir", str(work))
    if "DeepSpeed can't run" in ended.stderr:
        pytest.skip("no C++ compiler for DeepSpeed's CPU op")
    assert ended.returncode in (0, 1), ended.stderr
    tree = json.loads(ended.stdout)
    assert (ended.returncode == 0) == tree["passed"]
    assert [path.read_text() for path in tmp_path.glob("benchmarks/results/*/checkpoint.json")] == [ended.stdout]

    values = {check["name"]: check["value"] for check in tree["checks"]}
    assert 12 <= values["bytes_per_parameter"] <= 12.1
    assert values["stall_share_at_a_save_a_minute"] > 0
    sizes = {side: figures["bytes_per_parameter"] for side, figures in tree["sides"].items()}
    assert 12 <= sizes["torch.save"] < 12.5
    assert 14 <= sizes["deepspeed"] < 15  # bf16 weights, fp32 weights and moments
    assert sizes["dcp.async_save"] >= 12  # and a fair amount of its own at this scale
    assert len(tree["each_round"]) == 2
    for stall_ms, total_ms in (cost for each in tree["each_round"] for cost in each.values()):
        assert 0 < stall_ms <= total_ms
    assert list(work.iterdir()) == []


def test_bench_checkpoint_compares_with_the_median_of_the_ratios(bench: SimpleNamespace) -> None:
    cost = bench.Cost
    others = {"torch.save": cost(100, 200), "deepspeed": cost(50, 100), "dcp.async_save": cost(1, 1)}
    rounds = [{"ours": cost(stall, total), **others} for stall, total in ((5, 90), (4, 80), (900, 900))]
    found = {check.name: (check.value, check.passed) for check in bench.checks_of(rounds, 12.05)}
    assert found == {
        "stall_over_torch_save": (0.05, True),
        "total_over_torch_save": (0.45, True),
        "stall_over_deepspeed": (0.1, True),
        "total_over_deepspeed": (0.9, True),
        "stall_share_at_a_save_a_minute": (0.0083, True),
        "bytes_per_parameter": (12.05, True),
    }
    slow = [{"ours": cost(60, 250), **others}]
    assert not any(check.passed for check in bench.checks_of(slow, 12.2) if "share" not in check.name)


@pytest.mark.parametrize("wanted", [1e5, 3e5, 1e7, 3e7, 1e9])
def test_bench_checkpoint_builds_a_model_of_about_the_size(bench: SimpleNamespace, wanted: float) -> None:
    shape = bench.shape_of(wanted)
    assert shape.n_parameters == pytest.approx(wanted, rel=0.2)
    assert shape.vocab_size == shape.padded_vocab_size


@pytest.mark.parametrize("option", [("--rounds", "0"), ("--parameters", "1")])
def test_bench_checkpoint_refuses_what_it_cannot_measure(tmp_path: Path, option: tuple[str, str]) -> None:
    ended = run(CHECKPOINT, tmp_path, *option)
    assert ended.returncode == 2
    assert "must be at least 1" in ended.stderr


def test_bench_memory_holds_the_plan_against_the_count(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "bench_memory.py"
    ended = run(script, tmp_path, "--only", "125M_fp32", "--json", "--save")
    assert ended.returncode == 0, ended.stderr
    tree = json.loads(ended.stdout)
    assert [path.read_text() for path in tmp_path.glob("benchmarks/results/*/memory.json")] == [ended.stdout]
    (row,) = tree["configs"]
    assert [check["name"] for check in tree["checks"]] == ["125M_fp32_counted"] and row["measured_gb"] is None
    assert row["predicted_gb"] == pytest.approx(row["counted_gb"], rel=0.07)
    assert "predicted GB" in ended.stderr and "there is no GPU on this machine" in ended.stderr
    wrong = run(script, tmp_path, "--only", "125M")
    assert wrong.returncode == 2 and "there is no config '125M'. There are 125M_fp32" in wrong.stderr


def test_bench_memory_leaves_out_what_a_gpu_has_no_room_for_and_misses_by_the_percent() -> None:
    bench = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "bench_memory.py")))
    row = {"predicted_gb": 10.0, "counted_gb": 9.0, "measured_gb": 10.5}
    assert (bench.deviation(row, "counted"), bench.deviation(row, "measured")) == (11.11, -4.76)

    def full() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert bench.without_leftovers(full) is None and bench.without_leftovers(lambda: 7) == 7


@pytest.mark.slow
def test_bench_generate_writes_the_same_with_and_without_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_generate.main(["--new_tokens", "32", "--rounds", "1", "--json"]) in (0, 1)
    tree = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in tree["checks"]}
    assert checks["rounds_with_equal_text"]["passed"] and checks["speed_up_by_cache"]["value"] > 0
    assert tree["distinct_tokens"] > 1
    assert bench_generate.main(["--new_tokens", "31"]) == 2


@pytest.mark.slow
def test_bench_telemetry_compares_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_telemetry.main(["--steps", "1", "--rounds", "2", "--json"]) in (0, 1)
    tree = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in tree["checks"]] == ["counted_of_a_step", "compared_beyond_noise"]
    assert len(tree["ratios"]) == 2 and 0 < tree["calls_percent"] < 100
    assert bench_telemetry.main(["--rounds", "1"]) == 2
    assert "--rounds at least 2" in capsys.readouterr().err


# ---- the start ----


def test_a_start_is_told_by_its_phases(capsys: pytest.CaptureFixture[str]) -> None:
    starts = [bench_startup.Start(seconds, {"torch": 0.95 * seconds}) for seconds in (4.0, 9.0, 30.0)]
    found = {
        check.name: (check.value, check.passed) for check in bench_startup.evaluate(starts, [1, 2, 3], compiles=False)
    }
    assert found == {
        "first_step_after": (9.0, True),
        "first_step_over_import_of_torch": (4.5, True),
        "not_in_a_phase": (0.05, True),
    }
    assert bench_startup.medians(starts) == {"torch": 8.55}
    slow = [bench_startup.Start(12.0, {"torch": 6.0})]
    assert not any(check.passed for check in bench_startup.evaluate(slow, [1.0], compiles=False))
    assert [check.name for check in bench_startup.evaluate(slow, [1.0], compiles=True)] == ["not_in_a_phase"]
    assert bench_startup.main(["--ranks", "0"]) == 2
    assert "--rounds and --ranks must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_startup_starts_the_main_job(tmp_path: Path) -> None:
    ended = run(ROOT / "benchmarks" / "bench_startup.py", tmp_path, "--rounds", "1", "--json")
    assert ended.returncode in (0, 1), ended.stderr
    tree = json.loads(ended.stdout)
    values = {check["name"]: check["value"] for check in tree["checks"]}
    assert values["not_in_a_phase"] < 0.1
    assert {"launcher", "python", "torch", "data", "engine", "first step"} <= set(tree["phases_s"])


# ---- growth ----


def test_an_exponent_is_the_slope_and_what_grows_faster_than_the_arithmetic_fails() -> None:
    sizes = [1, 2, 4, 8]
    growths = [
        bench_growth.Growth("batch", sizes, lambda size: 3.0 * size, float),
        bench_growth.Growth("depth", sizes, lambda size: 0.5 * size**1.2, float),
        bench_growth.Growth("shards", sizes, lambda size: 1 + 0.01 * size, float),
    ]
    found = [bench_growth.fit(growth, 3) for growth in growths]
    assert [round(each.exponent, 2) for each in found[:2]] == [1.0, 1.2] and found[2].exponent < 0.1
    assert found[0].seconds == {1: 3.0, 2: 6.0, 4: 12.0, 8: 24.0}
    assert [check.passed for check in bench_growth.checks_of(found)] == [True, False, True]


def test_bench_growth_measures_steps_and_openings(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rounds", "1", "--scale", "1", "--shards", "64", "--only", "depth,shards", "--json"]
    assert bench_growth.main(words) in (0, 1)
    tree = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in tree["checks"]] == ["depth_over_arithmetic", "shards_over_arithmetic"]
    depth = tree["growths"]["depth"]
    assert 0.5 < depth["arithmetic"] < 1 and set(depth["ms"]) == {"2", "4", "8", "16"}
    assert bench_growth.main(["--only", "width"]) == 2


# ---- the GPU's ----


def gpu_script(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**plain_environment(OUT=str(folder), PYTHON=sys.executable), "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_without_a_gpu_gpu_sh_says_so_in_one_line(tmp_path: Path) -> None:
    ended = gpu_script(tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "torch sees no GPU" in ended.stderr and "--rehearse" in ended.stderr
    assert gpu_script(tmp_path, "--rounds").returncode == 2


def test_its_tests_run_on_the_cpu_too(tmp_path: Path) -> None:
    ended = gpu_script(tmp_path, "--rehearse", "tests")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "gpu: tests: passed" in ended.stdout and "no GPU was there" in ended.stdout
    assert " failed" not in ended.stdout and " passed" in ended.stdout


# what the head of gpu.sh wants, and the project itself
BARE = ["torch", "numpy", "pytest", "pytest-timeout", "PyYAML", "rich", "psutil", "safetensors", "refocused-gpt"]


def test_a_bare_machine_with_the_wheels_of_gpu_sh_has_all_that_is_imported(tmp_path: Path) -> None:
    wheels = re.search(r"NEEDED=\(([^)]*)\)", (ROOT / "benchmarks" / "gpu.sh").read_text())
    assert wheels
    command = [sys.executable, "-m", "tests.bare_machine", ",".join([*BARE, *wheels[1].split()])]
    shape = bench_train.CPU_SHAPES["tiny"]
    spec = bench_train.make_spec(shape, "fp32", "learned", str(tmp_path), "documented")
    words = json.dumps(asdict(replace(spec, engine="zero2")))
    side = [*command, str(ROOT / "benchmarks" / "peers" / "ours.py"), words]
    environment = plain_environment(PYTHONPATH=str(ROOT))
    ended = subprocess.run(side, input="1\n", env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    hello, turn = map(json.loads, ended.stdout.splitlines())
    assert hello["first_loss"] > 0 and turn["seconds"] > 0
    growth = [*command, str(ROOT / "benchmarks" / "bench_growth.py"), "--help"]
    subprocess.run(growth, env=environment, check=True, capture_output=True)


@pytest.mark.slow
def test_its_benchmarks_run_on_the_cpu_too(tmp_path: Path) -> None:
    ended = gpu_script(tmp_path, "--rehearse", "train", "engines", "memory", "growth")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    names = {json.loads(path.read_text())["name"] for path in tmp_path.glob("*.json")}
    assert names == {"train", "engines", "memory", "growth"}
