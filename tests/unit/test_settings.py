from __future__ import annotations

import pytest

from pretrain.errors import CheckpointError
from pretrain.settings import MISSING, differing_settings, flat_settings


def test_only_settings_that_differ_are_told():
    texts = ["a: {x: 1, y: 2}\nb: [1, 2]\n", "a: {x: 1, y: 3}\nb: [1, 2]\nc: 5\n"]
    assert differing_settings(texts) == {"a.y": [2, 3], "c": [MISSING, 5]}
    assert differing_settings(texts[:1] * 3) == {}
    with pytest.raises(CheckpointError, match="no YAML"):
        differing_settings(["a: ["])


def test_settings_are_named_by_their_sections():
    assert flat_settings("a: {x: 1, y: {z: [2]}}\nb: x\n") == {"a.x": 1, "a.y.z": [2], "b": "x"}
    assert flat_settings("- 1\n") == flat_settings("") == {}
