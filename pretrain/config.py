"""Every setting of a run as one tree of frozen dataclasses, and the check that finds all its problems at once.

Nothing here imports torch: a wrong setting is reported in well under a second. Each part of the trainer is handed
its own section, never the whole tree. How the command line and YAML become this tree is ``arguments.py``.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Literal

from pretrain.model_config import ModelConfig
from pretrain.optim_config import OptimConfig as OptimConfig  # for those who import sections from here


@dataclass(frozen=True)
class RunConfig:
    """The run as a whole."""

    name: str = ""
    """Name of the run: its folder in logs, in checkpoints and in the bucket. Empty: the name of the config file."""
    seed: int = 1234
    """Seed of the initial weights, of the data order and of dropout."""


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    source: str
    """Where its shards are, as `data.source`."""
    weight: float
    """Its part of the tokens, in proportion to the others'."""
    name: str = ""
    """What metrics call it; empty: the last part of `source`."""

    @property
    def title(self) -> str:
        """Its name, given or not."""
        return self.name or self.source.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and in which order."""

    source: str = ""
    """Where the training shards are: gs://bucket/prefix, a folder, or another url that fsspec reads, such as s3://…;
    with `tokenizer` raw text: a file, a folder or a glob, also gs:// and hf://datasets/…"""
    sources: tuple[SourceConfig, ...] = ()
    """Instead of `source`, a mixture: [{source: gs://b/web, weight: 0.7}, {source: gs://b/code, weight: 0.3}]"""
    pattern: str = "*.npz"
    """Which files under `source` are shards; matched against the file's name, in nested folders too."""
    val_source: str = ""
    """Where the validation shards are; empty: no validation."""
    max_files: int = 0
    """Use only the first so many shards of a source by name; 0: all."""
    cache_dir: str = "cache"
    """Folder of the verified, memory-mapped copies of the shards."""
    pad_token_id: int = -1
    """Token id that pads rows in shards with neither a mask nor lengths; -1: rows are not padded."""
    on_bad_shard: Literal["stop", "skip"] = "stop"
    """What a damaged shard does: stop the run, or be left out, counted and named in the summary."""
    shuffle_shards: int = 1
    """Windows are shuffled inside groups of so many shards."""
    tokenizer: str = ""
    """Of raw text: a tokenizer.json, a folder with one, or tiktoken:NAME. Sources are then raw text, `val_source`
    too, and prepared into shards below `cache_dir`; empty: they are shards."""
    tokenizer_num_workers: int = 4
    """Processes of a node that prepare raw text."""
    raw_ahead: bool = True
    """Training begins when the first shards of raw text are made, and its first epoch takes them in that order; false:
    all of it is prepared before the first step, and every epoch has a seeded order of shards."""
    raw_shard_tokens: int = 10_000_000
    """Tokens of a shard that raw text is prepared into."""
    text_key: str = "text"
    """Key or column of the text in raw text."""
    download_workers: int = 8
    """Parallel downloads per node."""
    prefetch_shards: int = 4
    """Shards that are fetched ahead of those which are trained on, in the order of their turn."""
    cache_gb: float = 0.0
    """Bound on a node's `cache_dir`, in GB (10^9 bytes): the least recently used shards make room; 0: no bound."""
    document_mask: bool = False
    """Attention never crosses a document, and positions restart with each."""
    eot_token_id: int = -1
    """Token id that ends a document, for `document_mask`; -1: the data's manifest.json tells it."""

    @property
    def prepares_ahead(self) -> bool:
        """Whether shards are made of raw text while they are trained on."""
        return bool(self.tokenizer) and self.raw_ahead


@dataclass(frozen=True)
class BatchConfig:
    """Sequences in a step. Accumulation is derived: global = micro × accumulation × ranks."""

    global_size: int = 128
    """Sequences in one optimizer step, over all ranks."""
    micro_size: int = 8
    """Sequences in one forward pass of one rank; auto (or 0): the largest that fits, found at start."""

    @property
    def is_auto(self) -> bool:
        """Whether the micro batch is still to be chosen."""
        return self.micro_size == 0

    @property
    def settled(self) -> BatchConfig:
        """The same; where the micro batch is still to be chosen, with the least that it can be."""
        return replace(self, micro_size=1) if self.is_auto else self

    def accumulation(self, world_size: int) -> int:
        """Micro-steps of each rank in one optimizer step."""
        return self.global_size // (self.micro_size * world_size)


