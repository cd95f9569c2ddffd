"""What turns documents into ids while shards are prepared: a tokenizer.json, by `tokenizers` or by `tiktoken`.

A tiktoken encoding becomes a tokenizer.json, too: it is what training, generation and evaluation read, and all that a
worker needs to have the encoding again. The ids are always tiktoken's own.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from pretrain.errors import ConfigError, ShardError
from pretrain.tokenizers import END_OF_TEXT, END_OF_TEXT_NAMES

TIKTOKEN = "tiktoken:"
MAX_PIECE_CHARS = 1 << 20  # what an encoder holds of a piece is some hundred times its text
SEARCHED_CHARS = 1 << 16
CUT = re.compile(r"(?<=\S)\s(?=\w)")  # here words are parted whatever comes before and after
PROBES = (
    "def f(x):\n    return x + 1\n",
    "Don't!  3.14 × 2718 = ?\r\n\r\n",
    " grüße, 世界 🙂 e\u0301",
    "a\u00a0 b \t\t c",
)


class Encoder(Protocol):
    """Encodes documents; the same text always gives the same ids."""

    vocab_size: int
    eot_id: int

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids (n,) uint32 of each text, nothing added; text that spells a special token is that text."""
        ...


class TokenizersEncoder:
    """A tokenizer.json through the library `tokenizers`.

    Raises:
        ShardError: it has no end of text.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        eot_id = next((ids[name] for name in END_OF_TEXT_NAMES if name in ids), None)
        if eot_id is None:
            names = ", ".join(END_OF_TEXT_NAMES)
            raise ShardError(f"the tokenizer has no end of text: none of {names}", "Add one to its added_tokens")
        self.eot_id: int = eot_id

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Encoder. The offsets, which nobody needs here, are not computed: a good part of the time."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


class TiktokenEncoder:
    """A tokenizer.json that `tiktoken_json` wrote, through the library `tiktoken`."""

    def __init__(self, tokenizer_json: str) -> None:
        tree = json.loads(tokenizer_json)
        to_byte = {char: byte for byte, char in _byte_chars().items()}
        ranks = {bytes(to_byte[char] for char in token): rank for token, rank in tree["model"]["vocab"].items()}
        special = {token["content"]: token["id"] for token in tree["added_tokens"]}
        ranks = {token: rank for token, rank in ranks.items() if rank not in special.values()}
        pattern = tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        self._encoding = _tiktoken().Encoding(
            "of tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self.vocab_size = int(self._encoding.n_vocab)
        self.eot_id = special[END_OF_TEXT]

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See Encoder."""
        return [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]


def open_encoder(tokenizer_json: str, library: str) -> Encoder:
    """The encoder of a tokenizer.json.

    Args:
        library: tokenizers or tiktoken.

    Raises:
        ShardError: it has no end of text.
        ConfigError: tiktoken is missing.
    """
    return TiktokenEncoder(tokenizer_json) if library == "tiktoken" else TokenizersEncoder(tokenizer_json)


def encode_whole(encoder: Encoder, text: str) -> list[np.ndarray]:
    """The ids of a document of any length, in pieces: memory is bounded by a piece.

    A cut is made before a single white space between words, where GPT-2's and BERT's rules part words in any case, so
    that the ids are those of the whole; only a text without any such place in 64 Ki characters is cut elsewhere.
    """
    pieces, begin = [], 0
    while len(text) - begin > MAX_PIECE_CHARS:
        end = begin + MAX_PIECE_CHARS
        cuts = [found.start() for found in CUT.finditer(text, end - SEARCHED_CHARS, end)]
        end = cuts[-1] if cuts else end
        pieces.append(encoder.encode([text[begin:end]])[0])
        begin = end
    return [*pieces, encoder.encode([text[begin:]])[0]]


# ---- tiktoken ----


def tiktoken_json(name: str) -> str:
    """A tiktoken encoding as the text of a tokenizer.json that gives the same ids.

    Args:
        name: as tiktoken knows it: gpt2, cl100k_base, … Its files are fetched where tiktoken has not cached them.

    Raises:
        ConfigError: tiktoken is missing, doesn't know the name or can't fetch its files.
        ShardError: the encoding has no end of text, or `tokenizers` reads its rules otherwise.
    """
    try:
        encoding = _tiktoken().get_encoding(name)
    except (ValueError, OSError) as error:
        mend = (
            "Names: python -c 'import tiktoken; print(tiktoken.list_encoding_names())'; TIKTOKEN_CACHE_DIR keeps files"
        )
        raise ConfigError(f"tiktoken can't give {name!r}: {error}", mend) from error
    special = dict(encoding._special_tokens)
    if END_OF_TEXT not in special:
        raise ShardError(f"the tiktoken encoding {name} has no {END_OF_TEXT}", "Use another encoding")
    tokenizer = _converted(encoding._mergeable_ranks, encoding._pat_str, special)
    for probe in PROBES:
        ours = tokenizer.encode(probe, add_special_tokens=False).ids
        if ours != encoding.encode_ordinary(probe):
            raise ShardError(f"tokenizers encodes {probe!r} unlike tiktoken's {name}", "Use another encoding")
    return str(tokenizer.to_str(pretty=True))


def _converted(ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> Tokenizer:
    """A byte-level BPE whose merges are every way to put a token together from two, by the token's rank."""
    chars = _byte_chars()
    spelled = {token: "".join(chars[byte] for byte in token) for token in ranks}
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    vocab = {spelled[token]: rank for token, rank in ranks.items()} | special
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _byte_chars() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _tiktoken() -> Any:
    try:
        return importlib.import_module("tiktoken")
    except ImportError as error:
        raise ConfigError(
            "tiktoken encodings need the package tiktoken", "pip install -r requirements-data.txt"
        ) from error
