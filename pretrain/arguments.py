"""From the command line to a Config: defaults < configs/NAME.yaml < command line.

Values are read and checked by jsonargparse; what is ours is that every mistake is reported in one go, a misspelt
option names its nearest neighbour, and `--config test` means configs/test.yaml.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from pretrain.config import Config
from pretrain.config_checks import validate
from pretrain.engine.choice import engine_problems
from pretrain.engine.ds_settings import deepspeed_settings
from pretrain.errors import ConfigError
from pretrain.hf_source import starting_settings

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = "test"

# The everyday options: alias -> field. Aliases that take no value carry it.
ALIASES: dict[str, str] = {
    "--run": "run.name",
    "--run-name": "run.name",  # torchrun takes --run for its own --run-path
    "--seed": "run.seed",
    "--family": "model.family",
    "--model_size": "model.size",
    "--data": "data.source",
    "--max-files": "data.max_files",
    "--max-steps": "train.max_steps",
    "--max-tokens": "train.max_tokens",
    "--precision": "train.precision",
    "--mixed-precision": "train.precision",
    "--engine": "engine.name",
    "--checkpoints": "checkpoint.url",
    "--resume": "checkpoint.resume",
    "--lr": "optim.lr",
    "--profile": "log.profile",
    "--price_per_gpu_hour": "train.price_per_gpu_hour",
}
SWITCHES: dict[str, tuple[str, Any]] = {
    "--no-background-upload": ("checkpoint.background_upload", False),
    "--no-version-check": ("log.version_check", False),
    "--no-tensorboard": ("log.tensorboard", False),
    "--wandb": ("log.wandb", True),
    "--no-wandb": ("log.wandb", False),
    "--no-telemetry": ("log.telemetry", False),
    "--deterministic": ("train.deterministic", True),
    "--compile": ("train.compile", True),
}
AUTO = "auto"
SYNONYMS: dict[str, dict[str, Any]] = {
    # field: {what people write: what it is called here}
    "train.precision": {"no": "fp32", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"},
    "model.activation_checkpointing": {"true": "full", "false": "none"},
    "batch.micro_size": {AUTO: 0},
}


@dataclasses.dataclass(frozen=True)
class Invocation:
    """One start of train.py: the resolved config, and what is about this start rather than about the run."""

    config: Config
    config_name: str
    debug: bool = False
    print_config: bool = False
    force: bool = False


def build_parser() -> jsonargparse.ArgumentParser:
    """The jsonargparse parser over the sections of Config; it also writes `--help`."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="train.py",
        exit_on_error=False,
        usage="python train.py --config NAME [--section.field VALUE ...]",
        description="Pretrain a GPT from tokenized .npz shards in a bucket or a folder.",
    )
    for section in dataclasses.fields(Config):
        parser.add_class_arguments(section.default_factory, section.name)
        for action in parser._actions:
            if action.option_strings == [f"--{section.name}"]:  # jsonargparse's own: a file for one section
                action.help = argparse.SUPPRESS
    return parser


def _short_forms() -> str:
    """The end of --help: options that are not a field, the short forms, the exit codes."""
    rows = [
        ("--config NAME", f"configs/NAME.yaml, or a path (default: {DEFAULT_CONFIG})"),
        ("--print_config", "print the resolved settings and end"),
        ("--force", "train although the memory plan says that it can't fit into the GPU"),
        ("--debug", "show tracebacks"),
        *((alias, f"--{key}") for alias, key in ALIASES.items()),
        *((switch, f"--{key} {str(value).lower()}") for switch, (key, value) in SWITCHES.items()),
    ]
    lines = [f"  {option:<24}{meaning}" for option, meaning in rows]
    codes = "0 done, 2 config, 3 data, 4 storage, 5 checkpoint, 6 diverged, 75 stopped by a signal after saving"
    return "\n".join(["Everyday options and short forms:", *lines, "", f"Exit codes: {codes}."])


