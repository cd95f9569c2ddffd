"""`manifest.json` beside the shards: what tokenized them, and what each of them holds.

Written by the scripts that make or download shards, read before training: a vocabulary that disagrees with the model,
a shard that was replaced or that is missing is found in the first second instead of in the loss.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pretrain.errors import ShardError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
MAX_MANIFEST_BYTES = 64 * 2**20
MEND = "Restore the one that belongs to the shards, or delete it: scripts/download_data.py writes one"


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was written."""

    name: str
    """Name relative to the manifest's folder."""
    tokens: int
    """Tokens without padding."""
    documents: int
    bytes: int
    """Size of the .npz file."""
    crc32c: str
    """Checksum of the .npz file, base64."""


@dataclass(frozen=True)
class DataManifest:
    """A set of shards."""

    tokenizer: str
    """What made the ids, e.g. `bpe-8192`; empty: unknown."""
    vocab_size: int
    """Number of ids of the tokenizer; 0: unknown, and then not compared with the model."""
    eot_id: int | None
    """Id that ends a document."""
    shards: tuple[ShardEntry, ...]
    unigram_entropy: float | None = None
    """Nats per validation token under the unigram frequencies of the training tokens: what a model must beat."""
    pad_token_id: int = -1
    """The padding that is not counted; -1: none."""

    @property
    def n_tokens(self) -> int:
        return sum(entry.tokens for entry in self.shards)

    def to_json(self) -> str:
        """The text of manifest.json; equal manifests give equal bytes."""
        tree = dataclasses.asdict(self)
        if self.pad_token_id < 0:  # nearly always: such manifests stay as they were before this field
            del tree["pad_token_id"]
        return json.dumps(tree, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, source: str = MANIFEST_NAME) -> DataManifest:
        """The manifest in `text`; unknown fields are passed over, so that a newer writer can be read.

        Args:
            source: what errors call the manifest.

        Raises:
            ShardError: too large, not JSON, or a field that is missing or of the wrong kind.
        """
        if len(text) > MAX_MANIFEST_BYTES:
            raise ShardError(f"{source} has {len(text)} bytes, expected at most {MAX_MANIFEST_BYTES}", MEND)
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{source} is not JSON: {error}", MEND) from error
        fields = _Fields(tree, source)
        entropy = fields.number("unigram_entropy") if fields.has("unigram_entropy") else None
        return cls(
            tokenizer=fields.text("tokenizer"),
            vocab_size=fields.count("vocab_size"),
            eot_id=fields.count("eot_id") if fields.has("eot_id") else None,
            shards=_entries(fields.items("shards"), source),
            unigram_entropy=entropy,
            pad_token_id=fields.count("pad_token_id") if fields.has("pad_token_id") else -1,
        )

    def check_vocab_size(self, vocab_size: int, source: str, may_be_larger: bool = False) -> None:
        """Refuse a model whose vocabulary is not the tokenizer's.

        Args:
            may_be_larger: the model's may have ids that the tokenizer never gives, as many models of others have.

        Raises:
            ShardError: naming both.
        """
        if self.vocab_size and self.vocab_size != vocab_size and not (may_be_larger and vocab_size > self.vocab_size):
            raise ShardError(
                f"{source} says vocab_size {self.vocab_size} (tokenizer {self.tokenizer or 'unknown'}), "
                f"the model has model.vocab_size {vocab_size}",
                f"Set --model.vocab_size {self.vocab_size}",
            )


def document_end(given: int, manifests: Mapping[str, DataManifest | None]) -> int:
    """The token id that ends a document in all of these sets of shards.

    Args:
        given: `data.eot_token_id`; -1: the manifests tell it.
        manifests: by their source; None where a source has none.

    Raises:
        ShardError: nobody says which it is, or two say it differently.
    """
    said = {"data.eot_token_id": given} if given >= 0 else {}
    for source, manifest in manifests.items():
        if manifest and manifest.eot_id is not None:
            said[f"{source.rstrip('/')}/{MANIFEST_NAME}"] = manifest.eot_id
    if not said:
        raise ShardError(
            f"data.document_mask: nothing says which token ends a document: no {MANIFEST_NAME} with an eot_id in "
            f"{', '.join(manifests)}",
            "Give --data.eot_token_id ID",
        )
    (first, found), *others = said.items()
    for other, differing in others:
        if differing != found:
            raise ShardError(
                f"data.document_mask: {first} says that token {found} ends a document, {other} says {differing}",
                "Give shards of one tokenizer, and no other --data.eot_token_id",
            )
    return found


def _entries(items: list[Any], source: str) -> tuple[ShardEntry, ...]:
    entries = []
    for index, item in enumerate(items):
        fields = _Fields(item, f"{source}, shards[{index}]")
        counts = {key: fields.count(key) for key in ("tokens", "documents", "bytes")}
        entries.append(ShardEntry(name=fields.text("name"), crc32c=fields.text("crc32c"), **counts))
    if len({entry.name for entry in entries}) < len(entries):
        raise ShardError(f"{source} names a shard twice", MEND)
    return tuple(entries)


class _Fields:
    """One JSON object, read with every value's kind checked."""

    def __init__(self, tree: Any, source: str) -> None:
        if not isinstance(tree, dict):
            raise ShardError(f"{source} is a {type(tree).__name__}, expected an object", MEND)
        self.tree, self.source = tree, source

    def has(self, key: str) -> bool:
        return self.tree.get(key) is not None

    def text(self, key: str) -> str:
        return str(self._checked(key, isinstance(self.tree.get(key), str), "a string"))

    def count(self, key: str) -> int:
        value = self.tree.get(key)
        is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
        return int(self._checked(key, is_count, "a count"))

    def number(self, key: str) -> float:
        value = self.tree.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return float(self._checked(key, is_number, "a finite number"))

    def items(self, key: str) -> list[Any]:
        return list(self._checked(key, isinstance(self.tree.get(key), list), "a list"))

    def _checked(self, key: str, right: bool, expected: str) -> Any:
        if not right:
            raise ShardError(f"{self.source}: {key} is {self.tree.get(key)!r:.60}, expected {expected}", MEND)
        return self.tree[key]
