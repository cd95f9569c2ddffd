"""What a model is evaluated on: shards as training reads them, or raw text tokenized as training data is."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pretrain.config import DataConfig, StorageConfig
from pretrain.errors import ShardError
from pretrain.evaluation import Source, Text, TokenStream, bytes_per_token
from pretrain.generation import end_of_text, plainly
from pretrain.manifest import MANIFEST_NAME, TOKENIZER_NAME
from pretrain.shards import fetch_shards, read_manifest
from pretrain.storage import ObjectStore, open_store
from pretrain.tokenizers import BATCH_DOCUMENTS, load_tokenizer

TEXT_SUFFIXES = (".txt", ".jsonl")
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
    shards = fetch_shards(store, data, vocab_size=vocab_size, may_be_larger=may_be_larger)
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
    paths: Sequence[Path], tokenizer: Tokenizer, vocab_size: int, *, text_key: str = "text", max_tokens: int = 0
) -> Source:
    """Raw text, tokenized as training data is: each document ends with the end of text.

    One more end of text stands before the first document, as it does in training before every other, so that all of
    the text is scored.

    Args:
        paths: .txt files (a document each), .jsonl files (a document a line), or folders of them.
        vocab_size: the model's.
        text_key: of the text in a line of a .jsonl file.
        max_tokens: stop reading once there are so many; 0: read all.

    Raises:
        ShardError: no such file, no text in it, text that is not UTF-8, a line without text, or a tokenizer
            without an end of text or with other ids than the model.
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
    title = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    if not text_bytes:
        raise ShardError(f"{title}: found no text", f"Give {' or '.join(TEXT_SUFFIXES)} files, or folders of them.")
    ids = np.concatenate(pieces)
    if ids.max() >= vocab_size:
        raise ShardError(
            f"{title}: the tokenizer gives id {ids.max()}, the model's vocabulary has {vocab_size}",
            "Give the tokenizer.json that the model was trained with: --tokenizer",
        )
    lengths = bytes_per_token(tokenizer, vocab_size)
    note = NO_BYTE_LENGTHS if lengths is None and 0 < max_tokens < n_tokens else ""
    return Source(title, TokenStream([Text(ids)]), lengths, text_bytes, note)


def read_documents(paths: Sequence[Path], text_key: str) -> Iterator[str]:
    """The documents of files and folders that are not empty, folders by name. Raises ShardError as `text_source`."""
    for path in paths:
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in (file for file in found if file == path or file.suffix in TEXT_SUFFIXES):
            if file.suffix not in TEXT_SUFFIXES:
                raise ShardError(f"{file} is neither {' nor '.join(TEXT_SUFFIXES)}", "Give raw text, or shards: --data")
            try:
                with file.open("rb") as lines:
                    for number, line in enumerate(lines if file.suffix == ".jsonl" else [lines.read()], 1):
                        where = f"{file}, line {number}" if file.suffix == ".jsonl" else str(file)
                        if text := _document(line, file.suffix, text_key, where):
                            yield text
            except OSError as error:
                raise ShardError(f"can't read {file}: {error.strerror}", "Check that the file is there.") from error


def _document(data: bytes, suffix: str, text_key: str, where: str) -> str:
    """The text of a .txt file or of one line of a .jsonl file; empty where there is none."""
    try:
        text = data.decode()
        if suffix == ".txt":
            return text
        tree = json.loads(text) if text.strip() else {text_key: ""}
        found = tree.get(text_key) if isinstance(tree, dict) else None
        if not isinstance(found, str):
            raise ShardError(f"{where}: there is no text under {text_key!r}", "Name its key: --text_key")
        found.encode()  # JSON can spell half a surrogate pair, which is no text
        return found
    except UnicodeError as error:
        raise ShardError(f"{where} is not UTF-8: {error}", "Convert it, or leave it out.") from error
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where} is not JSON: {error}", "Give one JSON object a line.") from error
