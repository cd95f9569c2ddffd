"""What the doctor tries with disks and buckets: room, speed, rights, the clock. What it writes is deleted again."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path

from pretrain import log
from pretrain.catalog import folder_bytes
from pretrain.checkpoint import SAVING_SUFFIX
from pretrain.checkpoint_manifest import MANIFEST_FILE
from pretrain.config import CheckpointConfig, LogConfig, StorageConfig
from pretrain.doctor import Finding, attempt, fail, ok, skip, warn
from pretrain.errors import StorageError
from pretrain.files import disk_problem, free_disk_bytes, make_writable
from pretrain.listings import size_text
from pretrain.sinks import has_wandb_key
from pretrain.storage import ObjectStore, open_store
from pretrain.uploads import PROBE_PREFIX

PATIENCE_S = 10.0  # for the bucket: a check should tell, and not wait as a training does
DISK_PROBE_BYTES, BUCKET_PROBE_BYTES = 64 * 2**20, 4 * 2**20
SLOW_DISK_MB_PER_S = 50
SKEW_NOTED_S, SKEW_REFUSED_S = 5.0, 300.0  # Google refuses tokens signed five minutes off its own clock
CLOCK_TIMEOUT_S = 10.0
WANDB_TIMEOUT_S = 15


def impatient(storage: StorageConfig) -> StorageConfig:
    """The same, giving up after seconds."""
    return replace(
        storage, deadline_s=min(storage.deadline_s, PATIENCE_S), timeout_s=min(storage.timeout_s, PATIENCE_S)
    )


# ---- disks ----


@contextlib.contextmanager
def borrowed(folder: Path, option: str) -> Iterator[None]:
    """A folder to write in; where it was missing it is gone again afterwards.

    Raises:
        StorageError: nothing can be written there.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    make_writable(folder, option)
    try:
        yield
    finally:
        for each in missing:
            with contextlib.suppress(OSError):  # somebody else needs it by now
                each.rmdir()


def cache_disk(folder: str) -> Finding:
    """The disk of the shards' cache; how much room they need is known when they are listed (cache_room)."""
    return _disk("cache_disk", Path(folder), "--data.cache_dir")


def checkpoint_disk(checkpoint: CheckpointConfig, run: str, checkpoint_bytes: int, nodes: int) -> Finding:
    """The disk of the checkpoints; those of the run that lie there already are part of what there is room for.

    Args:
        run: its name.
        checkpoint_bytes: of one.
        nodes: that write it together, each its part on a disk of its own; without a bucket all on one that they share.

    Raises:
        StorageError: nothing can be written or read there, or the disk is full.
    """
    found = _disk("checkpoint_disk", Path(checkpoint.dir), "--checkpoint.dir")
    part_bytes = checkpoint_bytes // (nodes if checkpoint.url else 1)
    held, unfinished = _held_bytes(Path(checkpoint.dir) / run)
    free, count = free_disk_bytes(Path(checkpoint.dir)) + unfinished, checkpoint.keep + 1
    seconds = part_bytes / (found.figures["write_mb_per_s"] * 1e6)
    title = "a checkpoint" if part_bytes == checkpoint_bytes else f"this node's part of a checkpoint, 1 of {nodes},"
    what = f"{found.found}; {title} of {size_text(part_bytes)} takes {seconds:.1f} s"
    what += f"; {size_text(held)} of this run's are there" if held else ""
    if free < part_bytes or free + held < 2 * part_bytes:  # one that is written, beside the one before
        room = "one more" if held else "two"
        mend = "Free some, or set --checkpoint.dir to a larger disk."
        return fail("checkpoint_disk", StorageError(f"{what}: there is no room for {room}", mend), **found.figures)
    if checkpoint.keep and free + held < count * part_bytes:
        mend = "Free some, or set --checkpoint.keep lower or --checkpoint.dir to a larger disk."
        return warn("checkpoint_disk", f"{what}, and {count} may lie there at once", mend, **found.figures)
    return replace(found, found=what)


def _held_bytes(folder: Path) -> tuple[int, int]:
    """Bytes of the checkpoints in a run's folder, and of saves that were not finished: the next start removes them.
    Raises StorageError."""
    held = unfinished = 0
    for path in (*folder.glob("checkpoint-*"), *folder.glob(f".checkpoint-*{SAVING_SUFFIX}")):
        if (path / MANIFEST_FILE).exists():
            held += folder_bytes(path)
        else:
            unfinished += folder_bytes(path)
    return held, unfinished


def log_folder(config: LogConfig) -> Finding:
    """Whether the logs can be written."""
    with borrowed(Path(config.dir), "--log.dir"):
        return ok("log_folder", f"{Path(config.dir).absolute()} can be written")


def _disk(name: str, folder: Path, option: str) -> Finding:
    """Speed and room of a folder's disk.

    Raises:
        StorageError: nothing can be written there, or the disk is full.
    """
    try:
        with borrowed(folder, option):
            write_s, read_s = _time_disk(folder, DISK_PROBE_BYTES)
    except OSError as error:
        if problem := disk_problem(error, folder):
            raise problem from error
        raise
    write, read = (DISK_PROBE_BYTES / seconds / 1e6 for seconds in (write_s, read_s))
    free = free_disk_bytes(folder)
    what = f"{folder.absolute()}: {write:,.0f} MB/s written, {read:,.0f} MB/s read, {size_text(free)} free"
    figures = {"write_mb_per_s": write, "read_mb_per_s": read, "free_gb": free / 1e9}
    if min(write, read) < SLOW_DISK_MB_PER_S:
        return warn(name, what, f"A disk of this machine would be faster: {option}.", **figures)
    return ok(name, what, **figures)


