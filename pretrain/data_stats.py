"""What a set of shards holds: tokens, documents, padding, frequencies. One shard is in memory at a time.

stats = DataStats()
for name in names:
    stats.add(name, path, pad_token_id=-1, vocab_size=8192)
print(stats.n_tokens, stats.unigram_entropy)
"""

from __future__ import annotations

import math
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import ConfigError, ShardError
from pretrain.files import crc32c_of_file, disk_problem
from pretrain.manifest import MANIFEST_NAME, ShardEntry
from pretrain.npz import TOKEN_KEYS, check_vocab, read_npz

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_GAPS = 100  # between the bars of shards; more of them hide the bars
_BLUE, _GREEN = "#1f77b4", "#2ca02c"


@dataclass(frozen=True)
class ShardStats:
    """One shard.

    Args:
        bytes: of the .npz file.
        slots: ids in its token array, padding included.
        problem: why it can't be trained on; empty where it can, and else the counts are 0.
    """

    name: str
    bytes: int
    tokens: int = 0
    documents: int = 0
    slots: int = 0
    problem: str = ""


@dataclass
class DataStats:
    """Sums over the shards that were added; damaged ones are kept by name and counted nowhere else.

    Attributes:
        token_counts: (largest id + 1,) int64, how often each id occurs.
        length_counts: tokens of a document -> documents.
    """

    shards: list[ShardStats] = field(default_factory=list)
    token_counts: np.ndarray = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    length_counts: Counter[int] = field(default_factory=Counter)

    def add(
        self, name: str, path: Path, *, pad_token_id: int, vocab_size: int, expected: ShardEntry | None = None
    ) -> ShardStats:
        """Read one shard and take it in; what is wrong with it is told by its `problem`.

        Args:
            expected: what manifest.json says of it.

        Raises:
            StorageError: the file can't be read.
        """
        size = path.stat().st_size
        try:
            tokens, lengths = read_npz(path, pad_token_id=pad_token_id, name=name)
            check_vocab(tokens, vocab_size, name)
            _check_entry(expected, path, len(tokens), name)
        except ShardError as error:
            shard = ShardStats(name, size, problem=error.what)
            self.shards.append(shard)
            return shard
        counts = np.bincount(tokens, minlength=len(self.token_counts))
        counts[: len(self.token_counts)] += self.token_counts
        self.token_counts = counts
        self.length_counts.update(
            dict(zip(*(part.tolist() for part in np.unique(lengths, return_counts=True)), strict=True))
        )
        shard = ShardStats(name, size, len(tokens), len(lengths), token_slots(path))
        self.shards.append(shard)
        return shard

    @property
    def good(self) -> list[ShardStats]:
        """Shards that can be trained on."""
        return [shard for shard in self.shards if not shard.problem]

    @property
    def bad(self) -> list[ShardStats]:
        """Shards that can't."""
        return [shard for shard in self.shards if shard.problem]

    @property
    def n_tokens(self) -> int:
        """Padding not counted."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def n_documents(self) -> int:
        """Rows, where a shard keeps no lengths."""
        return sum(shard.documents for shard in self.shards)

    @property
    def n_bytes(self) -> int:
        """Of the good shards' files."""
        return sum(shard.bytes for shard in self.good)

    @property
    def padding_share(self) -> float:
        """Part of the token arrays that is padding, 0 to 1."""
        slots = sum(shard.slots for shard in self.shards)
        return 1 - self.n_tokens / slots if slots else 0.0

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of the ids' own frequencies: -Σ p ln p."""
        counts = self.token_counts[self.token_counts > 0]
        shares = counts / max(counts.sum(), 1)
        return float(-(shares * np.log(shares)).sum())

    @property
    def n_distinct(self) -> int:
        """Ids that occur."""
        return int((self.token_counts > 0).sum())

    def top_tokens(self, count: int) -> list[tuple[int, int]]:
        """(id, occurrences) of the most frequent ids, the lower id first among equals."""
        order = np.argsort(-self.token_counts, kind="stable")[:count]
        return [(int(token), int(self.token_counts[token])) for token in order if self.token_counts[token]]

    def length_quantiles(self) -> dict[str, float]:
        """Tokens a document: min, mean, max and the quantiles, each the length of a document (the lower of two)."""
        if not self.length_counts:
            return {}
        lengths = np.array(sorted(self.length_counts))
        counts = np.array([self.length_counts[length] for length in lengths.tolist()])
        reached = np.cumsum(counts)
        places = [math.ceil(quantile * int(reached[-1])) for quantile in QUANTILES]
        quantiles = {
            f"p{round(100 * quantile)}": int(lengths[np.searchsorted(reached, place)])
            for quantile, place in zip(QUANTILES, places, strict=True)
        }
        mean = float((lengths * counts).sum() / reached[-1])
        return {"min": int(lengths[0]), "mean": round(mean, 2), **quantiles, "max": int(lengths[-1])}

    def length_histogram(self) -> list[tuple[int, int]]:
        """(lower bound, documents) by powers of two: bound ≤ tokens < 2 · bound, without the empty ends."""
        bins: Counter[int] = Counter()
        for length, documents in self.length_counts.items():
            bins[length.bit_length() - 1] += documents
        return [(2**power, bins[power]) for power in range(min(bins, default=0), max(bins, default=-1) + 1)]

    def to_json(self, top: int) -> dict[str, Any]:
        """Everything as plain values, with the `top` most frequent ids."""
        return {
            "tokens": self.n_tokens,
            "documents": self.n_documents,
            "bytes": self.n_bytes,
            "padding_share": round(self.padding_share, 6),
            "unigram_entropy_nats": round(self.unigram_entropy, 6),
            "distinct_tokens": self.n_distinct,
            "document_lengths": self.length_quantiles(),
            "length_histogram": self.length_histogram(),
            "top_tokens": self.top_tokens(top),
            "shards": [asdict(shard) for shard in self.shards],
        }


