"""Two hosts and a network on one machine: network namespaces with addresses of their own, joined by a bridge.

    with network() as net:
        host = net.hosts[0]
        subprocess.run([*host.enter, "ip", "addr"])
        host.unplug()

What runs inside a host shares this machine's files and nothing of its network: its loopback, its ports and its address
are its own, and so is its host name. Needs root and iproute2; `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Host:
    """One namespace: what a command is preceded by to run there, its address, and its end of the wire."""

    name: str
    address: str
    wire: str

    @property
    def enter(self) -> list[str]:
        """The words before a command that runs on this host, under its own host name."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname {self.name} && exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.name, *named]

    def unplug(self) -> None:
        """Cut the wire: nothing is told to either side."""
        _ip("link", "set", self.wire, "down")

    def plug_in(self) -> None:
        """The reverse of `unplug`."""
        _ip("link", "set", self.wire, "up")


@dataclass(frozen=True)
class Network:
    """The hosts, and the address on the bridge where this machine can be reached by them."""

    address: str
    hosts: list[Host]


@contextlib.contextmanager
def network(n_hosts: int = 2) -> Iterator[Network]:
    """So many hosts on a bridge of their own; nothing of it is left afterwards."""
    mark, number = secrets.token_hex(2), secrets.randbelow(1 << 16)
    bridge, subnet = f"rfg{mark}", f"10.{128 + number // 256 % 128}.{number % 256}"
    hosts = [Host(f"host-{mark}-{n}", f"{subnet}.{10 + n}", f"rfg{mark}v{n}") for n in range(n_hosts)]
    try:
        _ip("link", "add", bridge, "type", "bridge")
        _ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("link", "add", host.wire, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            _ip("link", "set", host.wire, "master", bridge, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
            _ip("-n", host.name, "link", "set", "lo", "up")
        yield Network(f"{subnet}.1", hosts)
    finally:
        for host in hosts:
            _ip("netns", "del", host.name, check=False)
        _ip("link", "del", bridge, check=False)


def why_not() -> str:
    """What keeps this machine from making such hosts; '' where nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "unshare", "hostname") if not shutil.which(tool)]:
        return f"{' and '.join(missing)} not installed (iproute2, util-linux, hostname)"
    try:
        with network(1):
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], check=check, capture_output=True, text=True)
