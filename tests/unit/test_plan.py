from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from pretrain import plan
from pretrain.config import BatchConfig, EngineConfig, OptimConfig
from pretrain.errors import ConfigError
from pretrain.memory import Setup
from pretrain.model_config import MODEL_SIZES, ModelConfig
from scripts import plan as script

H100 = plan.Gpu.named("h100-80gb")
BASE = ["--model", "1.2B", "--gpus", "8", "--gpu", "h100-80gb", "--tokens", "22B"]


def setup_of(size: str = "1.2B", world_size: int = 8, micro: int = 8, engine: str = "deepspeed", **shape) -> Setup:
    model = ModelConfig(size=size, **shape).resolve()
    batch = BatchConfig(128, micro)
    return plan.make_setup(model, batch, EngineConfig(name=engine), OptimConfig(), "bf16", world_size)


def run(capsys, *argv: str) -> tuple[int, str]:
    code = script.main(list(argv))
    return code, capsys.readouterr().out


def run_json(capsys, *argv: str) -> dict:
    return json.loads(run(capsys, *argv, "--json")[1])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("22B", 22_000_000_000),
        ("1.5T", 1_500_000_000_000),
        ("500M", 500_000_000),
        ("64k", 64_000),
        ("22_000_000_000", 22_000_000_000),
        ("1,000", 1000),
    ],
)
def test_tokens_are_read_as_people_write_them(text, tokens):
    assert plan.read_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "B", "22X", "-5B", "0", "1e9", "2.2.2B"])
def test_what_is_no_number_of_tokens_is_refused(text):
    with pytest.raises(ConfigError, match="no number of tokens"):
        plan.read_tokens(text)


def test_speed_is_the_published_share_of_the_data_sheets_peak():
    setup = setup_of()
    speed = plan.expected_speed(setup, H100)
    assert speed.mfu == 0.418
    assert speed.tokens_per_second * setup.model.flops_per_token == pytest.approx(0.418 * 8 * 989.4e12)
    # the source trained a model of this shape at 45,455 tokens/s a GPU; it counts all parameters in 6·N, as we do
    assert speed.tokens_per_second / 8 == pytest.approx(45_455, rel=0.01)


def test_recomputing_costs_a_quarter_of_the_useful_rate():
    off, on = (plan.expected_speed(setup_of().with_checkpointing(kind), H100) for kind in ("none", "full"))
    assert on.mfu / off.mfu == pytest.approx(3 / 4) == on.tokens_per_second / off.tokens_per_second
    assert "activation checkpointing" in on.source


def test_an_unknown_gpu_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"no GPU 'h1000'.*h100-80gb.*t4"):
        plan.Gpu.named("h1000")


def test_a_gpu_without_units_for_the_precision_is_told():
    with pytest.raises(ConfigError, match=r"t4 can't multiply in bf16\. Give --precision fp16"):
        plan.expected_speed(setup_of(), plan.Gpu.named("t4"))


def test_what_would_fit_really_fits_and_the_cheapest_comes_first():
    setup = setup_of("7B", micro=16)
    assert not plan.budget(setup, H100).feasible
    assert plan.mends(setup, H100) == [
        "--batch.micro_size 4",
        "--model.loss_chunks 8 --batch.micro_size 4",
        "--model.activation_checkpointing selective --batch.micro_size 4",
        "--model.activation_checkpointing full --batch.micro_size 16",
    ]
    assert plan.budget(setup.with_micro_size(4), H100).feasible
    assert plan.budget(setup.with_checkpointing("full"), H100).feasible
    assert not plan.budget(setup.with_micro_size(8), H100).feasible


def test_where_no_setting_helps_other_engines_more_or_larger_gpus_are_named():
    setup = setup_of("8B", world_size=1)
    found = plan.mends(setup, H100)
    assert found[0] == f"{plan.ZERO_2} --engine.offload_optimizer true --batch.micro_size 2"
    more = dataclasses.replace(setup, world_size=int(found[1].split()[1]))
    assert found[1].startswith("--gpus ")
    assert plan.budget(more.with_checkpointing("full").with_micro_size(1), H100).feasible
    assert found[2].startswith("--gpu ")


def test_who_starts_a_run_is_told_of_machines_in_words_and_of_options_that_train_py_has():
    setup = setup_of("8B", world_size=1)
    more = plan.mends(setup, H100)[1].split()[1]
    said = plan.advice(setup, H100, "--force to go on anyway")
    assert f", or {more} GPUs, with --model.activation_checkpointing full" in said and "--gpu" not in said
    assert said.startswith("Give ") and said.endswith(", or --force to go on anyway.")
    card = plan.mends(setup, H100)[2].split()[1]
    assert f", or {card} instead of h100-80gb, with --model" in said


