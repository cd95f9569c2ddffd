"""A run, or several beside one another, as one page that needs no network: report.html.

    write_report([logs], Path("logs/test/report.html"), time.time())

The page's parts are in pretrain/page; its charts are drawn by charts.js out of JSON that is inside it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pretrain import log
from pretrain.files import new_file
from pretrain.monitor import assess
from pretrain.report_series import run_series
from pretrain.report_tables import overview, tables
from pretrain.run_logs import RunLogs
from pretrain.sinks import Sink

REPORT_FILE = "report.html"
PARTS = Path(__file__).resolve().parent / "page"

logger = log.get(__name__)


def page(runs: Sequence[RunLogs], now: float) -> str:
    """The report of some runs.

    Args:
        runs: refreshed; at least one.
        now: seconds since 1970.
    """
    statuses = [assess(run, now) for run in runs]
    names = " · ".join(run.name for run in runs)
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    return Template(_part("report.html")).substitute(
        title=escape(f"Run {names}" if len(runs) == 1 else f"Runs {names}"),
        subtitle=escape(", ".join(dict.fromkeys(run.where for run in runs))),
        overview=overview(runs, statuses),
        tables=tables(runs, statuses),
        footer=escape(f"Made {made} from the runs' logs; losses over restarts are joined by step."),
        style=_part("report.css"),
        script=f"{_part('charts.js')}\n{_part('report.js')}",
        data=embedded({"runs": [run_series(run) for run in runs]}),
    )


def embedded(tree: Any) -> str:
    """JSON that can stand inside a script element, whatever its strings hold."""
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False)  # ASCII: U+2028 is escaped already
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_report(runs: Sequence[RunLogs], path: Path, now: float) -> int:
    """Write the report of some runs, whole or not at all; its size in bytes.

    Raises:
        StorageError: it can't be written there, or a log can't be read.
    """
    text = page(runs, now).encode()
    with new_file(path) as file:
        file.write(text)
    return len(text)


class ReportSink(Sink):
    """Draws the page of a run when it ends, however it ends; what goes wrong there is a warning and no more.

    Args:
        folder: logs/{run}, where the page goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def close(self) -> None:
        try:
            run = RunLogs(self._folder.name, self._folder)
            run.refresh()
            write_report([run], self._folder / REPORT_FILE, time.time())
        except Exception as error:  # noqa: BLE001 - a page must not end what took days
            logger.warning("%s was not made: %s", self._folder / REPORT_FILE, " ".join(str(error).split()))


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")
