"""How well a model predicts text: loss, perplexity and bits per byte.

    source = text_source(["book.txt"], pretrained.tokenizer, pretrained.config.vocab_size)
    evaluate(pretrained.model, source, seq_len=1024, stride=512, batch_size=8).bits_per_byte

The tokens are one packed stream, as in training. Windows of seq_len tokens advance by `stride`, and of each only the
last `stride` targets are scored, so that each has at least seq_len - stride tokens before it: stride = seq_len is what
training's validation does, stride 1 gives every target the longest context there is. The first window scores all its
targets; the last one is moved back until it is full. Every target is scored exactly once.

Bits per byte = nats / (ln 2 · bytes). The nats are those of every scored token, the end of each document included; the
bytes are the UTF-8 bytes of the text alone, so an end of text costs nats and has no bytes.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, pre_tokenizers

from pretrain.errors import ConfigError, DivergenceError, ShardError

OPEN_PIECES = 4  # the stream is read from its beginning to its end, so a few memory maps suffice

OnProgress = Callable[[int, int], None]
"""Called with (tokens scored, tokens in all)."""


class Piece(Protocol):
    """Consecutive tokens, such as a `Shard`."""

    @property
    def n_tokens(self) -> int: ...

    def tokens(self) -> np.ndarray:
        """The ids (n_tokens,)."""
        ...


@dataclass(frozen=True)
class Text:
    """Tokens in memory."""

    ids: np.ndarray

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    def tokens(self) -> np.ndarray:
        return self.ids


class TokenStream:
    """Pieces one behind the other, as training packs them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._ends = np.cumsum([piece.n_tokens for piece in pieces])  # (pieces,) where each ends
        self._piece = lru_cache(maxsize=OPEN_PIECES)(lambda index: pieces[index].tokens())
        self.n_tokens = int(self._ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """The tokens [start, start + count), int64 (count,)."""
        out = np.empty(count, dtype=np.int64)
        index, filled = int(np.searchsorted(self._ends, start, side="right")), 0
        while filled < count:
            tokens = self._piece(index)
            offset = start + filled - (int(self._ends[index]) - len(tokens))
            part = tokens[offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            index += 1
        return out


@dataclass(frozen=True)
class Source:
    """What is evaluated on.

    Args:
        title: how it is called in what is shown.
        stream: every token but the first is a target.
        token_bytes: int64 (vocab_size,), bytes of each id's text, -1 for ids that the tokenizer doesn't have; None
            where unknown.
        text_bytes: UTF-8 bytes of the targets' text; 0 where they are counted from the tokens.
        note: why there are no bits per byte, where that is known.
    """

    title: str
    stream: TokenStream
    token_bytes: np.ndarray | None
    text_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Args:
        tokens: targets scored.
        nats: sum of their negative log-likelihoods.
        bytes: of their text; None where unknown.
    """

    tokens: int
    nats: float
    bytes: int | None

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite beyond the largest float."""
        return math.exp(self.loss) if self.loss < math.log(sys.float_info.max) else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """None where the bytes are unknown or there are none."""
        return self.nats / math.log(2) / self.bytes if self.bytes else None


# ---- scoring ----


@dataclass(frozen=True)
class Window:
    """Inputs [start, start + length) of the stream; their last `scored` targets count."""

    start: int
    length: int
    scored: int


def windows(n_targets: int, seq_len: int, stride: int) -> Iterator[Window]:
    """The windows that score the first `n_targets` targets of a stream, each exactly once."""
    length = end = min(seq_len, n_targets)
    yield Window(0, length, length)
    while end < n_targets:
        scored = min(stride, n_targets - end)
        end += scored
        yield Window(end - length, length, scored)


@torch.inference_mode()
def evaluate(
    model: Callable[[torch.Tensor], torch.Tensor],
    source: Source,
    *,
    seq_len: int,
    stride: int,
    batch_size: int,
    device: torch.device | None = None,
    max_tokens: int = 0,
    on_progress: OnProgress | None = None,
) -> Score:
    """Score the targets of a source; the sums are float64.

    Args:
        model: maps tokens int64 (B, T) to logits (B, T, vocab_size); in eval mode.
        seq_len: tokens in a window, at most the model's context.
        stride: 1 to seq_len, see the module.
        batch_size: windows in one forward pass.
        device: of the model; the CPU where it is None.
        max_tokens: score only the first so many; 0: all.

    Raises:
        ConfigError: a stride that doesn't fit the window.
        ShardError: not even one target, or a token id that the tokenizer doesn't have.
        DivergenceError: the loss is not finite.
    """
    check_stride(stride, seq_len)
    if source.stream.n_tokens < 2:
        raise ShardError(f"{source.title}: found {source.stream.n_tokens} tokens, expected at least 2", "Give more.")
    n_all = source.stream.n_tokens - 1
    n_targets = min(max_tokens, n_all) if max_tokens else n_all
    nats, n_scored, n_bytes = 0.0, 0, 0
    for scored, group in _batched(windows(n_targets, seq_len, stride), batch_size):
        rows = np.stack([source.stream.read(window.start, window.length + 1) for window in group])  # (B, T + 1)
        tokens = torch.from_numpy(rows).to(device)
        nats += _nats(model(tokens[:, :-1])[:, -scored:], tokens[:, -scored:])
        if source.token_bytes is not None:
            n_bytes += _count_bytes(rows[:, -scored:], source.token_bytes, source.title)
        n_scored += scored * len(group)
        if on_progress:
            on_progress(n_scored, n_targets)
    assert n_scored == n_targets, f"{n_scored} of {n_targets} targets were scored"
    if not math.isfinite(nats):
        raise DivergenceError(
            f"{source.title}: the model's loss is {nats}", "Take an earlier checkpoint, or --dtype fp32."
        )
    if source.text_bytes and n_targets == n_all:
        return Score(n_targets, nats, source.text_bytes)
    return Score(n_targets, nats, n_bytes if source.token_bytes is not None else None)


def check_stride(stride: int, seq_len: int) -> None:
    """Raises ConfigError where windows of `seq_len` tokens can't advance by `stride`."""
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"--stride {stride} must be in [1, {seq_len}], the tokens of a window")


def _batched(all_windows: Iterable[Window], batch_size: int) -> Iterator[tuple[int, list[Window]]]:
    """(targets scored in each, windows) of every forward pass: the first and the last window may differ."""
    for scored, alike in groupby(all_windows, key=lambda window: window.scored):
        while group := list(islice(alike, batch_size)):
            yield scored, group


def _nats(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """The sum of the cross entropies of (B, n, vocab_size) and (B, n), by rows: logits in fp32 take much memory."""
    rows = zip(logits, targets, strict=True)
    sums = [F.cross_entropy(row.float(), wanted, reduction="none").double().sum() for row, wanted in rows]
    return float(torch.stack(sums).sum())


def _count_bytes(targets: np.ndarray, token_bytes: np.ndarray, title: str) -> int:
    lengths = token_bytes[targets]
    if (lengths < 0).any():
        unknown = int(targets[lengths < 0][0])
        raise ShardError(
            f"{title}: token id {unknown} is none of its tokenizer's", "Give the tokenizer.json of the shards."
        )
    return int(lengths.sum())


def bytes_per_token(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray | None:
    """UTF-8 bytes of each id's text, int64 (vocab_size,): 0 for special tokens, -1 for ids without a token.

    A byte-level token is spelled with one letter a byte (GPT-2), so its length is exact even where it holds half a
    character, which decoding can't give back. None for other tokenizers.
    """
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    if "ByteLevel" not in {part["type"] for part in [decoder, *decoder.get("decoders", [])] if part}:
        return None
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.get_added_tokens_decoder()
    lengths = np.full(max(vocab_size, tokenizer.get_vocab_size()), -1, dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in added:
            lengths[token_id] = 0 if added[token_id].special else len(token.encode())
        elif set(token) <= letters:
            lengths[token_id] = len(token)
        else:
            return None
    return lengths
