"""A run in memory: what train.py builds, steps through and closes, and what it reports of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from model import GPT
from pretrain import budget, log
from pretrain.budget import Prediction
from pretrain.config import Config
from pretrain.corpus import Corpus
from pretrain.divergence import Watch
from pretrain.engine.base import Engine, StepResult
from pretrain.errors import StorageError
from pretrain.generation import sample_text
from pretrain.hardware import GpuMonitor, describe_machine, device_name, peak_flops
from pretrain.history import LossTracker
from pretrain.keeper import Keeper
from pretrain.log_uploads import open_log_uploads
from pretrain.metrics import Metrics
from pretrain.plan import make_setup
from pretrain.progress import Progress
from pretrain.ranks import Ranks
from pretrain.report_page import REPORT_FILE, ReportSink

logger = log.get(__name__)


@dataclass
class Run:
    """Everything a run is made of, as this rank sees it.

    Args:
        device: this rank's.
        model: the bare module inside the engine.
        watch: for divergence.
        total_steps: step at which the run ends.
        prediction: of memory and speed; None on a CPU.
        beat: told the number of each step that has ended; the watchdog listens.

    Attributes:
        first_step: step at which this process began, or went back to where that is lower.
        flops_per_token: of training, model FLOPs.
        peak_flops: of one rank's device, FLOP/s.
        about: what is constant in a run, for metadata.json.
        stopped: whether a signal ended the loop.
        timed_steps, timed_seconds: of this process after its first step, which warms up and compiles.
        val_loss: of the last validation.
    """

    config: Config
    ranks: Ranks
    device: torch.device
    corpus: Corpus
    model: GPT
    engine: Engine
    keeper: Keeper
    metrics: Metrics
    history: LossTracker
    watch: Watch
    progress: Progress
    total_steps: int
    prediction: Prediction | None = None
    stopped: bool = False
    timed_steps: int = 0
    timed_seconds: float = 0.0
    val_loss: float | None = None
    beat: Callable[[int], None] = lambda _step: None

    def __post_init__(self) -> None:
        precision = self.config.train.precision
        self.first_step = self.progress.step
        self.flops_per_token = self.config.model.flops_per_token
        self.monitor = GpuMonitor(self.device)
        self.peak_flops, source = peak_flops(self.device, precision)
        self.about: dict[str, Any] = {
            "run": self.config.run.name,
            "parameters": self.config.model.n_parameters,
            "engine": self.engine.name,
            "world_size": self.ranks.world_size,
            "system_info": {**describe_machine(self.device), "mixed_precision": precision},
        }
        if self.prediction:
            self.about["predicted"] = self.prediction.to_json()
        if self.monitor.problem:
            logger.warning("no GPU figures in the metrics: %s", self.monitor.problem)
        if self.ranks.is_first and self.config.log.report:
            self.metrics.add(ReportSink(self.metrics.folder))
        if self.ranks.is_first and self.config.log.upload and (url := self.config.checkpoint.url):
            self.metrics.add(open_log_uploads(self.metrics.folder, url, self.config.storage, self.config.run.name))
        name = device_name(self.device)
        n_ranks = self.ranks.world_size
        logger.info("engine %s, %s, %d rank%s on %s", self.engine.name, precision, n_ranks, "s" * (n_ranks > 1), name)
        logger.info("MFU is against %.2f TFLOP/s a rank (%s)", self.peak_flops / 1e12, source)

    def advance(self, progress: Progress, step_s: float) -> None:
        """Take over the progress after a step of so many seconds."""
        self.beat(progress.step)
        self.progress = progress
        if progress.step > self.first_step + 1:
            self.timed_steps += 1
            self.timed_seconds += step_s
        if self.prediction and progress.step == self.first_step + budget.MEASURED_AFTER_STEPS:
            self.prediction.compare()

    @property
    def loss_scale(self) -> float | None:
        """The loss scale of fp16; None in other precisions, which have none."""
        return self.engine.state().loss_scale if self.config.train.precision == "fp16" else None

    def mfu(self, tokens_per_second: float) -> float:
        """Model FLOPs utilization, 0 to 1: useful FLOP/s over the peak of all devices (PaLM, appendix B)."""
        return tokens_per_second * self.flops_per_token / (self.peak_flops * self.ranks.world_size)

    def record(
        self, result: StepResult, loss: float, lr: float, step_s: float, data_wait_s: float, val_loss: float | None
    ) -> None:
        """Record the step just taken.

        Args:
            loss: mean over the ranks, nats per token.
            step_s: of the whole step, the wait for its batch included.
            val_loss: where this step was validated.
        """
        progress, tokens_per_second = self.progress, self.config.tokens_per_step / step_s
        self.history.update(progress.step, loss, lr)
        self.metrics.record(
            {
                "step": progress.step,
                "epoch": progress.position.epoch,
                "files": progress.files,
                "tokens": progress.tokens,
                "loss": loss,
                "val_loss": val_loss,
                "lr": lr,
                "grad_norm": result.grad_norm,
                "loss_scale": self.loss_scale,
                "skipped_updates": progress.skipped_updates,
                "tokens_per_second": tokens_per_second,
                "steps_per_second": 1 / step_s,
                "step_ms": step_s * 1e3,
                "data_wait_ms": data_wait_s * 1e3,
                "mfu": self.mfu(tokens_per_second),
                **self.monitor.sample(),
            }
        )

    def sample(self) -> None:
        """Have the model continue `log.sample_prompt`, where there is one. Every rank must call it."""
        prompt, step, tokenizer = self.config.log.sample_prompt, self.progress.step, self.corpus.tokenizer
        if not prompt or tokenizer is None:
            return
        text = sample_text(self.model, tokenizer, prompt, self.config.log.sample_tokens, self.config.run.seed)
        self.metrics.event("sample", step=step, prompt=prompt, text=text)
        if self.ranks.is_first:
            logger.info("step %d, sample: %s", step, f"{prompt}{text}".replace("\n", "⏎"))

    def record_events(self) -> None:
        """Record what happened to checkpoints in the background."""
        for kind, fields in self.keeper.events():
            self.metrics.event(kind, step=self.progress.step, **fields)

    def summary(self) -> dict[str, Any]:
        """logs/{run}/summary.json: what the run came to over all its restarts; rates are of this process."""
        progress, keeper, checkpoint = self.progress, self.keeper, self.config.checkpoint
        speed = self.timed_steps * self.config.tokens_per_step / self.timed_seconds if self.timed_steps else None
        return {
            "finished": not self.stopped,
            "steps": progress.step,
            "steps_of_this_process": progress.step - self.first_step,
            "tokens": progress.tokens,
            "files_processed": progress.files,
            "shards_skipped": len(self.corpus.skipped_shards),
            "skipped_shard_names": list(self.corpus.skipped_shards),
            "updates_skipped": progress.skipped_updates,
            "rollbacks": progress.rollbacks,
            "windows_passed_over": progress.windows_passed_over,
            "tokens_passed_over": progress.windows_passed_over * self.config.model.seq_len,
            "first_loss": self.history.first_loss,
            "last_loss": self.history.current_loss,
            "val_loss": self.history.validation_loss,
            "unigram_entropy": self.corpus.unigram_entropy,
            "loss_scale": self.loss_scale,
            "tokens_per_second": speed,
            "mfu": self.mfu(speed) if speed else None,
            "step_seconds": progress.seconds,
            **self.about,
            "checkpoints_committed": len(keeper.committed),
            "checkpoints_verified": self._count_verified(),
            "checkpoints_skipped": len(keeper.skipped),
            "checkpoints_dropped": len(keeper.dropped),
            "uploads_failed": len(keeper.uploads_failed),
            "checkpoints": f"{(checkpoint.url or checkpoint.dir).rstrip('/')}/{self.config.run.name}",
            "logs": str(self.metrics.folder),
        }

    def _count_verified(self) -> int | None:
        """Checkpoints that verify now; None where the bucket can't be asked, which must not cost a run its summary."""
        try:
            return len(self.keeper.verified())
        except StorageError as error:
            logger.warning("the checkpoints could not be verified: %s", error)
            return None

    def next_commands(self) -> list[tuple[str, str]]:
        """(what, command) that a user may want now."""
        page = [("see the whole run, in a browser", str(self.metrics.folder / REPORT_FILE))]
        again = f"the same command with --run {self.config.run.name} --resume auto"
        return [
            *(page if self.config.log.report else []),
            ("see the curves", f"tensorboard --logdir {self.config.log.dir}"),
            ("go on", again) if self.stopped else ("train longer", f"{again} --max-steps {2 * self.total_steps}"),
            ("look at the real job", "DATA=gs://… CHECKPOINTS=gs://… bash prod_train.sh --dry-run"),
        ]


def check_memory(config: Config, device: torch.device, ranks: Ranks, force: bool) -> Prediction | None:
    """See `budget.check_memory`."""
    engine, optim, precision = config.engine, config.optim, config.train.precision
    setup = make_setup(config.model, config.batch, engine, optim, precision, ranks.world_size)
    return budget.check_memory(setup, device, ranks, force)
