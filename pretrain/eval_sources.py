"""What a model is evaluated on: shards as training reads them, or raw text tokenized as training data is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pretrain.config import DataConfig, StorageConfig
from pretrain.documents import EMPTY, Document, Reading, read_unit
from pretrain.errors import ShardError
from pretrain.evaluation import Source, Text, TokenStream, bytes_per_token
from pretrain.generation import end_of_text, plainly
from pretrain.manifest import MANIFEST_NAME, TOKENIZER_NAME
from pretrain.raw_files import READ_HERE, Unit, list_inputs
from pretrain.shards import open_shards, read_manifest
from pretrain.storage import ObjectStore, open_store
from pretrain.tokenizers import BATCH_DOCUMENTS, load_tokenizer

MENDS = {
    "undecodable": "Convert it to UTF-8, or leave it out",
    "broken_json": "Give one JSON object a line",
    "missing_key": "Name the key of the text: --text_key",
    "too_long": "Cut it into documents",
    "damaged": "Fetch the file again",
}
NO_BYTE_LENGTHS = "no bits per byte: the tokenizer is not byte-level, so a token has no number of bytes"
OTHER_TOKENIZER = "Evaluate on shards of the tokenizer that the model was trained with."
NO_TOKENIZER = "no bits per byte: neither the shards nor the checkpoint have a tokenizer.json"


def shard_source(
    data: DataConfig,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    storage: StorageConfig | None = None,
    *,
    may_be_larger: bool = False,
) -> Source:
    """Shards in the order of their names, read through the cache as training reads them.

    The first token has nothing before it and is not scored.

    Args:
        data: source, pattern, cache_dir and the rest of what says how shards are read.
        vocab_size: the model's.
        tokenizer: the model's; where it is None, the one beside the shards tells their bytes.
        may_be_larger: whether `vocab_size` may exceed the vocabulary of the shards' manifest.

    Raises:
        ShardError: no shards, damaged ones, or another vocabulary or tokenizer than the model's.
        StorageError: the store or the cache can't be used.
    """
    store = open_store(data.source, storage or StorageConfig())
    manifest = read_manifest(store, store.list())
    if manifest:
        try:
            manifest.check_vocab_size(vocab_size, f"{data.source}: {MANIFEST_NAME}", may_be_larger)
        except ShardError as error:
            raise ShardError(error.what, OTHER_TOKENIZER) from error
    beside = _tokenizer_beside(store)
    if tokenizer and beside and tokenizer.get_vocab() != beside.get_vocab():
        raise ShardError(
            f"{data.source}: its {TOKENIZER_NAME} has other tokens than the model's",
            OTHER_TOKENIZER,
        )
    shards = open_shards(store, data, vocab_size=vocab_size, may_be_larger=may_be_larger, at_once=True)
    known = beside or tokenizer
    lengths = bytes_per_token(known, vocab_size) if known else None
    note = "" if lengths is not None else NO_BYTE_LENGTHS if known else NO_TOKENIZER
    return Source(data.source, TokenStream(shards.shards), lengths, note=note)


def _tokenizer_beside(store: ObjectStore) -> Tokenizer | None:
    if not store.stat(TOKENIZER_NAME):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / TOKENIZER_NAME
        store.download(TOKENIZER_NAME, path)
        try:
            return load_tokenizer(path)
        except ShardError as error:
            what = f"{store.url.rstrip('/')}/{TOKENIZER_NAME} is not a tokenizer"
            raise ShardError(what, "Give the tokenizer.json of the shards, or delete it.") from error


def text_source(
    paths: Sequence[str], tokenizer: Tokenizer, vocab_size: int, *, text_key: str = "text", max_tokens: int = 0
) -> Source:
    """Raw text, tokenized as training data is: each document ends with the end of text.

    One more end of text stands before the first document, as it does in training before every other, so that all of
    the text is scored.

    Args:
        paths: files, folders or globs, as scripts/prepare_data.py reads them: a .txt is a document.
        vocab_size: the model's.
        text_key: key or column of the text.
        max_tokens: stop reading once there are so many; 0: read all.

    Raises:
        ShardError: no such file, no text in it, text that can't be used, or a tokenizer without an end of text or with
            other ids than the model.
    """
    if (eot_id := end_of_text(tokenizer)) is None:
        raise ShardError("the tokenizer has no end of text that is known here", "Give another: --tokenizer")
    plainly(tokenizer)
    pieces, n_tokens, text_bytes = [np.array([eot_id], dtype=np.int64)], 0, 0
    documents = read_documents(paths, text_key)
    while (n_tokens < max_tokens or not max_tokens) and (batch := list(islice(documents, BATCH_DOCUMENTS))):
        for text, encoding in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            pieces.append(np.array([*encoding.ids, eot_id], dtype=np.int64))
            n_tokens += len(pieces[-1])
            text_bytes += len(text.encode())
    title = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if not text_bytes:
        raise ShardError(f"{title}: found no text", f"Read here: {READ_HERE}")
    ids = np.concatenate(pieces)
    if ids.max() >= vocab_size:
        raise ShardError(
            f"{title}: the tokenizer gives id {ids.max()}, the model's vocabulary has {vocab_size}",
            "Give the tokenizer.json that the model was trained with: --tokenizer",
        )
    lengths = bytes_per_token(tokenizer, vocab_size)
    note = NO_BYTE_LENGTHS if lengths is None and 0 < max_tokens < n_tokens else ""
    return Source(title, TokenStream([Text(ids)]), lengths, text_bytes, note)


def read_documents(paths: Sequence[str], text_key: str) -> Iterator[str]:
    """The documents of files and folders that are not empty, folders by name. Raises ShardError as `text_source`."""
    files, _ = list_inputs("", paths)
    for number, file in enumerate(files):
        for found in read_unit(Unit(number, file), Reading(text_key)):
            if isinstance(found, Document):
                yield found.text
            elif found.reason != EMPTY:
                raise ShardError(f"{found.where}: {found.found}", MENDS[found.reason])
