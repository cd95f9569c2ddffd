from __future__ import annotations

import dataclasses
import errno
import fcntl
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pretrain import encoders, files, preparation, shard_writer, tokenizer_choice, work_folder
from pretrain.config import DataConfig, StorageConfig
from pretrain.documents import Reading
from pretrain.encoders import CUT, TokenizersEncoder, encode_whole, open_encoder, tiktoken_json
from pretrain.encoding_pool import Work
from pretrain.errors import ConfigError, ShardError, StorageError
from pretrain.manifest import DataManifest
from pretrain.npz import read_npz
from pretrain.parts import find_part, part_paths, write_part
from pretrain.preparation import Preparation, prepare
from pretrain.raw_files import cut_units, list_inputs
from pretrain.recipes import documents_accounted
from pretrain.shards import fetch_shards
from pretrain.storage import open_store
from pretrain.tokenizer_choice import sample_documents
from pretrain.tokenizers import encode, load_tokenizer, save_tokenizer, train_bpe, train_wordpiece
from tests.unit.test_documents import FORMS, write

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "grüße", "and", "世界", "x1", "y2", "return", "def"]


def make_texts(n, seed=0):
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randint(1, 60))) + f"\n{i}" for i in range(n)]


TEXTS = make_texts(150)
VARIED = [" ".join(format(n * n * 7919, "x") for n in range(i, i + 40)) for i in range(0, 1600, 40)]
SMALL = {"vocab_size": 300, "shard_tokens": 800, "val_fraction": 0.1}


class SerialPool:
    """Does a unit in this process when it is asked for the part."""

    def __init__(self, work: Work, n_workers: int) -> None:
        self.work, self.encoder = work, open_encoder(work.tokenizer_json, work.library)

    def submit(self, unit):
        folder = Path(self.work.folder)
        return lambda _: write_part(unit, self.work.reading, self.encoder, folder, stop=self.work.stop)

    def progress(self):
        return 0, 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(autouse=True)
def _serial(monkeypatch):
    monkeypatch.setattr(preparation, "LocalPool", SerialPool)


def raw(folder, texts=TEXTS, name="a.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder)


def make(folder, source, **options):
    settings = {**SMALL, "input_dir": source, "output_dir": str(folder), **options}
    return prepare(Preparation(**settings), lambda line: None)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents(folder):
    """The texts in the shards of a folder, in order."""
    tokenizer = load_tokenizer(folder.parent / "shards" / "tokenizer.json")
    found = []
    for path in sorted(folder.glob("*.npz")):
        tokens, lengths = read_npz(path)
        for ids in np.split(tokens, np.cumsum(lengths)[:-1]):
            found.append(tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False))
    return found


# ---- what is written ----


def test_every_document_is_written_once_in_order_to_train_or_to_validate(tmp_path):
    metadata = make(tmp_path / "out", raw(tmp_path / "raw"))
    train, val = documents(tmp_path / "out" / "shards"), documents(tmp_path / "out" / "val")
    assert sorted(train + val) == sorted(TEXTS) and 5 <= len(val) <= 30
    assert train == [text for text in TEXTS if text in set(train)]
    result = metadata["result"]
    assert result["documents"] == len(TEXTS) == documents_accounted(result)
    assert result["splits"]["val"]["text_bytes"] == sum(len(text.encode()) for text in val)
    assert metadata["inputs"][0]["bytes"] == (tmp_path / "raw" / "a.jsonl").stat().st_size
    assert json.loads((tmp_path / "out" / "metadata.json").read_bytes()) == metadata
    assert not (tmp_path / "out" / ".prepare").exists()


