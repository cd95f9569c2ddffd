"""When a run is started again and when not, on scripted commands and a clock of its own; and a real family of them."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pretrain import supervise
from pretrain.arguments import launched_ranks
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName, Manifest
from pretrain.errors import ConfigError
from pretrain.processes import _LIBC as LIBC
from pretrain.processes import PR_SET_CHILD_SUBREAPER, RESTARTED, LaunchedCommand
from pretrain.stopping import StopRequest
from pretrain.supervise import Policy, SupervisedRun, Supervisor

ROOT = Path(__file__).resolve().parents[2]
LASTS_S = 7.0
CRASHES = [1, -9, 137, 134, 143, -6, 4, 75, 99]
WAITS = "import time; time.sleep(60)"


class FakeCommand:
    """A command that ends by itself after LASTS_S, or when it is stopped, as scripted."""

    def __init__(self, world: World, code: int) -> None:
        self.world, self.code = world, code
        self.ends_at = world.now + LASTS_S
        self.stops = self.kills = 0

    def poll(self) -> int | None:
        return self.code if self.world.now >= self.ends_at or self.kills else None

    def stop(self) -> None:
        self.stops += 1
        if self.world.code_when_stopped is not None:
            self.code, self.ends_at = self.world.code_when_stopped, self.world.now + self.world.save_s
        else:
            self.ends_at = float("inf")

    def kill(self, patience_s: float = 0.0) -> None:
        self.kills += 1


class World:
    """Time, commits and signals, as a test scripts them."""

    def __init__(self, folder: Path) -> None:
        self.now = 1000.0
        self.folder = folder
        self.codes: list[int] = []
        self.commands: list[FakeCommand] = []
        self.pauses: list[tuple[float, float]] = []
        self.stop = StopRequest(clock=lambda: self.now)
        self.stop_at = float("inf")
        self.code_when_stopped: int | None = 75
        self.save_s = 5.0
        self.on_start: Callable[[int], None] = lambda _number: None

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        if self.now >= self.stop_at and not self.stop:
            self.stop.receive(signal.SIGTERM)

    def uniform(self, low: float, high: float) -> float:
        self.pauses.append((low, high))
        return high

    def start(self) -> FakeCommand:
        self.on_start(len(self.commands))
        self.commands.append(FakeCommand(self, self.codes.pop(0) if self.codes else 1))
        return self.commands[-1]

    def commit(self, step: int, sequence: int | None = None) -> None:
        name = CheckpointName(0, step, 0)
        path = self.folder / "checkpoints" / str(name) / MANIFEST_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Manifest(name, "a", step if sequence is None else sequence, {}).to_bytes())

    def supervise(self, *codes: int, resumes: bool = True, **policy: float) -> int:
        self.codes = list(codes)
        run = SupervisedRun(self.folder / "checkpoints", self.folder / "logs", resumes)
        how = {"clock": lambda: self.now, "sleep": self.sleep, "uniform": self.uniform}
        return Supervisor(Policy(**policy), run, self.start, self.stop, **how).supervise()

    def restarts(self) -> list[dict[str, object]]:
        path = self.folder / "logs" / "restarts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(autouse=True)
def _started_for_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESTARTED, "")  # so that it is taken back
    monkeypatch.delenv(RESTARTED)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.mark.parametrize("code", [0, 2, 3, 5, 6])
def test_what_is_done_or_cannot_be_mended_by_a_restart_is_not_restarted(world, code, capsys):
    assert world.supervise(code) == code
    assert len(world.commands) == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize("code", CRASHES)
def test_everything_else_is_restarted_until_it_ends_well(world, code, capsys):
    assert world.supervise(code, code, 0) == 0
    assert len(world.commands) == 3
    lines = capsys.readouterr().err.splitlines()
    shown = code if code >= 0 else 128 - code
    assert len(lines) == 2 and all(f"(exit code {shown}) after 7 s" in line for line in lines)
    assert "restart 1 of 3" in lines[0] and "restart 2 of 3" in lines[1]


def test_a_command_that_is_started_again_knows_it(world):
    known = []
    world.on_start = lambda _: known.append(os.environ.get(RESTARTED))
    assert world.supervise(1, 137, 0) == 0
    assert known == [None, "1", "2"]


def test_each_attempt_is_cleared_away_before_the_next(world):
    alive = []
    world.on_start = lambda _: alive.append(sum(not command.kills for command in world.commands))
    world.supervise(1, 137, 0)
    assert alive == [0, 0, 0]


def test_it_gives_up_after_so_many_restarts_without_progress(world, capsys):
    world.commit(5)
    assert world.supervise(137, 137, 4, max_restarts=2) == 4
    assert len(world.commands) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert "given up after 2 restarts without a new checkpoint" in last and "storage" in last and "exit code 4" in last


def test_a_new_checkpoint_begins_the_count_anew(world, capsys):
    world.on_start = lambda number: world.commit(number) if number in (2, 4) else None
    assert world.supervise(*[1] * 20, max_restarts=2) == 1
    assert len(world.commands) == 7  # the second restart of a count commits, twice; then two in vain
    assert [record["restart"] for record in world.restarts()] == [1, 2, 1, 2, 1, 2]
    assert "from checkpoint-epoch0-step4-files0" in capsys.readouterr().err.splitlines()[-2]


def test_going_back_to_an_earlier_step_is_progress_where_it_is_committed_later(world):
    """After a roll-back the newest checkpoint has a lower step and a higher sequence."""
    world.commit(10)
    world.on_start = lambda number: world.commit(8, sequence=11) if number == 1 else None
    world.supervise(*[1] * 20, max_restarts=1)
    assert [record["step"] for record in world.restarts()] == [10, 8]


def test_a_damaged_manifest_is_no_progress(world):
    world.commit(1)
    for path in world.folder.glob("checkpoints/*/manifest.json"):
        path.write_text("{")
    world.supervise(*[1] * 9, max_restarts=2)
    assert len(world.commands) == 3


def test_pauses_double_up_to_a_limit_and_are_taken(world):
    started = []
    world.on_start = lambda _: started.append(world.now)
    world.supervise(*[1] * 9, max_restarts=5, backoff_s=10.0, max_backoff_s=60.0)
    assert world.pauses == [(0.0, 10.0), (0.0, 20.0), (0.0, 40.0), (0.0, 60.0), (0.0, 60.0)]
    gaps = [later - earlier - LASTS_S for earlier, later in itertools.pairwise(started)]
    assert gaps == pytest.approx([10, 20, 40, 60, 60], abs=2 * supervise.POLL_S)


def test_without_restarts_the_first_code_is_the_last(world, capsys):
    assert world.supervise(-9, max_restarts=0) == 137
    assert len(world.commands) == 1 and "no restart is allowed" in capsys.readouterr().err


def test_a_command_that_does_not_resume_is_not_started_twice(world, capsys):
    assert world.supervise(1, resumes=False) == 1
    assert len(world.commands) == 1 and "--resume auto" in capsys.readouterr().err


def test_restarts_are_recorded(world):
    world.commit(40)
    world.supervise(137, 0)
    (record,) = world.restarts()
    assert record.items() >= {"exit_code": 137, "restart": 1, "step": 40}.items()
    assert set(record) == {"time", "host", "exit_code", "reason", "restart", "step"}


def test_a_log_that_cannot_be_written_does_not_end_the_supervision(world, capsys):
    (world.folder / "logs").write_text("a file where the folder should be")
    assert world.supervise(1, 0) == 0
    assert "restarts.jsonl can't be written" in capsys.readouterr().err


# ---- asked to stop ----


@pytest.mark.parametrize(
    ("ended", "code"), [(75, 75), (0, 0), (4, 4), (-15, 75), (143, 75), (1, 1)], ids=lambda value: str(value)
)
def test_a_request_is_passed_on_once_and_the_end_is_final(world, ended, code):
    world.stop_at, world.code_when_stopped = 1003.0, ended
    assert world.supervise() == code
    assert [command.stops for command in world.commands] == [1] and not world.commands[0].kills


def test_without_a_grace_a_save_takes_what_it_takes(world):
    world.stop_at, world.save_s = 1003.0, 3600.0
    assert world.supervise() == 75
    assert world.now > 4600 and not world.commands[0].kills


@pytest.mark.parametrize(("resumes", "code"), [(True, 75), (False, 137)])
def test_after_the_grace_what_still_runs_is_killed(world, resumes, code, capsys):
    world.commit(9)
    world.stop_at, world.code_when_stopped = 1003.0, None
    assert world.supervise(resumes=resumes, grace_s=20.0) == code
    assert world.commands[0].kills == 1 and world.now == pytest.approx(1023, abs=2 * supervise.POLL_S)
    (line,) = capsys.readouterr().err.splitlines()
    assert "not ended 20 s after SIGTERM" in line and "checkpoint-epoch0-step9-files0" in line


def test_a_save_within_the_grace_is_left_alone(world):
    world.stop_at, world.save_s = 1003.0, 19.0
    assert world.supervise(grace_s=20.0) == 75
    assert not world.commands[0].kills


def test_a_request_during_the_pause_starts_nothing(world):
    world.stop_at = 1000 + LASTS_S + 4
    assert world.supervise(1, backoff_s=1000.0) == 75
    assert len(world.commands) == 1 and world.now == pytest.approx(world.stop_at, abs=2 * supervise.POLL_S)


# ---- what it knows of the run ----


def found(*words: str) -> SupervisedRun:
    return supervise._find_run(supervise._parser().parse_args([]), list(words))


def test_the_run_is_read_from_the_options_of_train_py():
    launcher = ["python", "-m", "pretrain.launch", "--nproc_per_node=4", "--nnodes", "2"]
    options = ["--config", "test", "--data", "x", "--run", "mine", "--checkpoint.dir", "c", "--log.dir", "l"]
    options += ["--batch.global_size", "8", "--batch.micro_size", "1"]
    run = found(*launcher, "/somewhere/train.py", *options, "--resume", "auto")
    assert run == SupervisedRun(Path("c/mine"), Path("l/mine"), resumes=True)
    assert not found(*launcher, "train.py", *options).resumes


def test_what_train_py_refuses_is_refused_with_the_ranks_that_the_launcher_starts():
    options = ["train.py", "--data", "x", "--batch.global_size", "8", "--batch.micro_size", "2"]
    assert found("pretrain.launch", "--nproc-per-node", "4", *options)
    with pytest.raises(ConfigError, match="micro_size"):
        found("pretrain.launch", "--nproc-per-node", "4", "--nnodes=2", *options)
    with pytest.raises(ConfigError, match="nproc_per_node=gpu"):
        found("pretrain.launch", "--nproc_per_node=gpu", *options)


def test_an_elastic_run_must_divide_its_batch_among_any_number_of_its_nodes():
    options = ["train.py", "--data", "x", "--batch.global_size", "8", "--batch.micro_size", "2"]
    assert found("pretrain.launch", "--nproc_per_node=2", "--nnodes=1:2", *options)
    with pytest.raises(ConfigError, match="× 6 ranks"):
        found("pretrain.launch", "--nproc_per_node=2", "--nnodes=2:4", *options)


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ([], [1]),
        (["--nproc-per-node", "4"], [4]),
        (["--nnodes=2", "--nproc_per_node=4"], [8]),
        (["--nnodes=1:3"], [1, 2, 3]),
    ],
)
def test_the_launchers_options_tell_how_many_ranks_there_may_be(words, sizes):
    assert launched_ranks(words) == sizes


@pytest.mark.parametrize("nnodes", ["0", "2:1", "x", "1:x", ":2"])
def test_a_number_of_nodes_that_can_not_be_is_refused(nnodes):
    with pytest.raises(ConfigError, match=f"--nnodes={nnodes}"):
        launched_ranks([f"--nnodes={nnodes}"])


def test_another_command_needs_to_be_told_where_its_checkpoints_are(capsys):
    assert supervise.main(["--", sys.executable, "-c", ""]) == 2
    assert "--run-checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--max-restarts", "3"], ["--max-restarts", "x", "--", "a"], ["--grace-s", "-1", "--", "a"], ["--"]]
)
def test_a_wrong_command_line_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        supervise.main(argv)
    assert ended.value.code == 2 and "error: " in capsys.readouterr().err


# ---- a real family of processes ----


@pytest.fixture
def launch() -> Iterator[Callable[..., LaunchedCommand]]:
    commands = []

    def start(*words: str) -> LaunchedCommand:
        commands.append(LaunchedCommand(words))
        return commands[-1]

    yield start
    for command in commands:
        command.kill()
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def wait_for(condition: Callable[[], bool], patience_s: float = 120.0) -> None:
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def read_pid(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def test_kill_ends_stopped_children_in_their_own_session_and_orphans_and_nobody_else(launch, tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        script = (
            "import os, signal, subprocess, sys\n"
            f"child = subprocess.Popen([sys.executable, '-c', {WAITS!r}], start_new_session=True)\n"
            "child.send_signal(signal.SIGSTOP)\n"
            "print(child.pid, file=open(sys.argv[1], 'w'))\n"
            "sys.exit(3)"
        )
        command = launch(sys.executable, "-c", script, str(tmp_path / "pid"))
        orphan = read_pid(tmp_path / "pid")
        wait_for(lambda: command.poll() is not None)
        assert is_running(orphan)
        command.kill()
        assert not is_running(orphan)
        assert command.poll() == 3
        assert other.poll() is None
        other.communicate(b"\n", timeout=120)


def test_a_command_that_cannot_be_started_is_a_config_error(launch):
    with pytest.raises(ConfigError, match="no-such-program can't be started"):
        launch("no-such-program")


def start_supervised(folder: Path, script: str, *options: str) -> subprocess.Popen[str]:
    where = ["--run-checkpoints", str(folder / "checkpoints"), "--run-logs", str(folder / "logs")]
    words = [sys.executable, "-m", "pretrain.supervise", *where, *options, "--", sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*words, str(folder)], env=environment, stderr=subprocess.PIPE, text=True, cwd=folder)


SAYS_ITS_PID = "import os, signal, sys, time\nopen(sys.argv[1] + '/pid', 'w').write(f'{os.getpid()}\\n')\n"


def test_the_command_ends_with_a_supervisor_that_is_killed(tmp_path):
    with start_supervised(tmp_path, SAYS_ITS_PID + WAITS) as supervisor:
        pid = read_pid(tmp_path / "pid")
        supervisor.kill()
        wait_for(lambda: not is_running(pid))


def test_a_second_signal_ends_everything_at_once(tmp_path):
    ignores = SAYS_ITS_PID.replace("open", "signal.signal(15, lambda *_: open(sys.argv[1] + '/asked', 'w'))\nopen")
    with start_supervised(tmp_path, ignores + "while True: time.sleep(60)") as supervisor:
        pid = read_pid(tmp_path / "pid")
        supervisor.terminate()
        wait_for((tmp_path / "asked").exists)
        time.sleep(1.1)  # within a second it would be the same request
        supervisor.terminate()
        assert supervisor.wait(120) == 143
        wait_for(lambda: not is_running(pid))