@dataclass(frozen=True)
class TrainConfig:
    """How long and how exactly to train."""

    max_steps: int = 0
    """Optimizer steps; 0: from `max_tokens`."""
    max_tokens: int = 0
    """Tokens to train on; 0: from `epochs`."""
    epochs: float = 1.0
    """Passes over the shards where neither steps nor tokens are given."""
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    """Compute precision. Master weights and optimizer state are fp32 always; fp16 scales the loss dynamically; fp8 is
    bf16 with the products inside the blocks in fp8 (torchao, compute capability 8.9 or more), and always compiled."""
    compile: bool = False
    """Compile the model with torch.compile."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """How: reduce-overhead records CUDA graphs, for small models whose kernels are shorter than their launch;
    max-autotune also tries the matrix kernels out, which takes minutes at the first start."""
    deterministic: bool = False
    """Only deterministic kernels, where torch has them: slower, bit for bit repeatable on a GPU too."""
    eval_interval: int = 0
    """Steps between validations; 0: only at the end."""
    eval_sequences: int = 64
    """Validation sequences of `model.seq_len` tokens in one validation."""
    max_skipped: int = 100
    """Updates in a row that may be skipped because they were not finite, before the run goes back to its last good
    checkpoint."""
    max_rollbacks: int = 2
    """Times that a run goes back to its last good checkpoint and passes over the data that made it diverge; then it
    stops (exit 6)."""
    spike_threshold: float = 0.0
    """Robust z-score of the loss above which it counts as a spike and the run goes back, as after `max_skipped`; 0:
    spikes are left alone. 8 or more is a sensible value."""
    spike_window: int = 64
    """Steps before it that a loss is compared with."""
    hang_timeout_s: float = 600.0
    """Seconds without a step after which a rank writes the stacks of its threads to the log and ends, for the
    supervisor to start again; longer than the slowest step with its validation and its save. 0: it waits for ever."""
    timeout_minutes: int = 30
    """How long a rank waits for the others before it gives up."""

    @property
    def compiles(self) -> bool:
        """Whether the model is compiled: fp8 is nothing without."""
        return self.compile or self.precision == "fp8"

    budget_hours: float = 0.0
    """Hours that the run may take over all its starts; then it saves and ends (exit 0). 0: no limit."""
    budget_usd: float = 0.0
    """What the run may cost over all its starts at `price_per_gpu_hour`; then it saves and ends (exit 0). 0: no
    limit."""
    price_per_gpu_hour: float = 0.0
    """What one GPU costs for an hour, each rank counting as one; 0: unknown."""


@dataclass(frozen=True)
class EngineConfig:
    """What runs the forward pass, the backward pass and the update."""

    name: Literal["deepspeed", "ddp", "fsdp", "single", "native"] = "deepspeed"
    """deepspeed: ZeRO; ddp: every rank holds everything; fsdp: ranks share everything (FSDP2); single: one rank;
    native: single on one rank, ddp on several."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed divides among ranks: 0 nothing, 1 master weights and moments, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """DeepSpeed keeps master weights and moments in host memory and updates them there: slower, for want of memory."""
    fsdp_shard: Literal["full", "hybrid"] = "full"
    """full: FSDP shares over all ranks; hybrid: over the ranks of a node, and each node holds everything (HSDP)."""
    fsdp_reduce: Literal["step", "micro_step"] = "step"
    """step: FSDP reduces gradients once a step and keeps whole ones in fp32 until then; micro_step: after each
    micro-batch, and keeps its share alone."""
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
    when_busy: Literal["wait", "skip"] = "wait"
    """A save that falls due while the one before is still being written: training waits, or this one is left out."""
    archive: Literal["none", "tar", "tar.gz", "tar.zst"] = "none"
    """Files of a checkpoint in the bucket: as they are, in parallel, or packed into one archive."""
    max_waiting: int = 5
    """Checkpoints kept here that could not be uploaded yet; beyond, the oldest go, but never the newest or the best."""


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
    report: bool = True
    """Draw report.html, one page of the whole run, when it ends."""
    upload: bool = True
    """Copy the logs beside the checkpoints of `checkpoint.url`, after each commit and at the end."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases; offline where no API key is set."""
    sample_prompt: str = ""
    """Text that the model continues at every validation, shown and logged; empty: no samples."""
    sample_tokens: int = 64
    """Tokens of a sample."""
    wandb_project: str = "refocused-gpt"
    """Project on Weights & Biases."""
    telemetry: bool = True
    """Measure phases, memory and power all the time: see docs/telemetry.md. It takes less than 1 % of a step."""
    profile: str = ""
    """START:STOP: steps, both included, that rank 0 traces with torch.profiler into the log folder; empty: none."""
    version_check: bool = True
    """Compare installed packages with requirements.txt at start and refuse to run on others."""


MOST_PROFILED = 100  # a trace of more steps is too big to be opened


def profile_steps(text: str) -> range:
    """The steps, counted from 1, that `log.profile` names; an empty range for an empty text.

    Raises:
        ValueError: it is not START:STOP.
    """
    if not text:
        return range(0)
    start, separator, stop = text.partition(":")
    if not (separator and start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop)):
        raise ValueError(f"log.profile is {text!r}, expected START:STOP, say 10:12 for the steps 10, 11 and 12")
    if int(stop) - int(start) >= MOST_PROFILED:
        raise ValueError(f"log.profile {text} is more than {MOST_PROFILED} steps: a trace of them is too big to open")
    return range(int(start), int(stop) + 1)


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

    def with_document_end(self, token_id: int | None) -> Config:
        """The same with `data.eot_token_id` as the data's manifest told it; None: nobody needs it."""
        if token_id is None:
            return self
        return dataclasses.replace(self, data=dataclasses.replace(self.data, eot_token_id=token_id))

    def total_steps(self, windows_per_epoch: int) -> int:
        """Optimizer steps of the whole run.

        Args:
            windows_per_epoch: sequences in one pass over the shards, used where neither steps nor tokens are given,
                which shards that are still being made don't allow.
        """
        if self.train.max_steps:
            return self.train.max_steps
        if self.train.max_tokens:
            return self.train.max_tokens // self.tokens_per_step
        return math.ceil(self.train.epochs * windows_per_epoch / self.batch.global_size)
