"""What a killed process left behind: checkpoint folders, objects and temporary files that no manifest names.

A leftover is never resumed from and only takes room. What is committed is none, a damaged commit neither.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from pretrain import log
from pretrain.catalog import Catalog, files_below, folder_bytes
from pretrain.checkpoint import REPLACED_SUFFIX, SAVING_SUFFIX, remove_folder
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName
from pretrain.errors import StorageError
from pretrain.files import PART_SUFFIX
from pretrain.storage import ObjectInfo, ObjectStore
from pretrain.uploads import PROBE_PREFIX, list_commits

logger = log.get(__name__)


@dataclass(frozen=True)
class Leftover:
    """One thing that can go.

    Args:
        run: whose it is.
        place: "local" or "bucket".
        path: the folder or the file, or the objects' common prefix below the bucket's root.
        why: why it is not committed.
        bytes: of all its files.
        changed_s: when its newest file was written, in seconds since 1970; infinite where unknown.
        objects: of the bucket.
    """

    run: str
    place: str
    path: str
    why: str
    bytes: int
    changed_s: float
    objects: tuple[ObjectInfo, ...] = ()

    @property
    def age_s(self) -> float:
        """Seconds since anything of it was written."""
        return max(time.time() - self.changed_s, 0.0)


def find_leftovers(catalog: Catalog, run: str = "") -> list[Leftover]:
    """What is not committed, of one run or of all.

    Raises:
        StorageError: the bucket can't be listed, or a folder can't be read.
    """
    found = []
    runs = [run] if run else sorted({*catalog.runs(), *(path.parent.name for path in catalog.folder.glob("*/.*"))})
    for name in runs:
        found += _local_leftovers(catalog.folder / name, name)
        if catalog.store:
            found += _bucket_leftovers(catalog.store, name)
    return found


def sweep(folder: Path) -> None:
    """Remove a run's leftovers of this disk, while nothing else uses its folder. Raises StorageError."""
    for leftover in _local_leftovers(folder, folder.name):
        logger.info("%s (%.1f MB) is removed: %s", leftover.path, leftover.bytes / 1e6, leftover.why)
        _remove_here(Path(leftover.path))


def _local_leftovers(folder: Path, run: str) -> list[Leftover]:
    found = []
    for path in sorted(folder.glob("*")):
        if path.is_dir() and (why := _why_unfinished(path)):
            found.append(Leftover(run, "local", str(path), why, folder_bytes(path), _newest(path)))
    inside = {Path(leftover.path) for leftover in found}
    for path, status in sorted(files_below(folder)):
        if path.name.startswith(".") and path.name.endswith(PART_SUFFIX) and path.parent not in inside:
            why = "a file that was not finished"
            found.append(Leftover(run, "local", str(path), why, status.st_size, status.st_mtime))
    return found


def _why_unfinished(path: Path) -> str:
    """Why a folder is no checkpoint and will be none, or ''."""
    name = path.name
    for suffix in (SAVING_SUFFIX, REPLACED_SUFFIX):
        if name.startswith(".") and name.endswith(suffix):
            name = name[1:].removesuffix(suffix)
    if not CheckpointName.parse(name):
        return ""
    if not (path / MANIFEST_FILE).exists():
        return "a save that was not finished: no manifest"
    has_successor = path.name.endswith(REPLACED_SUFFIX) and (path.with_name(name) / MANIFEST_FILE).exists()
    return "another save has taken its name" if has_successor else ""


def _newest(folder: Path) -> float:
    changed_s = [status.st_mtime for _, status in files_below(folder)]
    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
        changed_s.append(folder.stat().st_mtime)
    return max(changed_s, default=float("inf"))


def _bucket_leftovers(store: ObjectStore, run: str) -> list[Leftover]:
    attempts: dict[tuple[CheckpointName, str], list[ObjectInfo]] = defaultdict(list)
    found = []
    for info in store.list(f"{run}/"):
        parts = info.name.split("/")
        if len(parts) == 2 and parts[1].startswith(PROBE_PREFIX):
            why = "what a start tried the bucket with"
            found.append(Leftover(run, "bucket", info.name, why, info.size, info.created_s or float("inf"), (info,)))
        name = CheckpointName.parse(parts[1])
        if name and len(parts) == 4:
            attempts[name, parts[2]].append(info)
    commits = list_commits(store, run)  # after the objects: what was committed in between is seen as committed
    for (name, attempt), objects in sorted(attempts.items(), key=lambda item: (item[0][0].step, item[0][1])):
        commit = commits.get(name)
        if commit and (commit.manifest is None or commit.manifest.attempt == attempt):
            continue
        why = "a manifest names another attempt" if commit else "an upload that was not committed: no manifest"
        changed_s = max(info.created_s or float("inf") for info in objects)
        size = sum(info.size for info in objects)
        found.append(Leftover(run, "bucket", f"{run}/{name}/{attempt}", why, size, changed_s, tuple(objects)))
    return found


def remove_leftover(leftover: Leftover, catalog: Catalog) -> bool:
    """Remove it, unless it was committed meanwhile; whether it was removed.

    Raises:
        StorageError: it can't be removed.
    """
    if leftover.place == "bucket":
        return catalog.store is not None and _remove_objects(leftover, catalog.store)
    path = Path(leftover.path)
    if path.is_dir() and not _why_unfinished(path):
        return False
    _remove_here(path)
    return True


def _remove_here(path: Path) -> None:
    """Raises StorageError."""
    try:
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} can't be removed: {error.strerror}", f"Look at it: ls -ld {path.parent}") from error


def _remove_objects(leftover: Leftover, store: ObjectStore) -> bool:
    _, checkpoint, *attempt = leftover.path.split("/")
    name = CheckpointName.parse(checkpoint)  # None of a probe, which nothing can commit
    commit = list_commits(store, leftover.run).get(name) if name else None
    if commit and (commit.manifest is None or [commit.manifest.attempt] == attempt):
        return False
    for info in leftover.objects:
        store.delete(info.name, info.generation)
    return True
