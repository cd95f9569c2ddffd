"""The figures that README quotes, written from benchmarks/results: nobody types them.

python benchmarks/tables.py           # writes README's section anew
python benchmarks/tables.py --check   # exit code 1 where README says anything else
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- speed: written by benchmarks/tables.py -->", "<!-- end of speed -->"
TITLES = {"trainer": "transformers Trainer", "litgpt": "litgpt", "accelerate": "Accelerate", "plain": "plain PyTorch"}


def speed_section(results: Path) -> str:
    """How many times as fast as the others ours is, by device and config; and what was missed.

    Args:
        results: the folder with DEVICE/train.json.
    """
    lines: list[str] = []
    for path in sorted(results.glob("*/train.json")):
        tree = json.loads(path.read_text(encoding="utf-8"))
        rows = tree["rows"]
        peers = [peer for peer in TITLES if any(peer in row.get("peers", {}) for row in rows.values())]
        lines += [f"| {path.parent.name} | tokens/s | of matrix rate | {' | '.join(TITLES[p] for p in peers)} |"]
        lines += ["|---" * (3 + len(peers)) + "|"]
        missed = [check for check in tree["checks"] if not check["passed"]]
        names = {check["name"] for check in missed}
        lines += [_row(key, row, peers, names) for key, row in rows.items()]
        lines += ["", _footnote(missed, len(tree["checks"])), ""]
    if not lines:
        lines = ["Nothing was measured on a quiet machine yet.", ""]
    return "\n".join([BEGIN, *lines[:-1], END])


def _row(key: str, row: dict[str, Any], peers: Sequence[str], missed: set[str]) -> str:
    def marked(text: str, name: str) -> str:
        return f"{text} \\*" if f"{key.replace(' ', '_')}_{name}" in missed else text

    beside = row.get("peers", {})

    def ratio(peer: str, flags: str) -> str:
        return marked(f"{beside[peer][flags]['ours_is_faster']:.2f}", f"over_{peer}_{flags}")

    ratios = [f"{ratio(peer, 'documented')} / {ratio(peer, 'best')}" if peer in beside else "–" for peer in peers]
    speed = marked(f"{row['tokens_per_second']:,.0f}", "speed")
    rate = marked(f"{row['of_matrix_rate']:.0%}", "of_matrix_rate")
    return f"| {key} | {speed} | {rate} | {' | '.join(ratios)} |"


def _footnote(missed: Sequence[dict[str, Any]], n_goals: int) -> str:
    """How many goals were missed, and what the goals are."""
    if not missed:
        return "Every goal of what is in the table was met."
    bounds = sorted({f"{check['goal']:,g} {check['unit']}" for check in missed})
    return f"\\* misses its goal ({', '.join(bounds)}), as {len(missed)} of {n_goals} do."


def rewritten(text: str, section: str) -> str:
    """The text with the section between the marks, both of which must be there once."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    assert found and ended, f"the marks {BEGIN} and {END} are missing"
    return before + section + after


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check README's section; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where README is behind")
    options = parser.parse_args(argv)
    text = README.read_text(encoding="utf-8")
    right = rewritten(text, speed_section(ROOT / "benchmarks" / "results"))
    if options.check:
        return int(text != right)
    README.write_text(right, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