def test_the_trainer_reads_what_the_manifest_says(tmp_path):
    make(tmp_path / "out", raw(tmp_path / "raw"))
    tokens = {}
    for split in ("shards", "val"):
        manifest = DataManifest.from_json((tmp_path / "out" / split / "manifest.json").read_bytes())
        store = open_store(str(tmp_path / "out" / split), StorageConfig())
        shards = fetch_shards(store, DataConfig(cache_dir=str(tmp_path / "cache")), vocab_size=300)
        assert [(shard.name, shard.n_tokens) for shard in shards.shards] == [
            (e.name, e.tokens) for e in manifest.shards
        ]
        tokens[split] = np.concatenate([shard.tokens() for shard in shards.shards])
    assert manifest.tokenizer == "bpe-300"
    filled = DataManifest.from_json((tmp_path / "out" / "shards" / "manifest.json").read_bytes()).shards
    assert len(filled) > 3 and all(entry.tokens >= 800 for entry in filled[:-1])
    counts = np.bincount(tokens["shards"], minlength=300) + 1
    assert manifest.unigram_entropy == pytest.approx(-np.log(counts[tokens["val"]] / counts.sum()).mean())


def test_every_form_of_the_same_documents_gives_the_same_shards(tmp_path):
    texts = [text for text in TEXTS if text.strip()]
    made = []
    for index, form in enumerate(FORMS):
        make(tmp_path / f"out{index}", str(write(tmp_path / f"raw{index}", form, texts)))
        kept = content(tmp_path / f"out{index}")
        made.append({name: data for name, data in kept.items() if name not in ("recipe.json", "metadata.json")})
    assert len(made[0]) > 6 and all(other == made[0] for other in made[1:])


def test_units_and_workers_leave_no_trace_in_the_bytes(tmp_path):
    source = raw(tmp_path / "raw")
    for index, unit_mb in enumerate((16, 0.002, 0.0005)):
        make(tmp_path / f"out{index}", source, unit_mb=unit_mb, num_workers=index + 1, dedup=True)
    kept = [
        {name: data for name, data in content(tmp_path / f"out{index}").items() if name.endswith((".npz", "r.json"))}
        for index in range(3)
    ]
    assert kept[0] == kept[1] == kept[2]


def test_duplicates_are_left_out_after_the_first_wherever_they_are(tmp_path):
    source = raw(tmp_path / "raw", [*TEXTS, *TEXTS[:40], *make_texts(10, seed=1), TEXTS[3]])
    metadata = make(tmp_path / "out", source, dedup=True, unit_mb=0.002, val_fraction=0.0)
    assert documents(tmp_path / "out" / "shards") == [*TEXTS, *make_texts(10, seed=1)]
    assert metadata["result"]["skipped"] == {"duplicate": 41}
    assert documents_accounted(metadata["result"]) == metadata["result"]["documents"] == 201


def test_a_document_validates_by_its_text_alone(tmp_path):
    make(tmp_path / "one", raw(tmp_path / "raw1"))
    make(tmp_path / "two", raw(tmp_path / "raw2", [*make_texts(50, seed=2), *reversed(TEXTS)]), vocab_size=290)
    one, two = (set(documents(tmp_path / name / "val")) for name in ("one", "two"))
    assert one == two & set(TEXTS)


