"""The table of the scenarios, or one JSON object, out of the lines that the tests appended.

python -m tests.chaos.report RESULTS          exit 0 only where every scenario ran and passed
python -m tests.chaos.report RESULTS --json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pretrain.checks import Check, publish
from pretrain.listings import print_table
from tests.chaos.score import REPETITIONS, SCENARIOS, SEED, Figure

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.report", description=__doc__)
    parser.add_argument("results", type=Path, help="file of the lines that the tests appended")
    parser.add_argument("--only", default="", help="scenarios that were asked for, as 1,2,7 (all)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/{device}/chaos.json, too")
    options = parser.parse_args(argv)
    lines = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
    wanted = [int(number) for number in options.only.split(",") if number] or list(SCENARIOS)
    rows = [summarize(number, [line for line in lines if line["scenario"] == number]) for number in wanted]
    if not options.json:
        print_scenarios(rows, Console(highlight=False))
    checks = [check for row in rows for check in row["checks"]]
    details = {
        "repetitions": REPETITIONS,
        "seed": SEED,
        "scenarios": [{key: value for key, value in row.items() if key != "checks"} for row in rows],
    }
    if options.json or options.save:
        return publish("chaos", checks, as_json=options.json, save=options.save, details=details)
    return 0 if all(check.passed for check in checks) else 1


def summarize(number: int, lines: Sequence[Row]) -> Row:
    """One row of the table: the tests of a scenario taken together.

    Returns:
        number, title, runs, passed, skipped (a reason or ""), seconds, figures (name -> value), checks.
    """
    prefix = f"{number:02d}"
    ran = [line for line in lines if line["outcome"] != "skipped"]
    runs, passed = sum(line["runs"] for line in ran), sum(line["passed"] for line in ran)
    figures = combine(Figure(**figure) for line in ran for figure in line["figures"])
    checks = [Check(f"{prefix}_runs_passed", passed, "=", max(runs, 1), "runs")]
    checks += [
        Check(f"{prefix}_{figure.name}", figure.value, figure.relation, figure.goal, figure.unit)
        for figure in figures
        if figure.relation
    ]
    skipped = "; ".join(sorted({line["reason"] for line in lines if line["outcome"] == "skipped"}))
    if skipped:  # what was not tried is not passed
        checks.append(Check(f"{prefix}_skipped", sum(line["outcome"] == "skipped" for line in lines), "=", 0, "tests"))
    return {
        "number": number,
        "title": SCENARIOS[number],
        "runs": runs,
        "passed": passed,
        "skipped": skipped,
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "figures": {figure.name: figure.value for figure in figures},
        "checks": checks,
    }


def combine(figures: Iterable[Figure]) -> list[Figure]:
    """One figure a name: counts and goals added up, and of bounded ones the nearest to its bound."""
    found: dict[str, Figure] = {}
    for figure in figures:
        before = found.get(figure.name)
        if before is None:
            found[figure.name] = figure
        elif figure.relation == "≤":
            found[figure.name] = max(before, figure, key=lambda each: each.value - each.goal)
        else:
            value, goal = before.value + figure.value, before.goal + figure.goal
            found[figure.name] = Figure(figure.name, value, figure.relation, goal, figure.unit)
    return list(found.values())


def print_scenarios(rows: Sequence[Row], console: Console) -> None:
    """The table, and what it comes to."""
    cells = []
    for row in rows:
        by_name = {check.name.partition("_")[2]: check for check in row["checks"]}
        shown = []
        for name, value in row["figures"].items():
            check = by_name.get(name)
            bound = f" of {check.goal:g}" if check and check.relation == "=" and check.goal else ""
            bound = f" (≤ {check.goal:g})" if check and check.relation == "≤" else bound
            shown.append(f"{name.replace('_', ' ')} {value:g}{bound}")
        verdict = "yes" if all(check.passed for check in row["checks"]) else "NO"
        text = ", ".join(shown) + (f" [skipped: {row['skipped']}]" if row["skipped"] else "")
        cells.append([str(row["number"]), row["title"], row["runs"], row["passed"], text, row["seconds"], verdict])
    columns = ("#", "scenario", "runs", "passed", "figures", "s", "all passed")
    texts = [[str(cell) for cell in each] for each in cells]
    print_table(columns, texts, console, right=("#", "runs", "passed", "s"))
    good = sum(row[-1] == "yes" for row in cells)
    console.print(f"{good} of {len(rows)} scenarios passed ({REPETITIONS} repetitions, seed {SEED})")


if __name__ == "__main__":
    sys.exit(main())
