"""Documents in the column of a parquet or Arrow file, a few rows at a time. pyarrow is imported when one is opened."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.decompression import DamagedFile
from pretrain.errors import ConfigError

BATCH_ROWS = 256
ARROW_FILE_MAGIC = b"ARROW1"
ARROW_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


class Absent(str):
    """Why a row has no text."""


def parquet_group_bytes(path: Path) -> list[int]:
    """Compressed bytes of each row group; none where the file can't be read. Raises ConfigError without pyarrow."""
    arrow, parquet = _package("pyarrow"), _package("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            return [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    except (arrow.ArrowException, OSError):
        return []


def read_parquet(path: Path, column: str, first: int, end: int) -> Iterator[tuple[str, bytes | Absent]]:
    """(place, text as UTF-8 or why there is none) of each row in the row groups first to end - 1; end 0: of all.

    Raises:
        DamagedFile: the file can't be read (any further).
        ConfigError: pyarrow is missing.
    """
    arrow, parquet = _package("pyarrow"), _package("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            for group in range(first, end or file.metadata.num_row_groups):
                if column not in file.schema_arrow.names:
                    for row in range(file.metadata.row_group(group).num_rows):
                        yield f"row group {group}, row {row}", _no_column(file.schema_arrow.names)
                    continue
                row = 0
                for batch in file.iter_batches(BATCH_ROWS, [group], [column]):
                    for text in _texts(arrow, batch.column(0)):
                        yield f"row group {group}, row {row}", text
                        row += 1
    except (arrow.ArrowException, OSError) as error:
        raise DamagedFile(f"not a readable parquet file: {error}") from error


def read_arrow(path: Path, column: str) -> Iterator[tuple[str, bytes | Absent]]:
    """(place, text as UTF-8 or why there is none) of each row of an Arrow file or stream. Raises as read_parquet."""
    arrow = _package("pyarrow")
    row = 0
    try:
        with contextlib.closing(arrow.OSFile(str(path))) as file:
            for batch in _batches(arrow, file):
                index = batch.schema.get_field_index(column)
                if index < 0:
                    texts: Iterator[bytes | Absent] = iter([_no_column(batch.schema.names)] * batch.num_rows)
                else:
                    texts = _texts(arrow, batch.column(index))
                for text in texts:
                    yield f"row {row}", text
                    row += 1
    except (arrow.ArrowException, OSError) as error:
        raise DamagedFile(f"not a readable Arrow file after row {row}: {error}") from error


def _batches(arrow: Any, file: Any) -> Iterator[Any]:
    magic = file.read(len(ARROW_FILE_MAGIC))
    size = file.size()
    file.seek(0)
    if magic == ARROW_FILE_MAGIC:
        reader = arrow.ipc.open_file(file)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        return
    yield from arrow.ipc.open_stream(file)
    # A stream that was cut between two batches reads as a shorter one; its writer's last word tells them apart.
    file.seek(max(0, size - len(ARROW_STREAM_END)))
    if file.read() != ARROW_STREAM_END:
        raise DamagedFile(f"truncated: the Arrow stream of {size} bytes has no end mark")


def _texts(arrow: Any, column: Any) -> Iterator[bytes | Absent]:
    """The values as bytes: decoding them here would take a whole batch down with one bad byte."""
    types = arrow.types
    kind = column.type
    if types.is_dictionary(kind):
        column, kind = column.cast(kind.value_type), kind.value_type
    is_text = any(
        check(kind) for check in (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary)
    )
    if not is_text:
        why = Absent(f"is {kind}, not text")
        yield from (why for _ in range(len(column)))
        return
    large = types.is_large_string(kind) or types.is_large_binary(kind)
    for value in column.cast(arrow.large_binary() if large else arrow.binary()).to_pylist():
        yield Absent("is null") if value is None else value


def _no_column(names: list[str]) -> Absent:
    return Absent(f"is not among the columns {', '.join(names)}")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            ".parquet and .arrow files need the package pyarrow", "pip install -r requirements-data.txt"
        ) from error
