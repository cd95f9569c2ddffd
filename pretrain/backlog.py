"""The checkpoints that wait for the bucket: in which order they go, and which may go when there is no room for all."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.uploads import UploadJob


class Backlog:
    """Jobs by the sequence number of their commit, oldest first, as one rank sees them. Safe to share by threads.

    A later save of the same name takes an earlier one's folder, and so its place.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[int, UploadJob] = {}
        self._untried: set[int] = set()
        self._busy = -1
        self.last = 0
        """The highest sequence number that was ever put."""

    def put(self, job: UploadJob) -> None:
        """Add a job; its sequence number is higher than any before."""
        manifest = job.manifest
        with self._lock:
            for sequence in [s for s, other in self._jobs.items() if other.manifest.name == manifest.name]:
                self._remove(sequence)
            self._jobs[manifest.sequence] = job
            self._untried.add(manifest.sequence)
            self.last = max(self.last, manifest.sequence)

    def get(self, sequence: int) -> UploadJob | None:
        """The job, unless it has gone; from here on it is the one being uploaded."""
        with self._lock:
            self._busy = sequence
            return self._jobs.get(sequence)

    def tried(self, sequences: Iterable[int]) -> None:
        """These were uploaded in vain, or given up for now; none is being uploaded any more."""
        with self._lock:
            self._untried.difference_update(sequences)
            self._busy = -1

    def remove(self, sequences: Iterable[int]) -> list[UploadJob]:
        """Take these out; the ones that were still there."""
        with self._lock:
            return [job for sequence in sequences if (job := self._remove(sequence))]

    def keep_only(self, sequences: Iterable[int], up_to: int) -> None:
        """Forget what rank 0 has no more: all up to a sequence number but these."""
        kept = set(sequences)
        with self._lock:
            for sequence in [s for s in self._jobs if s <= up_to and s not in kept]:
                self._remove(sequence)

    def _remove(self, sequence: int) -> UploadJob | None:
        self._untried.discard(sequence)
        return self._jobs.pop(sequence, None)

    @property
    def sequences(self) -> list[int]:
        """What waits, oldest first."""
        with self._lock:
            return sorted(self._jobs)

    @property
    def untried(self) -> set[int]:
        """What was put and never tried."""
        with self._lock:
            return set(self._untried)

    @property
    def names(self) -> list[str]:
        """The checkpoints that wait, oldest first."""
        with self._lock:
            return [str(job.manifest.name) for _, job in sorted(self._jobs.items())]

    def too_many(self, limit: int) -> list[int]:
        """Which may go so that at most `limit` wait, the oldest first: never the newest, the best, or one on its way.

        The best is the one with the lowest validation loss; where none was validated, with the lowest training loss.
        """
        with self._lock:
            jobs, busy = sorted(self._jobs.items()), self._busy
        excess = len(jobs) - limit
        if excess <= 0:
            return []
        best = min(jobs, key=lambda item: (*_loss(item[1].folder), -item[0]))[0]
        spared = {jobs[-1][0], best, busy}
        return [sequence for sequence, _ in jobs if sequence not in spared][:excess]


def _loss(folder: Path) -> tuple[bool, float]:
    """(whether it was never validated, its loss) as the checkpoint's metadata.json tells; infinite where unknown."""
    try:
        tree: Any = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        validations = tree.get("validation_losses")
        loss = float(validations[-1] if validations else tree["current_loss"])
        return not validations, loss if math.isfinite(loss) else math.inf
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # no loss is known: it is not the best
        return True, math.inf
