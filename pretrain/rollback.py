"""Back to the last good checkpoint, past the data that made a run diverge; and the report where that is of no use.

The weights, the moments, the step and the schedule go back. The data does not: the windows since that checkpoint are
passed over, counted and named, as was done by hand for PaLM (arXiv 2204.02311, section 5.1). Every rank does it, with
the same result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pretrain import log
from pretrain.checkpoint import CheckpointReader
from pretrain.discovery import Inventory
from pretrain.divergence import PassedOver, Trouble
from pretrain.errors import CheckpointError, DivergenceError, StorageError
from pretrain.failpoints import failpoint
from pretrain.files import new_file
from pretrain.progress import read_progress
from pretrain.resumption import agree, share_inventory
from pretrain.storage import open_store

if TYPE_CHECKING:
    from pretrain.run import Run

REPORT_FILE = "divergence.json"
MEND = (
    "Resume from a checkpoint before it with a lower --lr, in bf16, or without the shards that the report names; "
    "none of them is touched."
)

logger = log.get(__name__)


def roll_back(run: Run, trouble: Trouble) -> None:
    """Take the run back to its last good checkpoint; the caller saves at once, so that this is never forgotten.

    Raises:
        DivergenceError: `train.max_rollbacks` are used up, or no good checkpoint is left; the report is written.
        StorageError: a checkpoint before it could not be written.
    """
    # Uploads get a while, not as long as they take: to the watchdog this is one long step.
    run.keeper.wait(run.config.train.hang_timeout_s / 4 or None)
    run.record_events()
    run.keeper.check()
    limit = run.config.train.max_rollbacks
    if run.progress.rollbacks >= limit:
        _give_up(run, trouble, f"went back {run.progress.rollbacks} times (train.max_rollbacks {limit})")
    checkpoint = find_good(run, trouble)
    if checkpoint is None:
        _give_up(run, trouble, f"no checkpoint from before step {trouble.since} is left to go back to")
    now = run.progress
    saved, state = read_progress(checkpoint, run.corpus.order, run.history)
    run.engine.load(checkpoint.parameter_state, state)
    windows = (now.step - saved.step) * run.config.batch.global_size
    run.progress = replace(
        now,
        step=saved.step,
        tokens=saved.tokens,
        rollbacks=now.rollbacks + 1,
        windows_passed_over=now.windows_passed_over + windows,
    )
    run.first_step = min(run.first_step, saved.step)
    shards = tuple(run.corpus.batches.shards_between(saved.position, now.position))
    passed_over = PassedOver(now.step, saved.step, windows, saved.position, now.position, shards, trouble.reason)
    run.watch.rolled_back(passed_over)
    run.keeper.branch()
    run.metrics.event("rolled_back", step=saved.step, checkpoint=checkpoint.folder.name, **asdict(passed_over))
    if run.ranks.is_first:
        logger.warning(
            "step %d: %s. Back to %s; %d windows are passed over (roll-back %d of at most %d)",
            *(trouble.step, trouble.reason, checkpoint.folder.name, windows, run.progress.rollbacks, limit),
        )
    run.timer.lap()  # none of this is a step
    failpoint("loop.after_rollback")


def find_good(run: Run, trouble: Trouble) -> CheckpointReader | None:
    """The newest good checkpoint that verifies, complete on every node: on this machine, else from the bucket."""
    config = run.config.checkpoint
    folder = Path(config.dir) / run.config.run.name
    store = open_store(config.url, run.config.storage) if config.url else None
    for source in (None, store) if store else (None,):  # a bucket that is away must not stop what can go on without it
        inventory = share_inventory(run.ranks, folder, source, run.config.run.name)
        names = run.ranks.from_first({"names": list(good_names(inventory, trouble.since))})["names"]
        for name in names:
            try:
                return agree(run.ranks, inventory, name, folder, store, run.config.run.name)
            except CheckpointError as error:
                logger.warning("can't go back to %s: %s", name, error.what)
    return None


def good_names(inventory: Inventory, since: int) -> Iterator[str]:
    """Names of the checkpoints that trouble since this step leaves in good repute, the newest first.

    Good is one whose next step was still sound: the weights after step c are first seen in the loss of step c + 1.
    What lies on a branch that an earlier roll-back has left is not: a later commit of a lower step tells.
    """
    lowest, told = since - 2, set()
    for manifest, _ in inventory.newest_first():
        if manifest.name.step <= lowest and manifest.name not in told:
            told.add(manifest.name)
            yield str(manifest.name)
        lowest = min(lowest, manifest.name.step)


def _give_up(run: Run, trouble: Trouble, why: str) -> NoReturn:
    path = run.metrics.folder / REPORT_FILE
    if run.ranks.is_first:
        try:
            with new_file(path) as file:
                file.write((json.dumps(_finite(_report(run, trouble, why)), indent=1) + "\n").encode())
        except StorageError as error:  # the run has diverged all the same
            logger.error("no report of the divergence: %s", error)
    run.metrics.event("diverged", step=trouble.step, reason=trouble.reason, why=why)
    raise DivergenceError(f"step {trouble.step}: {trouble.reason}, and {why}. Report: {path}", MEND)


def _report(run: Run, trouble: Trouble, why: str) -> dict[str, Any]:
    """What logs/{run}/divergence.json tells."""
    folder = Path(run.config.checkpoint.dir) / run.config.run.name
    begin = next((seen.position for seen in run.watch.recent if seen.step >= trouble.since), run.progress.position)
    return {
        "run": run.config.run.name,
        **asdict(trouble),
        "why_it_stopped": why,
        "rollbacks": run.progress.rollbacks,
        "windows_passed_over": run.progress.windows_passed_over,
        "shards": run.corpus.batches.shards_between(begin, run.progress.position),
        "passed_over": [asdict(each) for each in run.watch.passed_over],
        "window_losses": run.watch.window_losses,
        "recent_steps": [asdict(seen) for seen in run.watch.recent],
        "checkpoints": sorted(path.parent.name for path in folder.glob("checkpoint-*/manifest.json")),
        "mend": MEND,
    }


def _finite(tree: Any) -> Any:
    """The tree with NaN and the infinities, which JSON lacks, as text, as in metrics.jsonl."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return "NaN" if math.isnan(tree) else "Infinity" if tree > 0 else "-Infinity"
    return tree
