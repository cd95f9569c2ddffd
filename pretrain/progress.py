"""Where a run stands, and what a checkpoint says about it beside its tensors.

trainer_state.json is what a resume needs; metadata.json and training_metrics.json are what people and tools read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, field, fields, replace
from datetime import datetime, timezone
from typing import Any

from pretrain.batches import Position
from pretrain.checkpoint import CheckpointReader
from pretrain.checkpoint_manifest import CheckpointName
from pretrain.config import DataConfig
from pretrain.divergence import Watch
from pretrain.engine.base import EngineState
from pretrain.errors import CheckpointError
from pretrain.files import digest
from pretrain.history import LossTracker
from pretrain.mixture import position_from, shares
from pretrain.shards import ShardSet

TRAINER_STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class SourceOrder:
    """One source of a mixture: its name, its share of the windows ("7/10"), and its shards' names and contents."""

    name: str
    share: str
    fingerprint: str


@dataclass(frozen=True)
class DataOrder:
    """What decides which tokens step k trains on; a resume must find the same, or its position means nothing.

    Args:
        fingerprint: of the shards' names and contents.
        seed, seq_len, shuffle_shards: of the config.
        sources: of a mixture, in the order of their names.
        raw_ahead: whether the first epoch takes the shards in their own order, as raw text is prepared; the fingerprint
            is then of what they are made from.
    """

    fingerprint: str
    seed: int
    seq_len: int
    shuffle_shards: int
    sources: tuple[SourceOrder, ...] = ()
    raw_ahead: bool = False

    @classmethod
    def of(cls, data: DataConfig, shards: Mapping[str, ShardSet], seed: int, seq_len: int) -> DataOrder:
        """Of what was found under each name of `mixture.alone`."""
        how: dict[str, Any] = {"seed": seed, "seq_len": seq_len, "shuffle_shards": data.shuffle_shards}
        how["raw_ahead"] = data.prepares_ahead
        if not data.sources:
            return cls(shards[""].fingerprint, **how)
        parts = shares({each.title: each.weight for each in data.sources})
        sources = tuple(SourceOrder(name, str(parts[name]), each.fingerprint) for name, each in shards.items())
        return cls(digest([astuple(each) for each in sources]), **how, sources=sources)

    def check(self, saved: Mapping[str, Any], checkpoint: str) -> None:
        """Compare with the order that a checkpoint was trained in.

        Raises:
            CheckpointError: naming what differs.
        """
        before = {"raw_ahead": False, **saved}  # a version that didn't know it
        differing = [
            f"{each.name} was {before.get(each.name)} and is {getattr(self, each.name)}"
            for each in fields(self)
            if each.name not in self._told_by_sources(saved) and before.get(each.name) != getattr(self, each.name)
        ]
        differing += self._differing_sources(saved)
        if differing:
            raise CheckpointError(
                f"{checkpoint} was trained in another data order: {'; '.join(differing)}",
                "Resume with the same shards and settings, or start another run with --run NAME.",
            )

    def _told_by_sources(self, saved: Mapping[str, Any]) -> set[str]:
        return {"sources", "fingerprint"} if self.sources or saved.get("sources") else {"sources"}

    def _differing_sources(self, saved: Mapping[str, Any]) -> Iterator[str]:
        """In words, what another mixture has in another way; a checkpoint without one has no sources."""
        before = {each["name"]: each for each in saved.get("sources", ())}
        now = {each.name: asdict(each) for each in self.sources}
        if bool(before) != bool(now):
            yield (
                "it had data.source, and this has data.sources"
                if now
                else ("it had data.sources, and this has data.source")
            )
            return
        yield from (f"source {name} is new" for name in now if name not in before)
        yield from (f"source {name} is gone" for name in before if name not in now)
        for name in sorted(now.keys() & before.keys()):
            if before[name]["share"] != now[name]["share"]:
                yield f"source {name} had a share of {before[name]['share']} and has {now[name]['share']}"
            if before[name]["fingerprint"] != now[name]["fingerprint"]:
                yield f"source {name} has other shards"


