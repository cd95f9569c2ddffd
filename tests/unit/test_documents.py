from __future__ import annotations

import gzip
import json

import pytest

from pretrain import decompression
from pretrain.documents import Document, Reading, Rejected, read_unit
from pretrain.errors import ConfigError, ShardError
from pretrain.raw_files import cut_units, list_inputs

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = [f"document {i}: grüße, 世界 \u2028 🙂 " + "x" * (i * 37 % 400) + "\n\nand more\n" for i in range(60)]
LINES = "".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) + "\n" for text in TEXTS).encode()


def table(texts):
    return arrow.table({"n": list(range(len(texts))), "text": texts})


def save_dataset(folder, texts):
    """As datasets.save_to_disk leaves it: Arrow streams named by state.json, and perhaps a cache beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    for name, part in zip([*names, "cache-0123.arrow"], [texts[:20], texts[20:], ["not data"]], strict=True):
        with arrow.OSFile(str(folder / name), "wb") as sink, arrow.ipc.new_stream(sink, table(part).schema) as writer:
            writer.write_table(table(part), max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def write(folder, form, texts=TEXTS):
    """The texts in one of the forms that are read."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if form == "txt":
        for index, text in enumerate(texts):
            (folder / f"{index:03d}.txt").write_text(text, newline="")
    elif form == "arrow":
        save_dataset(folder, texts)
    elif form == "splits":
        save_dataset(folder / "train", texts)
        save_dataset(folder / "test", ["held out"] * 30)
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    elif form == "snapshot":
        (folder / "README.md").write_text("# a data set")
        (folder / "data").mkdir()
        parquet.write_table(table(texts), folder / "data" / "train-00000-of-00001-abc.parquet", row_group_size=9)
        parquet.write_table(table(["held out"]), folder / "data" / "test-00000-of-00001-abc.parquet")
    elif form == "parquet":
        parquet.write_table(table(texts), folder / "a.parquet", row_group_size=11, compression="zstd")
    else:
        packed = {"gz": gzip.compress, "zst": zstandard.compress}.get(form.rpartition(".")[2], bytes)
        half = len(lines[: len(lines) // 2].rpartition(b"\n")[0]) + 1
        content = packed(lines[:half]) + packed(lines[half:])  # two members, two frames
        (folder / f"a.{form}").write_bytes(content)
    return folder


FORMS = ("txt", "jsonl", "json", "jsonl.gz", "json.gz", "jsonl.zst", "zst", "parquet", "arrow", "splits", "snapshot")


def read(folder, unit_bytes=1 << 24, **reading):
    files, _ = list_inputs(str(folder), ())
    settings = Reading(**reading)
    units = cut_units(files, unit_bytes, lines_of_txt=settings.txt_documents == "line")
    return [found for unit in units for found in read_unit(unit, settings)]


def texts_of(found):
    return [one.text for one in found if isinstance(one, Document)]


def reasons_of(found):
    return [one.reason for one in found if isinstance(one, Rejected)]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(form, tmp_path):
    found = read(write(tmp_path / "raw", form))
    assert texts_of(found) == TEXTS and not reasons_of(found)
    assert all(one.data == one.text.encode() for one in found)


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 1000, 5000])
def test_wherever_a_file_is_cut_each_document_comes_once(unit_bytes, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES + b"\n\n")
    write(tmp_path, "parquet")
    assert texts_of(read(tmp_path, unit_bytes)) == TEXTS * 2


