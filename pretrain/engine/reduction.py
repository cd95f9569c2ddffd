"""Averages gradients over the ranks while the backward pass still runs, as DistributedDataParallel does.

A parameter whose gradient is ready goes into its bucket; a full bucket travels at once, and behind it the backward pass
goes on (Li et al. 2020, arXiv 2006.15704). Buckets have a fixed order, the same on every rank, whatever the order in
which gradients become ready.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_ELEMENTS = 16 * 2**20  # 64 MiB of fp32 a message: bandwidth-bound, and there are several of them to overlap
MESSAGES = 2  # under way at most: each is a copy of its bucket


@dataclass
class Message:
    """A bucket that travels: its gradients, and the copy of them that is summed over the ranks."""

    gradients: list[Tensor]
    flat: Tensor
    work: dist.Work


@dataclass
class Bucket:
    """Parameters, by number, that travel together; `missing` are those whose gradient is not there yet."""

    parameters: list[int]
    missing: set[int] = field(default_factory=set)


def make_buckets(sizes: Sequence[int], limit: int = BUCKET_ELEMENTS) -> list[Bucket]:
    """Buckets of parameters from the last to the first, as a backward pass reaches them; each closes once it is full.

    Args:
        sizes: elements of each parameter.
        limit: elements from which on a bucket is full.
    """
    buckets = [Bucket([])]
    elements = 0
    for number in reversed(range(len(sizes))):
        if elements >= limit:
            buckets.append(Bucket([]))
            elements = 0
        buckets[-1].parameters.append(number)
        elements += sizes[number]
    return buckets


class Reducer:
    """The reduction of one engine's gradients; one step is `start`, a backward pass, `finish`.

    Args:
        parameters: of the module, in the order of the module.
        collect: gives the fp32 gradient of a parameter by its number, all micro-batches added; None: it has none.
        world_size: ranks.
    """

    def __init__(self, parameters: Sequence[Tensor], collect: Callable[[int], Tensor | None], world_size: int) -> None:
        self._collect = collect
        self._world_size = world_size
        self._buckets = make_buckets([parameter.numel() for parameter in parameters])
        self._bucket_of = {number: bucket for bucket in self._buckets for number in bucket.parameters}
        self._next = 0  # bucket to send
        self._messages: list[Message] = []
        self._active = False
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: self._ready(number))

    def start(self) -> None:
        """The backward pass that comes now is the step's last: send what becomes ready."""
        self._active = True
        self._next = 0
        for bucket in self._buckets:
            bucket.missing = set(bucket.parameters)

    def finish(self) -> None:
        """Send what is left and wait; the gradients that `collect` gave are then means over the ranks."""
        self._active = False
        for bucket in self._buckets[self._next :]:
            self._send(bucket)
        while self._messages:
            self._receive()

    def _ready(self, number: int) -> None:
        if not self._active:
            return
        self._bucket_of[number].missing.discard(number)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._send(self._buckets[self._next])
            self._next += 1

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        """Sum a bucket over the ranks, behind what this rank computes."""
        found = [self._collect(number) for number in bucket.parameters]
        gradients = [gradient for gradient in found if gradient is not None]
        if not gradients:
            return
        while len(self._messages) >= MESSAGES:
            self._receive()
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._messages.append(Message(gradients, flat, dist.all_reduce(flat, async_op=True)))

    @torch.no_grad()
    def _receive(self) -> None:
        """Wait for the oldest message and put its means where the gradients were."""
        message = self._messages.pop(0)
        message.work.wait()
        message.flat /= self._world_size
        parts = message.flat.split([gradient.numel() for gradient in message.gradients])
        for gradient, part in zip(message.gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
