"""What the disks of several nodes hold together of a run's checkpoints, where they are not one shared disk.

Each node has the manifest of every checkpoint and the files that its own ranks wrote. The bucket is where they come
together; what an earlier start left behind gets there from the nodes that still have it, each uploading its part.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from pretrain import log
from pretrain.checkpoint import damaged_files
from pretrain.checkpoint_manifest import TENSORS_SUFFIX, Manifest
from pretrain.discovery import Inventory, take_inventory
from pretrain.errors import ConfigError
from pretrain.ranks import Ranks
from pretrain.storage import LocalStore, ObjectStore
from pretrain.uploads import PROBE_PREFIX

PART = re.compile(rf"(?:model|optimizer)-(\d+)-of-\d+{re.escape(TENSORS_SUFFIX)}")

Identity = tuple[str, str, int]  # name, attempt and sequence: what tells one commit from another

logger = log.get(__name__)


@dataclass(frozen=True)
class Leftover:
    """A checkpoint that an earlier start committed on the nodes and not in the bucket.

    Args:
        manifest: the same on every rank.
        own_files: that this rank uploads.
        missing: files that no node has.
        damaged: what is wrong with the others.
        is_on_first: whether rank 0's node alone has all of it.
    """

    manifest: Manifest
    own_files: tuple[str, ...]
    missing: tuple[str, ...]
    damaged: tuple[str, ...]
    is_on_first: bool

    @property
    def is_torn(self) -> bool:
        """Whether it can't be completed: it is never uploaded then."""
        return bool(self.missing or self.damaged)

    def lacks_a_node(self, ranks: Ranks) -> bool:
        """Whether it is torn because a node that wrote a part of it is not here, or has lost its disk: then all files
        of each of its ranks are missing, and not one of them."""
        lost = {_writer(file) for file in self.missing}
        whole = all(file in self.missing for file in self.manifest.files if _writer(file) in lost)
        n_writers = len({_writer(file) for file in self.manifest.files})
        return bool(lost) and whole and not self.damaged and n_writers > ranks.local_world_size


def _writer(file: str) -> int:
    """Number of the rank, from 1, that wrote a file of a checkpoint; the first one writes the documents."""
    part = PART.fullmatch(file)
    return int(part[1]) if part else 1


def take_inventories(ranks: Ranks, folder: Path) -> Inventory:
    """The local commits of every node: on rank 0 each of them, elsewhere this node's. Every rank must call it.

    Manifests travel only where rank 0's node has none of that name, or an older one.
    """
    own = take_inventory(folder, None, folder.name)
    speaks = ranks.local_rank == 0
    told = ranks.exchange({"commits": [identity(manifest) for manifest in own.local.values()] if speaks else []})
    first = {name: (attempt, sequence) for name, attempt, sequence in told[0]["commits"]}
    wanted: dict[str, tuple[int, int]] = {}  # name: (sequence, the rank that will tell)
    for rank, answer in enumerate(told):
        for name, _, sequence in answer["commits"]:
            if sequence > max(first.get(name, ("", 0))[1], wanted.get(name, (0, 0))[0]):
                wanted[name] = sequence, rank
    if not wanted:
        return own
    mine = [m.to_bytes().decode() for name, m in own.local.items() if wanted.get(str(name), (0, -1))[1] == ranks.rank]
    answers = ranks.exchange({"manifests": mine if speaks else []})
    if not ranks.is_first:
        return own
    texts = [text for answer in answers for text in answer["manifests"]]
    found = [Manifest.from_bytes(text.encode(), "the manifest of another node") for text in texts]
    return replace(own, local=own.local | {manifest.name: manifest for manifest in found})


