"""Tokenizers: a byte-level BPE or a WordPiece trained on text, saved as tokenizer.json, turned into arrays of ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pretrain.errors import ConfigError, ShardError
from pretrain.files import new_file

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # of ours, GPT-2, NeoX; Llama 3; Llama; Gemma
UNKNOWN = "[UNK]"  # WordPiece has no bytes to fall back on
SMALLEST_VOCAB = 256 + 1  # every byte, so that any text can be encoded, and the end of text
BATCH_DOCUMENTS = 64


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with exactly `vocab_size` ids; the same documents in the same order give the same one.

    Raises:
        ConfigError: a vocabulary too small for the 256 bytes.
        ShardError: too little text for so many ids.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(f"vocab_size {vocab_size} is below {SMALLEST_VOCAB}", "256 bytes and the end of text are ids")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return _exactly(tokenizer, vocab_size)


def train_wordpiece(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A WordPiece with exactly `vocab_size` ids, as BERT's with case and accents kept.

    White space is not kept, and a character that the documents don't have becomes [UNK]. The same documents in the
    same order give the same one; they are held in memory meanwhile.

    Raises:
        ConfigError: a vocabulary too small.
        ShardError: too little text for so many ids.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise ConfigError(f"vocab_size {vocab_size} is below {SMALLEST_VOCAB}", "Give more ids")
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts = list(documents)
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update("".join(tokenizer.normalizer.normalize_str(text).split()))
    # A character stands in the vocabulary twice, at a word's start and within: together at most half of it.
    alphabet = sorted(sorted(seen, key=lambda char: (-seen[char], char))[: vocab_size // 4])
    # The trainer would number the second kind in the order of a hash map, another one in each process.
    within = [f"##{char}" for char in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNKNOWN, END_OF_TEXT, *within],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tree = json.loads(tokenizer.to_str())
    tree["added_tokens"] = tree["added_tokens"][:2]  # those within words are not special after all
    return _exactly(Tokenizer.from_str(json.dumps(tree)), vocab_size)


def _exactly(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    if tokenizer.get_vocab_size() != vocab_size:
        raise ShardError(
            f"the text gives {tokenizer.get_vocab_size()} token ids, expected {vocab_size}",
            "Give more text or fewer ids",
        )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """Each document's ids (n_tokens,) ending with the end of text: uint16 where the vocabulary fits, else uint32.

    Text that spells `<|endoftext|>` is encoded as those letters: only this function ends a document.
    """
    eot_id = end_of_text_id(tokenizer)
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    tokenizer.encode_special_tokens = True
    remaining = iter(documents)
    while batch := list(islice(remaining, BATCH_DOCUMENTS)):
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield np.array([*encoding.ids, eot_id], dtype=dtype)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends a document.

    Raises:
        ShardError: the tokenizer has none.
    """
    eot_id = tokenizer.token_to_id(END_OF_TEXT)
    if eot_id is None:
        raise ShardError(f"the tokenizer has no token {END_OF_TEXT}", "train one with pretrain.tokenizers.train_bpe")
    return int(eot_id)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write tokenizer.json, whole or not at all."""
    with new_file(path) as file:
        file.write(tokenizer.to_str(pretty=True).encode())


def load_tokenizer(path: Path) -> Tokenizer:
    """Read tokenizer.json.

    Raises:
        ShardError: no such file, or not a tokenizer.
    """
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShardError(f"can't read tokenizer {path}: {error}", "give the tokenizer.json of the shards") from error
    except Exception as error:  # the tokenizers library raises bare Exception on JSON that is no tokenizer
        raise ShardError(f"{path} is not a tokenizer: {error}", "give the tokenizer.json of the shards") from error
