"""Every setting of a run as one tree of frozen dataclasses, and the check that finds all its problems at once.

Nothing here imports torch: a wrong setting is reported in well under a second. Each part of the trainer is handed
its own section, never the whole tree. How the command line and YAML become this tree is ``arguments.py``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

MODEL_SIZES: dict[str, tuple[int, int, int]] = {
    # alias: (n_layer, n_head, d_model); d_ff is 4 × d_model
    "125M": (12, 12, 768),
    "350M": (24, 16, 1024),
    "760M": (24, 16, 1536),
    "1.2B": (24, 16, 2048),
    "1.3B": (24, 16, 2048),
    "3B": (32, 20, 2560),
    "7B": (32, 32, 4096),
    "8B": (36, 32, 4096),
}
VOCAB_MULTIPLE = 128  # tensor cores want a vocabulary divisible by this; the padding rows never get a probability


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    name: str = ""
    """Name of the run: its folder in logs, in checkpoints and in the bucket. Empty: the name of the config file."""
    seed: int = 1234
    """Seed of the initial weights, of the data order and of dropout."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the model. 0 means: taken from `size`."""

    size: str = "1.2B"
    """Alias of a shape: 125M, 350M, 760M, 1.2B, 1.3B, 3B, 7B, 8B. A field below overrides its part of it."""
    n_layer: int = 0
    """Number of blocks."""
    n_head: int = 0
    """Number of attention heads."""
    d_model: int = 0
    """Width of the residual stream."""
    d_ff: int = 0
    """Width of the feed-forward layer; 4 × d_model where it is 0 and the size doesn't say."""
    vocab_size: int = 50257
    """Number of token ids of the tokenizer."""
    seq_len: int = 2048
    """Tokens in a training sequence, and number of learned positions."""
    dropout: float = 0.1
    """Dropout probability on embeddings, attention and residual branches."""
    attention: Literal["auto", "flash", "sdpa", "plain"] = "auto"
    """Attention kernel: the FlashAttention package, torch's fused kernels, or plain matrices; auto takes the best."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """Compile the model with torch.compile."""

    def resolve(self) -> ModelConfig:
        """This config with every 0 replaced by what its `size` gives; an unknown size leaves 0, for validate()."""
        n_layer, n_head, d_model = MODEL_SIZES.get(self.size, (0, 0, 0))
        d_model = self.d_model or d_model
        return dataclasses.replace(
            self,
            n_layer=self.n_layer or n_layer,
            n_head=self.n_head or n_head,
            d_model=d_model,
            d_ff=self.d_ff or 4 * d_model,
        )

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of 128: the rows the embedding really has."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def n_parameters(self) -> int:
        """Exact number of parameters of the resolved shape: the vocabulary not padded, the tied head once."""
        attention = 4 * self.d_model**2 + 4 * self.d_model
        feed_forward = 2 * self.d_model * self.d_ff + self.d_ff + self.d_model
        norms = 4 * self.d_model
        embeddings = (self.vocab_size + self.seq_len) * self.d_model
        return embeddings + self.n_layer * (attention + feed_forward + norms) + 2 * self.d_model


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and in which order."""

    source: str = ""
    """Where the training shards are: gs://bucket/prefix or a folder."""
    pattern: str = "*.npz"
    """Which files under `source` are shards; matched against the file's name, in nested folders too."""
    val_source: str = ""
    """Where the validation shards are; empty: no validation."""
    max_files: int = 0
    """Use only the first so many shards by name; 0: all."""
    cache_dir: str = "cache"
    """Folder of the verified, memory-mapped copies of the shards."""
    pad_token_id: int = -1
    """Token id that pads rows in shards with neither a mask nor lengths; -1: rows are not padded."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """What a damaged shard does: stop the run, or be left out, counted and named in the summary."""
    shuffle_shards: int = 1
    """Windows are shuffled inside groups of so many shards."""
    download_workers: int = 8
    """Parallel downloads per node."""


@dataclass(frozen=True)
class BatchConfig:
    """Sequences in a step. Accumulation is derived: global = micro × accumulation × ranks."""

    global_size: int = 128
    """Sequences in one optimizer step, over all ranks."""
    micro_size: int = 8
    """Sequences in one forward pass of one rank."""

    def accumulation(self, world_size: int) -> int:
        """Micro-steps of each rank in one optimizer step."""
        return self.global_size // (self.micro_size * world_size)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 6e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """The learning rate ends at this fraction of its peak."""
    warmup_steps: int = 2000
    """Optimizer steps of linear warm-up."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the first and the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on matrices only."""
    clip: float = 1.0
    """Largest global gradient norm; 0: no clipping."""


