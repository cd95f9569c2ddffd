from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import yaml

from pretrain import arguments
from pretrain.arguments import parse, to_yaml, world_size_from_env
from pretrain.errors import ConfigError

BASE = ["--data", "gs://bucket/data"]


def problems_of(*argv: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(list(argv), world_size)
    return caught.value.problems


@pytest.fixture
def config_file(tmp_path):
    """Writes a YAML file and gives its path as an option."""

    def write(text: str, name: str = "mine.yaml") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_defaults_below_yaml_below_command_line(config_file):
    path = config_file("data: {source: folder}\noptim: {lr: 0.1, clip: 0.5}\n")
    config = parse(["--config", path, "--optim.lr", "0.2"]).config
    assert (config.optim.lr, config.optim.clip, config.optim.weight_decay) == (0.2, 0.5, 0.1)


def test_a_name_means_a_shipped_config_and_names_the_run():
    invocation = parse(["--config", "production", *BASE])
    assert invocation.config_name == "production"
    assert invocation.config.run.name == "production"
    assert invocation.config.model.n_parameters == 1_315_723_264
    assert parse(["--config", "production", "--run", "mine", *BASE]).config.run.name == "mine"


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        (["--run", "a"], "run.name", "a"),
        (["--seed", "7"], "run.seed", 7),
        (["--data=gs://b/p"], "data.source", "gs://b/p"),
        (["--max-files", "25"], "data.max_files", 25),
        (["--max_files", "25"], "data.max_files", 25),
        (["--max-steps=3"], "train.max_steps", 3),
        (["--max_tokens", "1000"], "train.max_tokens", 1000),
        (["--precision", "fp16"], "train.precision", "fp16"),
        (["--mixed-precision", "bf16"], "train.precision", "bf16"),
        (["--mixed_precision", "no"], "train.precision", "fp32"),
        (["--engine", "native"], "engine.name", "native"),
        (["--checkpoints", "gs://b/c"], "checkpoint.url", "gs://b/c"),
        (["--resume", "auto"], "checkpoint.resume", "auto"),
        (["--lr", "1e-3"], "optim.lr", 1e-3),
        (["--optim.betas", "[0.8, 0.9]"], "optim.betas", (0.8, 0.9)),
        (["--no-background-upload"], "checkpoint.background_upload", False),
        (["--no_background_upload"], "checkpoint.background_upload", False),
        (["--no-version-check"], "log.version_check", False),
        (["--no-tensorboard"], "log.tensorboard", False),
        (["--wandb"], "log.wandb", True),
        (["--wandb", "--no-wandb"], "log.wandb", False),
        (["--deterministic"], "train.deterministic", True),
        (["--log.wandb", "true"], "log.wandb", True),
    ],
)
def test_the_options_reach_their_fields(options, field, value):
    section, name = field.split(".")
    assert getattr(getattr(parse([*BASE, *options]).config, section), name) == value


def test_text_that_looks_like_a_number_stays_text():
    config = parse(["--run", "20260101", "--data", "2026", "--resume", "1"]).config
    assert (config.run.name, config.data.source, config.checkpoint.resume) == ("20260101", "2026", "1")


def test_a_negative_number_is_a_value():
    assert parse([*BASE, "--data.pad_token_id", "-1"]).config.data.pad_token_id == -1


def test_an_empty_value_is_a_value():
    assert parse([*BASE, "--checkpoints", ""]).config.checkpoint.url == ""
    assert parse([*BASE, "--checkpoints="]).config.checkpoint.url == ""


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--optim.lrr", "--optim.lr"),
        ("--max-stepz", "--max-steps"),
        ("--checkpoint.keeep", "--checkpoint.keep"),
        ("--model.droput", "--model.dropout"),
        ("--resum", "--resume"),
        ("--no-wndb", "--no-wandb"),
    ],
)
def test_a_misspelt_option_names_its_nearest_neighbour(option, nearest):
    assert problems_of(*BASE, option, "1") == [f"unknown option {option}: did you mean {nearest}?"]


