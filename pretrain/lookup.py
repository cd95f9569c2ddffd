"""Which shards, windows and documents fed a step: the way from a step back to its text.

    batches = Batches(shards, seq_len=…, global_size=…, seed=…)
    for window in windows_at(batches, planned(batches, step=120)):
        for part in window.parts:
            print(part.shard.name, part.begin, part.end, part.shard.tokens()[part.begin : part.end])

Without roll-backs the position of a step follows from its number. A roll-back passes over data, so after one it takes
the run's own record (`recorded`).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.batches import Batches, Position
from pretrain.cache import Shard
from pretrain.errors import CheckpointError, ConfigError, ShardError
from pretrain.mixture import position_from
from pretrain.npz import read_npz
from pretrain.storage import LocalStore, ObjectStore


@dataclass(frozen=True)
class Part:
    """A stretch of one shard's tokens [begin, end) inside a window."""

    shard: Shard
    begin: int
    end: int


@dataclass(frozen=True)
class Window:
    """One sequence of a step.

    Args:
        row: in the global batch, from 0; ranks take contiguous rows, rank 0 the first.
        epoch: that it belongs to: a step may cross from one to the next.
        index: in the epoch's stream of shards.
        parts: of its seq_len + 1 tokens, in order; the last token is a target only, and the next window's first.
        source: name of its source in a mixture.
    """

    row: int
    epoch: int
    index: int
    parts: tuple[Part, ...]
    source: str = ""

    def tokens(self) -> np.ndarray:
        """Its tokens (seq_len + 1,)."""
        return np.concatenate([part.shard.tokens()[part.begin : part.end] for part in self.parts])


@dataclass(frozen=True)
class DocumentPart:
    """Tokens [begin, end) of a document of `length` tokens, the `number`-th of its shard from 0."""

    number: int
    begin: int
    end: int
    length: int


@dataclass(frozen=True)
class Detour:
    """What a roll-back did to the order: the run went from one step back to an earlier one, its data did not."""

    from_step: int
    to_step: int
    windows: int


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says of the data.

    Args:
        name: of the checkpoint.
        step: optimizer steps done.
        position: where the next step's windows begin.
        detours: every roll-back before it, the oldest first.
    """

    name: str
    step: int
    position: Position
    detours: tuple[Detour, ...]

    @classmethod
    def from_state(cls, state: Mapping[str, Any], name: str) -> Saved:
        """Out of a checkpoint's trainer_state.json.

        Raises:
            CheckpointError: it is of another version.
        """
        try:
            progress, passed_over = state["progress"], state.get("divergence", {}).get("passed_over", [])
            detours = tuple(
                Detour(int(each["from_step"]), int(each["to_step"]), int(each["windows"])) for each in passed_over
            )
            return cls(name, int(progress["step"]), position_from(progress["position"]), detours)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{name}: its trainer_state.json can't be read: {error!r}") from error

    @property
    def windows_passed_over(self) -> int:
        """By all roll-backs before it."""
        return sum(detour.windows for detour in self.detours)


def planned(batches: Batches, step: int) -> Position:
    """Where the windows of a step begin in a run that never rolled back. Raises ConfigError where `step` is below 1."""
    _check_step(step)
    return batches.position_after((step - 1) * batches.global_size)


def recorded(batches: Batches, step: int, newest: Saved, older: Sequence[Saved] = ()) -> Position:
    """Where the windows of a step begin, as a run's checkpoints tell; of a step that was repeated, the last time.

    Args:
        newest: the newest commit.
        older: commits of the same branch, which help where batch.global_size changed between two of them.

    Raises:
        CheckpointError: they don't tell.
    """
    _check_step(step)
    size = batches.global_size
    if windows_before(batches, newest.position) == newest.step * size + newest.windows_passed_over:
        return batches.position_after((step - 1) * size + _passed_over_before(step, newest.detours))
    around = sorted([newest, *older], key=lambda saved: saved.step)
    before = next((saved for saved in reversed(around) if saved.step < step), None)
    after = next((saved for saved in around if saved.step >= step), None)
    if before is None or (after and not _is_even(batches, before, after)):
        raise CheckpointError(
            f"step {step} can't be found: {newest.name} is not where {size} windows a step lead to, so "
            "batch.global_size was changed in between, and no checkpoint from right before that step is left",
            "Give the batch.global_size that this step had, and leave out --run",
        )
    return batches.position_after(windows_before(batches, before.position) + (step - 1 - before.step) * size)


def _check_step(step: int) -> None:
    if step < 1:
        raise ConfigError(f"there is no step {step}", "The first step is 1")


def _passed_over_before(step: int, detours: Sequence[Detour]) -> int:
    """Windows that the run had passed over when it took a step for the last time.

    That was after the last roll-back to below this step; what came later led to above it and changed nothing for it.
    """
    last = max((number for number, detour in enumerate(detours, 1) if detour.to_step < step), default=0)
    return sum(detour.windows for detour in detours[:last])


def _is_even(batches: Batches, before: Saved, after: Saved) -> bool:
    """Whether today's number of windows a step leads from one checkpoint to the other."""
    windows = windows_before(batches, after.position) - windows_before(batches, before.position)
    passed_over = after.windows_passed_over - before.windows_passed_over
    return windows == (after.step - before.step) * batches.global_size + passed_over