@dataclass(frozen=True)
class TrainConfig:
    """How long and how exactly to train."""

    max_steps: int = 0
    """Optimizer steps; 0: from `max_tokens`."""
    max_tokens: int = 0
    """Tokens to train on; 0: from `epochs`."""
    epochs: float = 1.0
    """Passes over the shards where neither steps nor tokens are given."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Compute precision. Master weights and optimizer state are fp32 always; fp16 scales the loss dynamically."""
    deterministic: bool = False
    """Only deterministic kernels, where torch has them: slower, bit for bit repeatable on a GPU too."""
    eval_interval: int = 0
    """Steps between validations; 0: only at the end."""
    eval_sequences: int = 64
    """Validation sequences of `model.seq_len` tokens in one validation."""
    max_skipped: int = 100
    """Stop (exit 6) after so many updates in a row were skipped because they were not finite."""
    timeout_minutes: int = 30
    """How long a rank waits for the others before it gives up."""


@dataclass(frozen=True)
class EngineConfig:
    """What runs the forward pass, the backward pass and the update."""

    name: Literal["deepspeed", "native"] = "deepspeed"
    """deepspeed: ZeRO-2; native: plain torch, data parallel."""
    ds_config: str = ""
    """JSON of what only DeepSpeed needs to know; empty: the ds_config.json beside train.py."""
    initial_loss_scale: float = 65536.0
    """First loss scale of fp16."""
    loss_scale_window: int = 1000
    """Finite fp16 steps in a row after which the loss scale doubles."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, where to, and what to start from."""

    dir: str = "checkpoints"
    """Local folder of the checkpoints."""
    url: str = ""
    """Where checkpoints are committed: gs://bucket/prefix or a folder; empty: they stay local."""
    every_files: int = 5
    """Save after so many shards; 0: never by files."""
    every_steps: int = 0
    """Save after so many steps; 0: never by steps."""
    keep: int = 3
    """Newest checkpoints kept, here and in the bucket; 0: all."""
    resume: str = ""
    """auto: go on from the newest verified checkpoint, or start where there never was one; NAME: from that one."""
    background_upload: bool = True
    """Upload behind the training; false: training waits for each upload."""


@dataclass(frozen=True)
class StorageConfig:
    """How patiently objects are read and written."""

    deadline_s: float = 300.0
    """Seconds that the retries of one request may take in all."""
    timeout_s: float = 60.0
    """Seconds without a byte after which a request counts as stalled."""
    max_backoff_s: float = 32.0
    """Longest pause between two tries."""
    upload_workers: int = 4
    """Parallel uploads of one rank."""


@dataclass(frozen=True)
class LogConfig:
    """What is recorded, and where it is shown."""

    dir: str = "logs"
    """Folder of metrics.jsonl, training.log, summary.json and the TensorBoard files, one subfolder a run."""
    interval: int = 1
    """Steps between two records."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases; offline where no API key is set."""
    wandb_project: str = "refocused-gpt"
    """Project on Weights & Biases."""
    version_check: bool = True
    """Compare installed packages with requirements.txt at start and refuse to run on others."""


