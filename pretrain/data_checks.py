"""What the doctor looks at in the shards: the list, room for them, the first one, its vocabulary and the tokenizer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from pretrain.cache import ShardCache
from pretrain.config import DataConfig, StorageConfig
from pretrain.doctor import Finding, attempt, fail, ok, skip, warn
from pretrain.errors import ShardError, TrainerError
from pretrain.listings import size_text
from pretrain.manifest import MANIFEST_NAME, TOKENIZER_NAME, DataManifest
from pretrain.mixture import alone
from pretrain.model_config import ModelConfig
from pretrain.npz import check_vocab, read_npz
from pretrain.shards import missing_shards, read_manifest, select_shards
from pretrain.storage import LocalStore, ObjectInfo, ObjectStore, open_store
from pretrain.storage_checks import borrowed, impatient

SAMPLE_S = 20.0  # longest time that the first shard may take to come
MAX_TOKENIZER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Source:
    """A place of shards, listed."""

    store: ObjectStore
    listed: Sequence[ObjectInfo]
    shards: Sequence[ObjectInfo]

    def has(self, name: str) -> bool:
        """Whether an object of that name is there."""
        return any(info.name == name for info in self.listed)


class _TooSlow(Exception):
    """The shard did not come in time; carries the bytes that did."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        super().__init__()


def corpus(data: DataConfig, storage: StorageConfig, model: ModelConfig) -> list[Finding]:
    """What can be known of the training shards of every source from their list and the first of them."""
    if data.tokenizer:
        when = "while training runs" if data.prepares_ahead else "before the first step"
        return [skip("shards", f"data.tokenizer: raw text, which is prepared into shards {when}")]
    if not (data.source or data.sources):
        return [skip("shards", "no --data given")]
    findings = []
    for title, one in alone(data):
        try:
            found = _look_at(one, storage, model)
        except TrainerError as error:
            found = [fail("shards", error)]
        findings += [replace(each, found=f"{title}: {each.found}") if title else each for each in found]
    return findings


def _look_at(data: DataConfig, storage: StorageConfig, model: ModelConfig) -> list[Finding]:
    """The findings about one source.

    Raises:
        StorageError: it can't be listed.
        ShardError: there are no shards.
    """
    store = open_store(data.source, impatient(storage))
    started = time.perf_counter()
    listed = store.list()
    seconds = time.perf_counter() - started
    shards = select_shards(listed, data.pattern, data.max_files, store.url)
    n_bytes = sum(info.size for info in shards)
    what = f"{store.describe()}: {len(shards):,} shards, {size_text(n_bytes)}, listed in {seconds:.1f} s"
    source = _Source(store, listed, shards)
    findings = [ok("shards", what, shards=len(shards), gb=n_bytes / 1e9)]
    manifest: DataManifest | None = None
    try:
        manifest = read_manifest(store, listed)
        findings.append(_manifest(source, manifest, data, model))
    except ShardError as error:
        findings.append(fail("manifest", error))
    findings.append(attempt("cache_room", lambda: _cache_room(source, manifest, data, model)))
    findings += _sample(source, data, model)
    findings.append(attempt("tokenizer", lambda: _tokenizer(source, manifest, model)))
    return findings


def validation(data: DataConfig, storage: StorageConfig) -> Finding:
    """Whether there are validation shards where they are looked for.

    Raises:
        StorageError: they can't be listed.
        ShardError: there are none.
    """
    if data.tokenizer and data.val_source:
        return skip("validation_shards", "data.tokenizer: raw text, which is prepared before the first step")
    if not data.val_source:
        return skip("validation_shards", "no data.val_source: training is not validated")
    store = open_store(data.val_source, impatient(storage))
    shards = select_shards(store.list(), data.pattern, 0, store.url)
    return ok("validation_shards", f"{store.describe()}: {len(shards):,} shards")


def _manifest(source: _Source, manifest: DataManifest | None, data: DataConfig, model: ModelConfig) -> Finding:
    """The manifest against the model and the list. Raises ShardError."""
    if manifest is None:
        return skip("manifest", f"no {MANIFEST_NAME} beside the shards: their tokens and checksums are not known")
    url = f"{source.store.url.rstrip('/')}/{MANIFEST_NAME}"
    manifest.check_vocab_size(model.vocab_size, url, may_be_larger=bool(model.init_from))
    what = (
        f"{manifest.n_tokens:,} tokens in {len(manifest.shards):,} shards, tokenizer {manifest.tokenizer or 'unknown'}"
    )
    if missing := missing_shards(manifest, source.shards, data.pattern, data.max_files):
        gone = f"{what}; {len(missing)} of them are not there, such as {missing[0]}"
        mend = f"Restore them, or delete that {MANIFEST_NAME}."
        if data.on_bad_shard == "stop":
            return fail("manifest", ShardError(gone, mend))
        return warn("manifest", gone, mend)
    return ok("manifest", what, tokens=manifest.n_tokens)