def test_windows_overlap_by_the_stride_and_lose_nothing(tmp_path):
    metadata = make(tmp_path / "out", raw(tmp_path / "raw"), max_length=32, stride=8, val_fraction=0.0)
    tokenizer = load_tokenizer(tmp_path / "out" / "shards" / "tokenizer.json")
    expected = []
    for ids in encode(tokenizer, TEXTS):
        starts = [0, *range(24, max(24, len(ids) - 8), 24)]
        expected += [ids[start : start + 32].tolist() for start in starts]
    rows, paths = [], sorted((tmp_path / "out" / "shards").glob("*.npz"))
    for path in paths:
        with np.load(path) as arrays:
            ids, mask, lengths = (arrays[key] for key in ("input_ids", "attention_mask", "sequence_lengths"))
        assert ids.dtype == np.int32 and ids.shape == mask.shape and ids.shape[1] == 32
        assert (mask.sum(axis=1) == lengths).all() and (ids[mask == 0] == tokenizer.token_to_id("<|endoftext|>")).all()
        rows += [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        assert read_npz(path)[1].tolist() == lengths.tolist()
    assert rows == expected and len(paths) > 3
    assert metadata["result"]["splits"]["shards"]["tokens"] == sum(map(len, rows))
    assert metadata["result"]["splits"]["shards"]["documents"] == len(TEXTS)


def test_a_large_vocabulary_is_stored_as_uint32(tmp_path, monkeypatch):
    tokenizer = train_bpe(TEXTS, 300)
    tokenizer.add_tokens([f"<{i}>" for i in range(70_000)])
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    make(tmp_path / "out", raw(tmp_path / "raw", [*TEXTS, "<69999>"]), tokenizer=str(tmp_path), val_fraction=0.0)
    last = max((tmp_path / "out" / "shards").glob("*.npz"))
    with np.load(last) as arrays:
        assert arrays["input_ids"].dtype == np.uint32 and arrays["input_ids"].max() == 70_299


# ---- what can't be used ----


def bad_source(tmp_path):
    folder = Path(raw(tmp_path / "raw"))
    lines = ["not json", '{"body": 1}', '{"text": ""}', '{"text": "kept"}']
    (folder / "b.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "c.jsonl").write_bytes(b'{"text": "\xff"}\n' + json.dumps({"text": "y" * 2_000_000}).encode() + b"\n")
    (folder / "d.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0")
    return str(folder)


def test_what_is_skipped_is_counted_by_reason(tmp_path):
    metadata = make(tmp_path / "out", bad_source(tmp_path), on_bad="skip", max_document_mb=1, unit_mb=0.1)
    result = metadata["result"]
    reasons = ("broken_json", "damaged", "empty", "missing_key", "too_long", "undecodable")
    assert result["skipped"] == dict.fromkeys(reasons, 1)
    assert result["documents"] == len(TEXTS) + 7 == documents_accounted(result)
    assert "broken_json: b.jsonl, byte 0: not JSON" in result["shown"][0] and len(result["shown"]) == 5


def test_the_first_that_cant_be_used_stops_and_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"b\.jsonl, byte 0: not JSON .* --on_bad skip"):
        make(tmp_path / "out", bad_source(tmp_path))
    given = tmp_path / "given"
    given.mkdir()
    save_tokenizer(train_bpe(TEXTS, 300), given / "tokenizer.json")
    with pytest.raises(ShardError, match=r"b\.jsonl, byte 0: not JSON"):  # by a worker this time
        make(tmp_path / "other", str(tmp_path / "raw"), tokenizer=str(given))


def test_nothing_to_train_on_is_an_error(tmp_path):
    given = tmp_path / "tokenizer.json"
    save_tokenizer(train_bpe(TEXTS, 300), given)
    with pytest.raises(ShardError, match="no document is left to train on: 2 were read"):
        make(tmp_path / "out", raw(tmp_path / "raw", ["", " "]), tokenizer=str(given))


def test_options_that_cant_be_are_told_in_one_go(tmp_path):
    with pytest.raises(ConfigError) as error:
        make(tmp_path / "out", "", val_fraction=1.0, num_workers=0, stride=8, max_length=8, unit_mb=0)
    assert len(error.value.problems) == 5
    with pytest.raises(ConfigError, match="takes no file"):
        make(tmp_path / "out", "x", tokenizer_type="tiktoken", tokenizer="some.json")
    with pytest.raises(ConfigError, match="can't read --tokenizer"):
        make(tmp_path / "out", raw(tmp_path / "raw"), tokenizer=str(tmp_path / "none.json"))


# ---- interruptions ----


class Crash(BaseException):
    """As a kill -9 at this point."""


class Dying:
    """Ends a call before or after the n-th file that takes its name."""

    def __init__(self, monkeypatch) -> None:
        self.left = 0
        monkeypatch.setattr(files, "os", self)
        monkeypatch.setattr(Path, "replace", self.replace_by(Path.replace))
        self.link = self.replace_by(os.link)

    def __getattr__(self, name):
        return getattr(os, name)

    def fsync(self, descriptor):
        """Nothing: the machine lives on, and a slow disk would make minutes of these seconds."""

    def replace_by(self, real):
        def rename(source, target):
            self.left -= 2
            if self.left == 0:
                raise Crash
            real(source, target)
            if self.left == -1:
                raise Crash

        return rename

    def within(self, n, call):
        """Whether it died before `call` ended; n counts the moments before and after each file."""
        self.left = n
        try:
            call()
        except Crash:
            return True
        finally:
            self.left = 0
        return False


def test_wherever_it_is_killed_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    """Killed before and after every file that takes its name, in the writer and elsewhere."""
    monkeypatch.setattr(shard_writer, "JOURNAL_EVERY_S", 0.0)
    source = raw(tmp_path / "raw", [*TEXTS[:60], TEXTS[1]])
    options = {"dedup": True, "unit_mb": 0.004, "val_fraction": 0.2, "vocab_size": 270}
    make(tmp_path / "whole", source, **options)
    expected = content(tmp_path / "whole")
    die = Dying(monkeypatch)
    for turn in range(1, 500):
        folder = tmp_path / f"out{turn}"
        if not die.within(turn, lambda: make(folder, source, **options)):  # noqa: B023 - called at once
            break
        die.within(1 + turn // 3, lambda: make(folder, source, **options))  # noqa: B023 - and once more, elsewhere
        make(folder, source, **options)
        assert content(folder) == expected, turn
    assert 60 < turn < 499


def test_a_part_that_was_damaged_on_disk_is_made_again(tmp_path):
    (unit,) = cut_units(list_inputs(raw(tmp_path / "raw"), ())[0], 1 << 20)
    encoder = TokenizersEncoder(train_bpe(TEXTS, 300).to_str())
    part = write_part(unit, Reading(), encoder, tmp_path, stop=True)
    assert find_part(tmp_path, 0) == part and find_part(tmp_path, 1) is None
    tokens = part_paths(tmp_path, 0)[0]
    data = bytearray(tokens.read_bytes())
    data[5] ^= 1
    tokens.write_bytes(data)
    assert find_part(tmp_path, 0) is None


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    for left in ("out/shards/.tokenized_cleaned_00000.npz.ab.part", "out/.prepare/scratch/raw-x/file"):
        (tmp_path / left).parent.mkdir(parents=True)
        (tmp_path / left).touch()
    make(tmp_path / "out", raw(tmp_path / "raw"))
    assert not [name for name in content(tmp_path / "out") if name.endswith((".part", "file"))]


def test_a_given_working_folder_keeps_what_else_is_in_it(tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    make(tmp_path / "out", raw(tmp_path / "raw"), work_dir=str(tmp_path))
    assert (tmp_path / "precious.txt").read_text() == "mine" and not list((tmp_path / ".prepare").iterdir())


@pytest.mark.parametrize("name", ["recipe.json", "metadata.json"])
def test_what_an_output_says_of_itself_is_not_believed_blindly(name, tmp_path):
    make(tmp_path / "out", raw(tmp_path / "raw"))
    for wrong in ("{", "[]", "{}"):
        (tmp_path / "out" / name).write_text(wrong)
        with pytest.raises((ShardError, ConfigError)):
            make(tmp_path / "out", str(tmp_path / "raw"))


def test_a_complete_output_is_kept_and_one_that_lost_a_shard_is_not_believed(tmp_path):
    source = raw(tmp_path / "raw")
    first = make(tmp_path / "out", source)
    before = content(tmp_path / "out")
    assert make(tmp_path / "out", source, num_workers=3) == first and content(tmp_path / "out") == before
    (tmp_path / "out" / "shards" / "tokenized_cleaned_00001.npz").unlink()
    with pytest.raises(ShardError, match=r"00001\.npz was written, and is missing"):
        make(tmp_path / "out", source)


def test_an_output_begun_with_other_options_or_input_is_refused_and_the_difference_named(tmp_path):
    source = raw(tmp_path / "raw")
    make(tmp_path / "out", source)
    with pytest.raises(ConfigError, match=r"shard_tokens 800, now 900.*vocab_size 300, now 310"):
        make(tmp_path / "out", source, shard_tokens=900, vocab_size=310)
    raw(tmp_path / "raw", ["more"], name="b.jsonl")
    with pytest.raises(ConfigError, match=r"1 files added, removed or changed, such as b\.jsonl"):
        make(tmp_path / "out", source)
    assert not (tmp_path / "out" / ".prepare").exists()
    (tmp_path / "out" / "recipe.json").unlink()
    with pytest.raises(ConfigError, match="shards of something else"):
        make(tmp_path / "out", source)


def test_a_working_folder_belongs_to_one_output_and_one_process(tmp_path, monkeypatch):
    source, work = raw(tmp_path / "raw"), str(tmp_path / "work")

    def full(*_):
        raise StorageError("full")

    monkeypatch.setattr(preparation.ShardWriter, "take", full)
    with pytest.raises(StorageError, match="full"):
        make(tmp_path / "out", source, work_dir=work)
    with pytest.raises(ConfigError, match="unfinished work with other options or input: vocab_size 300, now 310"):
        (tmp_path / "out" / "recipe.json").unlink()
        make(tmp_path / "out", source, work_dir=work, vocab_size=310)
    (tmp_path / "out" / "recipe.json").unlink()
    (work_path,) = (tmp_path / "work" / ".prepare").iterdir()
    with work_folder.sole_use(work_path), pytest.raises(StorageError, match="another process prepares"):
        make(tmp_path / "out", source, work_dir=work)


def test_a_file_system_without_locks_is_no_reason_not_to_prepare(tmp_path, monkeypatch, caplog):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with work_folder.sole_use(tmp_path):
        assert "no locks there" in caplog.text


@pytest.mark.parametrize("suffix", [".tokens", ".documents"])
def test_a_disk_that_is_full_while_shards_are_open_is_one_line(tmp_path, monkeypatch, suffix):
    class Full(io.BytesIO):
        def write(self, block):
            raise OSError(errno.ENOSPC, "No space left on device")

    opened = Path.open

    def open_or_full(path, mode="r", *how, **named):
        return Full() if path.suffix == suffix and mode == "ab" else opened(path, mode, *how, **named)

    monkeypatch.setattr(Path, "open", open_or_full)
    with pytest.raises(StorageError, match=r"out/\.prepare: the disk is full .* Free space there"):
        make(tmp_path / "out", raw(tmp_path / "raw"))


# ---- tokenizers ----


def test_wordpiece_knows_its_words_and_tells_what_it_doesnt(tmp_path):
    texts = [*VARIED, "ж" * 3]
    metadata = make(tmp_path / "out", raw(tmp_path / "raw", VARIED), tokenizer_type="wordpiece", val_fraction=0.0)
    assert metadata["result"]["tokenizer"] == "wordpiece-300" and metadata["result"]["unknown_tokens"] == 0
    again = make(
        tmp_path / "again", raw(tmp_path / "raw2", texts), tokenizer=str(tmp_path / "out" / "shards"), val_fraction=0.0
    )
    assert again["result"]["unknown_tokens"] == 1 and again["result"]["vocab_size"] == 300
    assert [text.split() for text in documents(tmp_path / "out" / "shards")] == [text.split() for text in VARIED]


def test_wordpiece_is_the_same_in_every_process():
    code = (
        "from tests.unit.test_preparation import VARIED, train_wordpiece;import hashlib;"
        "print(hashlib.sha256(train_wordpiece(VARIED, 300).to_str().encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    with pytest.raises(ShardError, match="expected 90000"):
        train_wordpiece(VARIED, 90000)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    save_tokenizer(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), tmp_path / "tokenizer.json")
    with pytest.raises(ShardError, match="no end of text"):
        make(tmp_path / "out", raw(tmp_path / "raw"), tokenizer=str(tmp_path / "tokenizer.json"))


def test_the_sample_is_bounded_and_spread_and_holds_nothing_that_validates(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_choice, "SAMPLED_UNITS", 20)
    units = cut_units(list_inputs(raw(tmp_path / "raw", make_texts(3000)), ())[0], 10_000)
    assert len(units) > 40
    sample = list(sample_documents(units, Reading(), 0.1, 40_000, stop=True))
    assert 38_000 < sum(len(text.encode()) for text in sample) < 44_000
    numbers = [int(text.rpartition("\n")[2]) for text in sample]
    assert numbers == sorted(numbers) and numbers[0] < 100 and numbers[-1] > 2800
    make(tmp_path / "out", str(tmp_path / "raw"))
    assert not set(sample) & set(documents(tmp_path / "out" / "val"))


def test_a_long_document_is_encoded_in_pieces_as_if_it_were_one(monkeypatch):
    encoder = TokenizersEncoder(train_bpe(TEXTS, 300).to_str())
    text = "\n".join(TEXTS) + "  \n\n  two  spaces \t" + "".join(WORDS) * 3
    (whole,) = encode_whole(encoder, text)
    monkeypatch.setattr(encoders, "MAX_PIECE_CHARS", 256)
    monkeypatch.setattr(encoders, "SEARCHED_CHARS", 128)
    pieces = encode_whole(encoder, text)
    assert len(pieces) > 10 and np.array_equal(np.concatenate(pieces), whole)
    unbroken = "世" * 1000
    assert not CUT.search(unbroken) and sum(map(len, encode_whole(encoder, unbroken))) == len(
        encoder.encode([unbroken])[0]
    )


def tiny_encoding(name="tiny"):
    """A tiktoken encoding of 256 bytes and some merges, with a gap before its special tokens."""
    tiktoken = pytest.importorskip("tiktoken")
    pieces = ["th", "the", " th", " the", "re", "ing", "in", " q", "qu", "ck", "\n\n", "  ", "aa", "aaa", "ü", "世"]
    tokens = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in pieces]
    ranks = {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    special = {"<|endoftext|>": len(ranks) + 5, "<|fim|>": len(ranks) + 6}
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture
def tiny(monkeypatch):
    encoding = tiny_encoding()
    monkeypatch.setattr(sys.modules["tiktoken"], "get_encoding", {"tiny": encoding}.__getitem__)
    return encoding


def test_a_tiktoken_encoding_becomes_a_tokenizer_with_the_same_ids(tiny):
    text = tiktoken_json("tiny")
    ours, theirs = TokenizersEncoder(text), open_encoder(text, "tiktoken")
    assert ours.vocab_size == theirs.vocab_size == tiny.n_vocab and ours.eot_id == theirs.eot_id == tiny.eot_token
    samples = [*TEXTS[:50], "aaaaaaa <|endoftext|> <|fim|>  \n\n x", "", "don't 12 quick\r\n"]
    for one, other, sample in zip(ours.encode(samples), theirs.encode(samples), samples, strict=True):
        assert one.tolist() == other.tolist() == tiny.encode_ordinary(sample)


def test_shards_are_made_with_a_tiktoken_encoding_as_it_is(tiny, tmp_path):
    metadata = make(tmp_path / "out", raw(tmp_path / "raw"), tokenizer="tiktoken:tiny", val_fraction=0.0)
    assert metadata["result"]["tokenizer"] == "tiktoken-tiny" and metadata["result"]["vocab_size"] == tiny.n_vocab
    tokens = np.concatenate([read_npz(path)[0] for path in sorted((tmp_path / "out" / "shards").glob("*.npz"))])
    assert tokens.tolist() == [one for text in TEXTS for one in [*tiny.encode_ordinary(text), tiny.eot_token]]
    assert documents(tmp_path / "out" / "shards") == TEXTS


def test_a_recipe_names_all_options_that_decide_the_bytes():
    """A new option is either in the recipe or named here as one that changes no byte."""
    fields = {field.name for field in dataclasses.fields(Preparation)}
    undecisive = {"input_dir", "input", "output_dir", "work_dir", "num_workers", "ray", "storage"}
    assert set(Preparation().decisive()) == fields - undecisive
