"""Raw text that training prepares for itself: when there is work, what is refused, and what a kill leaves."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import secrets
import sysconfig
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest

from pretrain import raw_files, raw_source
from pretrain.config import DataConfig, StorageConfig
from pretrain.documents import Document, Reading, read_unit
from pretrain.errors import ConfigError, ShardError
from pretrain.raw_files import cut_units, list_inputs
from pretrain.raw_source import prepare_source, prepared
from pretrain.shards import open_shards
from pretrain.storage import open_store
from pretrain.tokenizers import train_bpe
from pretrain.work_folder import InUse, with_checksums

VOCAB_SIZE = 300


def write_c4(folder: Path, n_files: int = 3, n_documents: int = 12) -> list[str]:
    """Files shaped as C4's, of the sources of Python's standard library; the texts in their order."""
    folder.mkdir(parents=True)
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: n_files * n_documents]
    texts = [path.read_text(encoding="utf-8")[:3000] for path in modules]
    texts = [text for text in texts if text]
    for number in range(n_files):
        with gzip.open(folder / f"c4-train.{number:05d}-of-01024.json.gz", "wt", encoding="utf-8") as file:
            for text in texts[number::n_files]:
                file.write(
                    json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "https://x.org"}) + "\n"
                )
    return [text for number in range(n_files) for text in texts[number::n_files]]


@pytest.fixture
def texts(tmp_path):
    return write_c4(tmp_path / "raw")


@pytest.fixture
def data(tmp_path, texts):
    tokenizer = train_bpe(iter(texts), VOCAB_SIZE)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return DataConfig(
        source=str(tmp_path / "raw" / "c4-train.0000*-of-01024.json.gz"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        tokenizer_num_workers=1,
        cache_dir=str(tmp_path / "cache"),
    )


def prepare(data, vocab_size=VOCAB_SIZE):
    """What was said."""
    said: list[str] = []
    prepare_source(data, StorageConfig(), vocab_size=vocab_size, may_be_larger=False, say=said.append)
    return said


def test_shards_are_their_own_source(data):
    plain = dataclasses.replace(data, tokenizer="")
    assert prepared(plain) is plain
    assert prepared(data).tokenizer == "" and prepared(prepared(data)) == prepared(data)
    others = [
        dataclasses.replace(data, **change) for change in ({"source": "x"}, {"tokenizer": "y"}, {"text_key": "z"})
    ]
    assert len({prepared(each).source for each in (data, *others)}) == 4


def test_the_text_is_prepared_once_and_read_back_whole(data, texts, tmp_path):
    said = prepare(data)
    assert said[-1].endswith(f" is prepared: {len(texts)} documents, none skipped")
    found = open_shards(open_store(prepared(data).source, StorageConfig()), prepared(data), vocab_size=VOCAB_SIZE)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokens = [token for shard in found.shards for token in shard.tokens().tolist()]
    decoded = tokenizer.decode(tokens, skip_special_tokens=False)
    assert [text for text in decoded.split("<|endoftext|>") if text] == texts
    found.feed.close()
    assert [line for line in prepare(data) if "was prepared before" in line]


def test_who_finds_another_at_the_same_text_waits_until_it_is_done(data, monkeypatch):
    real, others = raw_source.prepare, iter([True, True])

    def busy(*arguments):
        if next(others, False):
            raise InUse("another process prepares in x", "Let it end")
        return real(*arguments)

    monkeypatch.setattr(raw_source, "prepare", busy)
    monkeypatch.setattr(raw_source, "POLL_S", 0.0)
    said = prepare(data)
    assert [line for line in said if "waiting" in line] == [
        "data: another process prepares in x: waiting until it is done"
    ]
    assert any("documents, none skipped" in line for line in said)


def test_text_that_was_touched_is_looked_at_again_and_text_that_changed_is_refused(data, tmp_path):
    prepare(data)
    path = tmp_path / "raw" / "c4-train.00001-of-01024.json.gz"
    os.utime(path)  # as new, with the same content
    assert any("complete in" in line for line in prepare(data))
    path.write_bytes(path.read_bytes() + gzip.compress(b'{"text": "one more"}\n'))
    with pytest.raises(ConfigError, match=r"c4-train\.00001.*To prepare what is there now, delete .*prepared-"):
        prepare(data)


def test_a_tokenizer_of_another_size_is_refused_before_the_work(data, tmp_path):
    with pytest.raises(ShardError, match=r"data\.tokenizer says vocab_size \d+ .*--model\.vocab_size"):
        prepare(data, vocab_size=5000)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokenizer": "no/such.json"}, r"no/such\.json"),
        ({"text_key": "body"}, r"body"),
        ({"source": "no/such/*.json.gz"}, r"no raw text behind .*no/such"),
    ],
)
def test_what_is_not_there_is_named(data, changes, says):
    with pytest.raises((ConfigError, ShardError), match=says):
        prepare(dataclasses.replace(data, **changes))


def test_a_damaged_file_stops_or_is_counted_as_the_policy_says(data, tmp_path):
    path = tmp_path / "raw" / "c4-train.00002-of-01024.json.gz"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ShardError, match=r"c4-train\.00002"):
        prepare(data)
    assert any("1 damaged" in line for line in prepare(dataclasses.replace(data, on_bad_shard="skip")))


def test_a_hub_without_checksums_is_read_once_and_its_versions_tell(texts, tmp_path, monkeypatch):
    """hf:// is one of fsspec's file systems; here it is one in memory, by the same store."""
    url = f"memory://{secrets.token_hex(4)}/en"
    fs, root = fsspec.url_to_fs(url)
    for path in (tmp_path / "raw").iterdir():
        fs.pipe_file(f"{root}/{path.name}", path.read_bytes())
    (tmp_path / "work").mkdir()
    files, _ = list_inputs("", [f"{url}/c4-train.0000[01]-of-01024.json.gz"])
    files = with_checksums(files, tmp_path / "work", lambda n_bytes: None)
    assert len(files) == 2 and all(file.identity == f"version {file.generation}" for file in files)
    found = [each for unit in cut_units(files, 1 << 20) for each in read_unit(unit, Reading())]
    assert [each.text for each in found if isinstance(each, Document)] == texts[: len(found)]
    patience = []  # listed and fetched as the settings say

    def open_and_note(url, storage):
        patience.append(storage)
        return open_store(url, storage)

    monkeypatch.setattr(raw_files, "open_store", open_and_note)
    patient = StorageConfig(deadline_s=1234.0)
    listed, _ = list_inputs("", [f"{url}/c4-train.00000-of-01024.json.gz"], storage=patient)
    assert list(read_unit(cut_units(listed, 1 << 20)[0], Reading())) and patience == [patient, patient]
    fs.pipe_file(f"{root}/{files[0].key}", gzip.compress(b'{"text": "another"}\n'))
    with pytest.raises(ShardError, match="changed since it was listed"):
        list(read_unit(cut_units(files, 1 << 20)[0], Reading()))
