"""One page of a run, or of several beside one another: report.html, which needs no network.

    python scripts/report.py test                                     logs/test/report.html
    python scripts/report.py test other -o compared.html
    python scripts/report.py gs://bucket/Checkpoints/test -o test.html

RUN is a name in the folder of the logs, a log folder, a run in a bucket (its logs are copied there with its
checkpoints), or a bucket's folder of runs. train.py makes the page of its run at its end. Exit codes: 0 done, 2 there
is no such run or a setting is wrong, 4 a log can't be read or the page can't be written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain import log
from pretrain.config import CheckpointConfig, LogConfig
from pretrain.errors import EXIT_DONE, ConfigError, TrainerError
from pretrain.listings import size_text
from pretrain.log_sources import LogSource, open_sources
from pretrain.report_page import REPORT_FILE, write_report
from pretrain.run_logs import RunLogs

MAX_RUNS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(argv)
    try:
        with open_sources(options.runs, options.logs_dir) as sources:
            if len(sources) > MAX_RUNS:
                raise ConfigError(f"{len(sources)} runs are too many for one page", f"Name at most {MAX_RUNS} of them.")
            path = options.output or default_output(sources)
            runs = [source.refresh() for source in sources]
            for run in runs:
                complete(run, options.checkpoints_dir)
            size = write_report(runs, path, time.time())
    except TrainerError as error:
        print(log.mask(error.line()), file=sys.stderr)
        return error.exit_code
    if options.json:
        print(json.dumps({"name": "report", "path": str(path), "bytes": size, "runs": [run.name for run in runs]}))
    else:
        print(f"written: {path} ({size_text(size)}, {', '.join(run.name for run in runs)})")
    return EXIT_DONE


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a name, a log folder, or gs://…")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="HTML", help="the page (report.html in the log folder of a single run)"
    )
    parser.add_argument("--logs_dir", type=Path, default=Path(LogConfig().dir), metavar="FOLDER", help="of logs (logs)")
    parser.add_argument(
        "--checkpoints_dir",
        type=Path,
        default=Path(CheckpointConfig().dir),
        metavar="FOLDER",
        help="of local checkpoints, for the settings of runs whose logs lack them (checkpoints)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def default_output(sources: Sequence[LogSource]) -> Path:
    """Where the page goes that no place was named for. Raises ConfigError where there is no such place."""
    if len(sources) > 1 or sources[0].is_copy:
        what = "several runs have" if len(sources) > 1 else "a run in a bucket has"
        raise ConfigError(f"{what} no folder of their own here for the page", "Name the page: -o report.html")
    return sources[0].logs.folder / REPORT_FILE


def complete(run: RunLogs, checkpoints: Path) -> None:
    """Take the settings from the run's newest local checkpoint where an older version did not log them."""
    found = sorted((checkpoints / run.name).glob("checkpoint-*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not run.config_text and found:
        run.config_text = log.mask(found[-1].read_text(encoding="utf-8", errors="replace"))


if __name__ == "__main__":
    sys.exit(main())
