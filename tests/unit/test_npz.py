from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest

from pretrain.errors import ShardError, StorageError
from pretrain.npz import check_vocab, read_npz

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12]]
STREAM = [token for document in DOCUMENTS for token in document]
LENGTHS = [3, 1, 4]


def padded(pad=0, width=4, dtype=np.int32, left=False):
    rows = np.full((len(DOCUMENTS), width), pad, dtype=dtype)
    mask = np.zeros_like(rows)
    for row, document in enumerate(DOCUMENTS):
        place = slice(width - len(document), width) if left else slice(0, len(document))
        rows[row, place] = document
        mask[row, place] = 1
    return rows, mask


def write(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def header(shape, dtype="<u2", version=(1, 0)):
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text.encode()


def write_members(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def refusal(path, **options):
    with pytest.raises(ShardError) as caught:
        read_npz(path, **options)
    message = str(caught.value)
    assert str(path) in message and "found" in message and "expected" in message
    assert caught.value.exit_code == 3
    return message


def dialects():
    rows, mask = padded()
    left_rows, left_mask = padded(left=True)
    lengths = np.array(LENGTHS)
    stream = np.array(STREAM)
    return {
        "mask": {"input_ids": rows, "attention_mask": mask},
        "mask of bool": {"input_ids": rows, "attention_mask": mask.astype(bool)},
        "mask and int64": {"input_ids": rows.astype(np.int64), "attention_mask": mask.astype(np.int8)},
        "left padding": {"input_ids": left_rows, "attention_mask": left_mask},
        "pads of -1 under a mask": {"input_ids": padded(pad=-1)[0], "attention_mask": mask},
        "lengths": {"input_ids": rows, "sequence_lengths": lengths},
        "lengths (N, 1)": {"input_ids": rows, "sequence_lengths": lengths[:, None]},
        "mask and lengths": {"input_ids": rows, "attention_mask": mask, "sequence_lengths": lengths.astype(np.int32)},
        "(N, L, 1)": {"input_ids": rows[:, :, None], "attention_mask": mask},
        "(N, L, 1) and its mask": {"input_ids": rows[:, :, None], "attention_mask": mask[:, :, None]},
        "fortran order": {"input_ids": np.asfortranarray(rows), "attention_mask": mask},
        "big-endian": {"input_ids": rows.astype(">i4"), "attention_mask": mask},
        "an empty row": {"input_ids": np.vstack([rows, rows[:1]]), "sequence_lengths": np.array([*LENGTHS, 0])},
        "ours": {"input_ids": stream.astype(np.uint16), "sequence_lengths": lengths},
        "stream with a mask": {
            "tokens": np.append(stream, [0, 0]),
            "attention_mask": np.append(np.ones_like(stream), [0, 0]),
            "sequence_lengths": lengths,
        },
        "other arrays beside": {
            "data": stream,
            "sequence_lengths": lengths,
            "labels": np.ones(3),
            "note": np.array("x"),
        },
    }


@pytest.mark.parametrize("dialect", dialects())
def test_every_dialect_gives_the_same_documents_without_padding(tmp_path, dialect):
    tokens, lengths = read_npz(write(tmp_path / "shard.npz", **dialects()[dialect]))
    assert tokens.tolist() == STREAM and tokens.dtype == np.uint16
    assert lengths.tolist() == LENGTHS and lengths.dtype == np.int64


@pytest.mark.parametrize("key", ["input_ids", "data", "tokens", "arr_0"])
@pytest.mark.parametrize("shape", [(8,), (2, 4), (2, 4, 1)])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int64, np.uint64])
def test_unmasked_ids_are_read_whole_under_each_key(tmp_path, key, shape, dtype):
    tokens, lengths = read_npz(write(tmp_path / "a.npz", **{key: np.array(STREAM, dtype=dtype).reshape(shape)}))
    assert tokens.tolist() == STREAM
    assert lengths.tolist() == ([8] if len(shape) == 1 else [4, 4])


