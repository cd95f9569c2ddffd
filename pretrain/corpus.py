"""What a run trains and validates on, out of this node's cache: it comes as it is needed."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain import log
from pretrain.alike import check_same_data
from pretrain.batches import Batches, validation_batches
from pretrain.config import DataConfig, StorageConfig
from pretrain.errors import ConfigError, TrainerError
from pretrain.manifest import TOKENIZER_NAME, DataManifest, document_end
from pretrain.mixture import alone, as_given, check_same_tokenizer, lay_out
from pretrain.model_config import ModelConfig
from pretrain.progress import DataOrder
from pretrain.ranks import Ranks
from pretrain.raw_shards import open_made
from pretrain.raw_source import prepare_source, prepared
from pretrain.raw_worker import RawWorker
from pretrain.shard_feed import ShardFeed
from pretrain.shards import ShardSet, open_shards
from pretrain.storage import ObjectStore, open_store

LOOK_EVERY_S = 0.5

logger = log.get(__name__)


@dataclass(frozen=True)
class Corpus:
    """The tokens of a run.

    Args:
        batches: the training windows in their order.
        order: what decides that order.
        validation: int64 (n, seq_len + 1), this rank's share; None where there is no validation.
        skipped_shards: names of damaged shards that were left out.
        unigram_entropy: nats per token, where the data's manifest tells it.
        tokenizer: the content of tokenizer.json, where it lies beside the shards.
        document_end: the token that ends a document, where `data.document_mask` keeps them apart.
        workers: what prepares raw text while it is trained on; on the first rank of a node.
    """

    batches: Batches
    order: DataOrder
    validation: np.ndarray | None
    skipped_shards: tuple[str, ...]
    unigram_entropy: float | None
    tokenizer: str | None
    document_end: int | None = None
    workers: tuple[RawWorker, ...] = ()

    @property
    def arrived(self) -> int:
        """Grows as long as data arrives, or is prepared."""
        return self.batches.arrived + sum(worker.arrived for worker in self.workers)

    @property
    def failure(self) -> TrainerError | None:
        """Why no more raw text is prepared, where that failed; known to the first rank of its node."""
        return next((worker.failure for worker in self.workers if worker.failure), None)

    def tell_wait(self) -> None:
        """Say what a batch is waited for, where that is raw text; at most once a minute."""
        for worker in self.workers:
            worker.tell_wait()


def fetch_corpus(
    data: DataConfig,
    storage: StorageConfig,
    model: ModelConfig,
    ranks: Ranks,
    *,
    global_size: int,
    seed: int,
    eval_sequences: int,
) -> Corpus:
    """Find the shards, lay out their order and take the validation windows. Every rank calls it.

    Args:
        global_size: windows in a step, over all ranks.
        eval_sequences: windows of a validation, over all ranks.

    Raises:
        ShardError: no shards, damaged ones, too few tokens, or a vocabulary that is not the model's.
        StorageError: the bucket or the cache can't be used.
    """
    workers = _begin_ahead(data, storage, ranks, model)
    for source in _prepared_first(data):
        _prepare(dataclasses.replace(data, source=source, sources=(), raw_ahead=False), storage, ranks, model)
    _await_claims(workers, ranks)
    if data.prepares_ahead:
        found = {name: _open_ahead(one, workers.get(name), ranks, model) for name, one in as_given(data)}
    else:
        found = {name: _open(one, storage, ranks, model) for name, one in alone(data)}
    shards = {name: each for name, (_, each) in found.items()}
    _check_room(data, [each.feed for each in shards.values() if each.feed])
    for store, each in found.values():
        manifest = each.manifest.to_json() if each.manifest else ""
        check_same_data(ranks, store.url, each.fingerprint, len(each.shards), manifest)
    manifests = {store.url: each.manifest for store, each in found.values()}
    tokenizers = {store.url: _tokenizer_beside(store) for store, _ in found.values()}
    check_same_tokenizer(manifests, tokenizers)
    validation = None
    if data.val_source:
        validation, manifests[data.val_source] = _validation(data, storage, ranks, model, eval_sequences)
    return Corpus(
        batches=lay_out(data, shards, seq_len=model.seq_len, global_size=global_size, seed=seed),
        order=DataOrder.of(data, shards, seed, model.seq_len),
        validation=validation,
        skipped_shards=tuple(f"{name}/{shard}".lstrip("/") for name, each in shards.items() for shard in each.skipped),
        unigram_entropy=_unigram_entropy(shards),
        tokenizer=next((text for text in tokenizers.values() if text is not None), None),
        document_end=document_end(data.eot_token_id, manifests) if data.document_mask else None,
        workers=tuple(workers.values()),
    )


def _check_room(data: DataConfig, feeds: Sequence[ShardFeed]) -> None:
    """Refuse a bound that can't hold what all sources of a mixture hold at the same time. Raises ConfigError."""
    if len(feeds) < 2 or not data.cache_gb:
        return
    n_shards = data.shuffle_shards + 1 + data.prefetch_shards
    needed = sum(feed.room_bytes(n_shards) for feed in feeds)
    if data.cache_gb * 1e9 < needed:
        raise ConfigError(
            f"data.cache_gb {data.cache_gb:g} can't hold the {n_shards} shards that each of {len(feeds)} sources holds "
            f"at the same time, {needed / 1e9:.3g} GB",
            f"Set --data.cache_gb to {needed / 1e9 * 1.05:.2g} or more, or lower --data.prefetch_shards",
        )


