"""The shards of raw text that are made so far: what is known of them, and what is refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from pretrain.config import StorageConfig
from pretrain.errors import ConfigError, ShardError
from pretrain.raw_shards import open_made
from pretrain.raw_source import claim_of, folder_of, prepare_source
from tests.unit.test_raw_source import VOCAB_SIZE, data, texts  # noqa: F401 - fixtures

SHARD_TOKENS = 3000


@pytest.fixture
def made(data):  # noqa: F811
    """Settings of text that is prepared."""
    data = dataclasses.replace(data, raw_shard_tokens=SHARD_TOKENS, cache_dir=str(Path(data.cache_dir).absolute()))
    prepare_source(data, StorageConfig(), vocab_size=VOCAB_SIZE, may_be_larger=False, say=lambda text: None)
    return data


def shards_of(data, **how):  # noqa: F811
    found = open_made(data, vocab_size=VOCAB_SIZE, **how)
    try:
        return found.feed.made()
    finally:
        found.feed.close()


def test_all_are_known_from_the_manifest_and_the_first_from_the_journal(made):
    shards, is_all = shards_of(made)
    assert is_all and len(shards) > 5
    assert [shard.name for shard in shards] == [f"tokenized_cleaned_{index:05d}.npz" for index in range(len(shards))]
    some, is_all = shards_of(dataclasses.replace(made, max_files=2))
    assert is_all and some == shards[:2]
    # As a process leaves it that was killed in the middle.
    again = dataclasses.replace(made, cache_dir=str(Path(made.cache_dir).parent / "other"))
    kill_at_shard(again, 4)
    begun, is_all = shards_of(again)
    assert not is_all and 0 < len(begun) < len(shards)
    assert [(shard.name, shard.n_tokens, shard.source_crc32c) for shard in begun] == [
        (shard.name, shard.n_tokens, shard.source_crc32c) for shard in shards[: len(begun)]
    ]
    with pytest.raises(ShardError, match=rf"prepared up to shard {len(begun)} only .*Start train\.py"):
        open_made(again, vocab_size=VOCAB_SIZE, is_in_work=False).feed.await_more(len(begun))


def kill_at_shard(data, count):  # noqa: F811
    from pretrain import preparation

    class Killed(BaseException):
        pass

    writer = preparation.ShardWriter

    class Killing(writer):
        def take(self, part, parts):
            past = super().take(part, parts)
            if past and len(self.entries("shards")) >= count:
                raise Killed
            return past

    preparation.ShardWriter = Killing
    try:
        with pytest.raises(Killed):
            prepare_source(data, StorageConfig(), vocab_size=VOCAB_SIZE, may_be_larger=False, say=lambda text: None)
    finally:
        preparation.ShardWriter = writer


def test_the_recipe_tells_text_and_settings_apart_and_not_where_they_lie(made, tmp_path):
    recipe, manifest = claim_of(made)
    assert (manifest.vocab_size, manifest.shards) == (VOCAB_SIZE, ())
    moved = dataclasses.replace(made, source=made.source.replace("raw", "moved"), cache_dir=str(tmp_path / "cache2"))
    shutil.copytree(tmp_path / "raw", tmp_path / "moved")
    prepare_source(moved, StorageConfig(), vocab_size=VOCAB_SIZE, may_be_larger=False, say=lambda text: None)
    assert claim_of(moved)[0] == recipe != claim_of(dataclasses.replace(made, max_files=3))[0]
    (tmp_path / "moved" / "c4-train.00002-of-01024.json.gz").unlink()
    less = dataclasses.replace(moved, cache_dir=str(tmp_path / "cache3"))
    prepare_source(less, StorageConfig(), vocab_size=VOCAB_SIZE, may_be_larger=False, say=lambda text: None)
    assert claim_of(less)[0] != recipe


def test_what_can_not_be_read_is_refused_with_the_mend(made):
    with pytest.raises(ConfigError, match=r"can't hold the 2 shards .*Set --data\.cache_gb"):
        open_made(dataclasses.replace(made, cache_gb=1e-6), vocab_size=VOCAB_SIZE)
    unknown = dataclasses.replace(made, source="elsewhere/*.txt")
    with pytest.raises(ShardError, match=r"elsewhere/\*\.txt is raw text, and not prepared yet in .*Start train\.py"):
        open_made(unknown, vocab_size=VOCAB_SIZE)
    (folder_of(made) / "shards" / "tokenized_cleaned_00001.npz").unlink()
    with pytest.raises(ShardError, match=r"00001\.npz was made of raw text, and is missing now .*Delete .*prepared-"):
        shards_of(made)
