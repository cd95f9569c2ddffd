"""What every scenario shares: its score, a machine's disk, runs left alone, and the record of how each test ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from tests.chaos.chain import Baseline, run_alone
from tests.chaos.score import Score
from tests.runs import make_shards

RESULTS_VARIABLE = "CHAOS_RESULTS"  # a file to which every test appends one line of JSON
ONLY_VARIABLE = "CHAOS_ONLY"  # "1,7": these scenarios
SCORE = pytest.StashKey[Score]()


@pytest.fixture
def score(request: pytest.FixtureRequest) -> Score:
    """The figures of the test, which the report reads."""
    kept: Score = request.node.stash[SCORE]
    return kept


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A machine's disk, with the shards that every machine has."""
    make_shards(tmp_path / "shards")
    return tmp_path


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Baseline]:
    """`baseline(*options, ranks=1)`: the same run, left alone; each is run once."""
    known: dict[tuple[object, ...], Baseline] = {}

    def alone(*options: str, ranks: int = 1) -> Baseline:
        key = (*options, ranks)
        if key not in known:
            known[key] = run_alone(tmp_path_factory.mktemp("alone"), *options, ranks=ranks)
        return known[key]

    return alone


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the scenarios that were not asked for."""
    wanted = {int(number) for number in os.environ.get(ONLY_VARIABLE, "").split(",") if number}
    markers = [(item, item.get_closest_marker("chaos")) for item in items]
    left_out = [item for item, marker in markers if wanted and marker and marker.args[0] not in wanted]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[SCORE] = Score()
    assert item.get_closest_marker("chaos"), f"{item.nodeid} belongs to no scenario"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Append how a test ended to the file that the report is made of."""
    report = yield
    path = os.environ.get(RESULTS_VARIABLE)
    marker = item.get_closest_marker("chaos")
    # The call tells how a test ended; where set-up or tear-down went wrong, they tell it, too.
    if path and marker and (report.when == "call" or not report.passed):
        reason = str(report.longrepr[2]) if report.skipped and isinstance(report.longrepr, tuple) else ""
        line = {"scenario": marker.args[0], "test": item.name, "outcome": report.outcome, "seconds": call.duration}
        line |= {"reason": reason, **item.stash.get(SCORE, Score()).to_json(report.failed)}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return report
