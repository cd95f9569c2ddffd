"""The report of tests/chaos: what counts as passed, and how the figures of several tests become one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pretrain.failpoints import FAILPOINTS
from tests.chaos import report
from tests.chaos.score import SCENARIOS, Figure, Score, dice, in_lanes
from tests.runs import ROOT


def line(scenario: int, outcome: str = "passed", **more: Any) -> dict[str, Any]:
    plain = {"test": "t", "seconds": 1.0, "reason": "", "runs": 2, "passed": 2, "figures": []}
    return {"scenario": scenario, "outcome": outcome, **plain, **more}


def written(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    return str(path)


def test_all_passed_is_exit_0_and_one_json_object(tmp_path, capsys):
    results = written(tmp_path / "r", [line(number) for number in SCENARIOS])
    assert report.main([results, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["passed"] and len(tree["scenarios"]) == len(SCENARIOS) == 18
    assert all(row["runs"] == row["passed"] == 2 for row in tree["scenarios"])


@pytest.mark.parametrize(
    "spoilt",
    [
        [line(3, "failed", passed=1)],
        [],
        [line(3, "skipped", runs=0, passed=0, reason="no root")],
        [line(3), line(3, "skipped", reason="no root")],
        [line(3, figures=[{"name": "mismatches", "value": 1, "relation": "=", "goal": 0, "unit": "steps"}])],
    ],
    ids=["failed", "did-not-run", "skipped", "partly-skipped", "missed-figure"],
)
def test_one_scenario_that_did_not_pass_is_exit_1_and_shown(tmp_path, capsys, spoilt):
    results = written(tmp_path / "r", [line(number) for number in SCENARIOS if number != 3] + spoilt)
    assert report.main([results]) == 1
    out = capsys.readouterr().out
    assert "17 of 18 scenarios passed" in out
    (row,) = (each for each in out.splitlines() if SCENARIOS[3] in each)
    assert row.endswith("NO")
    assert report.main([results, "--only", "1,2"]) == 0


def test_equal_figures_and_goals_add_up_and_of_bounded_ones_the_worst_is_kept():
    figures = [
        Figure("found", 3, "=", 3, "x"),
        Figure("late", 1, "≤", 5, "s"),
        Figure("found", 4, "=", 5, "x"),
        Figure("late", 2, "≤", 2, "s"),
        Figure("tried", 1, "", 0, "x"),
        Figure("tried", 1, "", 0, "x"),
    ]
    assert report.combine(figures) == [
        Figure("found", 7, "=", 8, "x"),
        Figure("late", 2, "≤", 2, "s"),
        Figure("tried", 2, "", 0, "x"),
    ]


def test_a_score_counts_failures_in_and_outside_of_its_runs():
    score = Score()
    with score.run():
        pass
    with pytest.raises(AssertionError, match="mismatches: 1 steps, expected 0"), score.run():
        score.equal("mismatches", 1, 0, "steps")
    with pytest.raises(AssertionError):
        score.at_most("lost", 6, 5, "steps")
    told = score.to_json(failed=True)
    assert (told["runs"], told["passed"], len(told["figures"])) == (2, 1, 2)
    assert {key: Score().to_json(failed=True)[key] for key in ("runs", "passed")} == {"runs": 1, "passed": 0}
    assert Score().to_json(failed=False)["passed"] == 1


def test_lanes_run_everything_and_raise_what_went_wrong():
    done = []
    with pytest.raises(ZeroDivisionError):
        in_lanes([lambda: done.append(1), lambda: done.append(1 // 0), lambda: done.append(3)])
    assert sorted(done) == [1, 3]


def test_the_dice_fall_the_same_way_for_the_same_seed():
    assert dice("a", 1).random() == dice("a", 1).random() != dice("a", 2).random()


def test_a_wrong_option_of_the_runner_is_refused():
    command = ["bash", str(ROOT / "tests/chaos/run.sh"), "--jsn"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "config error: --jsn" in done.stderr


def test_every_failpoint_is_named_in_the_code():
    sources = "".join(path.read_text() for path in [ROOT / "train.py", *(ROOT / "pretrain").rglob("*.py")])
    assert [name for name in FAILPOINTS if f'failpoint("{name}")' not in sources] == []
