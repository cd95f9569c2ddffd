"""What a run left in its TensorBoard event files and in W&B's offline files, read back as those who show them do."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER_BYTES, BLOCK_BYTES, RECORD_BYTES = 7, 32768, 7  # of the LevelDB log that a .wandb file is
LAST_PARTS = (1, 4)  # a record that is whole, and the last part of one that is not


@dataclass
class TensorBoardView:
    """What TensorBoard shows of a folder.

    Args:
        points: of each chart, (step, value) in order.
        texts: of each text, (step, text).
    """

    points: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    texts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)


def read_tensorboard(folder: Path) -> TensorBoardView:
    """As TensorBoard's own loader has it, which hides what a later file takes back."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util import tensor_util

    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    view = TensorBoardView()
    for tag in found.Tags()["tensors"]:
        values = [(event.step, tensor_util.make_ndarray(event.tensor_proto).item(0)) for event in found.Tensors(tag)]
        if tag.endswith("/text_summary"):
            name = tag.removesuffix("/text_summary")
            view.texts[name] = [(step, value.decode()) for step, value in values]
        else:
            view.points[tag] = values
    return view


@dataclass
class WandbView:
    """One offline run of W&B, of one process.

    Args:
        history: what was logged, row by row; nested keys are joined by dots.
    """

    run_id: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)

    def points(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of a chart, in order."""
        return [(row["step"], row[name]) for row in self.history if name in row]


def read_wandb(folder: Path) -> list[WandbView]:
    """The offline runs below a log folder, in the order in which they began."""
    return [_read_run(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


def _read_run(path: Path) -> WandbView:
    from wandb.proto import wandb_internal_pb2

    make_record: Any = vars(wandb_internal_pb2)["Record"]
    view = WandbView()
    for block in _records(path.read_bytes()):
        record = make_record()
        record.ParseFromString(block)
        if record.HasField("run"):
            view.run_id = record.run.run_id
            view.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        if record.HasField("history"):
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
            view.history.append(row)
    return view


def _records(data: bytes) -> Iterator[bytes]:
    """The records that are whole: the file may be written to meanwhile."""
    position, record = HEADER_BYTES, b""
    while position + RECORD_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < RECORD_BYTES:  # a block's end is filled up
            position += left
            continue
        crc, length, kind = struct.unpack("<IHB", data[position : position + RECORD_BYTES])
        position += RECORD_BYTES + length
        part = data[position - length : position]
        if zlib.crc32(bytes([kind]) + part) != crc:
            return
        record += part
        if kind in LAST_PARTS:
            yield record
            record = b""