def parse(argv: list[str], world_size: int = 1) -> Invocation:
    """The resolved and validated settings of one start.

    Args:
        argv: the command line without the program's name.
        world_size: number of ranks, which the batch must divide by.

    Raises:
        ConfigError: naming every unknown option, wrong value and impossible combination at once.
        SystemExit: 0 after `--help`.
    """
    parser = build_parser()
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        print(f"\n{_short_forms()}")
        sys.exit(0)
    known = _flatten(dataclasses.asdict(Config()))
    from_cli, options, problems = _read_argv(argv, known)
    config_name, from_yaml, yaml_problems = _read_yaml(options.get("config", DEFAULT_CONFIG), known)
    for here, other in (("data.source", "data.sources"), ("data.sources", "data.source")):
        if here in from_cli and other not in from_cli:  # the command line's data replaces the file's
            from_yaml.pop(other, None)
    settings = {**from_yaml, **from_cli}
    for field, names in SYNONYMS.items():
        if (written := str(settings.get(field)).lower()) in names:
            settings[field] = names[written]
    if folder := str(settings.get("model.init_from") or ""):
        # What stands beside it is meant for it; the file of another run gives way to it.
        firm = from_cli if "model.init_from" in from_cli else settings
        settings |= starting_settings(Path(folder), settings, firm)
    problems += yaml_problems + _value_problems(parser, settings)
    if problems:
        raise ConfigError(problems)
    config: Config = Config(**vars(parser.instantiate(parser.parse_object(_nest(settings)))))
    config = dataclasses.replace(
        config,
        model=config.model.resolve(),
        run=dataclasses.replace(config.run, name=config.run.name or config_name),
    )
    problems = validate(config, world_size) + engine_problems(config.engine, world_size)
    if not problems and config.engine.name == "deepspeed":
        batch = config.batch.settled
        _, problems = deepspeed_settings(config.engine, config.optim, batch, config.train.precision, world_size)
    if problems:
        raise ConfigError(problems)
    return Invocation(config, config_name, "debug" in options, "print_config" in options, "force" in options)


