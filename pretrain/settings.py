"""The settings of a run as its config.yaml has them, section.field by section.field, and which differ between runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from pretrain.errors import CheckpointError

MISSING = "–"


def differing_settings(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Key -> its value in each config.yaml, of the keys that are not the same everywhere.

    Args:
        texts: the files' contents.

    Raises:
        CheckpointError: one of them is no YAML tree.
    """
    trees = [flat_settings(text) for text in texts]
    keys = dict.fromkeys(key for tree in trees for key in tree)
    values = {key: [tree.get(key, MISSING) for tree in trees] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def flat_settings(text: str) -> dict[str, Any]:
    """section.field -> value of a config.yaml. Raises CheckpointError where it is no YAML tree."""
    return _flat(_tree(text))


def _tree(text: str) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CheckpointError(f"config.yaml is no YAML: {error}") from error
    return tree if isinstance(tree, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
