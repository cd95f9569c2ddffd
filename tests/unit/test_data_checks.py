from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from pretrain import data_checks
from pretrain.config import DataConfig, SourceConfig, StorageConfig
from pretrain.doctor import Question, answer
from pretrain.files import crc32c_of_file
from pretrain.model_config import ModelConfig
from pretrain.storage import open_store
from pretrain.tokenizers import save_tokenizer, train_bpe
from tests.runs import VOCAB_SIZE, make_shards

MODEL = ModelConfig(size="custom", n_layer=2, n_head=2, d_model=32, vocab_size=VOCAB_SIZE, seq_len=32).resolve()
QUICK = StorageConfig(deadline_s=1.0, timeout_s=10.0, max_backoff_s=0.1)


@pytest.fixture
def data(tmp_path) -> DataConfig:
    make_shards(tmp_path / "shards", n_shards=2)
    return DataConfig(source=str(tmp_path / "shards"), cache_dir=str(tmp_path / "cache"))


def write_manifest(folder, vocab_size: int = VOCAB_SIZE, more: tuple[str, ...] = ()) -> None:
    entries = [
        {
            "name": path.name,
            "tokens": 2000,
            "documents": 1,
            "bytes": path.stat().st_size,
            "crc32c": crc32c_of_file(path),
        }
        for path in sorted(folder.glob("*.npz"))
    ]
    entries += [{**entries[0], "name": name} for name in more]
    tree = {"tokenizer": "bpe", "vocab_size": vocab_size, "eot_id": 0, "shards": entries}
    (folder / "manifest.json").write_text(json.dumps(tree))


def look(data: DataConfig, model: ModelConfig = MODEL) -> dict[str, tuple[str, str]]:
    findings = answer(Question("shards", data_checks.corpus, (data, QUICK, model)))
    return {finding.name: (finding.status, f"{finding.found}. {finding.mend}") for finding in findings}


