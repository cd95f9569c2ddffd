"""The processes of a run: who they are, and the small messages they exchange on the CPU.

Gradients travel inside the engine. What travels here is control: flags, mean losses, JSON. It goes over gloo, so
that it never waits for a GPU stream, and as JSON bytes, so that nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from pretrain.communication import BACKGROUND_TIMEOUT, collective_timeout, settle
from pretrain.errors import ConfigError, TrainerError, error_of

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FAILED = "failed before the ranks met"  # key of the store
ROLL_CALL = timedelta(seconds=1)
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of the run.

    Args:
        rank, world_size: of all processes.
        local_rank, local_world_size: of this node's.
        control: gloo group for messages at step boundaries.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    control: dist.ProcessGroup

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank. Every rank must call it."""
        return self.any_of(flag)[0]

    def any_of(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is set on at least one rank. Every rank must call it."""
        words = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(words, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(word) for word in words.tolist()]

    def mean(self, value: float) -> float:
        """The mean of a value over the ranks, in float64. Every rank must call it."""
        word = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(word, group=self.control)
        return word.item() / self.world_size

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self.control)

    def exchange(self, message: Mapping[str, Any], group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
        """Every rank's message, in rank order, on every rank.

        Args:
            message: JSON data.
            group: a group of `background_group` where this is called off the main thread.
        """
        return exchange(message, self.world_size, group or self.control)

    def from_first(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Rank 0's message, on every rank."""
        return self.exchange(message if self.is_first else {})[0]

    def decided_by_first(self, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `decide` returns on rank 0, on every rank; a TrainerError it raises is raised on every rank."""
        message: dict[str, Any] = {}
        if self.is_first:
            try:
                message = {"decision": decide()}
            except TrainerError as error:
                message = error.told()
        answer = self.from_first(message)
        if "decision" not in answer:
            raise _shared_error(answer)
        decision: dict[str, Any] = answer["decision"]
        return decision

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A TrainerError that the block raises on one rank is raised on every rank. Every rank must enter it."""
        message: dict[str, Any] = {}
        try:
            yield
        except TrainerError as error:
            message = error.told()
        if failed := next((answer for answer in self.exchange(message) if answer), None):
            raise _shared_error(failed)


def _shared_error(message: Mapping[str, Any]) -> TrainerError:
    """The error of another rank."""
    shared = error_of(message)
    shared.shared = True
    return shared


def exchange(message: Mapping[str, Any], world_size: int, group: dist.ProcessGroup) -> list[dict[str, Any]]:
    """All-gather of JSON messages of different lengths; see `Ranks.exchange`."""
    payload = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    length = torch.tensor([payload.numel()], dtype=torch.int64)
    lengths = [torch.zeros_like(length) for _ in range(world_size)]
    dist.all_gather(lengths, length, group=group)
    longest = max(int(each.item()) for each in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: payload.numel()] = payload
    payloads = [torch.zeros_like(padded) for _ in range(world_size)]
    dist.all_gather(payloads, padded, group=group)
    texts = (bytes(each[: int(n.item())].tolist()) for each, n in zip(payloads, lengths, strict=True))
    return [json.loads(text) for text in texts]


def background_group() -> dist.ProcessGroup:
    """A gloo group of all ranks for one background thread. Every rank must call it, in the same order."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT)
    return group


def join(device: torch.device, timeout_minutes: int) -> Ranks:
    """Meet the other ranks of the run, as RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of any launcher say.

    Without a launcher this process is the only rank.

    Raises:
        ConfigError: the launcher set only some of them; or what another rank failed with before it came.
        TrainerError: one did not come.
    """
    environment = os.environ
    alone = "RANK" not in environment and environment.get("WORLD_SIZE", "1") == "1"
    if alone:  # DeepSpeed wants an address, too, which nobody asks for anything
        environment.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    _end_with_torchrun()
    if missing := [name for name in LAUNCHER_VARIABLES if not environment.get(name)]:
        there = ", ".join(name for name in LAUNCHER_VARIABLES if name not in missing)
        mend = "Start by a launcher (python -m pretrain.launch, torchrun), or unset those."
        raise ConfigError(f"the environment has {there}, but not {', '.join(missing)}", mend)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    local_rank, local_world_size = local_ranks()
    settle(several_nodes=int(environment["WORLD_SIZE"]) > local_world_size)
    timeout = collective_timeout(timeout_minutes)
    store, rank, world_size = (HashStore(), 0, 1) if alone else _meet(timeout)
    place: dict[str, Any] = {"store": store, "rank": rank, "world_size": world_size}
    if device.type == "cuda":
        check_own_gpu(store, rank, world_size, str(torch.cuda.get_device_properties(device).uuid))
        dist.init_process_group("nccl", timeout=timeout, device_id=device, **place)
    else:
        dist.init_process_group("gloo", timeout=timeout, **place)
    control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, local_world_size, control)


def _meet(timeout: timedelta) -> tuple[Store, int, int]:
    """(store, rank, world size) once every rank is there."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    store.set(f"here {rank}", "")
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            store.wait([f"here {number}" for number in range(world_size)], ROLL_CALL)
            return store, rank, world_size
        except dist.DistStoreError:  # not yet
            if store.check([FAILED]):
                raise _shared_error(json.loads(store.get(FAILED))) from None
            if time.monotonic() > deadline:
                missing = [number for number in range(world_size) if not store.check([f"here {number}"])]
                which = f"{len(missing)} of {world_size} ranks did not come in {timeout.total_seconds():g} s"
                what = f"{which}: {', '.join(map(str, missing[:8]))}"
                raise TrainerError(what, "Look at what their nodes say.") from None


def tell_of_failure(error: TrainerError, patience: timedelta) -> bool:
    """Have the ranks that wait in `join` raise this rank's error, too, which came before it could meet them.

    Args:
        patience: for reaching them.

    Returns:
        Whether they are told; not where nobody is there.
    """
    if any(not os.environ.get(name) for name in LAUNCHER_VARIABLES):
        return False
    try:
        store, rank, _ = next(rendezvous("env://", timeout=patience))
        what = f"rank {rank} on {socket.gethostname()}: {error.what}"
        store.set(FAILED, json.dumps({**error.told(), "what": what}))
    except (RuntimeError, ValueError):  # nobody is there, or the launcher's variables are no numbers
        return False
    return True


def check_own_gpu(store: Any, rank: int, world_size: int, gpu: str) -> None:
    """Refuse a GPU that another rank has: NCCL would fail later and less clearly. Every rank must call it.

    Args:
        store: where the ranks meet.
        gpu: the identity of this rank's GPU.

    Raises:
        ConfigError: naming the two ranks, on every rank.
    """
    store.set(f"gpu of {rank}", f"{socket.gethostname()} {gpu}")
    places = store.multi_get([f"gpu of {other}" for other in range(world_size)])  # waits for all of them
    owners: dict[str, int] = {}
    for other, place in enumerate(each.decode() for each in places):
        if place in owners:
            host, _, number = place.partition(" ")
            raise ConfigError(
                f"ranks {owners[place]} and {other} are on one GPU ({number} of {host})",
                "Start as many processes a node as it has GPUs, each with its own LOCAL_RANK, and let "
                "CUDA_VISIBLE_DEVICES be the same for all of them.",
            )
        owners[place] = other


def _end_with_torchrun() -> None:
    """Have the kernel end this rank when its launcher dies: a worker that outlives it goes on training, and writing."""
    # Only under torchrun and its kin: the shell that started a rank by hand may end long before it.
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def leave(ranks: Ranks) -> None:
    """End the process groups, all ranks together: a launcher ends the others when the first one is gone."""
    ranks.barrier()
    dist.destroy_process_group()


def local_ranks() -> tuple[int, int]:
    """(rank on this node, ranks on this node) as the launcher set them; RANK and WORLD_SIZE where it set only those.

    Raises:
        ConfigError: one of them is no number.
    """
    environment = os.environ
    if wrong := [name for name in NUMBERS if not environment.get(name, "0").isdecimal()]:
        mend = "A launcher sets it: see there."
        raise ConfigError(f"{wrong[0]} is {environment[wrong[0]]!r}, expected a number", mend)
    rank = environment.get("LOCAL_RANK", environment.get("RANK", "0"))
    # DeepSpeed's launcher says LOCAL_SIZE where the others say LOCAL_WORLD_SIZE.
    size = environment.get("LOCAL_WORLD_SIZE", environment.get("LOCAL_SIZE", environment.get("WORLD_SIZE", "1")))
    return int(rank), int(size)


def is_news(line: str, alone: bool = False) -> bool:
    """Whether no other rank has printed this error line yet; True where nobody can be asked. For each line ask once.

    Args:
        alone: whether another rank's line, whatever it is, makes this one no news.
    """
    if not dist.is_initialized():
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        if alone:
            return int(store.add("error lines", 0)) == 0
        store.add("error lines", 1)
        return int(store.add(f"error line {hashlib.sha256(line.encode()).hexdigest()}", 1)) == 1
    except RuntimeError:  # the process that kept the store is gone
        return True