def test_where_nothing_in_the_table_would_do_that_is_said(capsys):
    shape = ModelConfig(size="custom", n_layer=80, n_head=64, d_model=8192).resolve()
    muon = OptimConfig(name="muon")
    setup = plan.make_setup(shape, BatchConfig(128, 1), EngineConfig(name="ddp"), muon, "bf16", 1)
    assert plan.mends(setup, H100) == []
    assert plan.advice(setup, H100) == f"{plan.NOTHING_FITS}: take a smaller model or a shorter --model.seq_len."
    assert plan.advice(setup, H100, "--force to go on anyway").endswith("seq_len. Give --force to go on anyway.")
    options = ["--config", "production", "--model.size", "custom", "--model.n_layer", "80", "--model.d_model", "8192"]
    options += ["--model.n_head", "64", "--gpus", "1", "--engine", "ddp", "--optim.name", "muon", "--tokens", "1B"]
    code, text = run(capsys, *options)
    assert code == 2 and plan.NOTHING_FITS in text


@pytest.mark.parametrize(
    ("engine", "gpus", "first"),
    [
        ("ddp", 8, f"{plan.ZERO_2} --batch.micro_size 4"),
        ("deepspeed", 8, "--engine.zero_stage 1 --batch.micro_size 2"),
        ("fsdp", 2, f"{plan.ZERO_2} --engine.offload_optimizer true --batch.micro_size 4"),
    ],
)
def test_an_engine_that_divides_more_is_cheaper_than_another_machine_and_really_fits(engine, gpus, first, capsys):
    model = ModelConfig(size="7B").resolve()
    config = EngineConfig(name=engine, zero_stage=0)
    setup = plan.make_setup(model, BatchConfig(128, 8), config, OptimConfig(), "bf16", gpus)
    found = plan.mends(setup, H100)
    assert found[0] == first
    for words in found[: next(index for index, mend in enumerate(found) if mend.startswith("--gpu"))]:
        options = ["--model", "7B", "--gpus", str(gpus), "--gpu", "h100-80gb", "--tokens", "22B", "--engine", engine]
        options += ["--precision", "bf16", "--zero_stage", "0", "--activation_checkpointing", "none", *words.split()]
        assert run(capsys, *options)[0] == 0, words


def test_the_production_run_is_planned(capsys):
    code, text = run(capsys, *BASE, "--shards", "2000", "--price_per_gpu_hour", "2")
    assert code == 0
    for expected in ("1,315,723,264 parameters", "83,923 steps", "published by LLM Foundry, not ours", "feasible"):
        assert expected in text
    course = run_json(capsys, *BASE, "--shards", "2000", "--price_per_gpu_hour", "2")["course"]
    assert course["checkpoints"] == 400 and course["uploaded_gb"] == pytest.approx(
        400 * course["checkpoint_gb"], rel=1e-3
    )
    assert course["checkpoint_gb"] == pytest.approx(12 * 1.3158e9 / 1e9, rel=1e-3)
    assert course["kept_gb"] == pytest.approx(3 * course["checkpoint_gb"], rel=1e-2)
    hours = course["tokens"] / course["tokens_per_second"] / 3600
    assert course["hours"] == pytest.approx(hours, rel=1e-3)
    assert course["cost"] == pytest.approx(16 * hours, rel=1e-2)
    assert course["energy_kwh"] == pytest.approx(8 * 0.7 * hours, rel=1e-2)
    assert course["tokens_per_parameter"] == pytest.approx(16.72)


def test_the_printed_components_add_up(capsys):
    tree = run_json(capsys, *BASE)["memory"]
    assert sum(tree["components_gb"].values()) == pytest.approx(tree["required_gb"], abs=0.01)
    assert tree["available_gb"] == 72.0 and tree["engine"] == "deepspeed ZeRO-2"


def test_a_plan_that_does_not_fit_says_what_would_and_ends_with_2(capsys):
    code, text = run(capsys, *BASE, "--model", "7B", "--micro_batch_size", "16", "--activation_checkpointing", "false")
    assert code == 2 and "NO" in text and "--batch.micro_size 4" in text


def test_every_option_of_training_works_and_a_wrong_one_is_told(capsys):
    tree = run_json(
        capsys, *BASE, "--engine", "native", "--precision", "bf16", "--seq_len", "1024", "--vocab_size", "1000"
    )
    assert tree["memory"]["engine"] == "native" and tree["memory"]["precision"] == "bf16"
    assert tree["course"]["tokens_per_step"] == 128 * 1024
    deep = run_json(capsys, *BASE, "--model.n_layer", "48")["memory"]["components_gb"]
    assert deep["weights"] > run_json(capsys, *BASE)["memory"]["components_gb"]["weights"] * 1.5
    assert script.main([*BASE, "--tokns", "1B"]) == 2
    assert "unknown option --tokns" in capsys.readouterr().err


