"""How the ranks talk: what NCCL and gloo are told, with the reasons, and how long a rank waits for the others.

Only what is not set already is set here: NCCL finds NVLink, InfiniBand and its network interfaces by itself, and who
sets NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1 or NCCL_SOCKET_IFNAME=eth0 to rule out a broken link is obeyed.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil

SETTINGS = {
    # says which link failed, and nothing else
    "NCCL_DEBUG": "WARN",
    # a lost peer ends the ranks that wait for it; otherwise they would hang for ever, and nobody would restart them
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
# Uploads: the ranks meet when the slowest has uploaded its files. The launcher ends what is dead.
BACKGROUND_TIMEOUT = timedelta(hours=3)
SOMEWHERE = "192.0.2.1"  # an address of nobody (RFC 5737), to ask which way the traffic leaves; nothing is sent


def settle(several_nodes: bool) -> None:
    """Set what is not set, before the ranks meet.

    Args:
        several_nodes: gloo is told its network interface then: left alone it asks for this machine's name, which in a
            container or on a fresh machine means nothing or the loopback, and the nodes never meet.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if several_nodes and GLOO_INTERFACE not in os.environ and (found := interface_towards(os.environ["MASTER_ADDR"])):
        os.environ[GLOO_INTERFACE] = found


def settled() -> dict[str, str]:
    """What NCCL and gloo go by, set here or elsewhere: for the log."""
    ours = (*SETTINGS, GLOO_INTERFACE)
    return {name: value for name, value in sorted(os.environ.items()) if name in ours or name.startswith("NCCL_")}


def collective_timeout(minutes: int) -> timedelta:
    """How long a rank waits in a collective for the others (train.timeout_minutes).

    A slow rank is no dead one: it may download, compile, or verify a checkpoint. A dead one's connections close, and
    one that hangs in a step is found by the watchdog (train.hang_timeout_s).
    """
    return timedelta(minutes=minutes)


def address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`; None where there is no way. Nothing is sent."""
    try:
        family, kind, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_towards(host: str) -> str | None:
    """The network interface on the way to `host`, or where that is this machine itself, on the way out of it."""
    for target in (host, SOMEWHERE):
        address = address_towards(target)
        for name, addresses in psutil.net_if_addrs().items():
            if address and not address.startswith("127.") and any(each.address == address for each in addresses):
                return str(name)
    return None
