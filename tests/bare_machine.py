"""Run a script as on a machine that has some packages alone, and what those need.

python -m tests.bare_machine torch,numpy,rich SCRIPT ARGUMENT…
"""

from __future__ import annotations

import importlib.abc
import importlib.metadata
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def plain(name: str) -> str:
    """A package's name as packages are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_needs(names: set[str]) -> set[str]:
    """The packages and all that they need, of those that are installed here; without extras."""
    found: set[str] = set()
    left = {plain(name) for name in names}
    while left:
        found.add(name := left.pop())
        try:
            needs = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        first = (re.match(r"[\w.-]+", need) for need in needs if "extra ==" not in need)
        left |= {plain(match[0]) for match in first if match} - found
    return found


class OnlyThese(importlib.abc.MetaPathFinder):
    """Refuses the modules of other packages."""

    def __init__(self, names: set[str]) -> None:
        self._names, self._owners = names, importlib.metadata.packages_distributions()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> None:
        owners = {plain(owner) for owner in self._owners.get(name.partition(".")[0], ())}
        if owners and not owners & self._names:
            raise ModuleNotFoundError(f"the bare machine has no {', '.join(owners)}", name=name)


if __name__ == "__main__":
    words, script = sys.argv[1:3]
    sys.meta_path.insert(0, OnlyThese(with_needs(set(words.split(",")))))
    sys.argv = sys.argv[2:]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
