"""What a benchmark or a tool found against what it should be: a table for people, one JSON object for machines."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from pretrain.errors import EXIT_DONE
from pretrain.listings import print_table

EXIT_MISSED = 1  # a check was not passed
RESULTS = Path("benchmarks") / "results"


@dataclass(frozen=True)
class Check:
    """One figure and its goal.

    Args:
        name: snake_case; what was measured or counted.
        value: rounded as it is to be read.
        goal: the bound, or the figure that was expected.
        relation: "≥", "≤" or "=": how value must stand to goal.
        unit: "x", "ms", "steps", …
    """

    name: str
    value: float
    relation: str
    goal: float
    unit: str

    @property
    def passed(self) -> bool:
        """Whether the goal was met; never by a value that is not a number."""
        compare = {"≥": self.value >= self.goal, "≤": self.value <= self.goal, "=": self.value == self.goal}
        return compare[self.relation]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the results file."""
        return {**asdict(self), "passed": self.passed}


def device_title(gpu: str | None = None) -> str:
    """The machine that the checks ran on, as it names a folder of results: "cpu-2core", "nvidia-h100".

    Args:
        gpu: the driver's name of its GPU, '' where it has none; None: torch is asked.
    """
    if gpu is None:
        import torch

        gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    if gpu:
        return f"nvidia-{re.split(r'[^a-z0-9]+', gpu.lower().removeprefix('nvidia '))[0]}"
    return f"cpu-{len(psutil.Process().cpu_affinity())}core"


def result(name: str, device: str, checks: list[dict[str, Any]], passed: bool) -> dict[str, Any]:
    """The object that every benchmark and tool prints with --json."""
    return {
        "name": name,
        "device": device,
        "platform": platform.platform(terse=True),
        "checks": checks,
        "passed": passed,
    }


def publish(
    name: str, checks: Sequence[Check], *, as_json: bool, save: bool = False, details: dict[str, Any] | None = None
) -> int:
    """Print the checks; returns the exit code, 0 where every one passed and 1 otherwise.

    Args:
        name: of the benchmark or tool, and of its results file.
        as_json: one object on stdout instead of a table.
        save: write benchmarks/results/{device}/{name}.json, too.
        details: what else belongs into the object: settings, rows of a table.
    """
    tree = _tree(name, checks, details or {})
    if as_json:
        print(json.dumps(tree, indent=1))
    else:
        rows = [
            [
                check.name,
                f"{check.value:g}",
                f"{check.relation} {check.goal:g}",
                check.unit,
                "yes" if check.passed else "NO",
            ]
            for check in checks
        ]
        print_table(("check", "value", "goal", "unit", "passed"), rows, Console(), right=("value", "goal"))
    if save:
        save_result(name, checks, details or {})
    return EXIT_DONE if tree["passed"] else EXIT_MISSED


def save_result(name: str, checks: Sequence[Check], details: dict[str, Any]) -> None:
    """Write benchmarks/results/{device}/{name}.json; see `publish`."""
    tree = _tree(name, checks, details)
    path = RESULTS / tree["device"] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _tree(name: str, checks: Sequence[Check], details: dict[str, Any]) -> dict[str, Any]:
    found = [check.to_json() for check in checks]
    return {**result(name, device_title(), found, all(check.passed for check in checks)), **details}