def test_a_known_pad_is_stripped_from_row_ends_only(tmp_path):
    rows = np.array([[1, 9, 2, 9, 9], [9, 3, 4, 5, 6], [9, 9, 9, 9, 9]])
    path = write(tmp_path / "a.npz", input_ids=rows)
    tokens, lengths = read_npz(path, pad_token_id=9)
    assert tokens.tolist() == [1, 9, 2, 9, 3, 4, 5, 6]
    assert lengths.tolist() == [3, 5]
    assert len(read_npz(path)[0]) == 15


def test_a_known_pad_does_not_touch_what_a_mask_or_lengths_keep(tmp_path):
    rows, mask = padded(pad=12)
    assert (
        read_npz(write(tmp_path / "a.npz", input_ids=rows, attention_mask=mask), pad_token_id=12)[0].tolist() == STREAM
    )


def test_ids_above_65535_are_uint32(tmp_path):
    tokens, _ = read_npz(write(tmp_path / "a.npz", input_ids=np.array([1, 65535, 65536])))
    assert tokens.tolist() == [1, 65535, 65536] and tokens.dtype == np.uint32
    assert read_npz(write(tmp_path / "b.npz", input_ids=np.array([65535])))[0].dtype == np.uint16


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"input_ids": np.ones(4, np.float32)}, "float32"),
        ({"input_ids": np.ones(4, bool)}, "bool"),
        ({"input_ids": np.array(["a"])}, "<U1"),
        ({"input_ids": np.array([[1], [2, 3]], dtype=object)}, "object"),
        ({"input_ids": np.ones((2, 2, 2), np.int32)}, "(2, 2, 2)"),
        ({"input_ids": np.array(3)}, "()"),
        ({"input_ids": np.ones((0, 4), np.int32)}, "(0, 4)"),
        ({"input_ids": np.array([4, -3])}, "-3 at offset 1"),
        ({"input_ids": np.array([4, 2**33])}, "8589934592 at offset 1"),
        ({"ids": np.ones(3, int)}, "arrays ids"),
        ({"arr_0": np.ones((2, 3), int), "arr_1": np.ones((2, 3), int)}, "arr_1"),
        ({"input_ids": np.ones(4, int), "sequence_lengths": np.array([1, 2])}, "summing to 3"),
        ({"input_ids": np.ones(4, int), "sequence_lengths": np.array([5, -1])}, "sequence_lengths[0] = 5"),
        ({"input_ids": np.ones((2, 4), int), "sequence_lengths": np.array([4])}, "(1,)"),
        ({"input_ids": np.ones((2, 4), int), "sequence_lengths": np.array([4, 5])}, "sequence_lengths[1] = 5"),
        ({"input_ids": np.ones((2, 4), int), "sequence_lengths": np.array([4.0, 2.0])}, "float64"),
        ({"input_ids": np.ones((2, 4), int), "attention_mask": np.ones((2, 3), int)}, "attention_mask (2, 3)"),
        ({"input_ids": np.ones((2, 4), int), "attention_mask": np.ones((2, 4))}, "float64"),
        ({"input_ids": np.ones((2, 4), int), "attention_mask": np.full((2, 4), 2)}, "values 2 to 2"),
        ({"input_ids": np.ones((2, 4), int), "attention_mask": np.zeros((2, 4), int)}, "nothing but padding"),
        (
            {
                "input_ids": np.ones((2, 2), int),
                "attention_mask": np.array([[1, 1], [1, 0]]),
                "sequence_lengths": np.array([2, 2]),
            },
            "2 in row 1",
        ),
    ],
)
def test_what_is_no_shard_is_refused_by_name(tmp_path, arrays, says):
    assert says in refusal(write(tmp_path / "a.npz", **arrays))


def test_a_lying_npy_header_is_refused_before_anything_is_allocated(tmp_path):
    path = write_members(tmp_path / "a.npz", ("input_ids.npy", header((2**40,)) + b"\0" * 64))
    assert str(2**41 + 128) in refusal(path)


