from __future__ import annotations

import json

import pytest

from pretrain.checkpoint_manifest import CheckpointName, FileEntry, Manifest
from pretrain.errors import CheckpointError

MANIFEST = Manifest(
    CheckpointName(1, 20, 3),
    "a1b2c3",
    7,
    {"model.safetensors": FileEntry(12, "AAAA=="), "x.json": FileEntry(3, "BB==")},
)


def changed(**fields: object) -> bytes:
    """The manifest's bytes with some fields replaced."""
    return json.dumps({**json.loads(MANIFEST.to_bytes()), **fields}).encode()


def refused(data: bytes) -> str:
    with pytest.raises(CheckpointError) as caught:
        Manifest.from_bytes(data, "gs://b/run/manifest.json")
    assert "gs://b/run/manifest.json is not a checkpoint manifest" in str(caught.value)
    return str(caught.value)


def test_a_manifest_comes_back_as_it_was():
    assert Manifest.from_bytes(MANIFEST.to_bytes(), "here") == MANIFEST
    assert MANIFEST.total_bytes == 15


def test_the_same_manifest_is_always_the_same_bytes():
    reordered = Manifest(MANIFEST.name, MANIFEST.attempt, MANIFEST.sequence, dict(reversed(MANIFEST.files.items())))
    assert reordered.to_bytes() == MANIFEST.to_bytes()


@pytest.mark.parametrize("cut", range(0, len(MANIFEST.to_bytes()) - 2, 17))
def test_a_torn_manifest_is_refused(cut):
    refused(MANIFEST.to_bytes()[:cut])


@pytest.mark.parametrize("data", [b"[]", b"3", b"null", b'"x"', b"\xff\xfe", b"{}", b'{"format": 1}'])
def test_what_is_no_manifest_is_refused(data):
    refused(data)


def test_another_format_is_named():
    assert "format 3, this version reads formats up to 2" in refused(changed(format=3))


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "/etc/passwd", ".hidden", "a\\b", "a\n", "-x", "ü"])
def test_a_file_that_could_lie_outside_the_folder_is_refused(name):
    refused(changed(files={name: {"bytes": 1, "crc32c": "A"}}))


@pytest.mark.parametrize("attempt", ["../x", "a/b", "", None, 3])
def test_an_attempt_that_could_lie_outside_the_folder_is_refused(attempt):
    refused(changed(attempt=attempt))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "checkpoint-epoch0-step1"},
        {"name": None},
        {"sequence": "x"},
        {"files": []},
        {"files": {"a": {"bytes": 1}}},
        {"files": {"a": {"bytes": "many", "crc32c": "A"}}},
        {"files": {"a": 3}},
        {"files": {"a": {"bytes": -1, "crc32c": "A"}}},
    ],
)
def test_a_field_of_another_kind_is_refused(fields):
    refused(changed(**fields))


def test_a_name_is_spelt_and_parsed():
    name = CheckpointName(2, 300, 45)
    assert str(name) == "checkpoint-epoch2-step300-files45"
    assert CheckpointName.parse(str(name)) == name


@pytest.mark.parametrize(
    "text",
    ["", "checkpoint", "checkpoint-epoch1-step2", "checkpoint-epoch-1-step2-files3", "checkpoint-epoch1-step2-files3x",
     "xcheckpoint-epoch1-step2-files3", "checkpoint-epoch1-step2-files3/manifest.json"],
)  # fmt: skip
def test_what_is_no_name_is_none(text):
    assert CheckpointName.parse(text) is None
