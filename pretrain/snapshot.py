"""A snapshot of a run's tensors in host memory, taken behind the training where nothing changes them meanwhile.

What an engine's optimizer holds changes in one place only: the next update. So the copy of it goes on beside the next
step's forward and backward pass, and only the update waits for it (Mohan et al. 2021, "CheckFreq", USENIX FAST). What
was gathered from the ranks for the snapshot is copied, and the memory given back, before training goes on.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pretrain.engine.base import ParameterState
from pretrain.failpoints import failpoint


def part_name(kind: str, rank: int, world_size: int) -> str:
    """File of one rank's share: kind is "model" or "optimizer"."""
    return f"{kind}-{rank + 1:05d}-of-{world_size:05d}.safetensors"


class Copying:
    """The copies of one snapshot: `finish` makes them, on another thread than the one that `wait`s."""

    def __init__(self) -> None:
        self._left: list[tuple[Tensor, Tensor]] = []  # (buffer, source) of host tensors that stay as they are
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._events: list[tuple[torch.device, torch.cuda.Event]] = []
        self._is_on_host = False
        self._is_done = threading.Event()

    def later(self, buffer: Tensor, source: Tensor) -> None:
        """Copy `source`, which does not change before `wait` has returned."""
        if not source.is_cuda:
            self._left.append((buffer, source))
            self._is_on_host = True
            return
        device = source.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
            self._streams[device].wait_stream(torch.cuda.current_stream(device))  # the update before is in it
        with torch.cuda.stream(self._streams[device]):
            buffer.copy_(source, non_blocking=True)

    def begin(self) -> None:
        """All that is to be copied is named."""
        for device, stream in self._streams.items():
            self._events.append((device, stream.record_event()))

    def finish(self) -> None:
        """Make the copies; they are whole when this returns."""
        try:
            failpoint("snapshot.before_copy")
            for buffer, source in self._left:
                np.copyto(buffer.numpy(), source.numpy())  # one thread, without the GIL: the others belong to the step
            for _, event in self._events:
                event.synchronize()
        finally:
            self._left.clear()
            self._is_done.set()

    def wait(self) -> None:
        """Until what was named may change. For a GPU's its stream waits, not this thread."""
        for device, event in self._events:
            torch.cuda.current_stream(device).wait_event(event)
        if self._is_on_host:
            self._is_done.wait()


@dataclass
class Snapshot:
    """One rank's share of the tensors in host memory, whole after `copying.finish`, and who has which weight.

    Args:
        weights: fp32 by canonical name.
        moments: fp32 by "exp_avg/NAME" and "exp_avg_sq/NAME", or "momentum_buffer/NAME".
        weight_map: canonical name -> file, of all ranks.
        total_bytes: of all weights, for the index.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    moments: dict[str, Tensor] = field(default_factory=dict)
    weight_map: dict[str, str] = field(default_factory=dict)
    total_bytes: int = 0
    copying: Copying = field(default_factory=Copying)

    def index(self) -> str:
        """model.safetensors.index.json, in the form that transformers and others read."""
        tree = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
        return json.dumps(tree, indent=1) + "\n"


class HostBuffers:
    """Host memory that snapshots are copied to, kept from one save to the next: fp32, by tensor name.

    Its pages are there after the first save, and beside a GPU they are pinned, so that copies run at the full speed of
    the bus and beside one another.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._devices: set[torch.device] = set()

    def take(self, key: str, source: Tensor) -> Tensor:
        """The buffer for a tensor; the one before of that name is the same memory."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != source.shape:
            buffer = torch.empty(source.shape, dtype=torch.float32, pin_memory=source.is_cuda)
            self._buffers[key] = buffer
        return buffer

    def copy(self, key: str, source: Tensor) -> Tensor:
        """A copy of any tensor, whole after `synchronize`; the next copy of that name overwrites it."""
        buffer = self.take(key, source).copy_(source, non_blocking=True)
        if source.is_cuda:
            self._devices.add(source.device)
        return buffer

    def synchronize(self) -> None:
        """Wait for the copies from GPUs."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()


def take_snapshot(
    states: Iterable[tuple[str, ParameterState]],
    rank: int,
    world_size: int,
    buffers: HostBuffers | None = None,
    *,
    states_stay: bool = False,
) -> Snapshot:
    """This rank's share of the parameters in host memory: all that a save makes the training wait for.

    Each parameter goes to the rank with the fewest bytes so far, so every rank knows who writes what without asking.

    Args:
        buffers: what an earlier snapshot was copied to, which is overwritten.
        states_stay: the states are there, and don't change, until the caller has called `copying.wait`; they are copied
            by `copying.finish`, which the caller must have another thread call.
    """
    buffers = buffers or HostBuffers()
    snapshot = Snapshot()
    load = [0] * world_size

    def copy(key: str, tensor: Tensor) -> Tensor:
        source = tensor.detach()
        if not states_stay or source.dtype != torch.float32:
            return buffers.copy(key, source)
        buffer = buffers.take(key, source)
        snapshot.copying.later(buffer, source)
        return buffer

    for name, state in states:
        owner = load.index(min(load))
        size = state["weight"].numel() * state["weight"].element_size()
        load[owner] += size
        snapshot.total_bytes += size
        snapshot.weight_map[name] = part_name("model", owner, world_size)
        if owner == rank:
            snapshot.weights[name] = copy(name, state["weight"])
            for moment, tensor in state.items():
                if moment != "weight":
                    snapshot.moments[f"{moment}/{name}"] = copy(f"{moment}/{name}", tensor)
    buffers.synchronize()
    snapshot.copying.begin()
    return snapshot