def windows_before(batches: Batches, position: Position) -> int:
    """Windows taken since the run began.

    Raises:
        CheckpointError: this data has no such position.
    """
    try:
        return batches.windows_before(position)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint is of other data: {error}", "Give the run's own data") from error


def windows_at(batches: Batches, position: Position) -> list[Window]:
    """The windows of the step that begins at a position, in the order of the global batch.

    They hold what `Batches.take` gives, row for row; here it is told where it comes from.
    """
    windows_before(batches, position)  # is it one of this data?
    found = []
    for row, (name, source, before) in enumerate(batches.origins(position)):
        epoch, taken = source.located(before)
        index = epoch.window(taken)
        begin = index * source.seq_len
        parts = _parts(source, epoch.order, epoch.starts, begin, begin + source.seq_len + 1)
        found.append(Window(row, epoch.number, index, tuple(parts), name))
    return found


def _parts(batches: Batches, order: np.ndarray, starts: np.ndarray, begin: int, end: int) -> Iterator[Part]:
    """The tokens [begin, end) of an epoch's stream, shard by shard.

    Args:
        order: (shards,) index of each shard in stream order.
        starts: (shards + 1,) where each begins in the stream, and the end.
    """
    place = int(np.searchsorted(starts, begin, side="right")) - 1
    while begin < end:
        start, stop = int(starts[place]), min(int(starts[place + 1]), end)
        if begin < stop:
            yield Part(batches.shards[int(order[place])], begin - start, stop - start)
            begin = stop
        place += 1


def documents_in(lengths: np.ndarray, begin: int, end: int) -> list[DocumentPart]:
    """The documents that the tokens [begin, end) of a shard belong to.

    Args:
        lengths: (n_documents,) tokens of each document of the shard, in order.
    """
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    number = int(np.searchsorted(starts, begin, side="right")) - 1
    found = []
    while begin < end:
        start, stop = int(starts[number]), min(int(starts[number + 1]), end)
        found.append(DocumentPart(number, begin - start, stop - start, int(lengths[number])))
        begin, number = stop, number + 1
    return found


def document_lengths(store: ObjectStore, shard: Shard, pad_token_id: int) -> np.ndarray:
    """Tokens of each document of a shard (n_documents,) int64; the cache keeps the tokens only, so it is read again.

    Raises:
        ShardError: it is no longer the shard that the cache holds.
        StorageError: it can't be read.
    """
    with local_copy(store, shard.name) as path:
        tokens, lengths = read_npz(path, pad_token_id=pad_token_id, name=f"{store.url}/{shard.name}")
    if len(tokens) != shard.n_tokens:
        raise ShardError(
            f"shard {store.url}/{shard.name}: found {len(tokens)} tokens, the cache has {shard.n_tokens}",
            "Let its writer end, and try again",
        )
    return lengths


@contextlib.contextmanager
def local_copy(store: ObjectStore, name: str) -> Iterator[Path]:
    """An object as a file: a folder's own, or one that is downloaded and goes with the block. Raises StorageError."""
    if isinstance(store, LocalStore):
        yield store.root / name
        return
    with tempfile.TemporaryDirectory(prefix="lookup-") as folder:
        path = Path(folder) / "object"
        store.download(name, path)
        yield path