def test_a_text_file_is_one_document_or_its_lines_or_its_paragraphs(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nstill one\n \n\ntwo\n")
    assert texts_of(read(tmp_path)) == ["one\r\nstill one\n \n\ntwo\n"]
    found = read(tmp_path, txt_documents="line", unit_bytes=3)
    assert texts_of(found) == ["one", "still one", "two"] and reasons_of(found) == ["empty", "empty"]
    assert texts_of(read(tmp_path, txt_documents="paragraph")) == ["one\r\nstill one", "two"]


def test_each_bad_line_is_told_apart_and_named_with_its_offset(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut',
        b"[1, 2]",
        b'{"body": "other key"}',
        b'{"text": 3}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": " \\n"}',
        b"[" * 100_000,
        b'{"text": "' + b"x" * 3000 + b'"}',
        b'{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path, max_document_bytes=200_000)
    assert texts_of(found) == ["good", "x" * 3000, "last"]
    expected = ["broken_json", "broken_json", "missing_key", "missing_key", "undecodable", "undecodable", "empty"]
    assert reasons_of(found) == [*expected, "broken_json"]
    assert found[1].where == "a.jsonl, byte 17" and "not JSON" in found[1].found
    assert "is not among the keys body" in str(found[3].error()) and "--text_key" in found[3].error().mend
    assert reasons_of(read(tmp_path, max_document_bytes=2000))[-2:] == ["too_long", "too_long"]
    assert texts_of(read(tmp_path, max_document_bytes=2000)) == ["good", "last"]


def test_rows_without_text_are_told_apart(tmp_path):
    data = [b"good", None, b"\xff", b" "]
    parquet.write_table(arrow.table({"text": arrow.array(data, arrow.binary())}), tmp_path / "a.parquet")
    found = read(tmp_path)
    assert texts_of(found) == ["good"] and reasons_of(found) == ["missing_key", "undecodable", "empty"]
    assert found[1].where == "a.parquet, row group 0, row 1"
    assert reasons_of(read(tmp_path, text_key="body")) == ["missing_key"] * 4
    parquet.write_table(arrow.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert [one.found for one in read(tmp_path)] == ["'text' is int64, not text"] * 2
    words = arrow.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(arrow.table({"text": words}), tmp_path / "a.parquet")
    assert texts_of(read(tmp_path)) == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("form", "how"),
    [
        ("jsonl.gz", "cut"),
        ("jsonl.gz", "flipped"),
        ("jsonl.zst", "cut"),
        ("jsonl.zst", "flipped"),
        ("parquet", "cut"),
        ("arrow", "cut"),  # neither parquet nor Arrow has checksums that its writers fill in
    ],
)
def test_a_damaged_file_ends_in_one_rejection_that_names_it(form, how, tmp_path):
    path = sorted(path for path in write(tmp_path / "raw", form).iterdir() if path.suffix != ".json")[-1]
    content = bytearray(path.read_bytes())
    if how == "cut":
        del content[-8:]
    else:
        content[len(content) // 3 : len(content) // 3 + 40] = bytes(range(40))
    path.write_bytes(content)
    found = read(tmp_path / "raw")
    damaged = [one for one in found if isinstance(one, Rejected) and one.reason == "damaged"]
    assert len(damaged) == 1 and found[-1] is damaged[0]
    assert damaged[0].where == ("data-00001-of-00002.arrow" if form == "arrow" else path.name)
    assert len(texts_of(found)) < len(TEXTS) or "truncated" in damaged[0].found


def test_a_compressed_file_that_ends_early_names_the_offset(tmp_path):
    whole = gzip.compress(LINES)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-20])
    assert f"truncated: the file ends at byte {len(whole) - 20}" in read(tmp_path)[-1].found
    (tmp_path / "a.jsonl.gz").write_bytes(whole + b"\0" * 600)  # padding is no damage
    assert texts_of(read(tmp_path)) == TEXTS


@pytest.mark.parametrize(("name", "pack"), [("a.txt.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)])
def test_a_bomb_is_refused_before_it_goes_off(name, pack, tmp_path, monkeypatch):
    monkeypatch.setattr(decompression, "FREE_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(pack(b"\n" * (64 << 20)))
    (found,) = read(tmp_path, max_document_bytes=100 << 20)
    assert found.reason == "damaged" and "more than 256 times as much" in found.found


def test_lines_longer_than_the_limit_are_never_held():
    blocks = (b"y" * 1000 for _ in range(5000))
    assert list(decompression.split_lines(blocks, 2000)) == [(0, None)]


def test_what_is_no_text_is_passed_over_and_nothing_at_all_is_an_error(tmp_path):
    write(tmp_path / "raw", "jsonl")
    for name in ("notes.md", ".hidden.jsonl", ".git/a.jsonl", "a.parquet.gz", "out/metadata.json"):
        (tmp_path / "raw" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "raw" / name).touch()
    files, passed = list_inputs(str(tmp_path / "raw"), (), outside=tmp_path / "raw" / "out")
    assert [file.name for file in files] == ["a.jsonl"] and passed == ["a.parquet.gz", "notes.md"]
    with pytest.raises(ShardError, match=r"no raw text below .*none"):
        list_inputs(str(tmp_path / "none"), ())
    with pytest.raises(ShardError, match="no raw text behind "):
        list_inputs("", [str(tmp_path / "raw" / "*.md")])


def test_globs_and_folders_are_read_in_order_and_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.txt", "b/1.txt", "a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    files, _ = list_inputs("", ["b", "*.jsonl", "b/*.txt"])
    assert [file.name for file in files] == ["b/1.txt", "b/2.txt", "./a.jsonl"]


def test_a_split_that_is_not_there_and_a_file_that_changed_are_errors(tmp_path):
    write(tmp_path / "raw", "splits")
    with pytest.raises(ConfigError, match="no split 'dev'"):
        list_inputs(str(tmp_path / "raw"), (), split="dev")
    files, _ = list_inputs(str(tmp_path / "raw"), (), split="test")
    (unit, *_) = cut_units(files, 1 << 20)
    (tmp_path / "raw" / files[0].key).write_bytes(b"changed")
    with pytest.raises(ShardError, match="changed since it was listed"):
        list(read_unit(unit, Reading()))