@dataclass(frozen=True)
class Config:
    """The whole tree: one section for each part of the trainer."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def tokens_per_step(self) -> int:
        """Target tokens in one optimizer step, over all ranks."""
        return self.batch.global_size * self.model.seq_len

    def total_steps(self, windows_per_epoch: int) -> int:
        """Optimizer steps of the whole run.

        Args:
            windows_per_epoch: sequences in one pass over the shards, used where neither steps nor tokens are given.
        """
        if self.train.max_steps:
            return self.train.max_steps
        if self.train.max_tokens:
            return self.train.max_tokens // self.tokens_per_step
        return math.ceil(self.train.epochs * windows_per_epoch / self.batch.global_size)


def validate(config: Config, world_size: int) -> list[str]:
    """Every problem of a resolved config on `world_size` ranks that can be known without torch, a GPU or a bucket."""
    return [*_model_problems(config.model), *_batch_problems(config.batch, world_size), *_range_problems(config)]


def _model_problems(model: ModelConfig) -> list[str]:
    problems = []
    if model.size not in MODEL_SIZES:
        explicit = model.n_layer and model.n_head and model.d_model
        if model.size != "custom" or not explicit:
            known = ", ".join(MODEL_SIZES)
            problems.append(
                f"model.size is {model.size!r}; known are {known}, or 'custom' with n_layer, n_head and d_model given"
            )
            return problems
    if model.d_model % model.n_head:
        problems.append(f"model.d_model {model.d_model} is not divisible by model.n_head {model.n_head}")
    return problems


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


def _range_problems(config: Config) -> list[str]:
    """Fields outside the range in which they mean something."""
    c = config
    rules = [
        (not c.data.source, "data.source is empty: give --data gs://bucket/prefix or a folder of .npz shards"),
        (not 2 <= c.model.vocab_size <= 2**32, f"model.vocab_size {c.model.vocab_size} must be in [2, 2**32]"),
        (c.model.seq_len < 1, f"model.seq_len {c.model.seq_len} must be at least 1"),
        (min(c.model.n_layer, c.model.n_head, c.model.d_model, c.model.d_ff) < 0, "model sizes must not be negative"),
        (not 0 <= c.model.dropout < 1, f"model.dropout {c.model.dropout} must be in [0, 1)"),
        (c.data.max_files < 0, f"data.max_files {c.data.max_files} must not be negative"),
        (c.data.shuffle_shards < 1, f"data.shuffle_shards {c.data.shuffle_shards} must be at least 1"),
        (c.data.download_workers < 1, f"data.download_workers {c.data.download_workers} must be at least 1"),
        (c.optim.lr <= 0, f"optim.lr {c.optim.lr} must be positive"),
        (not 0 <= c.optim.min_lr_ratio <= 1, f"optim.min_lr_ratio {c.optim.min_lr_ratio} must be in [0, 1]"),
        (c.optim.warmup_steps < 0, f"optim.warmup_steps {c.optim.warmup_steps} must not be negative"),
        (not all(0 <= b < 1 for b in c.optim.betas), f"optim.betas {c.optim.betas} must be in [0, 1)"),
        (c.optim.weight_decay < 0, f"optim.weight_decay {c.optim.weight_decay} must not be negative"),
        (c.optim.clip < 0, f"optim.clip {c.optim.clip} must not be negative"),
        (min(c.train.max_steps, c.train.max_tokens) < 0, "train.max_steps and train.max_tokens must not be negative"),
        (c.train.epochs <= 0, f"train.epochs {c.train.epochs} must be positive"),
        (c.train.eval_interval < 0, f"train.eval_interval {c.train.eval_interval} must not be negative"),
        (c.train.eval_sequences < 1, f"train.eval_sequences {c.train.eval_sequences} must be at least 1"),
        (c.train.max_skipped < 1, f"train.max_skipped {c.train.max_skipped} must be at least 1"),
        (c.train.timeout_minutes < 1, f"train.timeout_minutes {c.train.timeout_minutes} must be at least 1"),
        (c.engine.initial_loss_scale < 1, f"engine.initial_loss_scale {c.engine.initial_loss_scale} must be ≥ 1"),
        (c.engine.loss_scale_window < 1, f"engine.loss_scale_window {c.engine.loss_scale_window} must be at least 1"),
        (c.checkpoint.every_files < 0, f"checkpoint.every_files {c.checkpoint.every_files} must not be negative"),
        (c.checkpoint.every_steps < 0, f"checkpoint.every_steps {c.checkpoint.every_steps} must not be negative"),
        (c.checkpoint.keep < 0, f"checkpoint.keep {c.checkpoint.keep} must not be negative"),
        (c.storage.deadline_s <= 0, f"storage.deadline_s {c.storage.deadline_s} must be positive"),
        (c.storage.max_backoff_s <= 0, f"storage.max_backoff_s {c.storage.max_backoff_s} must be positive"),
        (c.storage.timeout_s <= 0, f"storage.timeout_s {c.storage.timeout_s} must be positive"),
        (c.storage.upload_workers < 1, f"storage.upload_workers {c.storage.upload_workers} must be at least 1"),
        (c.log.interval < 1, f"log.interval {c.log.interval} must be at least 1"),
        ("/" in c.run.name or c.run.name.startswith("."), f"run.name {c.run.name!r} must be a plain folder name"),
    ]
    return [problem for broken, problem in rules if broken]