def test_every_mistake_is_reported_in_one_go(config_file):
    path = config_file("optm: {lr: 1}\noptim: {clip: high}\n")
    problems = problems_of("--config", path, "--droput", "0.1", "--lr", "fast", "--precision", "fp4", "--resume")
    words = ["optm.lr", "optim.clip", "--droput", "optim.lr is 'fast'", "fp4", "--resume needs a value"]
    assert len(problems) == len(words)
    assert all(any(word in problem for problem in problems) for word in words)


def test_a_wrong_value_says_what_was_expected():
    assert problems_of(*BASE, "--max-steps", "many") == ["train.max_steps is 'many', expected int"]
    (problem,) = problems_of(*BASE, "--precision", "fp4")
    assert all(choice in problem for choice in ("fp4", "fp32", "bf16", "fp16", "fp8"))


def test_a_value_that_is_not_even_yaml_is_a_mistake():
    (problem,) = problems_of(*BASE, "--optim.betas", "[0.9")
    assert problem.startswith("optim.betas is '[0.9', expected")


def test_a_word_without_an_option_is_a_mistake():
    assert "stray" in problems_of("stray", *BASE)[0]


def test_an_impossible_batch_is_a_mistake_on_this_number_of_ranks():
    argv = [*BASE, "--batch.global_size", "16", "--batch.micro_size", "8"]
    assert parse(argv, world_size=2).config.batch.accumulation(2) == 1
    assert "× 3 ranks" in problems_of(*argv, world_size=3)[0]


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words"])
def test_a_file_that_is_no_config_is_named(config_file, text):
    path = config_file(text)
    assert any(path in problem for problem in problems_of("--config", path))


def test_a_config_that_is_not_there_names_those_that_are():
    (problem,) = problems_of(*BASE, "--config", "prodction")
    assert "production" in problem and "test" in problem


def test_yaml_reads_back_to_the_same_tree(config_file):
    config = parse([*BASE, "--lr", "3e-4", "--optim.betas", "[0.8, 0.99]", "--run", "007", "--resume", "auto"]).config
    again = parse(["--config", config_file(to_yaml(config))]).config
    assert again == config
    assert yaml.safe_load(to_yaml(config))["optim"]["betas"] == [0.8, 0.99]


def test_every_field_has_a_help_line(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    said = "".join(capsys.readouterr().out.split())  # lines may break inside a name, at its hyphen
    assert ended.value.code == 0
    for section in dataclasses.fields(arguments.Config):
        for field in dataclasses.fields(section.default_factory):
            assert f"--{section.name}.{field.name}" in said
    assert all(option in said for option in (*arguments.ALIASES, *arguments.SWITCHES))


def test_flags_of_this_start_are_not_part_of_the_config():
    invocation = parse([*BASE, "--debug", "--print_config"])
    assert invocation.debug and invocation.print_config
    assert not parse(BASE).debug
    assert invocation.config == parse(BASE).config


def test_the_local_rank_of_the_deepspeed_launcher_is_taken():
    assert parse([*BASE, "--local_rank=1"]).config == parse(["--local_rank", "1", *BASE]).config


def test_world_size_comes_from_the_launcher(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert world_size_from_env() == 4
    monkeypatch.delenv("WORLD_SIZE")
    assert world_size_from_env() == 1


@pytest.mark.parametrize("text", ["four", "0", "-1", "", "2.0"])
def test_a_world_size_that_is_no_number_of_ranks_is_refused(monkeypatch, text):
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE is '{text}', expected the number of ranks"):
        world_size_from_env()


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_a_value_must_be_finite(value):
    with pytest.raises(ConfigError, match=r"optim\.lr is (-?inf|nan), expected a finite number"):
        parse([*BASE, f"--lr={value}"])


def test_a_switch_takes_no_value():
    with pytest.raises(ConfigError, match=r"--compile takes no value: give --train\.compile 1 instead"):
        parse([*BASE, "--compile=1"])


def test_a_mistake_is_found_without_torch():
    code = (
        "import sys; from pretrain.arguments import parse; from pretrain.errors import ConfigError\n"
        "try: parse(['--lr', 'x'])\n"
        "except ConfigError: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=arguments.ROOT).returncode == 0