def test_good_shards_are_read_and_nothing_is_left(data, tmp_path):
    folder = tmp_path / "shards"
    write_manifest(folder)
    save_tokenizer(train_bpe(["a b c"] * 9, VOCAB_SIZE), folder / "tokenizer.json")
    found = look(data)
    assert {name: status for name, (status, _) in found.items()} == dict.fromkeys(
        ("shards", "manifest", "cache_room", "shard", "vocabulary", "tokenizer"), "ok"
    )
    assert "2 shards" in found["shards"][1] and "4,000 tokens" in found["manifest"][1]
    assert "2,000 tokens in 1 documents" in found["shard"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_in_a_bucket_the_first_shard_is_downloaded_and_timed(data, tmp_path, bucket_url):
    store = open_store(bucket_url, StorageConfig())
    for path in sorted((tmp_path / "shards").iterdir()):
        store.upload(path, path.name)
    found = look(replace(data, source=bucket_url))
    assert found["shard"][0] == "ok" and "MB/s" in found["shard"][1]
    assert found["manifest"][0] == found["tokenizer"][0] == "skip"
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_a_slow_bucket_is_a_warning_and_no_wait(data, tmp_path, bucket_url, monkeypatch):
    store = open_store(bucket_url, StorageConfig())
    store.upload(next((tmp_path / "shards").iterdir()), "a.npz")
    monkeypatch.setattr(data_checks, "SAMPLE_S", -1.0)
    status, words = look(replace(data, source=bucket_url))["shard"]
    assert status == "warn" and "its content was not checked" in words


def test_without_shards_or_without_a_source(data, tmp_path):
    assert look(replace(data, source=""))["shards"][0] == "skip"
    found = look(replace(data, source=str(tmp_path / "nothing")))
    assert found == {"shards": ("fail", found["shards"][1])} and "no shards under" in found["shards"][1]


def test_a_missing_bucket(data, bucket_url):
    (finding,) = answer(
        Question("shards", data_checks.corpus, (replace(data, source="gs://no-such-bucket/x"), QUICK, MODEL))
    )
    assert (finding.status, finding.exit_code) == ("fail", 4) and "there is no bucket" in finding.found


def test_a_vocabulary_that_is_not_the_models(data, tmp_path):
    write_manifest(tmp_path / "shards")
    found = look(data, replace(MODEL, vocab_size=100))
    assert found["manifest"][0] == "fail" and "Set --model.vocab_size 257" in found["manifest"][1]
    assert found["vocabulary"][0] == "fail" and "expected ids below the vocabulary of 100" in found["vocabulary"][1]


def test_a_damaged_shard_fails_or_is_left_out_as_the_config_says(data, tmp_path):
    next(iter(sorted((tmp_path / "shards").iterdir()))).write_bytes(b"not a zip")
    assert look(data)["shard"][0] == "fail"
    assert look(replace(data, on_bad_shard="skip"))["shard"][0] == "warn"


def test_shards_that_the_manifest_names_and_nobody_has(data, tmp_path):
    write_manifest(tmp_path / "shards", more=("gone.npz",))
    status, words = look(data)["manifest"]
    assert status == "fail" and "1 of them are not there, such as gone.npz" in words
    assert look(replace(data, on_bad_shard="skip"))["manifest"][0] == "warn"


def test_a_manifest_that_is_none_costs_its_own_line(data, tmp_path):
    (tmp_path / "shards" / "manifest.json").write_text("{")
    found = look(data)
    assert found["manifest"][0] == "fail" and found["shard"][0] == "ok"


def test_a_full_disk_has_no_room_for_the_cache(data, monkeypatch):
    monkeypatch.setattr("pretrain.cache.free_disk_bytes", lambda folder: 1000)
    status, words = look(data)["cache_room"]
    assert status == "fail" and "2 shards need about" in words and "--data.cache_dir" in words


def test_a_bounded_cache_must_hold_what_is_read_at_the_same_time(tmp_path):
    make_shards(tmp_path / "shards", n_shards=6)  # of 4 kB of tokens each
    data = DataConfig(source=str(tmp_path / "shards"), cache_dir=str(tmp_path / "cache"), cache_gb=20e-6)
    write_manifest(tmp_path / "shards")
    assert look(replace(data, shuffle_shards=1))["cache_room"][0] == "ok"
    status, words = look(replace(data, shuffle_shards=5))["cache_room"]
    assert status == "fail" and "can't hold the 6 shards" in words and "--data.cache_gb" in words


def test_a_tokenizer_of_other_shards(data, tmp_path):
    folder = tmp_path / "shards"
    (folder / "tokenizer.json").write_text("{}")
    assert "can't be read as a tokenizer" in look(data)["tokenizer"][1]
    save_tokenizer(train_bpe(["a b c d e"] * 9, 259), folder / "tokenizer.json")
    status, words = look(data)["tokenizer"]
    assert status == "fail" and "has 259 ids, the model 257" in words


def test_every_source_of_a_mixture_is_looked_at_and_raw_text_is_left_to_its_preparation(data, tmp_path):
    parts = SourceConfig(data.source, 0.7, "web"), SourceConfig(str(tmp_path / "nothing"), 0.3, "code")
    mixed = replace(data, source="", sources=parts)
    findings = answer(Question("shards", data_checks.corpus, (mixed, QUICK, MODEL)))
    told = [(each.status, each.found.partition(":")[0]) for each in findings if each.name in ("shards", "shard")]
    assert told == [("fail", "code"), ("ok", "web"), ("ok", "web")]
    assert look(replace(data, tokenizer="tokenizer.json"))["shards"][0] == "skip"


def test_validation_shards(data, tmp_path):
    def look_at(source: str):
        return answer(Question("validation_shards", data_checks.validation, (replace(data, val_source=source), QUICK)))[
            0
        ]

    assert look_at("").status == "skip"
    assert look_at(data.source).status == "ok"
    missing = look_at(str(tmp_path / "nothing"))
    assert (missing.status, missing.exit_code) == ("fail", 3)


def test_the_first_shard_by_name_is_the_one_that_is_read(data, tmp_path):
    np.savez(tmp_path / "shards" / "0.npz", input_ids=np.arange(10, dtype=np.uint16))
    assert "10 tokens" in look(data)["shard"][1]
