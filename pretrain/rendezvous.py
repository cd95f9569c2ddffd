"""How the launchers of several nodes meet: torchrun's c10d rendezvous at node 0, made fit for restarts.

What it does beyond c10d:
- ranks follow NODE_RANK, so that rank 0, whose log and metrics count, is always on node 0;
- each node is known by the address that it reaches node 0 from: host names need not resolve, and two may be the same;
- a node that comes back while the others are still ending waits for their next start instead of failing;
- a node 0 that can't be reached at all is told within seconds; one that does not listen yet is waited for.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from torch.distributed import DistError
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from pretrain.processes import RESTARTED

BACKEND = "nodes"
MEET_S = 600  # how long nodes wait for each other; MEET_S of prod_train.sh
UNREACHABLE_S = 20.0  # and for a node 0 whose address leads nowhere, at the first start: it is most likely wrong
TRY_S, AGAIN_S, SAY_AFTER_S = 3.0, 1.0, 10.0


class NodesRendezvous(RendezvousHandler):
    """One node's side of it.

    Args:
        params: of torchrun; `node_rank` among their options, and `join_timeout` in seconds, where it is not MEET_S.

    Attributes:
        met: whether the nodes have come together once.
        scaling: whether another node has come, so that the ranks are stopped to make room for it.
    """

    current: NodesRendezvous | None = None  # a launcher has one

    def __init__(self, params: RendezvousParameters) -> None:
        self.node_rank = int(params.config.pop("node_rank"))
        self.met = self.scaling = False
        patient = "join_timeout" in params.config
        params.config.setdefault("join_timeout", MEET_S)
        self._patience_s = float(params.config["join_timeout"])
        self._unreachable_s = self._patience_s if patient or RESTARTED in os.environ else UNREACHABLE_S
        self._params = params
        self._inner: RendezvousHandler | None = None
        NodesRendezvous.current = self

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other nodes.

        Raises:
            RendezvousError: node 0 can't be reached, too few nodes came in time, or two say that they are the same one.
        """
        deadline = time.monotonic() + self._patience_s
        self.scaling = False
        with _say_when_slow(f"waiting for the other nodes at {self._params.endpoint}, up to {self._patience_s:g} s"):
            while True:
                try:
                    info = self._join()
                    break
                except (RendezvousClosedError, RendezvousConnectionError, DistError):
                    # The others' last start is still ending. Node 0 itself has nobody to wait for.
                    if self.node_rank == 0 or time.monotonic() > deadline:
                        raise
                    self._inner = None
                    time.sleep(AGAIN_S)
            self.met = True  # a node that is lost from here on is a crash, not a wrong setting
            try:
                in_order = self._in_order(info)
            except RendezvousError:
                self.met = False
                raise
        return in_order

    def _join(self) -> RendezvousInfo:
        if self._inner is None:
            if self.node_rank:
                self._await_node_0()
            backend, store = create_backend(self._params)
            self._inner = create_handler(store, backend, self._params)
        # Where the workers meet changes with the nodes; torch 2.13 keeps the first place on all but the new rank 0.
        self._inner._bootstrap_store_info = None  # type: ignore[attr-defined]
        return self._inner.next_rendezvous()

    def _await_node_0(self) -> None:
        """Return when node 0 listens. Raises RendezvousError where its address leads nowhere."""
        host, _, port = self._params.endpoint.rpartition(":")
        started = time.monotonic()
        while True:
            try:
                socket.create_connection((host, int(port)), TRY_S).close()
                return
            except OSError as error:
                listens_later = isinstance(error, ConnectionRefusedError)
                patience_s = self._patience_s if listens_later else self._unreachable_s
                if time.monotonic() - started > patience_s - TRY_S:
                    raise RendezvousError(f"node 0 can't be reached: {error.strerror or error}") from None
                time.sleep(AGAIN_S)

    def _in_order(self, info: RendezvousInfo) -> RendezvousInfo:
        """The same meeting with the nodes numbered as NODE_RANK says."""
        store, meeting_place = info.store, info.bootstrap_store_info
        assert meeting_place is not None
        store.set(f"node_rank/{info.rank}", str(self.node_rank))
        told = [int(store.get(f"node_rank/{rank}")) for rank in range(info.world_size)]
        if len(set(told)) < len(told):
            # not before all have read it: with the first that ends the place may be gone
            store.set(f"read by {info.rank}", "")
            store.wait([f"read by {rank}" for rank in range(info.world_size)])
            twice = next(number for number in told if told.count(number) > 1)
            raise RendezvousError(f"two nodes say that they are NODE_RANK={twice}")
        return RendezvousInfo(store, sorted(told).index(self.node_rank), info.world_size, meeting_place)

    def num_nodes_waiting(self) -> int:
        """Nodes that want to come in. A node 0 that is gone has none: the ranks tell by themselves how this ends."""
        waiting = 0
        with contextlib.suppress(RendezvousError, DistError):
            waiting = self._handler.num_nodes_waiting()
        self.scaling = waiting > 0
        return waiting

    @property
    def _handler(self) -> RendezvousHandler:
        assert self._inner is not None, "nobody asks before the first meeting"
        return self._inner

    def get_backend(self) -> str:
        """See RendezvousHandler, as below."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """The workers use a store of the launcher's."""
        return True

    def is_closed(self) -> bool:
        """Whether no node will meet here again."""
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """Let no node meet here again."""
        self._handler.set_closed()

    def get_run_id(self) -> str:
        """What this meeting is called."""
        return str(self._params.run_id)

    def shutdown(self) -> bool:
        """Leave, and tell the others."""
        return self._inner is None or self._inner.shutdown()


def register() -> None:
    """Make torchrun know BACKEND."""
    rendezvous_handler_registry.register(BACKEND, NodesRendezvous)


@contextlib.contextmanager
def _say_when_slow(text: str) -> Iterator[None]:
    """Print a line where the block takes long."""
    timer = threading.Timer(SAY_AFTER_S, print, (f"launch: {text}",), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