def _tokenizer_beside(store: ObjectStore) -> str | None:
    return store.read_bytes(TOKENIZER_NAME).decode() if store.stat(TOKENIZER_NAME) else None


def _unigram_entropy(shards: Mapping[str, ShardSet]) -> float | None:
    """Of the data as a whole: a mixture's is not that of any source."""
    (first, *others) = shards.values()
    return None if others or first.manifest is None else first.manifest.unigram_entropy


def _open(
    data: DataConfig, storage: StorageConfig, ranks: Ranks, model: ModelConfig, at_once: bool = False
) -> tuple[ObjectStore, ShardSet]:
    store = open_store(data.source, storage)
    logger.info("data: %s", store.describe())
    shards = open_shards(
        store,
        data,
        vocab_size=model.vocab_size,
        may_be_larger=bool(model.init_from),  # OPT, Pythia and Qwen3 have rows that their tokenizers never name
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        at_once=at_once,
    )
    skipped = len(shards.skipped)
    logger.info("data: %d shards, %s tokens, %d shards left out", len(shards.shards), f"{shards.n_tokens:,}", skipped)
    return store, shards


def _validation(
    data: DataConfig, storage: StorageConfig, ranks: Ranks, model: ModelConfig, eval_sequences: int
) -> tuple[np.ndarray, DataManifest | None]:
    """This rank's share of the validation windows (n, seq_len + 1) int64, spread evenly over `data.val_source`, and the
    manifest of that."""
    val_data = prepared(dataclasses.replace(data, source=data.val_source, sources=(), max_files=0))
    _, shards = _open(val_data, storage, ranks, model, at_once=True)
    windows = validation_batches(shards.shards, model.seq_len, eval_sequences)[ranks.rank :: ranks.world_size]
    if shards.feed:
        shards.feed.close()
    return windows, shards.manifest


# ---- raw text ----


def _prepared_first(data: DataConfig) -> list[str]:
    """The sources of raw text that are prepared whole before the first step: all, or the validation's alone."""
    if not data.tokenizer:
        return []
    ahead = data.prepares_ahead
    return [*([] if ahead else (one.source for _, one in as_given(data))), *filter(None, [data.val_source])]


def _begin_ahead(data: DataConfig, storage: StorageConfig, ranks: Ranks, model: ModelConfig) -> dict[str, RawWorker]:
    """On the first rank of a node, what prepares each source while it is trained on; they share the processes."""
    if not data.prepares_ahead or ranks.local_rank:
        return {}
    sources = as_given(data)
    share = max(1, data.tokenizer_num_workers // len(sources))
    how: dict[str, Any] = {"vocab_size": model.vocab_size, "may_be_larger": bool(model.init_from), "rank": ranks.rank}
    sources = [(name, dataclasses.replace(one, tokenizer_num_workers=share)) for name, one in sources]
    return {name: RawWorker(one, storage, **how) for name, one in sources}


def _await_claims(workers: Mapping[str, RawWorker], ranks: Ranks) -> None:
    """Wait, all ranks together, until the shards to come are decided on every node. Raises what a worker failed of."""
    working = True
    while working:
        is_waiting = not all(worker.claimed.wait(LOOK_EVERY_S) for worker in workers.values())
        for worker in workers.values():
            if worker.failure:
                raise worker.failure
        working = ranks.any(is_waiting)


def _open_ahead(
    data: DataConfig, worker: RawWorker | None, ranks: Ranks, model: ModelConfig
) -> tuple[ObjectStore, ShardSet]:
    shards = open_made(
        data,
        vocab_size=model.vocab_size,
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
        on_close=worker.close if worker else None,
    )
    store = open_store(prepared(data).source, StorageConfig())
    logger.info("data: training begins when the first shards are there, in %s", store.url)
    return store, shards


def _prepare(data: DataConfig, storage: StorageConfig, ranks: Ranks, model: ModelConfig) -> None:
    """Have the first rank of each node prepare its raw text while all wait; what a rank raises ends it at once."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            larger = bool(model.init_from)
            prepare_source(data, storage, vocab_size=model.vocab_size, may_be_larger=larger, say=logger.info)
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            failed.append(error)

    thread = threading.Thread(target=work, name="prepare", daemon=True)
    if ranks.local_rank == 0:
        thread.start()
    working = True
    # Asked again and again: hours of work are longer than any collective's patience.
    while working:
        if thread.ident is not None:
            thread.join(LOOK_EVERY_S)
        is_alive = thread.is_alive()  # asked first: what it came to must count
        if failed:
            raise failed[0]
        working = ranks.any(is_alive)
