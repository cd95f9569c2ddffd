"""A run in memory: what train.py builds, steps through and closes, and what it reports of it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from model import GPT
from pretrain import budget, garbage, host_memory, log
from pretrain.batches import Position
from pretrain.budget import HostPrediction, Prediction
from pretrain.config import Config
from pretrain.corpus import Corpus
from pretrain.divergence import Watch
from pretrain.engine.base import Engine, StepResult
from pretrain.errors import StorageError
from pretrain.generation import sample_text
from pretrain.hardware import describe_machine, device_name, peak_flops
from pretrain.history import LossTracker
from pretrain.keeper import Keeper
from pretrain.ledger import spent_budget
from pretrain.metrics import Metrics
from pretrain.mixture import Mixture
from pretrain.phases import A_STEP, BETWEEN_STEPS, StepTimer
from pretrain.power import EnergyWindow
from pretrain.progress import Progress
from pretrain.ranks import Ranks
from pretrain.read_ahead import ReadAhead
from pretrain.report_page import REPORT_FILE
from pretrain.startup import START
from pretrain.stopping import StopRequest
from pretrain.telemetry import Telemetry

LOOK_EVERY_S = 0.5  # while a batch is waited for: for a signal, and whether data arrives
WAIT_SAID_AFTER_S = 1.0

logger = log.get(__name__)


@dataclass
class Run:
    """Everything a run is made of, as this rank sees it.

    Args:
        device: this rank's.
        model: the bare module inside the engine.
        watch: for divergence.
        total_steps: step at which the run ends.
        prediction: of memory, and on a GPU of speed; None where nobody asked.
        beat: told the number of each step that has ended; the watchdog listens.
        excuse: told that no step can end, and that this is no hang; the watchdog listens.

    Attributes:
        first_step: step at which this process began, or went back to where that is lower.
        peak_flops: of one rank's device, FLOP/s.
        about: what is constant in a run, for metadata.json.
        stopped: whether a signal ended the loop.
        starved: whether the loop ended because raw text could not be prepared any further; see `check_data`.
        spent: which budget ended the loop, in words, or ''.
        timed_steps, timed_seconds: of this process after its first step, which warms up and compiles.
        unrecorded_steps, unrecorded_seconds: since the last record.
        val_loss: of the last validation.
        timer: of the steps.
    """

    config: Config
    ranks: Ranks
    device: torch.device
    corpus: Corpus
    model: GPT
    engine: Engine
    keeper: Keeper
    metrics: Metrics
    telemetry: Telemetry
    history: LossTracker
    watch: Watch
    progress: Progress
    total_steps: int
    prediction: Prediction | HostPrediction | None = None
    stopped: bool = False
    starved: bool = False
    spent: str = ""
    timed_steps: int = 0
    timed_seconds: float = 0.0
    unrecorded_steps: int = 0
    unrecorded_seconds: float = 0.0
    val_loss: float | None = None
    beat: Callable[[int], None] = lambda _step: None
    excuse: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        precision = self.config.train.precision
        self.first_step = self.progress.step
        self.engine.mark = self.telemetry.mark
        self._energy = EnergyWindow()
        self.timer = StepTimer()
        self.peak_flops, source = peak_flops(self.device, precision)
        self.about: dict[str, Any] = {
            "run": self.config.run.name,
            "parameters": self.config.model.n_parameters,
            "engine": self.engine.name,
            "optimizer": self.config.optim.name,
            "world_size": self.ranks.world_size,
            "system_info": {**describe_machine(self.device), "mixed_precision": precision},
        }
        if self.prediction:
            self.about["predicted"] = self.prediction.to_json()
        name = device_name(self.device)
        n_ranks = self.ranks.world_size
        logger.info("engine %s, %s, %d rank%s on %s", self.engine.name, precision, n_ranks, "s" * (n_ranks > 1), name)
        if isinstance(self.corpus.batches, Mixture):
            for line in self.corpus.batches.outlook(self.total_steps):
                logger.info(line)
        logger.info("MFU is against %.2f TFLOP/s a rank (%s)", self.peak_flops / 1e12, source)

    def await_batch(self, stream: ReadAhead[Position], stop: StopRequest) -> None:
        """Begin a step: wait until every rank has its batch, or one is asked to stop (`stopped`), or no more raw text
        can be prepared on a node (`starved`).

        A wait while data arrives, on whatever rank, is no hang. Every rank must call it.
        """
        self.timer.begin()
        self.telemetry.begin_step(self.progress.step + 1)
        started, arrived, waits = time.perf_counter(), self.corpus.arrived, True
        waited_s = 0.0
        with self.phase("data_wait"):
            while waits and not self.stopped and not self.starved:
                is_ready = stream.ready(LOOK_EVERY_S if waited_s else 0.0)
                arrives, arrived = self.corpus.arrived != arrived, self.corpus.arrived
                flags = bool(stop), bool(self.corpus.failure), not is_ready, arrives
                self.stopped, fails, waits, arrives = self.ranks.any_of(*flags)
                self.starved = fails and not self.stopped
                if waits:
                    waited_s = max(time.perf_counter() - started, 1e-9)
                if waited_s >= WAIT_SAID_AFTER_S:
                    self.corpus.tell_wait()
                if waits and arrives:
                    self.excuse()
        START.ended("first batch")

    def check_data(self) -> None:
        """Raise, on every rank, why raw text could not be prepared where the loop ended because of it."""
        if self.starved:
            with self.ranks.together():
                if self.corpus.failure:
                    raise self.corpus.failure

    def advance(self, progress: Progress, step_s: float) -> None:
        """Take over the progress after a step of so many seconds."""
        self.beat(progress.step)
        self.progress = progress
        if START.finish("first step"):
            logger.info("start-up: %s", START)
        steps = progress.step - self.first_step
        with self.timer.apart() if steps == 1 else contextlib.nullcontext():  # what the start has made is no step's
            if garbage.collect_after(steps):
                host_memory.give_back()
        self.unrecorded_steps += 1
        self.unrecorded_seconds += step_s
        if progress.step > self.first_step + 1:
            self.timed_steps += 1
            self.timed_seconds += step_s
        if self.prediction and progress.step == self.first_step + budget.MEASURED_AFTER_STEPS:
            self.prediction.compare()

    @property
    def loss_scale(self) -> float | None:
        """The loss scale of fp16; None in other precisions, which have none."""
        return self.engine.state().loss_scale if self.config.train.precision == "fp16" else None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The phase that a block is, see phases.PHASES: for the telemetry, and for the time of the steps."""
        apart = self.timer.apart() if name in BETWEEN_STEPS else contextlib.nullcontext()
        with apart, self.telemetry.phase(name):
            yield

    def mfu(self, tokens_per_second: float) -> dict[str, float]:
        """Model FLOPs utilization, 0 to 1: useful FLOP/s over the peak of all devices (PaLM, appendix B).

        Returns:
            mfu, which counts the whole square of attention, as most publish it; mfu_causal, which counts half of it.
        """
        rate, model = tokens_per_second / (self.peak_flops * self.ranks.world_size), self.config.model
        return {"mfu": rate * model.flops_per_token, "mfu_causal": rate * model.causal_flops_per_token}

    def record(self, result: StepResult, loss: float, lr: float, val_loss: float | None) -> None:
        """Record the step just taken; times and rates are means over the steps since the record before. Every rank must
        call it.

        Args:
            loss: mean over the ranks, nats per token.
            val_loss: where this step was validated.
        """
        progress, steps = self.progress, self.unrecorded_steps
        step_s = self.unrecorded_seconds / steps
        self.unrecorded_steps, self.unrecorded_seconds = 0, 0.0
        tokens_per_second = self.config.tokens_per_step / step_s
        self.history.update(progress.step, loss, lr)
        self._energy.add(self._energy_j(), steps * self.config.tokens_per_step)
        figures = self.telemetry.figures()
        if figures:
            figures["other_ms"] = max(step_s * 1e3 - sum(figures[f"{phase}_ms"] for phase in A_STEP), 0.0)
        self.metrics.record(
            {
                "step": progress.step,
                "epoch": progress.position.epoch,
                "files": progress.files,
                "tokens": progress.tokens,
                "loss": loss,
                "val_loss": val_loss,
                **({} if self.model.z_loss is None else {"z_loss": float(self.model.z_loss)}),
                **self.shares(),
                "lr": lr,
                "grad_norm": result.grad_norm,
                "loss_scale": self.loss_scale,
                "skipped_updates": progress.skipped_updates,
                "tokens_per_second": tokens_per_second,
                "steps_per_second": 1 / step_s,
                "step_ms": step_s * 1e3,
                **self.mfu(tokens_per_second),
                **figures,
                **self._energy.figures(at_once=progress.step == self.total_steps),
            }
        )

    def shares(self) -> dict[str, float]:
        """share/NAME and tokens/NAME of each source of a mixture: its part of what was read, and the target tokens.

        Read are also the windows that a roll-back passed over.
        """
        batches = self.corpus.batches
        given = batches.windows_of(self.progress.position) if isinstance(batches, Mixture) else {}
        total, seq_len = sum(given.values()) or 1, self.config.model.seq_len
        found: dict[str, float] = {f"share/{name}": count / total for name, count in given.items()}
        return found | {f"tokens/{name}": count * seq_len for name, count in given.items()}

    def _energy_j(self) -> float | None:
        """Joules that the devices of all nodes have used since this process began; None where one node can't tell."""
        own, ranks = self.telemetry.energy_j, self.ranks
        if ranks.world_size == ranks.local_world_size:
            return own
        speaks = ranks.local_rank == 0
        total = ranks.mean((math.nan if own is None else own) if speaks else 0.0) * ranks.world_size
        return None if math.isnan(total) else total

    def record_energy(self) -> None:
        """Record the energy of which no record has told, at the end of a run. Every rank must call it."""
        self._energy.add(self._energy_j(), 0)
        if joules := self._energy.rest():
            self.metrics.event("energy", step=self.progress.step, energy_j=joules)

    def check_budget(self) -> None:
        """Set `spent` where the run has taken what it may take. Every rank must call it."""
        train = self.config.train
        if not (train.budget_hours or train.budget_usd) or self.progress.step >= self.total_steps:
            return
        spent = spent_budget(self.metrics.ledger, train, time.time()) if self.ranks.is_first else ""
        if self.ranks.any(bool(spent)):
            self.spent = self.ranks.from_first({"spent": spent})["spent"]

    def ledger(self) -> dict[str, Any]:
        """What the run has taken over all its starts; for rank 0, which has the books."""
        totals = self.metrics.ledger.totals(time.time(), self.config.train.price_per_gpu_hour)
        wandb = {"wandb_run_id": run_id} if (run_id := self.metrics.wandb_run_id) else {}
        return {**totals, "step": self.progress.step, "tokens": self.progress.tokens, **wandb}

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
            "finished": not (self.stopped or self.starved or self.spent),
            "steps": progress.step,
            "steps_of_this_process": progress.step - self.first_step,
            "tokens": progress.tokens,
            "files_processed": progress.files,
            **self.shares(),
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
            **(self.mfu(speed) if speed else {"mfu": None, "mfu_causal": None}),
            "step_seconds": progress.seconds,
            "startup_seconds": START.rounded,
            "ledger": self.ledger(),
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
        ended_early = self.stopped or self.starved or self.spent
        again += ", and a larger budget" if self.spent else ""
        return [
            *(page if self.config.log.report else []),
            ("see the curves", f"tensorboard --logdir {self.config.log.dir}"),
            ("go on", again) if ended_early else ("train longer", f"{again} --max-steps {2 * self.total_steps}"),
            ("look at the real job", "DATA=gs://… CHECKPOINTS=gs://… bash prod_train.sh --dry-run"),
        ]
