"""Watch runs while they train: how far, how fast, what the devices do, what was saved, and what went wrong.

    python scripts/monitor_training.py                          every run in logs/, again and again
    python scripts/monitor_training.py test --refresh 2
    python scripts/monitor_training.py gs://bucket/Checkpoints/test --once --json
    python scripts/monitor_training.py test --logs-only         training.log as it grows

RUN is a name in the folder of the logs, a log folder, a run in a bucket (its logs are copied there with its
checkpoints), or a bucket's folder of runs. Nothing is changed. Ctrl+C ends it. Exit codes: 0 done, 2 there is no such
run or a setting is wrong, 4 the logs can't be read.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pretrain import log
from pretrain.config import LogConfig
from pretrain.errors import EXIT_DONE, ConfigError, StorageError, TrainerError
from pretrain.log_sources import LogSource, open_sources
from pretrain.monitor import Status, assess
from pretrain.monitor_views import draw, one_line, print_plain
from pretrain.run_logs import LOG_TAIL_BYTES, TRAINING_LOG, Follower, parse_log, printable

REFRESH_S, BUCKET_REFRESH_S = 2.0, 30.0
ONCE_LINES = 40
LEVEL_STYLES = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = parse(argv)
    console = Console(highlight=False, emoji=False, markup=False)
    log.get().addHandler(logging.NullHandler())  # the warning of each retry would tear the display
    try:
        check(options)
        with open_sources(options.runs, options.logs_dir) as sources:
            for source in sources:
                source.refresh()  # what can't be read at first is an error; later it is a line of the display
            show = show_lines if options.logs_only else show_once if options.once else watch
            show(sources, options, console)
    except TrainerError as error:
        print(log.mask(error.line()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_DONE
    return EXIT_DONE


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse ends the program with 2 where it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="*", help="a name, a log folder, or gs://… (every run in logs/)")
    looks = f"seconds between two looks ({REFRESH_S:g}; {BUCKET_REFRESH_S:g} in a bucket)"
    parser.add_argument("--refresh", type=float, metavar="N", help=looks)
    parser.add_argument("--once", action="store_true", help="show how it stands now, and end")
    parser.add_argument("--logs-only", action="store_true", help="show the lines of training.log as they come")
    parser.add_argument("--json", action="store_true", help="with --once: print one JSON object")
    parser.add_argument(
        "--logs_dir", type=Path, default=Path(LogConfig().dir), metavar="FOLDER", help="folder of the logs (logs)"
    )
    return parser.parse_args(argv)


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError where options don't go together."""
    if options.json and not options.once:
        raise ConfigError("--json shows one moment", "Give --once too.")
    if options.json and options.logs_only:
        raise ConfigError("--json and --logs-only exclude each other")
    if options.refresh is not None and not 0.1 <= options.refresh <= 86400:
        raise ConfigError(f"--refresh is {options.refresh:g}, expected 0.1 to 86400 seconds")


def refresh(sources: Sequence[LogSource]) -> str:
    """Read what is new of every run; what went wrong, or ''. A bucket that is away now may be back at the next look."""
    problem = ""
    for source in sources:
        try:
            source.refresh()
        except StorageError as error:
            problem = log.mask(error.line())
    return problem


def statuses_of(sources: Sequence[LogSource]) -> list[Status]:
    """How the runs stand, as far as they were read."""
    now = time.time()
    return [assess(source.logs, now, source.changed_s if source.is_copy else None) for source in sources]


def show_once(sources: Sequence[LogSource], options: argparse.Namespace, console: Console) -> None:
    """How all runs stand now."""
    statuses = statuses_of(sources)
    if options.json:
        print(json.dumps({"name": "monitor_training", "runs": [status.to_json() for status in statuses]}, indent=1))
    elif console.is_terminal:
        console.print(draw(statuses, console.width))
    else:
        for status in statuses:
            print_plain(status, console)


def watch(sources: Sequence[LogSource], options: argparse.Namespace, console: Console) -> None:
    """Panels that are drawn again and again; where there is no terminal, a line a run each time."""
    if not console.is_terminal:
        for problem in looks(sources, options):
            for line in [problem] * bool(problem) + [one_line(status) for status in statuses_of(sources)]:
                console.print(line, soft_wrap=True)
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for problem in looks(sources, options):
            panels = draw(statuses_of(sources), console.width)
            above = [Text(f"not refreshed: {problem}", style="bold red")] if problem else []
            live.update(Group(*above, panels), refresh=True)


def looks(sources: Sequence[LogSource], options: argparse.Namespace) -> Iterator[str]:
    """For ever: what went wrong with the last look, or ''; the first was taken before."""
    pause_s = options.refresh or (BUCKET_REFRESH_S if any(source.is_copy for source in sources) else REFRESH_S)
    problem = ""
    while True:
        yield problem
        time.sleep(pause_s)
        problem = refresh(sources)


def show_lines(sources: Sequence[LogSource], options: argparse.Namespace, console: Console) -> None:
    """The last lines of each training.log, and then, without --once, those that come."""
    followers = [Follower(source.logs.folder / TRAINING_LOG, LOG_TAIL_BYTES) for source in sources]
    shown = [""] * len(sources)
    for at, problem in enumerate(looks(sources, options)):
        if problem:
            console.print(Text(f"not refreshed: {problem}", style="bold red"), soft_wrap=True)
        for number, follower in enumerate(followers):
            lines, is_new = follower.lines()
            if is_new and shown[number] in lines:  # a bucket's copy is another file each time
                lines = lines[len(lines) - lines[::-1].index(shown[number]) :]
            for line in lines if at else lines[-ONCE_LINES:]:
                shown[number] = line
                console.print(styled(line, sources[number].logs.name if len(sources) > 1 else ""), soft_wrap=True)
        if options.once:
            return


def styled(line: str, run: str) -> Text:
    """A line of training.log in the colour of its level, behind the name of its run."""
    entries = parse_log([line])
    line = printable(line.expandtabs())
    return Text(f"{run}  {line}" if run else line, style=LEVEL_STYLES.get(entries[0].level, "") if entries else "")


if __name__ == "__main__":
    sys.exit(main())
