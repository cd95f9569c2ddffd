"""`.npz` shards whose bytes depend on nothing but the tokens in them: members in a fixed order, stored, dated 1980.

They are not compressed: token ids shrink by a quarter at the price of a good part of the time that encoding takes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO

import numpy as np

from pretrain.files import new_file
from pretrain.npz import LENGTHS_KEY, MASK_KEY, TOKEN_KEYS

COPY_TOKENS = 1 << 20


def count_windows(lengths: np.ndarray, max_length: int, overlap: int) -> np.ndarray:
    """int64 (n,): windows of each document; the last one reaches its end."""
    step = max_length - overlap
    return 1 + np.maximum(0, -(-(lengths.astype(np.int64) - max_length) // step))


def write_stream(path: Path, tokens: np.ndarray, lengths: np.ndarray) -> None:
    """Our dialect: `input_ids` (n_tokens,) as they are and `sequence_lengths` (n_documents,) int64.

    Args:
        tokens: mapped or in memory; copied piece by piece.
    """
    with new_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, TOKEN_KEYS[0], tokens)
        _write(archive, LENGTHS_KEY, lengths.astype(np.int64))


def write_windows(
    path: Path, tokens: np.ndarray, lengths: np.ndarray, *, max_length: int, overlap: int, pad_id: int
) -> tuple[int, int]:
    """The padded dialect: `input_ids` (N, max_length) int32, `attention_mask` uint8, `sequence_lengths` (N,) int64.

    Each document is cut into windows that share `overlap` tokens with the one before; none holds two documents.

    Returns:
        (windows, tokens in them, those of the overlap counted each time).
    """
    counts = count_windows(lengths, max_length, overlap)
    ends = np.cumsum(lengths, dtype=np.int64)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(ends - lengths, counts) + within * (max_length - overlap)
    row_lengths = np.minimum(max_length, np.repeat(ends, counts) - starts)
    mask = np.arange(max_length) < row_lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int32)
    ids[mask] = tokens[(starts[:, None] + np.arange(max_length))[mask]]
    with new_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, TOKEN_KEYS[0], ids)
        _write(archive, MASK_KEY, mask.astype(np.uint8))
        _write(archive, LENGTHS_KEY, row_lengths)
    return len(row_lengths), int(row_lengths.sum())


def _write(archive: zipfile.ZipFile, key: str, array: np.ndarray) -> None:
    """One member; ZipInfo's own date is 1980-01-01, whatever the clock says."""
    with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
        _write_header(member, array)
        flat = array.reshape(-1)
        for begin in range(0, len(flat), COPY_TOKENS):
            member.write(flat[begin : begin + COPY_TOKENS].tobytes())


def _write_header(member: IO[bytes], array: np.ndarray) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(member, header)
