"""All that is wrong with a config and can be known without torch, a GPU or a bucket, found at once."""

from __future__ import annotations

import math
import re
from pathlib import Path

from pretrain.config import BatchConfig, CheckpointConfig, Config, DataConfig, LogConfig, TrainConfig, profile_steps
from pretrain.model_config import ModelConfig, model_problems
from pretrain.optim_config import optim_problems

NO_SOURCE = "data.source is empty: give --data gs://bucket/prefix or a folder of .npz shards, or data.sources"


def validate(config: Config, world_size: int) -> list[str]:
    """Every problem of a resolved config on `world_size` ranks that can be known without torch, a GPU or a bucket."""
    problems = [
        *model_problems(config.model),
        *_batch_problems(config.batch.settled, world_size),
        *optim_problems(config.optim, config.engine.name),
        *_range_problems(config),
    ]
    problems += _source_problems(config.data, config.train) + _data_problems(config.data)
    problems += _raw_text_problems(config.data, config.train)
    problems += _mask_problems(config.data, config.model, config.train)
    problems += _budget_problems(config.train) + _profile_problems(config.log)
    problems += _fp8_problems(config)
    if config.train.compile_mode != "default" and not config.train.compiles:
        problems.append(f"train.compile_mode {config.train.compile_mode} means nothing without --compile")
    return problems + _place_problems(config.checkpoint.url) + _same_place_problems(config.checkpoint)


def _budget_problems(train: TrainConfig) -> list[str]:
    amounts = ("budget_hours", "budget_usd", "price_per_gpu_hour")
    problems = [
        f"train.{name} is {value:g}, expected a positive number, or 0 for none"
        for name in amounts
        if (value := getattr(train, name)) < 0
    ]
    if train.budget_usd > 0 and train.price_per_gpu_hour == 0:
        what = "train.budget_usd is set and train.price_per_gpu_hour is not"
        problems.append(f"{what}: give --price_per_gpu_hour, what a GPU costs for an hour")
    return problems


def _profile_problems(log: LogConfig) -> list[str]:
    try:
        steps = profile_steps(log.profile)
    except ValueError as error:
        return [str(error)]
    return ["log.profile needs log.telemetry"] if steps and not log.telemetry else []


def _source_problems(data: DataConfig, train: TrainConfig) -> list[str]:
    if not data.sources:
        return [] if data.source else [NO_SOURCE]
    names = [each.title for each in data.sources]
    rules = [
        (data.source, f"data.source {data.source} and data.sources exclude each other: leave out one"),
        (len(names) < 2, "data.sources has one source, which is no mixture: give it as data.source"),
        (
            not (train.max_steps or train.max_tokens),
            "train.epochs means nothing for data.sources, whose sources end at different times: give train.max_tokens "
            "or train.max_steps",
        ),
        *((not each.source, f"data.sources: one of weight {each.weight} has no source") for each in data.sources),
        *(
            (not 0 < each.weight < math.inf, f"data.sources: {each.title} has weight {each.weight}, expected above 0")
            for each in data.sources
        ),
        *(
            (names.count(name) > 1, f"data.sources: {names.count(name)} are called {name!r}: give each a name")
            for name in sorted(set(names))
        ),
        *(
            (
                each.source and not re.fullmatch(r"[\w.-]+", each.title),
                f"data.sources: {each.source} can't be called {each.title!r}: give it a name of letters, digits, _, . "
                "and -",
            )
            for each in data.sources
        ),
    ]
    return [problem for broken, problem in rules if broken]


def _raw_text_problems(data: DataConfig, train: TrainConfig) -> list[str]:
    if data.prepares_ahead and not data.sources and not (train.max_steps or train.max_tokens):
        what = "train.epochs can't be counted in steps while raw text is still being prepared: give --max-tokens or"
        first = "or have it prepared first, with --data.raw_ahead false or by python scripts/prepare_data.py"
        return [f"{what} --max-steps, {first}"]
    return []


