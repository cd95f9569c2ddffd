"""What a run goes on from: rank 0 looks and decides, every rank learns it, every node has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain import log
from pretrain.checkpoint import CheckpointReader, damaged_files, read_manifest
from pretrain.checkpoint_manifest import CheckpointName, Manifest
from pretrain.discovery import AUTO, Inventory, choose, fetch
from pretrain.errors import CheckpointError
from pretrain.node_disks import take_inventories
from pretrain.ranks import Ranks
from pretrain.storage import ObjectStore
from pretrain.uploads import BucketManifest, list_commits

logger = log.get(__name__)


def share_inventory(ranks: Ranks, folder: Path, store: ObjectStore | None, run_name: str) -> Inventory:
    """On rank 0 what all nodes and the bucket have; the others learn its last sequence and what is in the bucket.

    Args:
        folder: local folder of the run.

    Raises:
        StorageError: the bucket can't be listed; on every rank.
    """
    found: list[Inventory] = []
    local = take_inventories(ranks, folder)

    def look() -> dict[str, Any]:
        inventory = local.with_bucket(list_commits(store, run_name) if store else {})
        several = ranks.world_size > ranks.local_world_size
        found.append(inventory.without_parts(folder) if several else inventory)
        commits = [commit.manifest for commit in found[0].bucket.values() if commit.manifest]
        bucket = [manifest.to_bytes().decode() for manifest in commits]
        return {"last_sequence": found[0].last_sequence, "bucket": bucket}

    answer = ranks.decided_by_first(look)
    if found:
        return found[0]
    placeholder = Manifest(CheckpointName(0, 0, 0), "-", answer["last_sequence"], {})
    manifests = [Manifest.from_bytes(text.encode(), "the inventory of rank 0") for text in answer["bucket"]]
    bucket = {manifest.name: BucketManifest(0, manifest) for manifest in manifests}
    return Inventory({placeholder.name: placeholder}, bucket, {})


def agree(
    ranks: Ranks, inventory: Inventory, resume: str, folder: Path, store: ObjectStore | None, run_name: str
) -> CheckpointReader | None:
    """The checkpoint to go on from, verified and complete on this node; None to start afresh.

    Args:
        inventory: of rank 0.
        resume: "auto", a checkpoint's name, or "" for a fresh start.
        folder: local folder of the run.

    Raises:
        CheckpointError: nothing to resume from where that was asked for, or an existing run would be overwritten.
        StorageError: the bucket can't be read.
    """
    answer = ranks.decided_by_first(lambda: _decide(inventory, resume, folder, store, run_name))
    if not answer["manifest"]:
        return None
    manifest = Manifest.from_bytes(answer["manifest"].encode(), "the manifest of rank 0")
    checkpoint = folder / str(manifest.name)
    with ranks.together():
        if ranks.local_rank == 0 and not ranks.is_first:
            _complete_on_this_node(manifest, checkpoint, store, run_name)
    return CheckpointReader(checkpoint, manifest)


def _decide(
    inventory: Inventory, resume: str, folder: Path, store: ObjectStore | None, run_name: str
) -> dict[str, str]:
    """{"manifest": rank 0's choice, or "" for a fresh start}."""
    if not resume:
        if not inventory.is_empty:
            newest = max((m for m, _ in inventory.newest_first()), key=lambda m: m.sequence, default=None)
            raise CheckpointError(
                f"run {run_name} already has checkpoints (newest: {newest.name if newest else 'damaged'})",
                "Go on with --resume auto, or start another with --run NAME.",
            )
        return {"manifest": ""}
    chosen = choose(inventory, resume, folder, store, run_name)
    if chosen is None:
        logger.info("--resume %s: run %s has no checkpoint yet, starting afresh", AUTO, run_name)
        return {"manifest": ""}
    return {"manifest": chosen.to_bytes().decode()}


def _complete_on_this_node(manifest: Manifest, folder: Path, store: ObjectStore | None, run_name: str) -> None:
    """Bring rank 0's choice to another node, unless its disk is shared or has it already."""
    try:
        if read_manifest(folder) == manifest and not damaged_files(manifest, folder):
            return
    except CheckpointError:
        logger.info("%s is not on this node yet", manifest.name)
    if problems := fetch(manifest, folder, store, run_name):
        raise CheckpointError(f"{manifest.name} can't be completed on this node: {'; '.join(problems[:3])}")
