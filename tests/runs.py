"""train.py as real processes on a model and shards small enough for a test.

    make_shards(tmp_path / "shards")
    with TrainingProcess(tmp_path, "--checkpoints", bucket_url, "--checkpoint.every_steps", "5") as training:
        training.until(lambda: commits(bucket_url))
        training.kill()
    again = train(tmp_path, "--checkpoints", bucket_url, "--resume", "auto")
    assert again.code == 0

A run lives in one folder: shards, cache, checkpoints and logs. `commits` and `store_of` look into a bucket with the
trainer's own client, so STORAGE_EMULATOR_HOST must be set (fixtures bucket_url, fault_proxy).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import psutil
from safetensors.numpy import load_file

from pretrain.config import StorageConfig
from pretrain.discovery import take_inventory
from pretrain.metrics import read_metrics
from pretrain.storage import ObjectStore, open_store
from pretrain.uploads import list_commits

ROOT = Path(__file__).resolve().parent.parent
RUN = "tiny"
VOCAB_SIZE, SEQ_LEN = 257, 32
PATIENCE_S = 240.0  # for a machine that is busy with something else; nothing here takes long by itself
MARK = "TRAINING_PROCESS"  # in the environment of every process of one start
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

TINY = f"""
run: {{name: {RUN}}}
model: {{size: custom, n_layer: 2, n_head: 2, d_model: 32, vocab_size: {VOCAB_SIZE}, seq_len: {SEQ_LEN}, dropout: 0.1}}
data: {{source: shards, shuffle_shards: 2}}
batch: {{global_size: 8, micro_size: 2}}
optim: {{lr: 0.003, warmup_steps: 4}}
train: {{max_steps: 12, precision: fp32, timeout_minutes: 2}}
engine: {{name: native}}
checkpoint: {{every_files: 0}}
log: {{tensorboard: false, version_check: false}}
"""

T = TypeVar("T")


def make_shards(folder: Path, n_shards: int = 6, tokens_each: int = 2000, seed: int = 0) -> Path:
    """Shards of tokens that a model can learn from: a walk of small steps through the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    walk = np.cumsum(np.random.default_rng(seed).integers(1, 4, n_shards * tokens_each)) % VOCAB_SIZE
    for index, tokens in enumerate(np.split(walk.astype(np.uint16), n_shards)):
        np.savez(folder / f"tokenized_cleaned_{index:03d}.npz", input_ids=tokens)
    return folder


def tiny_config(folder: Path) -> Path:
    """The YAML of the tiny run, written into its folder; options of the command line override it."""
    path = folder / f"{RUN}.yaml"
    path.write_text(TINY)
    return path


