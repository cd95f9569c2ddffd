"""Training data in words: the windows of a step, the counts of a set of shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
from rich.console import Console
from tokenizers import Tokenizer

from pretrain.config import DataConfig
from pretrain.data_stats import DataStats
from pretrain.listings import print_fields, print_table, size_text
from pretrain.lookup import DocumentPart, Part, Window, document_lengths, documents_in
from pretrain.storage import ObjectStore

SNIPPET_TOKENS, SNIPPET_CHARACTERS = 32, 60
MAX_ROWS = 40  # of a table; --json has them all


def text_of(tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    """Tokens decoded; their ids where there is no tokenizer."""
    ids = tokens.tolist()
    return tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(map(str, ids))


class StepView:
    """Windows in words.

    Args:
        stores: of the shards, by the name of their source; of data that is no mixture by ''.
    """

    def __init__(self, stores: Mapping[str, ObjectStore], data: DataConfig, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._lengths = lru_cache(maxsize=None)(
            lambda source, shard: document_lengths(stores[source], shard, data.pad_token_id)
        )

    def tree(self, window: Window) -> dict[str, Any]:
        """A window with every document of it, decoded."""
        parts = []
        for part in window.parts:
            tokens, at, documents = part.shard.tokens(), part.begin, []
            for document in documents_in(self._lengths(window.source, part.shard), part.begin, part.end):
                length = document.end - document.begin
                documents.append({**asdict(document), "text": text_of(tokens[at : at + length], self._tokenizer)})
                at += length
            parts.append({"shard": _title(window, part), "begin": part.begin, "end": part.end, "documents": documents})
        return {"window": window.row, "epoch": window.epoch, "index": window.index, "parts": parts}

    def shards(self, windows: Sequence[Window]) -> list[dict[str, Any]]:
        """What each shard gave, in the order in which they come."""
        spans: dict[str, list[DocumentPart]] = {}
        counts: Counter[str] = Counter()
        for window in windows:
            for part in window.parts:
                counts[_title(window, part)] += 1
                documents = documents_in(self._lengths(window.source, part.shard), part.begin, part.end)
                spans.setdefault(_title(window, part), []).extend(documents)
        return [
            {
                "name": shard,
                "windows": counts[shard],
                "tokens": sum(each.end - each.begin for each in documents),
                "documents": len({each.number for each in documents}),
            }
            for shard, documents in spans.items()
        ]

    def print_step(self, windows: Sequence[Window], console: Console) -> None:
        """A table of the shards, and a line a window."""
        rows = [
            [row["name"], *(f"{row[key]:,}" for key in ("windows", "tokens", "documents"))]
            for row in self.shards(windows)
        ]
        print_table(
            ("shard", "windows", "tokens", "documents"), rows, console, right=("windows", "tokens", "documents")
        )
        console.print()
        print_table(("window", "shard", "tokens", "documents", "begins with"), self._lines(windows[:MAX_ROWS]), console)
        if len(windows) > MAX_ROWS:
            console.print(f"… and {len(windows) - MAX_ROWS} more (--json has all, --window N one whole)")

    def _lines(self, windows: Sequence[Window]) -> list[list[str]]:
        lines = []
        for window in windows:
            first, more = window.parts[0], len(window.parts) - 1
            lengths = self._lengths(window.source, first.shard)
            numbers = [each.number for each in documents_in(lengths, first.begin, first.end)]
            text = text_of(window.tokens()[:SNIPPET_TOKENS], self._tokenizer).replace("\n", "⏎")
            span = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
            shard = _title(window, first) + (f" +{more}" if more else "")
            tokens = f"{first.begin:,}–{first.end:,}"
            lines.append([str(window.row), shard, tokens, span, text[:SNIPPET_CHARACTERS]])
        return lines

    def print_window(self, window: Window, console: Console) -> None:
        """The whole text of one, document by document."""
        for part in self.tree(window)["parts"]:
            for document in part["documents"]:
                begin, end, length = document["begin"], document["end"], document["length"]
                title = f"{part['shard']}, document {document['number']}, tokens {begin:,}–{end:,} of {length:,}"
                console.print(f"\n── {title} ──\n{document['text']}")


def _title(window: Window, part: Part) -> str:
    """A shard's name, in a mixture behind its source's."""
    return f"{window.source}/{part.shard.name}" if window.source else part.shard.name


def token_text(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as text in quotes; nothing where there is no tokenizer."""
    return repr(text_of(np.array([token]), tokenizer)) if tokenizer else ""


def print_stats(stats: DataStats, top: int, tokenizer: Tokenizer | None, console: Console) -> None:
    """The counts as tables."""
    entropy = stats.unigram_entropy
    fields = {
        "shards": f"{len(stats.good):,} good, {len(stats.bad):,} bad or missing",
        "tokens": f"{stats.n_tokens:,}",
        "documents": f"{stats.n_documents:,}",
        "size": f"{size_text(stats.n_bytes)}, {stats.n_bytes / max(stats.n_tokens, 1):.2f} bytes a token",
        "padding": f"{stats.padding_share:.2%} of the token arrays",
        "distinct tokens": f"{stats.n_distinct:,}",
        "unigram entropy": f"{entropy:.4f} nats a token, {entropy / np.log(2):.4f} bits",
        "document lengths": ", ".join(f"{name} {value:,}" for name, value in stats.length_quantiles().items()),
    }
    print_fields("Data", fields, console)
    console.print()
    bins = [[f"{low:,}–{2 * low - 1:,}", f"{count:,}", _bar(count, stats)] for low, count in stats.length_histogram()]
    print_table(("tokens", "documents", ""), bins, console, right=("tokens", "documents"), title="Documents by length")
    console.print()
    frequent = [
        [str(token), f"{count:,}", f"{count / stats.n_tokens:.2%}", token_text(token, tokenizer)]
        for token, count in stats.top_tokens(top)
    ]
    columns = ("id", "count", "share", "text")
    print_table(columns, frequent, console, right=columns[:3], title="Most frequent tokens")
    console.print()
    rows = [
        [
            shard.name,
            f"{shard.tokens:,}",
            f"{shard.documents:,}",
            size_text(shard.bytes),
            "NO" if shard.problem else "yes",
        ]
        for shard in stats.shards[:MAX_ROWS]
    ]
    print_table(("shard", "tokens", "documents", "size", "good"), rows, console, right=("tokens", "documents", "size"))
    if len(stats.shards) > MAX_ROWS:
        console.print(f"… and {len(stats.shards) - MAX_ROWS} more (--json has all)")


def _bar(documents: int, stats: DataStats) -> str:
    """A bar as long as the part of the fullest bin."""
    return "█" * round(30 * documents / max(count for _, count in stats.length_histogram()))
