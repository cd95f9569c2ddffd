"""test_train.sh, the first command of the README: short on every run of the suite, and whole among the slow tests."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.runs import ROOT, StartedProcess, metrics, plain_environment

VARIABLES = ("GPUS", "RUN", "DATA", "VAL_DATA", "VOCAB_SIZE", "CHECKPOINTS", "DEMO_DIR", "STORAGE_EMULATOR_HOST")
TINY = "--model.n_layer 1 --model.n_head 2 --model.d_model 32 --model.seq_len 64 --train.eval_sequences 8"
SHORT = [*TINY.split(), "--engine", "native", "--checkpoint.every_files", "0", "--checkpoint.every_steps", "5"]
WHOLE_PATIENCE_S = 1200.0


@dataclass(frozen=True)
class Demo:
    """The demo, everything it leaves kept in one folder instead of the repository's."""

    folder: Path
    name: str

    def start(self, *options: str, threads: int = 1) -> StartedProcess:
        environment = {name: value for name, value in plain_environment().items() if name not in VARIABLES}
        environment |= {"DEMO_DIR": str(self.folder / "demo"), "RUN": self.name, "CUDA_VISIBLE_DEVICES": ""}
        environment["OMP_NUM_THREADS"] = str(threads)
        places = {"--checkpoint.dir": "checkpoints", "--log.dir": "logs", "--data.cache_dir": "cache"}
        where = [word for option, place in places.items() for word in (option, str(self.folder / place))]
        return StartedProcess(
            self.folder, ["bash", str(ROOT / "test_train.sh"), *where, *options], environment, self.name
        )

    @property
    def summary(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "logs" / self.name / "summary.json").read_text()))


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    return Demo(tmp_path, f"demo-{os.getpid()}")


def steps(demo: Demo) -> list[int]:
    return [record["step"] for record in metrics(demo.folder, demo.name)]


def test_the_demo_trains_from_a_bucket_into_a_bucket_and_goes_on_when_told_to(demo):
    with demo.start(*SHORT, "--max-steps", "12") as training:
        first = training.wait()
        training.until_all_gone()  # the bucket's process, too
    assert first.code == 0, first.output
    told = demo.summary
    counts = {"steps": 12, "checkpoints_committed": 3, "checkpoints_verified": 3, "uploads_failed": 0}
    assert {key: told[key] for key in counts} == counts
    assert 0 < told["val_loss"] and 4 < told["unigram_entropy"] < math.log(8192)
    assert told["tokens"] == 12 * 8 * 64 and told["tokens_per_second"] > 0 and 0 < told["mfu"] < 1
    for line in ("checkpoints committed  3", "unigram entropy", "tokens/s", "MFU", "--resume auto", "tensorboard"):
        assert line in first.output
    assert "gs://demo/Checkpoints" in told["checkpoints"]

    with demo.start(*SHORT, "--max-steps", "100000", "--checkpoint.every_steps", "0", "--resume", "auto") as training:
        training.until_step(16)
        training.signal(signal.SIGTERM)  # to the script alone: it passes it on, and its bucket outlives the last upload
        second = training.wait()
        training.until_all_gone()
    assert second.code == 75, second.output
    assert "resumed checkpoint-epoch0-step12-" in second.output and "nothing to do" in second.output
    told_again = demo.summary
    last = told_again["steps"]
    assert steps(demo) == list(range(1, last + 1)) and last >= 16
    assert (told_again["finished"], told_again["steps_of_this_process"]) == (False, last - 12)
    assert (told_again["checkpoints_committed"], told_again["uploads_failed"]) == (1, 0)
    assert told_again["first_loss"] == told["first_loss"]


@pytest.mark.slow
@pytest.mark.timeout(WHOLE_PATIENCE_S)
def test_the_whole_demo_learns_the_corpus(demo):
    with demo.start(threads=os.cpu_count() or 1) as training:
        done = training.wait(WHOLE_PATIENCE_S)
    assert done.code == 0, done.output
    told = demo.summary
    assert told["files_processed"] == 25 and told["engine"] == "deepspeed"
    assert told["checkpoints_committed"] >= 5 and told["uploads_failed"] == 0
    assert told["checkpoints_verified"] == 3  # --checkpoint.keep
    assert told["first_loss"] == pytest.approx(math.log(8192), abs=0.3)
    assert told["last_loss"] < told["first_loss"] - 3
    assert told["val_loss"] < told["unigram_entropy"] - 0.5
    assert 0 < told["mfu"] < 1 and told["tokens_per_second"] > 0
