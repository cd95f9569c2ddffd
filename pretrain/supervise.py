"""Keep a run going: run its launch command, and start it again until it ends well.

    python -m pretrain.supervise -- python -m pretrain.launch --nproc_per_node=8 train.py ... --resume auto

How the command ended decides:

    0                         done
    2, 3, 5, 6                the settings, the data, the checkpoints or the loss are wrong: no restart mends that
    75, after a signal here   the run was asked to stop, and saved: 75
    anything else             a crash, a kill, a hang that the watchdog ended, a bucket away (4), a rank or the launcher
                              stopped by somebody else (75): start again, after a pause

The pause is exponential with full jitter. --max-restarts counts restarts *without progress*, and progress is what
survives: a later checkpoint committed in this machine's folder. Steps that were taken and lost again don't count, or a
run that dies a little later each time would go on for ever. So the interval of the checkpoints must be shorter than
the time between two crashes; a run without any checkpoint yet has --max-restarts starts in all to reach its first.

SIGTERM, Ctrl+C or a closed terminal are passed on once, as SIGTERM: the ranks save at the next step boundary and the
exit code is 75. With --grace-s, what still runs then is killed, which tears nothing: a commit is one rename or one
object. A second signal kills everything at once. Should the supervisor itself be killed, the kernel ends the launcher
and its ranks with it (Linux).

With several nodes each runs its own supervisor around its own launcher, and none knows of the others. When one node
fails, the ranks of the others lose their peer and fail too, so that all start again, and node 0's new launcher is where
they meet. Its old one may still answer for a while: a node that came back sooner fails once more, at the cost of a
restart, unless it waits (pretrain/rendezvous.py does). A node that doesn't come back within the time that nodes wait
for each other ends the others with exit code 2, and one that was stopped by a signal is waited for just as long: stop
all nodes, or none. With --nnodes=1:2 the others go on without it.

Each restart is a line in logs/{run}/restarts.jsonl: time, host, exit_code, reason, restart (1: the first without
progress), and step, of the checkpoint that it goes on from as far as this machine knows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain import log
from pretrain.arguments import launched_ranks, parse
from pretrain.checkpoint_manifest import MANIFEST_FILE, Manifest
from pretrain.errors import (
    EXIT_DONE,
    EXIT_STOPPED,
    CheckpointError,
    ConfigError,
    DivergenceError,
    ShardError,
    StorageError,
    TrainerError,
)
from pretrain.ledger import RESTARTS_FILE
from pretrain.processes import RESTARTED, Command, LaunchedCommand
from pretrain.stopping import StopRequest, stop_request

POLL_S = 0.2
KILLED = 128 + signal.SIGKILL
MENDED_BY_HAND = (ConfigError, ShardError, CheckpointError, DivergenceError)
FINAL = {EXIT_DONE, *(kind.exit_code for kind in MENDED_BY_HAND)}
REASONS = {
    1: "it crashed",
    StorageError.exit_code: "storage could not be reached or written",
    EXIT_STOPPED: "it was stopped, and not through this supervisor",
    128 + signal.SIGABRT: "it was ended by SIGABRT, as a hang is (see stacks-rank*.txt beside the log)",
    KILLED: "it was ended by SIGKILL, as by a lack of memory",
}


@dataclass(frozen=True)
class Policy:
    """How patient the supervisor is.

    Args:
        max_restarts: restarts in a row without a later checkpoint.
        grace_s: seconds from a request to stop to SIGKILL; 0: as long as it takes.
        backoff_s: the longest pause before the first restart; it doubles with each without progress.
        max_backoff_s: the longest pause of all.
    """

    max_restarts: int = 3
    grace_s: float = 0.0
    backoff_s: float = 10.0
    max_backoff_s: float = 300.0

    def pause_s(self, restart: int, uniform: Callable[[float, float], float]) -> float:
        """Seconds before a restart, 1 the first: full jitter, as nodes that failed together shall not knock together
        (https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/)."""
        return uniform(0.0, min(self.max_backoff_s, self.backoff_s * 2 ** min(restart - 1, 30)))


@dataclass(frozen=True)
class SupervisedRun:
    """The run, as far as a supervisor must know it.

    Args:
        checkpoints: the run's folder on this machine.
        logs: the run's folder.
        resumes: whether the command goes on from the newest checkpoint; otherwise it must not be started twice.
    """

    checkpoints: Path
    logs: Path
    resumes: bool

    def newest_commit(self) -> Manifest | None:
        """The newest local checkpoint; what is damaged or pruned meanwhile is passed over, as the resume does."""
        found = []
        for path in self.checkpoints.glob(f"checkpoint-*/{MANIFEST_FILE}"):
            with contextlib.suppress(OSError, CheckpointError):
                found.append(Manifest.from_bytes(path.read_bytes(), str(path)))
        return max(found, key=lambda manifest: manifest.sequence, default=None)


class Supervisor:
    """Starts a command, and starts it again, as its policy says.

    Args:
        start: starts the command.
        stop: set by the signal that asks this process to stop.
        clock, sleep, uniform: time and chance, for tests.
    """

    def __init__(
        self,
        policy: Policy,
        run: SupervisedRun,
        start: Callable[[], Command],
        stop: StopRequest,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._policy = policy
        self._run = run
        self._start = start
        self._stop = stop
        self._clock = clock
        self._sleep = sleep
        self._uniform = uniform
        self._command: Command | None = None

    def supervise(self) -> int:
        """Run the command until it ends well, or for good; the exit code, 128 + n for signal n."""
        restarts, sequence = 0, self._newest_sequence()
        while not self._stop:
            started = self._clock()
            self._command = self._start()
            code = self._wait(self._command)
            if self._stop:
                return EXIT_STOPPED if code == 128 + signal.SIGTERM else code  # it came before it could be handled
            if code in FINAL:
                return code
            if (now := self._newest_sequence()) > sequence:
                restarts, sequence = 0, now
            if why := self._why_not_again(restarts):
                say(f"{reason_of(code)} (exit code {code}), {why}")
                return code
            restarts += 1
            self._command.kill()  # ranks that outlived their launcher
            pause_s = self._policy.pause_s(restarts, self._uniform)
            self._report(code, restarts, self._clock() - started, pause_s)
            self._pause(pause_s)
            os.environ[RESTARTED] = str(restarts)
        return EXIT_STOPPED  # nothing runs, nothing is lost

    def end_at_once(self) -> None:
        """Kill what runs, when a second signal comes."""
        if self._command:
            self._command.kill(patience_s=0)

    def _wait(self, command: Command) -> int:
        """The exit code of the command when it has ended; a request to stop is passed on once."""
        deadline: float | None = None
        while (code := command.poll()) is None:
            if self._stop and deadline is None:
                command.stop()
                deadline = self._clock() + (self._policy.grace_s or float("inf"))
            if deadline is not None and self._clock() >= deadline:
                return self._cut_off(command)
            self._sleep(POLL_S)
        return code if code >= 0 else 128 - code

    def _cut_off(self, command: Command) -> int:
        command.kill()
        last = self._run.newest_commit()
        where = f"{last.name} is the last checkpoint on this machine" if last else "there is no checkpoint yet"
        say(f"not ended {self._policy.grace_s:g} s after {self._stop.signal_name}: killed, {where}")
        return EXIT_STOPPED if self._run.resumes else KILLED

    def _why_not_again(self, restarts: int) -> str:
        """Why there is no further restart, and the mend; '' where there is one."""
        if not self._policy.max_restarts:
            return "and no restart is allowed"
        if not self._run.resumes:
            return "not started again: only --resume auto goes on from where it ended"
        if restarts < self._policy.max_restarts:
            return ""
        times = f"{restarts} restart{'s' * (restarts > 1)}"
        return f"given up after {times} without a new checkpoint. See what it says above, mend that and start it again"

    def _report(self, code: int, restart: int, lasted_s: float, pause_s: float) -> None:
        last = self._run.newest_commit()
        origin = f"from {last.name}" if last else "from the bucket's newest checkpoint or, without one, from step 0"
        times = f"restart {restart} of {self._policy.max_restarts} in {pause_s:.0f} s"
        say(f"{reason_of(code)} (exit code {code}) after {lasted_s:.0f} s: {times}, {origin}")
        record = {
            "time": time.time(),
            "host": socket.gethostname(),
            "exit_code": code,
            "reason": reason_of(code),
            "restart": restart,
            "step": last.name.step if last else 0,
        }
        try:
            self._run.logs.mkdir(parents=True, exist_ok=True)
            with (self._run.logs / RESTARTS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk may be what it is restarted for
            say(f"{self._run.logs / RESTARTS_FILE} can't be written: {error.strerror or error}")

    def _pause(self, seconds: float) -> None:
        end = self._clock() + seconds
        while not self._stop and (left := end - self._clock()) > 0:
            self._sleep(min(left, POLL_S))

    def _newest_sequence(self) -> int:
        last = self._run.newest_commit()
        return last.sequence if last else 0


def reason_of(code: int) -> str:
    """What an exit code tells, in words."""
    if code in REASONS:
        return REASONS[code]
    with contextlib.suppress(ValueError):
        return f"it was ended by {signal.Signals(code - 128).name}"
    return "it failed"


def say(text: str) -> None:
    """One line to stderr, without secrets."""
    print(f"supervise: {log.mask(text)}", file=sys.stderr, flush=True)


# ---- the command line ----


def main(argv: list[str] | None = None) -> int:
    """Supervise the command after `--`; returns its exit code, see above."""
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    parser = _parser()
    options, command = parser.parse_args(words[:split]), words[split + 1 :]
    if not command:
        parser.error("give the launch command after --")
    policy = Policy(options.max_restarts, options.grace_s, options.backoff_s, options.max_backoff_s)
    try:
        run = _find_run(options, command)
        with stop_request(lambda: supervisor.end_at_once()) as stop:
            supervisor = Supervisor(policy, run, lambda: LaunchedCommand(command), stop)
            return supervisor.supervise()
    except TrainerError as error:
        print(error.line(), file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.supervise",
        usage="%(prog)s [options] -- COMMAND ...",
        description="Run a launch command, and start it again until it ends well.",
        epilog="Example: %(prog)s --grace-s 20 -- python -m pretrain.launch --nproc_per_node=8 train.py --resume auto",
    )
    default = Policy()
    parser.add_argument(
        "--max-restarts",
        type=_whole,
        default=default.max_restarts,
        metavar="N",
        help="restarts in a row without a new checkpoint (%(default)s); 0: none",
    )
    seconds = {
        "--grace-s": (default.grace_s, "from a request to stop to SIGKILL (%(default)g); 0: as long as it takes"),
        "--backoff-s": (default.backoff_s, "longest pause before the first restart (%(default)g); then it doubles"),
        "--max-backoff-s": (default.max_backoff_s, "longest pause of all (%(default)g)"),
    }
    for name, (value, text) in seconds.items():
        parser.add_argument(name, type=_seconds, default=value, metavar="SECONDS", help=text)
    group = parser.add_argument_group("for a command without train.py, whose own options tell these")
    group.add_argument("--run-checkpoints", metavar="FOLDER", type=Path, help="where the run's checkpoints are")
    group.add_argument("--run-logs", metavar="FOLDER", type=Path, help="where restarts.jsonl goes")
    return parser


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _find_run(options: argparse.Namespace, command: Sequence[str]) -> SupervisedRun:
    """The run that the command trains, from train.py's own options or from ours.

    Raises:
        ConfigError: neither tells, or train.py would refuse its options.
    """
    if options.run_checkpoints and options.run_logs:
        return SupervisedRun(options.run_checkpoints, options.run_logs, resumes=True)
    script = next((index for index, word in enumerate(command) if Path(word).name == "train.py"), None)
    if script is None:
        mend = "Give --run-checkpoints and --run-logs, or a command with train.py."
        raise ConfigError("the command does not tell where its checkpoints are", mend)
    sizes = launched_ranks(command[:script])
    for ranks in sizes[:-1]:  # an elastic run must be able to go on with any number of its nodes
        parse(list(command[script + 1 :]), ranks)
    config = parse(list(command[script + 1 :]), sizes[-1]).config
    name, checkpoint = config.run.name, config.checkpoint
    return SupervisedRun(Path(checkpoint.dir) / name, Path(config.log.dir) / name, checkpoint.resume == "auto")


if __name__ == "__main__":
    sys.exit(main())