def gives_sources(argv: Sequence[str]) -> bool:
    """Whether a command line names a mixture, so that a script must not fill in another source."""
    return any(word.partition("=")[0] == "--data.sources" for word in argv)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `--config` reads back to the same tree."""
    plain = dataclasses.asdict(config)
    plain["optim"]["betas"], plain["data"]["sources"] = list(plain["optim"]["betas"]), list(plain["data"]["sources"])
    plain["batch"]["micro_size"] = plain["batch"]["micro_size"] or AUTO
    return yaml.safe_dump(plain, sort_keys=False)


def _read_argv(argv: list[str], known: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """(fields, options that are not fields, problems) of a command line of `--key value` and `--key=value`."""
    fields: dict[str, Any] = {}
    options: dict[str, str] = {}
    problems: list[str] = []
    words = list(argv)
    while words:
        word, equals, inline = words.pop(0).partition("=")
        name = word.removeprefix("--")
        switch = SWITCHES.get(_hyphens(word))
        if switch and equals:
            problems.append(f"{word} takes no value: give --{switch[0]} {inline} instead")
        elif switch:
            fields[switch[0]] = switch[1]
        elif name in ("debug", "force", "print_config", "print-config"):
            options[name.replace("-", "_")] = "true"
        elif name in ("local_rank", "local-rank"):  # the deepspeed launcher appends it; LOCAL_RANK says the same
            _take_value(words, equals, inline)
        elif word.startswith("--") and (name == "config" or _field_of(word, known)):
            value = _take_value(words, equals, inline)
            if value is None:
                problems.append(f"{word} needs a value")
            elif name == "config":
                options["config"] = value
            else:
                field = _field_of(word, known)
                fields[field] = _typed(value, known[field])
        else:
            problems.append(_unknown(word, known))
            _take_value(words, equals, inline)
    return fields, options, problems


def _take_value(words: list[str], equals: str, inline: str) -> str | None:
    """The value of the option just read: after its `=`, or the next word."""
    if equals:
        return inline
    return words.pop(0) if words and not words[0].startswith("--") else None


def _typed(text: str, default: Any) -> Any:
    """A value of the command line: as it stands where the field holds text (`--run 007`), read as YAML elsewhere."""
    if isinstance(default, str):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # no field but text takes it, and the check of the values says so


def _hyphens(word: str) -> str:
    return word.replace("_", "-")


def _field_of(word: str, known: dict[str, Any]) -> str:
    """The field that `--section.field` or an alias names, or ''."""
    name = word.removeprefix("--")
    aliases = {_hyphens(alias): key for alias, key in ALIASES.items()}
    return name if name in known else aliases.get(_hyphens(word), "")


def _unknown(word: str, known: dict[str, Any]) -> str:
    choices = [f"--{key}" for key in known] + [*ALIASES, *SWITCHES, "--config", "--debug", "--force", "--print_config"]
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5) or difflib.get_close_matches(
        word.split(".")[-1], [choice.split(".")[-1] for choice in choices], n=1
    )
    full = next((choice for choice in choices if near and choice.endswith(near[0])), "")
    return f"unknown option {word}" + (f": did you mean {full}?" if full else ": see python train.py --help")


def _read_yaml(name: str, known: dict[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """(run name, fields, problems) of configs/NAME.yaml or of a path to a YAML file."""
    path = Path(name)
    if not path.suffix and not path.is_file():
        path = ROOT / "configs" / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(found.stem for found in (ROOT / "configs").glob("*.yaml")))
        return path.stem, {}, [f"no config {name!r}: there is no file {path}; shipped are {shipped}"]
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return path.stem, {}, [f"{path} is not valid YAML: {' '.join(str(error).split())}"]
    if not isinstance(tree, dict):
        return path.stem, {}, [f"{path} must hold sections such as 'model:', found {type(tree).__name__}"]
    fields = _flatten(tree)
    problems = [f"{path}: {_unknown(f'--{key}', known)}" for key in fields if key not in known]
    return path.stem, {key: value for key, value in fields.items() if key in known}, problems


def _value_problems(parser: jsonargparse.ArgumentParser, settings: dict[str, Any]) -> list[str]:
    """What is wrong with each value by itself."""
    if infinite := [key for key, value in settings.items() if isinstance(value, float) and not math.isfinite(value)]:
        return [f"{key} is {settings[key]}, expected a finite number" for key in infinite]
    try:
        parser.parse_object(_nest(settings))
    except jsonargparse.ArgumentError:  # it names the first one only
        return [problem for key, value in settings.items() if (problem := _value_problem(parser, key, value))]
    return []


def _value_problem(parser: jsonargparse.ArgumentParser, key: str, value: Any) -> str:
    """What is wrong with one value by itself, or ''."""
    try:
        parser.parse_object(_nest({key: value}))
    except jsonargparse.ArgumentError as error:
        expected = str(error).split("Expected a ")[-1].split(". Got")[0]
        if key == "data.sources":
            expected = f"[{{source: gs://b/web, weight: 0.7}}, …]: {expected.splitlines()[-1].strip()}"
        expected = expected.replace("<class '", "").replace("'>", "").replace("typing.Literal", "one of ")
        return f"{key} is {value!r}, expected {expected}"
    return ""


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """The reverse of `_flatten`."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        level = tree
        for section in sections:
            level = level.setdefault(section, {})
        level[name] = value
    return tree


def world_size_from_env() -> int:
    """WORLD_SIZE as the launcher set it; 1 without a launcher.

    Raises:
        ConfigError: it is no number of ranks.
    """
    text = os.environ.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"WORLD_SIZE is {text!r}, expected the number of ranks", "Unset it, or start by a launcher.")
    return int(text)


def launched_ranks(launcher: Sequence[str]) -> list[int]:
    """Ranks that the launcher's options may start on all nodes together, ascending: several with --nnodes=MIN:MAX.

    Raises:
        ConfigError: they are no numbers.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("nproc_per_node", "nnodes"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", default="1")
    known, _ = parser.parse_known_args(list(launcher))
    for name, pattern in (("nproc_per_node", r"0*[1-9]\d*"), ("nnodes", r"0*[1-9]\d*(:\d+)?")):
        if not re.fullmatch(pattern, value := getattr(known, name)):
            raise ConfigError(f"--{name}={value} is not a number", f"Give --{name}=8, say.")
    least, _, most = known.nnodes.partition(":")
    if int(most or least) < int(least):
        raise ConfigError(f"--nnodes={known.nnodes} is no range of nodes", "Give --nnodes=1:2, say.")
    return [int(known.nproc_per_node) * nodes for nodes in range(int(least), int(most or least) + 1)]
