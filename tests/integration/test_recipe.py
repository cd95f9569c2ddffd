"""The options of the fast recipe through train.py, and the benchmark of recipes."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.optim import learning_rate
from pretrain.optim_config import OptimConfig
from tests.runs import ROOT, final_state, make_shards, metrics, plain_environment, tiny_config, train

BENCH = ROOT / "benchmarks" / "bench_recipe.py"
OPTIONS = ("--optim.name", "muon", "--optim.schedule", "wsd", "--optim.cooldown_fraction", "0.5", "--max-steps", "6")
MODEL = (
    "--model.z_loss",
    "0.01",
    "--model.logit_softcap",
    "30",
    "--model.qk_norm",
    "true",
    "--model.zero_init",
    "true",
)


def test_a_run_with_muon_wsd_and_a_z_loss_and_its_resume_by_another_optimizer(tmp_path: Path) -> None:
    make_shards(tmp_path / "shards")
    tiny_config(tmp_path)
    ended = train(tmp_path, *OPTIONS, *MODEL)
    assert ended.code == 0, ended.output
    records = metrics(tmp_path)
    optim = OptimConfig("muon", lr=0.003, warmup_steps=4, schedule="wsd", cooldown_fraction=0.5)
    assert [record["lr"] for record in records] == pytest.approx([learning_rate(step, 6, optim) for step in range(6)])
    assert all(0 < record["z_loss"] < 1 for record in records)
    assert records[0]["loss"] == pytest.approx(math.log(257), abs=0.1)  # the plain cross entropy
    state = final_state(tmp_path)
    assert {"momentum_buffer/blocks.0.attn.qkv.weight", "exp_avg_sq/tok_emb.weight"} <= set(state)
    assert "exp_avg/blocks.0.attn.qkv.weight" not in state

    refused = train(tmp_path, "--resume", "auto", "--max-steps", "8", *MODEL)
    assert refused.code == 5
    assert "was written by optimizer muon, and optim.name is adamw" in refused.errors[0] and len(refused.errors) == 1


@pytest.fixture(scope="module")
def bench() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(BENCH)))


def test_bench_recipe_interpolates_between_validations(bench: SimpleNamespace) -> None:
    def run(recipe: str, seed: int, *losses: float) -> object:
        return bench.Run(recipe, seed, (100, 200, 300, 400), losses, 1000 + 15 * (recipe == "fast"))

    runs = [
        run("classic", 1, 5.0, 4.0, 3.5, 3.0),
        run("fast", 1, 4.0, 3.2, 2.8, 2.5),  # 3.0 is in the middle between 200 and 300
        run("classic", 2, 5.0, 4.0, 3.5, 4.0),
        run("fast", 2, 4.0, 3.2, 2.8, 2.5),
        run("classic", 3, 5.0, 4.0, 3.5, 2.0),
        run("fast", 3, 4.0, 3.2, 2.8, 2.5),  # never
    ]
    assert bench.ratios_of(runs) == pytest.approx([400 / 250, 4.0, 0.0])
    found = {check.name: (check.value, check.passed) for check in bench.checks_of(runs)}
    assert found == {
        "tokens_to_the_classic_loss": (1.6, True),
        "worst_seed": (0.0, False),
        "difference_of_parameters": (1.5, True),
    }


def test_bench_recipe_compares_what_it_says_it_compares(bench: SimpleNamespace) -> None:
    classic, fast = (bench.config_of(bench.options_of(name, 1, bench.TOKENS, {})) for name in ("classic", "fast"))
    assert abs(fast.model.n_parameters / classic.model.n_parameters - 1) <= bench.SAME_SIZE
    for part in ("n_layer", "d_model", "vocab_size", "seq_len"):
        assert getattr(fast.model, part) == getattr(classic.model, part)
    assert (fast.batch, fast.train, fast.run.seed) == (classic.batch, classic.train, classic.run.seed)
    assert (classic.model.position, classic.model.dropout, classic.optim.name) == ("learned", 0.1, "adamw")
    assert (classic.optim.schedule, fast.optim.name, fast.optim.schedule) == ("cosine", "muon", "wsd")
    for changes in bench.ABLATIONS.values():
        ablated = bench.config_of(bench.options_of("fast", 1, bench.TOKENS, changes))
        assert abs(ablated.model.n_parameters / fast.model.n_parameters - 1) <= 0.03 and ablated != fast


def test_bench_recipe_refuses_what_it_cannot_measure(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCH), "--tokens", "100"]
    ended = subprocess.run(words, cwd=tmp_path, env=plain_environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "--tokens at least" in ended.stderr


@pytest.mark.slow
def test_bench_recipe_runs_to_its_end_and_goes_on_where_it_was(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCH), "--seeds", "1", "--tokens", str(2**15), "--work", "work", "--json", "--save"]
    words += ["--picture", "recipe.png"]
    for _ in range(2):
        ended = subprocess.run(
            words, cwd=tmp_path, env=plain_environment(), capture_output=True, text=True, check=False
        )
        assert ended.returncode in (0, 1), ended.stderr
        tree = json.loads(ended.stdout)
        assert [run["recipe"] for run in tree["runs"]] == ["classic", "fast"]
        assert all(run["tokens"][-1] == 2**15 and len(run["losses"]) == 16 for run in tree["runs"])
    assert (tmp_path / "recipe.png").stat().st_size > 10_000
    assert len(list((tmp_path / "work" / "logs").iterdir())) == 2
