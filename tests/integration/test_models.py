"""Each family through the real trainer: it trains, saves, resumes, samples, compiles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.model_config import ModelConfig, parameter_shapes
from pretrain.tokenizers import save_tokenizer, train_bpe
from tests.runs import (
    RUN,
    VOCAB_SIZE,
    TrainingProcess,
    differing,
    final_state,
    losses,
    make_shards,
    metrics,
    plain_environment,
    train,
)

SMALL = ("--train.max_steps", "6", "--checkpoint.every_steps", "3", "--model.n_head", "4")
# family: options beside it, so that everything is trained at least once
TRAINED = {
    "neox": ("--engine", "deepspeed", "--precision", "bf16"),
    "llama": ("--model.n_kv_head", "2", "--engine", "deepspeed", "--model.activation_checkpointing", "selective"),
    "qwen3": ("--model.n_kv_head", "1", "--model.head_dim", "12", "--model.loss_chunks", "3"),
    "opt": ("--model.activation_checkpointing", "full", "--precision", "bf16"),
}


def add_tokenizer(shards: Path) -> None:
    documents = [f"the walk goes on by {step} and by {step + 1}, step after step" for step in range(50)]
    save_tokenizer(train_bpe(documents, VOCAB_SIZE), shards / "tokenizer.json")


ORDINARY = ("llama", "qwen3")  # the others take as long and go the same way; -m slow runs them


@pytest.mark.parametrize(
    "family", [family if family in ORDINARY else pytest.param(family, marks=pytest.mark.slow) for family in TRAINED]
)
def test_a_family_trains_and_resumes_to_the_last_bit(tmp_path, family):
    make_shards(tmp_path / "shards")
    options = ("--family", family, *SMALL, *TRAINED[family])
    assert train(tmp_path, *options).code == 0
    whole, expected = losses(tmp_path), final_state(tmp_path)
    (newest,) = (tmp_path / "checkpoints" / RUN).glob("checkpoint-*-step6-*")
    shutil.rmtree(newest)
    again = train(tmp_path, *options, "--resume", "auto")
    assert again.code == 0 and "resumed checkpoint-epoch0-step3" in again.output
    assert losses(tmp_path) == whole and len(whole) == 6
    assert not differing(final_state(tmp_path), expected)
    names = {name.rpartition(".")[0] for name in expected if "/" not in name}
    config = ModelConfig(family=family, size="custom", n_layer=2, n_head=4, d_model=32).resolve()
    assert names == {name.rpartition(".")[0] for name, _ in parameter_shapes(config)}


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_samples_are_shown_and_recorded_and_change_nothing(tmp_path, ranks):
    for name in ("with", "without"):
        make_shards(tmp_path / name / "shards")
        make_shards(tmp_path / name / "val", 1)
        add_tokenizer(tmp_path / name / "shards")
    options = ("--data.val_source", "val", "--train.eval_interval", "3", "--train.max_steps", "6")
    sampled = train(
        tmp_path / "with", *options, "--log.sample_prompt", "the walk", "--log.sample_tokens", "8", ranks=ranks
    )
    assert sampled.code == 0 and train(tmp_path / "without", *options, ranks=ranks).code == 0
    assert "step 3, sample: the walk" in sampled.output
    events = [json.loads(line) for line in (tmp_path / "with/logs/tiny/events.jsonl").read_text().splitlines()]
    samples = [event for event in events if event["kind"] == "sample"]
    assert [event["step"] for event in samples] == [3, 6] and all(event["text"] for event in samples)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert not differing(final_state(tmp_path / "with"), final_state(tmp_path / "without"))


def test_a_sample_that_can_not_be_drawn_is_refused_at_the_start(tmp_path):
    make_shards(tmp_path / "shards")
    ended = train(tmp_path, "--log.sample_prompt", "once")
    assert ended.code == 2 and "no tokenizer.json lies beside the shards" in ended.output
    assert not metrics(tmp_path)


@pytest.mark.slow  # a C++ compiler that has never met torch's headers takes a minute
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["native", "deepspeed"])
def test_a_compiled_run_gives_the_losses_of_an_eager_one(tmp_path, engine):
    options = ("--engine", engine, "--family", "llama", "--train.max_steps", "4", "--model.dropout", "0")
    for name in ("eager", "compiled"):
        make_shards(tmp_path / name / "shards")
    assert train(tmp_path / "eager", *options).code == 0
    told = plain_environment(TORCH_LOGS="recompiles")
    with TrainingProcess(tmp_path / "compiled", *options, "--compile", environment=told) as training:
        compiled = training.wait(patience_s=500)
    assert compiled.code == 0 and "the model is compiled at its first step" in compiled.output
    assert "Recompiling function" not in compiled.output
    eager, fast = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert [loss for loss, _, _ in fast.values()] == pytest.approx([loss for loss, _, _ in eager.values()], rel=1e-5)


def test_without_a_compiler_the_run_says_so_and_goes_on(tmp_path):
    make_shards(tmp_path / "shards")
    nothing = {"CXX": "/nonexistent/c++", "PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    environment = plain_environment(**nothing)
    ended = train(tmp_path, "--compile", "--train.max_steps", "2", environment=environment)
    assert ended.code == 0 and "torch.compile can't work here" in ended.output and "going on without it" in ended.output