def _mask_problems(data: DataConfig, model: ModelConfig, train: TrainConfig) -> list[str]:
    rules = [
        (
            data.eot_token_id >= model.vocab_size or data.eot_token_id < -1,
            f"data.eot_token_id {data.eot_token_id} must be below model.vocab_size {model.vocab_size}, or -1",
        ),
        (
            data.eot_token_id >= 0 and not data.document_mask,
            f"data.eot_token_id {data.eot_token_id} means nothing without --data.document_mask true",
        ),
        (
            model.attention == "flex" and not data.document_mask,
            "model.attention flex is for --data.document_mask true: take auto, flash or sdpa",
        ),
        (
            model.attention == "flex" and model.dropout > 0,
            f"model.attention flex knows no dropout: set model.dropout {model.dropout} to 0, or take auto or sdpa",
        ),
        (
            model.attention == "flash" and data.document_mask and train.compiles,
            "model.attention flash keeps documents apart in eager mode only: no train.compile, no fp8; or take auto",
        ),
    ]
    return [problem for broken, problem in rules if broken]


def _same_place_problems(checkpoint: CheckpointConfig) -> list[str]:
    scheme, separator, rest = checkpoint.url.partition("://")
    if not checkpoint.url or (separator and scheme not in ("file", "local")):
        return []
    here, there = Path(checkpoint.dir), Path(rest if separator else checkpoint.url)
    if here.expanduser().resolve() != there.expanduser().resolve():
        return []
    return [f"checkpoint.url {checkpoint.url} is checkpoint.dir: each commit there would look like another trainer's"]


def _place_problems(checkpoint_url: str) -> list[str]:
    scheme, separator, _ = checkpoint_url.partition("://")
    if not separator or scheme in ("gs", "file", "local"):
        return []
    why = "a commit needs a creation that fails where the name is taken, and fsspec promises none"
    return [f"checkpoint.url {checkpoint_url}: {why}: give gs://bucket/prefix or a folder (data.source may be there)"]


def _batch_problems(batch: BatchConfig, world_size: int) -> list[str]:
    if batch.global_size < 1 or batch.micro_size < 1:
        return [f"batch.global_size {batch.global_size} and batch.micro_size {batch.micro_size} must be at least 1"]
    per_pass = batch.micro_size * world_size
    if batch.global_size % per_pass:
        fits = [m for m in range(1, batch.global_size + 1) if batch.global_size % (m * world_size) == 0]
        mend = (
            f"set batch.micro_size to one of {fits}"
            if fits
            else f"set batch.global_size to a multiple of the {world_size} ranks"
        )
        return [
            f"batch.global_size {batch.global_size} is not divisible by micro_size {batch.micro_size} "
            f"× {world_size} ranks = {per_pass}: {mend}"
        ]
    return []


def _data_problems(data: DataConfig) -> list[str]:
    rules = [
        (data.max_files < 0, f"data.max_files {data.max_files} must not be negative"),
        (data.shuffle_shards < 1, f"data.shuffle_shards {data.shuffle_shards} must be at least 1"),
        (data.download_workers < 1, f"data.download_workers {data.download_workers} must be at least 1"),
        (data.prefetch_shards < 0, f"data.prefetch_shards {data.prefetch_shards} must not be negative"),
        (
            data.tokenizer_num_workers < 1,
            f"data.tokenizer_num_workers {data.tokenizer_num_workers} must be at least 1",
        ),
        (data.raw_shard_tokens < 1, f"data.raw_shard_tokens {data.raw_shard_tokens} must be at least 1"),
        (data.cache_gb < 0, f"data.cache_gb {data.cache_gb} must not be negative"),
    ]
    return [problem for broken, problem in rules if broken]


