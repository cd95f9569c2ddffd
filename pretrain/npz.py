"""Tokens and document lengths out of the `.npz` dialects in the wild, without trusting the file.

A shard comes from a bucket that others write to, so its headers are checked before anything is inflated: a 2 MB file
can declare 2 GiB, and a lying `.npy` header can ask for 2 TiB. Padding is dropped here and nowhere else.
"""

from __future__ import annotations

import errno
import math
import threading
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pretrain.errors import ShardError, StorageError

TOKEN_KEYS = ("input_ids", "data", "tokens", "arr_0")
MASK_KEY = "attention_mask"
LENGTHS_KEY = "sequence_lengths"

MAX_MEMBERS = 32
MAX_MEMBER_BYTES = 8 * 2**30
MAX_INFLATION = 256  # of the tokens; deflate could reach 1032. A mask of ones does, but its shape is the tokens' shape
FREE_MEMBER_BYTES = 64 * 2**20  # below this no inflation is dangerous, and a small padded shard may inflate a lot
REWRITE = "Write the shard again, or leave it out with --data.on_bad_shard skip"


# numpy parses a header as Python, and CPython 3.11 mixes up the depths of two parsers in two threads (gh-106905)
_PARSER = threading.Lock()


@dataclass(frozen=True)
class _Member:
    """One array of the archive as its headers declare it; nothing of its data has been read."""

    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    dtype: np.dtype


def read_npz(path: Path | str, *, pad_token_id: int = -1, name: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a shard in order, padding dropped, and the lengths of its documents.

    Args:
        path: the `.npz` file.
        pad_token_id: id whose run at a row's end is padding, in shards with neither a mask nor lengths; -1: none is.
        name: what errors call the shard; the path where empty.

    Returns:
        tokens (n_tokens,) uint16 where every id fits, else uint32; document lengths (n_documents,) int64, each at
        least 1, summing to n_tokens.

    Raises:
        ShardError: the file is damaged, hostile or in no known dialect.
        StorageError: the file can't be opened.
    """
    name = name or str(path)
    try:
        with Path(path).open("rb") as file, zipfile.ZipFile(file) as archive:
            members = _read_headers(archive, name)
            tokens, lengths = _read_tokens(archive, members, pad_token_id, name)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _bad(name, f"not a readable .npz: {error}", "a zip archive of .npy arrays") from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # zipfile seeks to where a damaged directory points
            raise _bad(name, f"not a readable .npz: {error}", "a zip archive of .npy arrays") from error
        raise StorageError(f"can't read shard {name}: {error.strerror}", "check that the file is there") from error
    return _narrow(tokens, name), lengths[lengths > 0]


def check_vocab(tokens: np.ndarray, vocab_size: int, name: str) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        ShardError: naming the shard, the first such id, its offset in the shard and the vocabulary.
    """
    if len(tokens) == 0 or int(tokens.max()) < vocab_size:
        return
    offset, highest = int(np.argmax(tokens >= vocab_size)), int(tokens.max())
    raise ShardError(
        f"shard {name}: found token id {int(tokens[offset])} at offset {offset} (its largest is {highest}), "
        f"expected ids below the vocabulary of {vocab_size}",
        f"Set --model.vocab_size to the tokenizer's, at least {highest + 1}",
    )


def _bad(name: str, found: str, expected: str) -> ShardError:
    return ShardError(f"shard {name}: found {found}, expected {expected}", REWRITE)


# --- the archive: what it declares, checked before it is believed -----------------------------------------------------


def _read_headers(archive: zipfile.ZipFile, name: str) -> dict[str, _Member]:
    """The arrays this module may read, by key."""
    infos = archive.infolist()
    files = [info.filename for info in infos]
    if not infos:
        raise _bad(name, "an empty archive", f"an array named one of {', '.join(TOKEN_KEYS)}")
    if len(files) > MAX_MEMBERS:
        raise _bad(name, f"{len(files)} arrays", f"at most {MAX_MEMBERS}")
    if len(set(files)) < len(files):
        raise _bad(name, f"two members of one name among {', '.join(files)}", "each array once")
    if strange := [file for file in files if "/" in file or "\\" in file or not file.endswith(".npy")]:
        raise _bad(name, f"a member {strange[0]!r}", "only .npy arrays")
    if (total := sum(info.file_size for info in infos)) > MAX_MEMBERS * MAX_MEMBER_BYTES:
        raise _bad(name, f"{total} declared bytes", f"at most {MAX_MEMBERS * MAX_MEMBER_BYTES}")
    wanted = {*TOKEN_KEYS, MASK_KEY, LENGTHS_KEY}
    by_key = {info.filename.removesuffix(".npy"): info for info in infos}
    if "arr_0" in by_key and "arr_1" in by_key:
        raise _bad(name, "unnamed arrays arr_0 and arr_1", f"a second array that is named {MASK_KEY} or {LENGTHS_KEY}")
    return {key: _read_header(archive, info, name) for key, info in by_key.items() if key in wanted}


def _read_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> _Member:
    """The declared shape and dtype of one array, held against the size that the zip directory declares."""
    if info.flag_bits & 1:
        raise _bad(name, f"{info.filename} encrypted", "a plain array")
    if info.file_size > MAX_MEMBER_BYTES:
        raise _bad(name, f"{info.filename} of {info.file_size} declared bytes", f"at most {MAX_MEMBER_BYTES}")
    with archive.open(info) as file:
        shape, _, dtype = _read_npy_header(file)
        header_bytes = file.tell()
    if any(axis < 0 for axis in shape) or dtype.hasobject:
        raise _bad(name, f"{info.filename} of shape {shape} and dtype {dtype}", "an array of integers")
    declared = header_bytes + math.prod(shape) * dtype.itemsize
    if declared != info.file_size:
        found = f"{info.filename} with shape {shape} {dtype}, {declared} bytes"
        raise _bad(name, found, f"the {info.file_size} bytes that the zip directory declares")
    return _Member(info, shape, dtype)


def _read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, whether in Fortran's order, dtype); the file stands behind it."""
    with _PARSER:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f".npy format version {version}, known are 1.0 and 2.0")
    return tuple(int(axis) for axis in shape), bool(fortran), dtype