def plain_environment(**more: str) -> dict[str, str]:
    """This process's environment with one thread a rank and nothing of a launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def launch_command(ranks: int) -> list[str]:
    """What comes before train.py's own options: python, or our launcher with so many ranks."""
    launcher = ["-m", "pretrain.launch", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py")]


class StartedProcess:
    """A command that trains, in a folder; a context manager that leaves no process behind.

    Args:
        folder: working directory; what is printed goes to a file in it.
        words: the command.
        environment: instead of this process's.
        run: name of the run, for its metrics.
    """

    def __init__(
        self, folder: Path, words: list[str], environment: Mapping[str, str] | None = None, run: str = RUN
    ) -> None:
        self.folder = folder
        self.run = run
        number = len(list(folder.glob("output-*.txt")))
        self._output = folder / f"output-{number}.txt"
        self._mark = secrets.token_hex(8)
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                words,
                cwd=folder,
                env={**(environment or plain_environment()), MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl+C at the terminal that runs the tests is not meant for it
            )

    def __enter__(self) -> StartedProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()

    @property
    def output(self) -> str:
        """What all processes of the tree have printed so far, stdout and stderr in one."""
        return self._output.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl; 0 before the first."""
        records = metrics(self.folder, self.run)
        return int(records[-1]["step"]) if records else 0

    def until(self, is_true: Callable[[], T], what: str = "") -> T:
        """Wait until a condition holds; its value. Fails where the process ends before, or too much time passes."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            code = self.process.poll()  # asked first: what the process did last must count
            if value := is_true():
                return value
            if code is not None:
                raise AssertionError(f"ended with {code} before {what or 'the condition'}:\n{self.output}")
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {PATIENCE_S} s for {what or 'the condition'}:\n{self.output}")
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        """Wait until metrics.jsonl has this step."""
        self.until(lambda: self.step >= step, f"step {step}")

    def until_said(self, text: str) -> None:
        """Wait until the output holds `text`."""
        self.until(lambda: text in self.output, repr(text))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process that was started, and to none of its children."""
        self.process.send_signal(number)

    def until_all_gone(self) -> None:
        """Wait until no process started from here is left, its launcher's orphans included."""
        self.process.wait(PATIENCE_S)
        deadline = time.monotonic() + PATIENCE_S
        while left := self.survivors():
            if time.monotonic() > deadline:
                raise AssertionError(f"{left} are left after {PATIENCE_S} s:\n{self.output}")
            time.sleep(0.01)

    def is_stopped(self) -> bool:
        """Whether the process that was started stands still, as by a failpoint."""
        return self.process.poll() is None and psutil.Process(self.process.pid).status() == psutil.STATUS_STOPPED

    def freeze(self) -> None:
        """Stop every process of the tree where it is, the launcher first; `thaw` lets them go on."""
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def thaw(self) -> None:
        """The reverse of `freeze`."""
        for process in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def kill(self) -> None:
        """SIGKILL to every process of the tree at one point in its time; returns when all are gone."""
        self.freeze()
        processes = [*self._tree(), *self.survivors()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(processes, timeout=PATIENCE_S)

    def _tree(self) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def workers(self) -> list[psutil.Process]:
        """The ranks that a launcher has started so far."""
        found = []
        for process in self._tree()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if "RANK" in process.environ() and any(word.endswith("train.py") for word in process.cmdline()):
                    found.append(process)
        return found

    def survivors(self) -> list[psutil.Process]:
        """Processes of this start that still run, also where their launcher is gone: their environment tells."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                is_zombie = process.status() == psutil.STATUS_ZOMBIE
                if process.environ().get(MARK) == self._mark and not is_zombie:
                    found.append(process)
        return found

    def wait(self, patience_s: float = PATIENCE_S) -> Ended:
        """The exit code and everything printed, when it has ended by itself."""
        try:
            code = self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {patience_s} s:\n{self.output}") from None
        return Ended(code, self.output)


class TrainingProcess(StartedProcess):
    """One start of train.py.

    Args:
        folder: working directory; what is printed goes to a file in it.
        options: of train.py, after `--config` of the tiny run.
        ranks: more than 1 go through `python -m pretrain.launch`.
        command: another way to start train.py, instead of `ranks`.
        environment: instead of this process's.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        ranks: int = 1,
        command: list[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        words = [*(command or launch_command(ranks)), "--config", str(tiny_config(folder)), *options]
        super().__init__(folder, words, environment)


@dataclass(frozen=True)
class Ended:
    """How a start of train.py ended."""

    code: int
    output: str

    @property
    def errors(self) -> list[str]:
        """The lines that a user reads as the error."""
        return [line for line in self.output.splitlines() if " error: " in line or line.startswith("diverged:")]


def train(folder: Path, *options: str, **how: Any) -> Ended:
    """Start train.py and wait for its end; see TrainingProcess for the arguments."""
    with TrainingProcess(folder, *options, **how) as training:
        return training.wait()


# ---- what a run left behind ----


def metrics(folder: Path, run: str = RUN) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, each step once; none where there is no file yet."""
    path = folder / "logs" / run / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def losses(folder: Path, run: str = RUN) -> dict[int, tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) of every step."""
    return {record["step"]: (record["loss"], record["grad_norm"], record["lr"]) for record in metrics(folder, run)}


def final_state(folder: Path, run: str = RUN) -> dict[str, np.ndarray]:
    """Weights by name and moments by "exp_avg/name" and "exp_avg_sq/name" of the newest local checkpoint."""
    path = folder / "checkpoints" / run
    newest = max(take_inventory(path, None, run).local.values(), key=lambda manifest: manifest.sequence)
    state: dict[str, np.ndarray] = {}
    for name in newest.files:
        if name.endswith(".safetensors"):
            state |= load_file(path / str(newest.name) / name)
    return state


def differing(left: Mapping[str, np.ndarray], right: Mapping[str, np.ndarray]) -> list[str]:
    """Names that only one side has, or whose values are not the same to the last bit."""
    either = sorted(set(left) | set(right))
    return [name for name in either if name not in left or name not in right or _bits(left[name]) != _bits(right[name])]


def _bits(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, array.tobytes()


def store_of(url: str) -> ObjectStore:
    """The bucket that STORAGE_EMULATOR_HOST names, as the trainer sees it."""
    return _store_at(url, os.environ["STORAGE_EMULATOR_HOST"])


@lru_cache
def _store_at(url: str, _endpoint: str) -> ObjectStore:
    return open_store(url, StorageConfig())


def commits(url: str, run: str = RUN) -> list[int]:
    """Steps of the checkpoints committed in the bucket, in order."""
    found = list_commits(store_of(url), run)
    return sorted(name.step for name, commit in found.items() if commit.manifest)


def remove_local_checkpoints(folder: Path) -> None:
    """What the bucket has, too."""
    shutil.rmtree(folder / "checkpoints")


def become_a_new_machine(folder: Path) -> None:
    """What a new machine doesn't have."""
    remove_local_checkpoints(folder)
    shutil.rmtree(folder / "logs")
