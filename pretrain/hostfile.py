"""DeepSpeed's hostfile as prod_train.sh reads it: how many nodes there are, and which one this is.

    worker-1 slots=8
    worker-2 slots=8

    python -m pretrain.hostfile FILE      prints GPUS NNODES NODE_RANK MASTER_ADDR of this machine

Every node has the same file and starts the same command; the first host is node 0, where all of them meet. A machine
finds its line by its host name or one of its addresses; NODE_RANK says it where neither does.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from pretrain.errors import ConfigError

LINE = re.compile(r"(\S+)\s+slots=(\d+)")


class Host(NamedTuple):
    """One line: a name or an address, and the GPUs there."""

    name: str
    slots: int


def parse_hostfile(text: str, where: str) -> list[Host]:
    """The hosts of a hostfile, the first one node 0.

    Args:
        where: how messages name it.

    Raises:
        ConfigError: a line is not `NAME slots=N`, a host is there twice, the slots differ, or there is no host.
    """
    problems: list[str] = []
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.partition("#")[0].strip()):
            continue
        found = LINE.fullmatch(words)
        if not found or not int(found[2]):
            problems.append(f"{where}, line {number}: {words!r:.80} is not NAME slots=GPUS")
        elif any(found[1] == host.name for host in hosts):
            problems.append(f"{where}, line {number}: {found[1]} is there twice")
        else:
            hosts.append(Host(found[1], int(found[2])))
    if not hosts and not problems:
        problems.append(f"{where} names no host: a line is NAME slots=GPUS")
    if len({host.slots for host in hosts}) > 1:
        counts = ", ".join(f"{host.name} {host.slots}" for host in hosts[:4])
        problems.append(f"{where}: every host must have as many slots as the others, found {counts}")
    if problems:
        raise ConfigError(problems)
    return hosts


def own_number(hosts: Sequence[Host], names: Collection[str], addresses: Collection[str], where: str) -> int:
    """Which of the hosts this machine is, from 0.

    Args:
        names: that this machine calls itself.
        addresses: of its interfaces.

    Raises:
        ConfigError: none is, or several are.
    """
    short = {name.partition(".")[0] for name in names}
    known = {*names, *short, *addresses}
    mine = [number for number, host in enumerate(hosts) if host.name in known or _resolves_to(host.name) & {*addresses}]
    if len(mine) == 1:
        return mine[0]
    listed = ", ".join(host.name for host in hosts[:4]) + (", …" if len(hosts) > 4 else "")
    mend = f"Give NODE_RANK=0 to {len(hosts) - 1} on each node, in the order of the file."
    if mine:
        raise ConfigError(f"{where}: lines {', '.join(str(n + 1) for n in mine)} are all this machine", mend)
    raise ConfigError(f"{where} has no line for this machine, {sorted(names)[0]}: it names {listed}", mend)


def _resolves_to(name: str) -> set[str]:
    with contextlib.suppress(OSError):
        return {str(found[4][0]) for found in socket.getaddrinfo(name, None)}
    return set()


def own_addresses() -> set[str]:
    """The addresses of this machine's interfaces, without those that every machine has."""
    found = {address.address for each in psutil.net_if_addrs().values() for address in each}
    return {address for address in found if not address.startswith("127.") and address != "::1"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print what the hostfile says of this machine; the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if len(words) != 1:
        print("usage: python -m pretrain.hostfile FILE", file=sys.stderr)
        return ConfigError.exit_code
    try:
        print(*_settings(words[0], os.environ.get("NODE_RANK", "")))
    except ConfigError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code
    return 0


def _settings(where: str, told: str) -> tuple[int, int, int, str]:
    """(GPUS, NNODES, NODE_RANK, MASTER_ADDR)."""
    try:
        text = Path(where).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ConfigError(f"HOSTFILE {where} can't be read: {reason}", "Give HOSTFILE=/path on every node.") from error
    hosts = parse_hostfile(text, where)
    if told and not (told.isdecimal() and int(told) < len(hosts)):
        problem = f"NODE_RANK={told} is not one of the {len(hosts)} hosts of {where}"
        raise ConfigError(problem, "The first one is 0; unset it where the host's name tells.")
    names = {socket.gethostname(), socket.getfqdn()}
    rank = int(told) if told else own_number(hosts, names, own_addresses(), where)
    return hosts[0].slots, len(hosts), rank, hosts[0].name


if __name__ == "__main__":
    sys.exit(main())
