"""What a run trains and validates on, fetched into this node's cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pretrain import log
from pretrain.batches import Batches, validation_batches
from pretrain.config import DataConfig, StorageConfig
from pretrain.errors import ShardError
from pretrain.manifest import TOKENIZER_NAME, document_end
from pretrain.mixture import alone, check_alike, lay_out
from pretrain.model_config import ModelConfig
from pretrain.progress import DataOrder
from pretrain.ranks import Ranks
from pretrain.shards import ShardSet, fetch_shards
from pretrain.storage import ObjectStore, open_store

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
    """

    batches: Batches
    order: DataOrder
    validation: np.ndarray | None
    skipped_shards: tuple[str, ...]
    unigram_entropy: float | None
    tokenizer: str | None
    document_end: int | None = None


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
    """Fetch the shards, each once per node, and lay out the order. Every rank calls it.

    Args:
        global_size: windows in a step, over all ranks.
        eval_sequences: windows of a validation, over all ranks.

    Raises:
        ShardError: no shards, damaged ones, too few tokens, or a vocabulary that is not the model's.
        StorageError: the bucket or the cache can't be used.
    """
    seq_len = model.seq_len
    found = {name: _fetch(one, storage, ranks, model) for name, one in alone(data)}
    shards = {name: each for name, (_, each) in found.items()}
    order = DataOrder.of(data, shards, seed, seq_len)
    if len({answer["found"] for answer in ranks.exchange({"found": order.fingerprint})}) > 1:
        places = ", ".join(store.url for store, _ in found.values())
        raise ShardError(f"{places}: not every rank found the same shards", "Start again once nobody is writing there.")
    manifests = {store.url: each.manifest for store, each in found.values()}
    tokenizers = {store.url: _tokenizer_beside(store) for store, _ in found.values()}
    check_alike(manifests, tokenizers)
    validation = None
    if data.val_source:
        val_data = dataclasses.replace(data, source=data.val_source, sources=(), max_files=0)
        _, val_shards = _fetch(val_data, storage, ranks, model)
        manifests[data.val_source] = val_shards.manifest
        validation = validation_batches(val_shards.shards, seq_len, eval_sequences)[ranks.rank :: ranks.world_size]
    return Corpus(
        batches=lay_out(data, shards, seq_len=seq_len, global_size=global_size, seed=seed),
        order=order,
        validation=validation,
        skipped_shards=tuple(f"{name}/{shard}".lstrip("/") for name, each in shards.items() for shard in each.skipped),
        unigram_entropy=_unigram_entropy(shards),
        tokenizer=next((text for text in tokenizers.values() if text is not None), None),
        document_end=document_end(data.eot_token_id, manifests) if data.document_mask else None,
    )


def _tokenizer_beside(store: ObjectStore) -> str | None:
    return store.read_bytes(TOKENIZER_NAME).decode() if store.stat(TOKENIZER_NAME) else None


def _unigram_entropy(shards: Mapping[str, ShardSet]) -> float | None:
    """Of the data as a whole: a mixture's is not that of any source."""
    (first, *others) = shards.values()
    return None if others or first.manifest is None else first.manifest.unigram_entropy


def _fetch(data: DataConfig, storage: StorageConfig, ranks: Ranks, model: ModelConfig) -> tuple[ObjectStore, ShardSet]:
    store = open_store(data.source, storage)
    logger.info("data: %s", store.describe())
    shards = fetch_shards(
        store,
        data,
        vocab_size=model.vocab_size,
        may_be_larger=bool(model.init_from),  # OPT, Pythia and Qwen3 have rows that their tokenizers never name
        local_rank=ranks.local_rank,
        local_world_size=ranks.local_world_size,
    )
    skipped = len(shards.skipped)
    logger.info("data: %d shards, %s tokens, %d shards left out", len(shards.shards), f"{shards.n_tokens:,}", skipped)
    return store, shards