def find_leftovers(ranks: Ranks, missing_in_bucket: Iterable[Manifest], folder: Path) -> list[Leftover]:
    """What the nodes together still have of commits that the bucket lacks, oldest first. Every rank must call it.

    Each file is read and checked on one node only, also where the disk is shared.

    Args:
        missing_in_bucket: of rank 0; what the others pass is ignored.
        folder: local folder of the run.
    """
    answer = ranks.from_first({"manifests": [manifest.to_bytes().decode() for manifest in missing_in_bucket]})
    manifests = [Manifest.from_bytes(text.encode(), "the manifest of rank 0") for text in answer["manifests"]]
    return [_find(ranks, manifest, folder / str(manifest.name)) for manifest in manifests]


def _find(ranks: Ranks, manifest: Manifest, folder: Path) -> Leftover:
    held = _files_of_the_right_size(manifest, folder) if ranks.local_rank == 0 else []
    everyone = [set(answer["held"]) for answer in ranks.exchange({"held": held})]
    owner = {file: next((rank for rank, has in enumerate(everyone) if file in has), -1) for file in manifest.files}
    own = tuple(file for file in manifest.files if owner[file] == ranks.rank)
    damaged = damaged_files(replace(manifest, files={file: manifest.files[file] for file in own}), folder)
    problems = [problem for answer in ranks.exchange({"damaged": damaged}) for problem in answer["damaged"]]
    missing = tuple(file for file, rank in owner.items() if rank < 0)
    return Leftover(manifest, own, missing, tuple(problems), everyone[0] == set(manifest.files))


def _files_of_the_right_size(manifest: Manifest, folder: Path) -> list[str]:
    """The manifest's files that are here, as far as their sizes tell."""
    found = []
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_file() and path.stat().st_size == entry.bytes:
            found.append(name)
    return found


def identity(manifest: Manifest) -> Identity:
    """What tells this commit from any other of the run."""
    return str(manifest.name), manifest.attempt, manifest.sequence


def check_every_node_writes(ranks: Ranks, store: ObjectStore, run_name: str, attempt: str) -> None:
    """Have each node write where checkpoints are committed, before hours of work depend on it. Every rank must call it.

    Raises:
        StorageError: naming the right that one of them lacks; on every rank.
        ConfigError: it is a folder that is not the same one on every node; on every rank.
    """
    speaks, created = ranks.local_rank == 0, False
    first, own = (f"{run_name}/{PROBE_PREFIX}{attempt}-{rank}" for rank in (0, ranks.rank))
    try:
        with ranks.together():
            if speaks:
                store.create(own, b"is this bucket writable?\n")
                created = True
        with ranks.together():
            if speaks and isinstance(store, LocalStore) and store.stat(first) is None:  # a bucket is one for all
                raise not_shared(f"the checkpoints' folder {store.url}", "gs://bucket/prefix")
    finally:
        with ranks.together():
            if created:
                store.delete(own)


def finds_what_first_writes(ranks: Ranks, folder: Path) -> bool:
    """Whether this rank's folder is the one that rank 0 has under that name. Every rank must call it."""
    if ranks.local_world_size == ranks.world_size:
        return True
    probe = folder / f".probe-{ranks.from_first({'id': secrets.token_hex(6)})['id']}"
    with ranks.together():
        if ranks.is_first:
            probe.touch()
    try:
        with ranks.together():
            return probe.exists()
    finally:
        if ranks.is_first:
            probe.unlink(missing_ok=True)


def not_shared(place: str, mend: str) -> ConfigError:
    """The error for a place that is to hold whole checkpoints and is another one on each node."""
    what = f"{place} is not one folder for all nodes, so no checkpoint would be whole anywhere"
    return ConfigError(what, f"Give {mend}, or a folder on a disk that all nodes share.")


def say_what_is_torn(leftovers: Iterable[Leftover]) -> None:
    """Warn of those that can't be completed."""
    for left in (left for left in leftovers if left.is_torn):
        problems = [*(f"{file} is on no node" for file in left.missing), *left.damaged]
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        logger.warning("%s was never committed and is not whole: %s%s", left.manifest.name, problems[0], more)