@dataclass(frozen=True)
class Progress:
    """Where a run stands at a step boundary.

    Args:
        step: optimizer steps done, skipped updates included.
        position: where the next step's windows begin.
        files: shards taken to the end.
        tokens: target tokens trained on.
        skipped_updates: steps whose update was left out because it was not finite, also those that a roll-back undid.
        seconds: spent in steps, over all restarts; evaluation and waiting for checkpoints not counted.
        rollbacks: times that the run went back to a checkpoint because it diverged.
        windows_passed_over: sequences that were read and are not trained on, because of these.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    files: int = 0
    tokens: int = 0
    skipped_updates: int = 0
    seconds: float = 0.0
    rollbacks: int = 0
    windows_passed_over: int = 0

    @property
    def checkpoint_name(self) -> CheckpointName:
        """The name of a checkpoint taken here."""
        return CheckpointName(self.position.epoch, self.step, self.files)

    def after_step(self, position: Position, files: int, tokens: int, applied: bool, seconds: float) -> Progress:
        """Progress one step later."""
        return replace(
            self,
            step=self.step + 1,
            position=position,
            files=files,
            tokens=self.tokens + tokens,
            skipped_updates=self.skipped_updates + (not applied),
            seconds=self.seconds + seconds,
        )


def checkpoint_documents(
    progress: Progress,
    engine: EngineState,
    history: LossTracker,
    order: DataOrder,
    about: Mapping[str, Any],
    watch: Watch | None = None,
    ledger: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """The JSON documents of a checkpoint, by file name.

    Args:
        about: what is constant in a run (its name, the model, the machine), for metadata.json.
        watch: for divergence.
        ledger: what the run has taken so far, for a resume on a machine without its logs.
    """
    measured = history.state()
    trainer_state = {
        "progress": asdict(progress),
        "engine": engine.to_json(),
        "order": asdict(order),
        "history": measured,
        "divergence": watch.state() if watch else {},
        "ledger": dict(ledger or {}),
    }
    completed = {
        "completed_steps": progress.step,
        "total_epochs": progress.position.epoch,
        "files_processed": progress.files,
        "tokens": progress.tokens,
        "rollbacks": progress.rollbacks,
        "windows_passed_over": progress.windows_passed_over,
        "tokens_passed_over": progress.windows_passed_over * order.seq_len,
    }
    metadata = {
        "step": progress.step,
        "epoch": progress.position.epoch,
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **measured,
        "training_progress": completed,
        **about,
    }
    training_metrics = {"step": progress.step, **measured, "training_progress": completed}
    trees = {TRAINER_STATE_FILE: trainer_state, "metadata.json": metadata, "training_metrics.json": training_metrics}
    return {name: json.dumps(tree, indent=1) + "\n" for name, tree in trees.items()}


def read_progress(
    reader: CheckpointReader, order: DataOrder, history: LossTracker, watch: Watch | None = None
) -> tuple[Progress, EngineState]:
    """What a checkpoint says a resume goes on from; `history` and `watch` take over their own parts.

    What a version before 0.2 did not save (roll-backs, the watch) begins anew.

    Raises:
        CheckpointError: the state is of another version, or of another data order.
    """
    try:
        tree: Mapping[str, Any] = reader.document(TRAINER_STATE_FILE)
        order.check(tree["order"], reader.folder.name)
        saved = dict(tree["progress"])
        progress = Progress(**{**saved, "position": position_from(saved["position"])})
        history.restore(tree["history"])
        if watch:
            watch.restore(tree.get("divergence", {}))
        return progress, EngineState(**tree["engine"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{reader.folder / TRAINER_STATE_FILE} can't be read: {type(error).__name__}: {error}",
            "Resume with the version that wrote it, or from another checkpoint.",
        ) from error


def carried_ledger(reader: CheckpointReader) -> dict[str, Any]:
    """What the run had taken when this checkpoint was saved; {} of a version that did not keep it.

    Raises:
        CheckpointError: trainer_state.json can't be read.
    """
    try:
        tree: Mapping[str, Any] = reader.document(TRAINER_STATE_FILE)
        return dict(tree.get("ledger", {}))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{reader.folder / TRAINER_STATE_FILE} can't be read: {error}") from error


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of one step's randomness (dropout) on one rank; distinct for all that a run can reach."""
    return ((seed % 2**20) << 43) + (step << 16) + rank