def _check_entry(expected: ShardEntry | None, path: Path, n_tokens: int, name: str) -> None:
    """Raises ShardError where manifest.json says otherwise, as training would."""
    if expected and (expected.tokens, expected.crc32c) != (n_tokens, crc32c := crc32c_of_file(path)):
        raise ShardError(
            f"shard {name}: found {n_tokens} tokens and crc32c {crc32c}, "
            f"expected {expected.tokens} and {expected.crc32c} as {MANIFEST_NAME} says"
        )


def token_slots(path: Path) -> int:
    """Ids in the token array of a shard that `read_npz` took, padding included; only its header is read."""
    with zipfile.ZipFile(path) as archive:
        key = next(key for key in TOKEN_KEYS if f"{key}.npy" in archive.namelist())
        with archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return math.prod(read(file)[0])


# ---- the picture ----


def save_png(stats: DataStats, path: Path, title: str) -> None:
    """Lengths of the documents, frequencies of the tokens and sizes of the shards, side by side.

    Raises:
        ConfigError: matplotlib is not installed, or it can't write a file of that name.
        StorageError: the file can't be written.
    """
    try:
        import matplotlib  # here, because it takes half a second and only pictures need it

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("--save needs matplotlib, which is not installed", "Run bash setup_env.sh.") from error
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    figure.suptitle(title)
    _draw_lengths(stats.length_histogram(), panels[0])
    _draw_frequencies(stats.token_counts, panels[1])
    _draw_shards(stats.good, panels[2])
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ConfigError(f"--save {path}: {error}", "Name a .png, .pdf or .svg.") from error
    except OSError as error:
        if problem := disk_problem(error, path.parent):
            raise problem from error
        raise
    finally:
        pyplot.close(figure)


def _draw_lengths(bins: Sequence[tuple[int, int]], axes: Any) -> None:
    bounds = [bound for bound, _ in bins]
    axes.bar(bounds, [documents for _, documents in bins], width=bounds, align="edge", color=_BLUE, edgecolor="white")
    axes.set(title="Documents by length", xlabel="tokens in a document", ylabel="documents", xscale="log")


def _draw_frequencies(counts: np.ndarray, axes: Any) -> None:
    ranked = np.sort(counts[counts > 0])[::-1]
    axes.loglog(np.arange(1, len(ranked) + 1), ranked / max(ranked.sum(), 1), color=_BLUE, linewidth=1.8)
    axes.set(title="Tokens by frequency", xlabel="rank of a token", ylabel="share of all tokens")


def _draw_shards(shards: Sequence[ShardStats], axes: Any) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    width = 0.85 if len(shards) <= MAX_GAPS else 1.0
    axes.bar(np.arange(1, len(shards) + 1), [shard.tokens for shard in shards], width=width, color=_GREEN)
    axes.set(title="Tokens a shard", xlabel="shards, by name", ylabel="tokens")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(EngFormatter())