def _time_disk(folder: Path, n_bytes: int) -> tuple[float, float]:
    """Seconds to write a file to the disk, and to read it back from there."""
    block = secrets.token_bytes(2**20)  # nothing that a file system could pack
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for _ in range(n_bytes // len(block)):
            file.write(block)
        os.fsync(file.fileno())
        write_s = time.perf_counter() - started
        file.seek(0)
        if hasattr(os, "posix_fadvise"):  # or the page cache would answer
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        while file.read(len(block)):
            pass
        return write_s, time.perf_counter() - started


# ---- buckets ----


def checkpoint_store(url: str, run: str, storage: StorageConfig) -> list[Finding]:
    """Whether checkpoints can be listed, written, read and pruned there in the name of this user, and how fast.

    Args:
        url: checkpoint.url; empty: they stay local.
    """
    if not url:
        return [skip("checkpoint_store", "no checkpoint.url: checkpoints stay on this machine")]
    store = open_store(url, impatient(storage))
    findings = [attempt("checkpoint_store", lambda: _listed(store, f"{run}/"))]
    name, data = f"{run}/{PROBE_PREFIX}{secrets.token_hex(8)}", secrets.token_bytes(BUCKET_PROBE_BYTES)
    findings.append(attempt("checkpoint_write", lambda: _write(store, name, data)))
    if findings[-1].status == "fail":
        return findings
    findings.append(attempt("checkpoint_read", lambda: _read(store, name, data)))
    findings.append(attempt("checkpoint_delete", lambda: _delete(store, name)))
    return findings


def _listed(store: ObjectStore, prefix: str) -> Finding:
    """How many objects of the run are there."""
    count = len(store.list(prefix))
    return ok("checkpoint_store", f"{store.describe()}; {count:,} objects of this run")


def _write(store: ObjectStore, name: str, data: bytes) -> Finding:
    started = time.perf_counter()
    store.create(name, data)
    rate = len(data) / (time.perf_counter() - started) / 1e6
    return ok("checkpoint_write", f"{rate:,.1f} MB/s, one object of {size_text(len(data))}", mb_per_s=rate)


def _read(store: ObjectStore, name: str, data: bytes) -> Finding:
    started = time.perf_counter()
    found = store.read_bytes(name, len(data))
    rate = len(data) / (time.perf_counter() - started) / 1e6
    if found != data:
        mend = "Is there a proxy or an emulator in between?"
        return fail("checkpoint_read", StorageError(f"{store.url}/{name} came back changed", mend))
    return ok("checkpoint_read", f"{rate:,.1f} MB/s, and what came is what was written", mb_per_s=rate)


def _delete(store: ObjectStore, name: str) -> Finding:
    try:
        store.delete(name)
    except StorageError as error:
        raise StorageError(f"{error.what}; {store.url}/{name} is left there", error.mend) from error
    return ok("checkpoint_delete", "the probe is gone again")


def clock(urls: list[str]) -> Finding:
    """This machine's clock against that of the first bucket among the urls."""
    if not any(url.startswith("gs://") for url in urls):
        return skip("clock", "no gs:// bucket in this config that would tell the time")
    import requests

    from pretrain.credentials import connect

    endpoint = connect().endpoint
    before = time.time()
    try:
        answer = requests.head(endpoint, timeout=CLOCK_TIMEOUT_S, allow_redirects=False)
    except requests.RequestException as error:
        raise StorageError(f"{endpoint} does not answer: {type(error).__name__}", "Is it within reach?") from error
    if not (told := answer.headers.get("Date")):
        return skip("clock", f"{endpoint} does not tell the time")
    # The header has whole seconds, and was written at some moment between question and answer.
    skew = (before + time.time()) / 2 - (parsedate_to_datetime(told).timestamp() + 0.5)
    what = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} {endpoint}"
    mend = "Set it: timedatectl set-ntp true, or chronyc makestep."
    if abs(skew) > SKEW_REFUSED_S:
        return fail("clock", StorageError(f"{what}: its tokens will be refused", mend), skew_s=skew)
    if abs(skew) > SKEW_NOTED_S:
        return warn("clock", what, mend, skew_s=skew)
    return ok("clock", f"within {SKEW_NOTED_S:.0f} s of {endpoint}", skew_s=skew)


# ---- Weights & Biases ----


def wandb_login(config: LogConfig) -> Finding:
    """Whether the run can be sent to W&B; where not it is kept offline, and training goes on."""
    if not config.wandb:
        return skip("wandb", "log.wandb is off")
    try:
        import wandb
    except ImportError as error:
        return fail("wandb", StorageError(f"log.wandb is on: {error}", "bash setup_env.sh, or --no-wandb"))
    if mode := os.environ.get("WANDB_MODE", ""):
        return ok("wandb", f"{wandb.__version__}, WANDB_MODE={mode}")
    if not has_wandb_key():
        return warn("wandb", "no API key: the run stays offline", "Run .venv/bin/wandb login, or give --no-wandb.")
    try:
        user = wandb.Api(timeout=WANDB_TIMEOUT_S).viewer.username
    except Exception as error:  # noqa: BLE001 - W&B raises a dozen kinds that share no base
        words = log.mask(" ".join(str(error).split()))[:160]
        return warn("wandb", f"W&B can't be used, the run stays offline: {words}", "Run .venv/bin/wandb login again.")
    return ok("wandb", f"{wandb.__version__}, logged in as {user}, project {config.wandb_project}")
