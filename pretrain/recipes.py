"""What an output of shards says of itself: the recipe that claims it, and the manifests and metadata that complete it.

    recipe.json              what was asked for; created before anything else, and the tokenizer.json after it
    shards/*.npz, val/*.npz  with manifest.json beside them, tokenizer.json beside the first
    metadata.json            the recipe and what came of it; created last: with it the output is complete

All are objects that are created and never replaced, so that an output holds one preparation and no other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pretrain.errors import ConfigError, ShardError, StorageError
from pretrain.manifest import MANIFEST_NAME, TOKENIZER_NAME, DataManifest
from pretrain.shard_writer import SPLITS, ShardWriter
from pretrain.storage import ObjectExists, ObjectStore
from pretrain.tokenizers import UNKNOWN

RECIPE_NAME, METADATA_NAME = "recipe.json", "metadata.json"
TOKENIZER = f"{SPLITS[0]}/{TOKENIZER_NAME}"
MAX_BYTES = 1 << 30  # a million inputs


def claim(store: ObjectStore, recipe: dict[str, Any]) -> None:
    """Make the output this recipe's, or find that it is already.

    Raises:
        ConfigError: it is another's; the message names what differs.
        StorageError: it can't be read or written.
    """
    text = as_json(recipe)
    if store.stat(RECIPE_NAME) is None:
        if others := [info.name for info in store.list() if info.name.endswith(".npz")]:
            raise ConfigError(
                f"{store.url} has shards of something else, such as {others[0]}", "Give an empty --output_dir"
            )
    elif differing := differences(_read(store, RECIPE_NAME), recipe):
        raise ConfigError(
            f"{store.url} was begun with other options or input: {'; '.join(differing[:5])}",
            "Give the same, or an empty --output_dir",
        )
    create(store, RECIPE_NAME, text)


def differences(there: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    """In what two recipes differ, in words; empty where they are the same."""
    found = []
    for group in ("options", "versions"):
        old, new = there.get(group, {}), recipe[group]
        found += [
            f"{key} {old.get(key)!r}, now {new.get(key)!r}"
            for key in sorted({*old, *new})
            if old.get(key) != new.get(key)
        ]
    if there.get("inputs") != recipe["inputs"]:
        old_files = {(file["name"], file["bytes"], file["crc32c"]) for file in there.get("inputs", [])}
        new_files = {(file["name"], file["bytes"], file["crc32c"]) for file in recipe["inputs"]}
        changed = sorted({file[0] for file in old_files ^ new_files})
        found.append(
            f"{len(changed)} files added, removed or changed, such as {changed[0]}" if changed else "file order"
        )
    found += [
        f"{key} {there.get(key)!r}, now {recipe.get(key)!r}"
        for key in ("format", "output")
        if there.get(key) != recipe.get(key)
    ]
    return found


def finished(store: ObjectStore) -> dict[str, Any] | None:
    """The output's metadata.json, or None where it is not complete.

    Raises:
        ShardError: it was complete, and a shard is missing or has another size.
    """
    if store.stat(METADATA_NAME) is None:
        return None
    metadata = _read(store, METADATA_NAME)
    try:
        shards = {split: told["shards"] for split, told in metadata["result"]["splits"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardError(f"{store.url}/{METADATA_NAME} is not of this program", "Give an empty --output_dir") from error
    _check_sizes(store, shards)
    return metadata


def _check_sizes(store: ObjectStore, shards: dict[str, list[dict[str, Any]]]) -> None:
    """Raises ShardError for a shard that was written and is missing now, or has another size."""
    sizes = {info.name: info.size for info in store.list()}
    for split, told in shards.items():
        for shard in told:
            if sizes.get(name := f"{split}/{shard['name']}") != shard["bytes"]:
                raise ShardError(
                    f"{store.url}/{name} was written, and is missing now or has another size",
                    "Delete the output and --work_dir, and prepare it again",
                )


@dataclass(frozen=True)
class Product:
    """What made the ids."""

    title: str
    tokenizer_json: str
    vocab_size: int
    eot_id: int


def publish(store: ObjectStore, recipe: dict[str, Any], product: Product, writer: ShardWriter) -> dict[str, Any]:
    """Write manifests and metadata.json beside the shards; the content of the last.

    Raises:
        ShardError: no document is left to train on.
        StorageError: the output can't be written.
    """
    entries = {split: writer.entries(split) for split in SPLITS}
    if not entries[SPLITS[0]]:
        raise ShardError(
            f"no document is left to train on: {writer.documents_in} were read, {writer.skipped or 'none'} skipped",
            "See --text_key and --val_fraction",
        )
    _check_sizes(store, {split: [asdict(entry) for entry in shards] for split, shards in entries.items()})
    train, val = (writer.token_counts(split) for split in SPLITS)
    entropy = unigram_entropy(train, val) if val.any() else None
    for split, shards in entries.items():
        if shards:
            manifest = DataManifest(product.title, product.vocab_size, product.eot_id, shards, entropy)
            create(store, f"{split}/{MANIFEST_NAME}", manifest.to_json())
    vocab = json.loads(product.tokenizer_json)["model"].get("vocab", {})
    unknown = vocab.get(UNKNOWN) if isinstance(vocab, dict) else None
    result = {
        "tokenizer": product.title,
        "vocab_size": product.vocab_size,
        "documents": writer.documents_in,
        "skipped": dict(sorted(writer.skipped.items())),
        "shown": writer.shown,
        "unknown_tokens": int(train[unknown] + val[unknown]) if unknown is not None else 0,
        "unigram_entropy": entropy,
        "splits": {
            split: {
                **writer.written(split),
                "tokens": sum(entry.tokens for entry in shards),
                "shards": [{"name": entry.name, "bytes": entry.bytes, "crc32c": entry.crc32c} for entry in shards],
            }
            for split, shards in entries.items()
        },
    }
    metadata = {**recipe, "result": result}
    create(store, METADATA_NAME, as_json(metadata))
    return metadata


def unigram_entropy(train: np.ndarray, val: np.ndarray) -> float:
    """Nats per validation token under the training tokens' frequencies, each id counted once more than it was seen.

    Args:
        train, val: int64 (vocab_size,), how often each id was written.
    """
    counts = train + 1
    return float(-(val * np.log(counts / counts.sum())).sum() / val.sum())


def _read(store: ObjectStore, name: str) -> dict[str, Any]:
    return parsed(store.read_bytes(name, MAX_BYTES), f"{store.url}/{name}")


def parsed(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object. Raises ShardError where it is none."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where} is not JSON: {error}", "Delete the output, or give another --output_dir") from error
    if not isinstance(tree, dict):
        raise ShardError(f"{where} is no JSON object", "Delete the output, or give another --output_dir")
    return tree


def as_json(tree: dict[str, Any]) -> str:
    """Equal trees give equal bytes."""
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def documents_accounted(result: dict[str, Any], splits: Sequence[str] = SPLITS) -> int:
    """Documents written and skipped, which must be all that were read."""
    written = sum(result["splits"][split]["documents"] for split in splits)
    return int(written + sum(result["skipped"].values()))


def create(store: ObjectStore, name: str, text: str) -> None:
    """Create an object, or find it there as it should be. Raises StorageError where it is another."""
    try:
        store.create(name, text.encode())
    except ObjectExists as error:
        raise StorageError(f"{store.url}/{name} is there with another content", "Give an empty --output_dir") from error