def _read_array(archive: zipfile.ZipFile, member: _Member) -> np.ndarray:
    """The data of one array; reading to the member's end makes zipfile compare its CRC."""
    with archive.open(member.info) as file:
        shape, fortran, dtype = _read_npy_header(file)
        data = file.read(math.prod(shape) * dtype.itemsize)
        if file.read(1):
            raise ValueError(f"{member.info.filename} goes on after its array")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


# --- the dialects -----------------------------------------------------------------------------------------------------


def _read_tokens(
    archive: zipfile.ZipFile, members: dict[str, _Member], pad_token_id: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """(kept ids (n_tokens,) of the file's own dtype, document lengths (n_documents,) int64)."""
    key = next((key for key in TOKEN_KEYS if key in members), None)
    if key is None:
        held = ", ".join(info.filename.removesuffix(".npy") for info in archive.infolist())
        raise _bad(name, f"arrays {held}", f"one named {', '.join(TOKEN_KEYS)}")
    ids, mask, lengths = members[key], members.get(MASK_KEY), members.get(LENGTHS_KEY)
    shape = _token_shape(ids, name)
    limit = max(FREE_MEMBER_BYTES, MAX_INFLATION * ids.info.compress_size)
    if ids.info.file_size > limit:
        found = f"{ids.info.filename} that inflates {ids.info.compress_size} bytes to {ids.info.file_size}"
        raise _bad(name, found, f"at most {MAX_INFLATION} times as much")
    if mask and (mask.dtype.kind not in "iub" or mask.shape not in (ids.shape, shape)):
        raise _bad(name, f"{MASK_KEY} {mask.shape} {mask.dtype}", f"integers or booleans of shape {shape}")
    if lengths:
        _check_lengths_header(lengths, shape, name)
    tokens = _read_array(archive, ids).reshape(shape)
    row_lengths = _read_array(archive, lengths).reshape(-1) if lengths else None
    if len(shape) == 1 and mask is None:
        return _from_stream(tokens, row_lengths, pad_token_id, name)
    rows = tokens.reshape(-1, shape[-1])  # a 1-D stream with a mask is one row
    kept = _read_array(archive, mask).reshape(rows.shape) if mask else None
    if kept is not None:
        return _from_masked_rows(rows, kept, row_lengths, len(shape) == 1, name)
    return _from_rows(rows, row_lengths, pad_token_id, name)


def _token_shape(ids: _Member, name: str) -> tuple[int, ...]:
    """(n,) or (N, L) for the declared shape, (N, L, 1) read as (N, L)."""
    shape = ids.shape[:2] if len(ids.shape) == 3 and ids.shape[2] == 1 else ids.shape
    if ids.dtype.kind not in "iu":
        raise _bad(name, f"{ids.info.filename} of dtype {ids.dtype}", "integer token ids")
    if len(shape) not in (1, 2):
        raise _bad(name, f"{ids.info.filename} of shape {ids.shape}", "(tokens,), (rows, length) or (rows, length, 1)")
    if math.prod(shape) == 0:
        raise _bad(name, f"{ids.info.filename} of shape {ids.shape}", "at least one token")
    return shape


def _check_lengths_header(lengths: _Member, shape: tuple[int, ...], name: str) -> None:
    """Lengths count rows, or documents of a stream; either way there are no more of them than rows or tokens."""
    count = math.prod(lengths.shape)
    fits = count == shape[0] if len(shape) == 2 else count <= shape[0]
    if lengths.dtype.kind not in "iu" or len(lengths.shape) not in (1, 2) or count != max(lengths.shape) or not fits:
        expected = f"{shape[0]} integers, one a row" if len(shape) == 2 else f"at most {shape[0]} integers"
        raise _bad(name, f"{LENGTHS_KEY} {lengths.shape} {lengths.dtype}", expected)


def _from_stream(
    tokens: np.ndarray, lengths: np.ndarray | None, pad_token_id: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """A 1-D stream: with lengths it is ours, without it is one document."""
    if lengths is None:
        return _from_rows(tokens.reshape(1, -1), None, pad_token_id, name)
    lengths = _checked_lengths(lengths, len(tokens), name)
    if int(lengths.sum()) != len(tokens):
        raise _bad(name, f"{LENGTHS_KEY} summing to {int(lengths.sum())}", f"the {len(tokens)} tokens of the stream")
    return tokens, lengths


def _from_masked_rows(
    rows: np.ndarray, mask: np.ndarray, lengths: np.ndarray | None, is_stream: bool, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, L) with a mask (N, L): what the mask marks 1 is kept, wherever in the row it is."""
    if not ((mask == 0) | (mask == 1)).all():
        raise _bad(name, f"{MASK_KEY} with values {int(mask.min())} to {int(mask.max())}", "only 0 and 1")
    keep = mask.astype(bool)
    tokens, counts = rows[keep], keep.sum(axis=1, dtype=np.int64)
    if lengths is None:
        return tokens, counts
    if is_stream:  # documents of a stream, not rows
        return _from_stream(tokens, lengths, -1, name)
    lengths = _checked_lengths(lengths, rows.shape[1], name)
    if (counts != lengths).any():
        row = int(np.argmax(counts != lengths))
        found = f"{LENGTHS_KEY} {int(lengths[row])} in row {row}"
        raise _bad(name, found, f"the {int(counts[row])} tokens that its {MASK_KEY} keeps")
    return tokens, counts


def _from_rows(
    rows: np.ndarray, lengths: np.ndarray | None, pad_token_id: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, L) without a mask: the first `lengths` of each, or all but the run of pads at each end."""
    n_rows, row_length = rows.shape
    if lengths is not None:
        counts = _checked_lengths(lengths, row_length, name)
    elif pad_token_id >= 0:
        is_token = rows[:, ::-1] != pad_token_id
        counts = np.where(is_token.any(axis=1), row_length - is_token.argmax(axis=1), 0).astype(np.int64)
    else:
        return rows.reshape(-1), np.full(n_rows, row_length, dtype=np.int64)
    return rows[np.arange(row_length) < counts[:, None]], counts


def _checked_lengths(lengths: np.ndarray, longest: int, name: str) -> np.ndarray:
    """The lengths as int64, each in [0, longest]."""
    wrong = (lengths < 0) | (lengths > longest)
    if wrong.any():
        index = int(np.argmax(wrong))
        raise _bad(name, f"{LENGTHS_KEY}[{index}] = {int(lengths[index])}", f"a length from 0 to {longest}")
    return lengths.astype(np.int64)


def _narrow(tokens: np.ndarray, name: str) -> np.ndarray:
    """The ids as uint16 where all of them fit, else uint32."""
    if len(tokens) == 0:
        raise _bad(name, "nothing but padding", "at least one token")
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= 2**32:
        wrong = lowest if lowest < 0 else highest
        offset = int(np.argmax(tokens == wrong))
        raise _bad(name, f"token id {wrong} at offset {offset}", "ids from 0 to 4294967295")
    return np.ascontiguousarray(tokens, dtype=np.uint16 if highest < 2**16 else np.uint32)
