"""Checkpoints to the bucket and back, one at a time and by hand: as the trainer's queue does, without a trainer."""

from __future__ import annotations

from pretrain.catalog import Catalog, Entry
from pretrain.checkpoint import damaged_files
from pretrain.config import StorageConfig
from pretrain.discovery import damaged_objects, fetch, take_inventory
from pretrain.errors import CheckpointError, ConfigError, StorageError
from pretrain.run_lock import sole_use
from pretrain.storage import ObjectStore
from pretrain.uploads import BucketRun, UploadJob, list_commits


def waiting(catalog: Catalog, run: str = "") -> list[Entry]:
    """What is committed here and not in the bucket, of one run or of all, in the order of its commits.

    Raises:
        ConfigError: no bucket is named.
        StorageError: it can't be listed.
    """
    store = bucket_of(catalog)
    found = []
    for name in [run] if run else catalog.runs():
        missing = {manifest.name for manifest in take_inventory(catalog.folder / name, store, name).not_in_bucket()}
        found += [entry for entry in catalog.entries(name) if entry.name in missing]
    return found


def upload(entry: Entry, catalog: Catalog, storage: StorageConfig) -> bool:
    """Commit a local checkpoint in the bucket, as the trainer would have; whether there was anything to do.

    Raises:
        CheckpointError: it is not here or damaged, a trainer is using the run, or another commit of its step is there.
        StorageError: the bucket or a file can't be used; nothing was committed.
    """
    store, folder = bucket_of(catalog), catalog.folder_of(entry)
    manifest = entry.local.manifest if entry.local else None
    if manifest is None:
        raise CheckpointError(f"{entry.label} is not committed on this machine", "See what is: upload_manager.py list")
    with sole_use(folder.parent):
        if problems := damaged_files(manifest, folder):
            raise CheckpointError(f"{entry.label} is damaged here: {'; '.join(problems[:3])}", "Upload another one.")
        known = list_commits(store, entry.run)
        there = known[entry.name].manifest if entry.name in known else None
        if there and there == manifest and not damaged_objects(there, store, entry.run):
            return False
        if there and there != manifest and there.sequence >= manifest.sequence:
            raise CheckpointError(
                f"the bucket has another, later commit of {entry.label}", "Fetch that one: upload_manager.py download"
            )
        bucket = BucketRun(store, entry.run, known, storage.upload_workers)
        problem, _ = bucket.upload(UploadJob(manifest, folder, tuple(manifest.files)))
        if problem:
            raise StorageError(f"{entry.label} was not uploaded: {problem}")
        outcome = bucket.commit(manifest)
    if outcome["conflict"]:
        raise CheckpointError(outcome["conflict"], "Stop the trainer that writes this run, then look again.")
    if outcome["problem"]:
        raise StorageError(f"{entry.label} was uploaded and not committed: {outcome['problem']}")
    return True


def download(entry: Entry, catalog: Catalog) -> bool:
    """Bring a checkpoint of the bucket to this machine, verified and committed; whether there was anything to do.

    Raises:
        CheckpointError: it is not in the bucket or damaged there, a trainer is using the run, or what is here under
            its name is in no bucket.
        StorageError: the bucket or the folder can't be used.
    """
    store, folder = bucket_of(catalog), catalog.folder_of(entry)
    manifest = entry.bucket.manifest if entry.bucket else None
    if manifest is None:
        raise CheckpointError(f"{entry.label} is not committed in {store.url}", "See what is: upload_manager.py list")
    here = entry.local.manifest if entry.local else None
    if here and here != manifest:
        raise CheckpointError(
            f"another commit of {entry.label} is in {folder}, and not in the bucket",
            f"Move it away first, or upload it: mv {folder} ELSEWHERE",
        )
    with sole_use(folder.parent):
        if here and not damaged_files(manifest, folder):
            return False
        if problems := fetch(manifest, folder, store, entry.run):
            raise CheckpointError(f"{entry.label} is damaged in the bucket: {'; '.join(problems[:3])}")
    return True


def bucket_of(catalog: Catalog) -> ObjectStore:
    """The catalog's bucket. Raises ConfigError where none is named."""
    if catalog.store is None:
        mend = "Give --url gs://bucket/prefix, or --config NAME where checkpoint.url is set."
        raise ConfigError("no bucket is named", mend)
    return catalog.store