def test_a_size_replaces_the_shape_of_the_config(capsys):
    options = ["--config", "test", "--gpus", "1", "--tokens", "1B"]
    assert "125,226,240" not in run(capsys, *options)[1]
    model = run(capsys, *options, "--model", "125M", "--seq_len", "2048", "--vocab_size", "50257")[1]
    assert "125,226,240 parameters" in model


def test_without_tokens_the_plan_asks_for_them(capsys):
    assert script.main(["--config", "test", "--gpus", "1"]) == 2
    assert "Give --tokens 22B" in capsys.readouterr().err


def test_the_comparison_has_every_engine_with_every_kind_of_recomputing(capsys):
    rows = run_json(capsys, *BASE, "--compare")["rows"]
    assert len(rows) == 18
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    assert engines == ["ddp", "fsdp", *(f"deepspeed ZeRO-{stage}" for stage in range(4))]
    offloading = run_json(capsys, *BASE, "--compare", "--engine.offload_optimizer", "true")["rows"]
    assert [row["engine"] for row in offloading[6::3]] == [f"deepspeed ZeRO-{stage} offload" for stage in (1, 2, 3)]
    need = {row["engine"]: row["required_gb"]["8"] for row in rows if row["activation_checkpointing"] == "full"}
    assert need["ddp"] > need["deepspeed ZeRO-1"] > need["deepspeed ZeRO-2"] > need["deepspeed ZeRO-3"]
    text = run(capsys, *BASE, "--compare")[1]
    assert "95.3!" in text and "72.00 GB are available" in text
    assert max(len(line) for line in text.splitlines()[:22]) <= 80


def test_the_models_are_listed_with_exact_counts(capsys):
    text = run(capsys, "--models")[1]
    assert all(f"{count:,}" in text for count in (125_226_240, 1_315_723_264, 7_463_923_712))
    assert set(run_json(capsys, "--models")) == set(MODEL_SIZES)


def test_the_readme_shows_what_the_command_prints(capsys):
    readme = (Path(script.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert run(capsys, *BASE, "--compare")[1].strip() in readme


@pytest.mark.parametrize("size", ["7B", "8B"])
def test_7b_and_8b_fit_on_8_cards_of_80_gb_where_they_are_divided_as_the_page_says(capsys, size):
    page = (Path(script.__file__).parents[1] / "docs/big_models.md").read_text(encoding="utf-8")
    argv = ["--model", size, "--gpus", "8", "--gpu", "h100-80gb", "--tokens", "140B", "--precision", "bf16"]
    lines = [line.rstrip() for line in run(capsys, *argv, "--compare")[1].splitlines()]
    rows = [line for line in lines if line.startswith(("fsdp", "ZeRO-2", "ZeRO-3")) and "selective" not in line]
    assert len(rows) == 6
    assert "\n".join([lines[0], lines[2], *rows]) in page
    fits = {row["engine"] for row in run_json(capsys, *argv, "--compare")["rows"] if row["largest_micro_batch_size"]}
    assert fits == {"fsdp", *(f"deepspeed ZeRO-{stage}" for stage in (1, 2, 3))}


def test_fp8_is_planned_as_bf16_without_what_can_not_train_in_it(capsys):
    argv = [*BASE, "--engine", "fsdp"]
    fp8 = run_json(capsys, *argv, "--precision", "fp8", "--compare")["rows"]
    bf16 = run_json(capsys, *argv, "--precision", "bf16", "--compare")["rows"]
    assert {row["engine"] for row in fp8} == {"ddp", "fsdp"}
    assert [row["required_gb"] for row in fp8] == [row["required_gb"] for row in bf16[: len(fp8)]]
    assert "what fp8 gains is not known" in fp8[0]["mfu_source"]
    for card in ("l4", "h200", "rtx-5090", "gb200"):
        assert plan.peak_tflops(plan.Gpu.named(card), "fp8") == plan.peak_tflops(plan.Gpu.named(card), "bf16") > 0
    for card, able in (("a100-80gb", "bf16"), ("v100-32gb", "fp16")):
        with pytest.raises(ConfigError, match=f"{card} can't multiply in fp8.*--precision {able}"):
            plan.expected_speed(dataclasses.replace(setup_of(engine="fsdp"), precision="fp8"), plan.Gpu.named(card))