def _fp8_problems(config: Config) -> list[str]:
    """What fp8 can't do: the sides of each matrix that it multiplies are multiples of 16, the batch's tokens too."""
    if config.train.precision != "fp8":
        return []
    problems = []
    if config.engine.name == "deepspeed":
        problems.append(
            "train.precision is fp8, which engine.name deepspeed does not train in: choose --engine ddp or fsdp"
        )
    if config.model.n_layer < 3:
        what = f"train.precision is fp8, but the first and the last of model.n_layer {config.model.n_layer} blocks stay"
        problems.append(f"{what} in bf16, and none is left: choose --precision bf16")
    if config.batch.is_auto and config.model.seq_len % 16:
        what = f"multiples of 16 tokens, and batch.micro_size auto a model.seq_len of such, not {config.model.seq_len}"
        problems.append(f"train.precision is fp8, which needs {what}")
    elif config.batch.micro_size * config.model.seq_len % 16:
        what = f"batch.micro_size {config.batch.micro_size} × model.seq_len {config.model.seq_len} tokens"
        problems.append(f"train.precision is fp8, which needs a multiple of 16 tokens, not {what}")
    return problems


def _range_problems(config: Config) -> list[str]:
    """Fields outside the range in which they mean something."""
    c = config
    rules = [
        (min(c.train.max_steps, c.train.max_tokens) < 0, "train.max_steps and train.max_tokens must not be negative"),
        (c.train.epochs <= 0, f"train.epochs {c.train.epochs} must be positive"),
        (c.train.eval_interval < 0, f"train.eval_interval {c.train.eval_interval} must not be negative"),
        (c.train.eval_sequences < 1, f"train.eval_sequences {c.train.eval_sequences} must be at least 1"),
        (c.train.max_skipped < 1, f"train.max_skipped {c.train.max_skipped} must be at least 1"),
        (c.train.max_rollbacks < 0, f"train.max_rollbacks {c.train.max_rollbacks} must not be negative"),
        (c.train.spike_threshold < 0, f"train.spike_threshold {c.train.spike_threshold} must not be negative"),
        (c.train.spike_window < 8, f"train.spike_window {c.train.spike_window} must be at least 8"),
        (c.train.hang_timeout_s < 0, f"train.hang_timeout_s {c.train.hang_timeout_s} must not be negative"),
        (c.train.timeout_minutes < 1, f"train.timeout_minutes {c.train.timeout_minutes} must be at least 1"),
        (c.engine.initial_loss_scale < 1, f"engine.initial_loss_scale {c.engine.initial_loss_scale} must be ≥ 1"),
        (c.engine.loss_scale_window < 1, f"engine.loss_scale_window {c.engine.loss_scale_window} must be at least 1"),
        (c.checkpoint.every_files < 0, f"checkpoint.every_files {c.checkpoint.every_files} must not be negative"),
        (c.checkpoint.every_steps < 0, f"checkpoint.every_steps {c.checkpoint.every_steps} must not be negative"),
        (c.checkpoint.keep < 0, f"checkpoint.keep {c.checkpoint.keep} must not be negative"),
        (c.checkpoint.max_waiting < 1, f"checkpoint.max_waiting {c.checkpoint.max_waiting} must be at least 1"),
        (c.storage.deadline_s <= 0, f"storage.deadline_s {c.storage.deadline_s} must be positive"),
        (c.storage.max_backoff_s <= 0, f"storage.max_backoff_s {c.storage.max_backoff_s} must be positive"),
        (c.storage.timeout_s <= 0, f"storage.timeout_s {c.storage.timeout_s} must be positive"),
        (c.storage.upload_workers < 1, f"storage.upload_workers {c.storage.upload_workers} must be at least 1"),
        (c.log.sample_tokens < 1, f"log.sample_tokens {c.log.sample_tokens} must be at least 1"),
        (c.log.interval < 1, f"log.interval {c.log.interval} must be at least 1"),
        ("/" in c.run.name or c.run.name.startswith("."), f"run.name {c.run.name!r} must be a plain folder name"),
    ]
    return [problem for broken, problem in rules if broken]