def _cache_room(source: _Source, manifest: DataManifest | None, data: DataConfig, model: ModelConfig) -> Finding:
    """Whether the cache can hold the shards as training reads them, data.shuffle_shards at the same time.

    Raises:
        ConfigError: data.cache_gb is too small.
        StorageError: the disk is, or it can't be written.
    """
    cache = ShardCache(source.store, data, model.vocab_size, manifest)
    with borrowed(cache.folder, "--data.cache_dir"):
        cache.check_room(source.shards, data.shuffle_shards)
    ready = sum(cache.is_here(info) for info in source.shards)
    return ok("cache_room", f"enough for the shards; {ready:,} of {len(source.shards):,} are ready")


def _sample(source: _Source, data: DataConfig, model: ModelConfig) -> list[Finding]:
    """The first shard, read and checked as training reads it."""
    info = source.shards[0]
    if isinstance(source.store, LocalStore):
        return _read(source.store.root / info.name, info, data, model, "")
    folder = Path(data.cache_dir)
    with (
        borrowed(folder, "--data.cache_dir"),
        tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as temporary,
    ):
        path, started = Path(temporary) / "shard.npz", time.perf_counter()
        try:
            source.store.download(info.name, path, _limited())
        except _TooSlow as slow:
            rate = slow.n_bytes / SAMPLE_S / 1e6
            what = f"{info.name}: {size_text(slow.n_bytes)} of {size_text(info.size)} came in {SAMPLE_S:.0f} s"
            mend = "Take a machine nearer to the bucket; --data.download_workers fetches more at once."
            return [warn("shard", f"{what}, {rate:,.1f} MB/s; its content was not checked", mend, mb_per_s=rate)]
        rate = info.size / (time.perf_counter() - started) / 1e6
        return _read(path, info, data, model, f", {rate:,.1f} MB/s")


def _limited() -> Callable[[int], None]:
    """A listener to a download that ends it after SAMPLE_S."""
    started, arrived = time.perf_counter(), 0

    def on_bytes(n_bytes: int) -> None:
        nonlocal arrived
        if n_bytes > 0 and time.perf_counter() - started > SAMPLE_S:
            raise _TooSlow(arrived)
        arrived += n_bytes

    return on_bytes


def _read(path: Path, info: ObjectInfo, data: DataConfig, model: ModelConfig, rate: str) -> list[Finding]:
    """A shard's tokens, and whether each is in the model's vocabulary."""
    try:
        tokens, lengths = read_npz(path, pad_token_id=data.pad_token_id, name=info.name)
    except ShardError as error:
        if data.on_bad_shard == "skip":
            return [warn("shard", error.what, "Training leaves it out, as data.on_bad_shard says.")]
        return [fail("shard", error)]
    what = f"{info.name}: {len(tokens):,} tokens in {len(lengths):,} documents, {size_text(info.size)}{rate}"

    def vocabulary() -> Finding:
        check_vocab(tokens, model.vocab_size, info.name)
        largest = int(tokens.max()) if len(tokens) else 0
        return ok("vocabulary", f"largest id {largest:,} in that shard, model.vocab_size {model.vocab_size:,}")

    return [ok("shard", what), attempt("vocabulary", vocabulary)]


def _tokenizer(source: _Source, manifest: DataManifest | None, model: ModelConfig) -> Finding:
    """tokenizer.json against the model and the manifest. Raises ShardError."""
    if not source.has(TOKENIZER_NAME):
        return skip("tokenizer", f"no {TOKENIZER_NAME} beside the shards: no samples, and none goes into checkpoints")
    text = source.store.read_bytes(TOKENIZER_NAME, MAX_TOKENIZER_BYTES).decode(errors="replace")
    url, mend = f"{source.store.url.rstrip('/')}/{TOKENIZER_NAME}", "Put the one there that made the shards."
    try:
        size = int(Tokenizer.from_str(text).get_vocab_size())
    except Exception as error:  # the tokenizers library raises no other kind
        raise ShardError(f"{url} can't be read as a tokenizer: {str(error)[:160]}", mend) from error
    expected = manifest.vocab_size if manifest and manifest.vocab_size else size
    if size > model.vocab_size or size != expected:
        told = f", {MANIFEST_NAME} says {expected:,}" if size != expected else ""
        raise ShardError(f"{url} has {size:,} ids, the model {model.vocab_size:,}{told}", mend)
    return ok("tokenizer", f"{size:,} ids")