def test_a_bomb_is_refused_by_its_inflation(tmp_path):
    path = write(tmp_path / "a.npz", input_ids=np.zeros(2**25 + 1, dtype=np.uint16))
    assert "inflates" in refusal(path)


def test_a_small_shard_may_inflate_a_lot_and_so_may_its_mask(tmp_path):
    path = write(tmp_path / "a.npz", input_ids=np.ones((512, 512), int), attention_mask=np.ones((512, 512), int))
    assert path.stat().st_size * 500 < 512 * 512 * 16
    assert len(read_npz(path)[0]) == 512 * 512


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([], "empty archive"),
        ([("../input_ids.npy", b"")], "../input_ids.npy"),
        ([("input_ids.pkl", b"")], "input_ids.pkl"),
        ([(f"a{i}.npy", b"") for i in range(40)], "40 arrays"),
        ([("input_ids.npy", b"no array at all")], "not a readable .npz"),
        ([("input_ids.npy", header((3,)) + b"\0" * 5)], "zip directory"),
        ([("input_ids.npy", header((3,)) + b"\0" * 7)], "zip directory"),
        ([("input_ids.npy", header((-1,)))], "(-1,)"),
        ([("input_ids.npy", header((1,), version=(9, 9)) + b"\0\0")], "version"),
    ],
)
def test_strange_archives_are_refused(tmp_path, members, says):
    assert says in refusal(write_members(tmp_path / "a.npz", *members))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path):
    member = ("input_ids.npy", header((1,)) + b"\1\0")
    assert "one name" in refusal(write_members(tmp_path / "a.npz", member, member))


def test_pickles_are_never_read(tmp_path):
    np.savez(tmp_path / "a.npz", input_ids=np.array([1, 2]), labels=np.array([print], dtype=object))
    assert read_npz(tmp_path / "a.npz")[0].tolist() == [1, 2]
    np.savez(tmp_path / "b.npz", input_ids=np.array([print], dtype=object))
    refusal(tmp_path / "b.npz")


def test_a_flipped_bit_in_the_data_is_found(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, input_ids=np.arange(1000, dtype=np.uint16))
    raw = bytearray(path.read_bytes())
    raw[1000] ^= 1
    path.write_bytes(raw)
    assert "CRC" in refusal(path)


def test_no_damage_escapes_as_another_error(tmp_path):
    good = io.BytesIO()
    rows, mask = padded(width=64)
    np.savez_compressed(good, input_ids=rows, attention_mask=mask, sequence_lengths=np.array(LENGTHS))
    generator = np.random.default_rng(0)
    path = tmp_path / "a.npz"
    refused = 0
    for cut in range(0, len(good.getvalue()), 7):
        path.write_bytes(good.getvalue()[:cut])
        refusal(path)
    for _ in range(400):
        raw = bytearray(good.getvalue())
        for place in generator.integers(0, len(raw), size=3):
            raw[place] = generator.integers(0, 256)
        path.write_bytes(raw)
        try:
            assert read_npz(path)[0].tolist() == STREAM  # the damage hit bytes that mean nothing
        except ShardError:
            refused += 1
    assert refused > 300


def test_a_missing_file_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        read_npz(tmp_path / "a.npz")


def test_errors_use_the_objects_name(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(ShardError, match=r"shard gs://bucket/x\.npz"):
        read_npz(tmp_path / "a.npz", name="gs://bucket/x.npz")


def test_ids_outside_the_vocabulary_are_refused_with_their_offset():
    tokens = np.array([1, 2, 99, 100], dtype=np.uint16)
    check_vocab(tokens, 101, "a.npz")
    with pytest.raises(
        ShardError, match=r"a\.npz: found token id 99 at offset 2 .*100.*vocabulary of 99\. .*at least 101"
    ):
        check_vocab(tokens, 99, "a.npz")
