from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import train
from pretrain.config import CheckpointConfig, Config


def test_ctrl_c_before_the_first_step_is_a_stop(monkeypatch, capsys):
    def interrupted(argv, world_size):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "parse", interrupted)
    assert train.main([]) == 75
    assert "nothing is lost" in capsys.readouterr().err


def test_every_wrong_option_is_told_at_once_with_exit_code_2(capsys):
    assert train.main(["--config", "test", "--max-stepps", "3", "--batch.micro_size", "x"]) == 2
    err = capsys.readouterr().err
    assert "2 problems" in err and "--max-steps" in err and "batch.micro_size" in err and "Traceback" not in err


def test_print_config_prints_and_trains_nothing(monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda invocation: pytest.fail("it trained"))
    assert train.main(["--config", "test", "--print_config", "--lr", "0.5"]) == 0
    assert "lr: 0.5" in capsys.readouterr().out


def test_divides():
    assert [number for number in range(1, 13) if train.divides(4, number)] == [4, 8, 12]
    assert not any(train.divides(0, number) for number in range(5))


@pytest.mark.parametrize(
    ("every_files", "every_steps", "files", "expected"),
    [
        (5, 0, [0, 3, 5, 5, 9, 12, 12], [3, 6]),  # step 3 ends file 5; step 6 passes file 10
        (5, 0, [0, 11, 11], [2]),  # two stretches in one step are one checkpoint
        (1, 0, [0, 0, 1, 2], [3, 4]),
        (0, 2, [0, 9, 9, 9, 9], [2, 4]),
        (5, 3, [0, 5, 5, 5], [2, 3]),
        (0, 0, [0, 5, 10], []),
    ],
)
def test_a_checkpoint_is_due_by_files_or_by_steps(every_files, every_steps, files, expected):
    config = Config(checkpoint=CheckpointConfig(every_files=every_files, every_steps=every_steps))
    due, before = [], 0
    for step, now in enumerate(files, 1):
        run = SimpleNamespace(config=config, progress=SimpleNamespace(step=step, files=now))
        if train.is_due(run, before):
            due.append(step)
        before = now
    assert due == expected


class Alone:
    """Ranks of which the others contribute what is told."""

    def __init__(self, others=()):
        self.others = list(others)
        self.world_size = 1 + len(self.others)

    def mean(self, value):
        return (value + (self.others.pop(0) if self.others else 0)) / self.world_size


@pytest.mark.parametrize("sequences", [1, 4, 7])
def test_the_validation_loss_is_the_mean_over_sequences(sequences):
    tokens = np.arange(sequences * 3).reshape(sequences, 3)
    validated = []
    run = SimpleNamespace(
        config=Config(),
        corpus=SimpleNamespace(validation=tokens),
        engine=SimpleNamespace(evaluate=lambda part: float(part.double().mean()), forward_is_collective=False),
        ranks=Alone(),
        history=SimpleNamespace(validated=lambda step, loss: validated.append((step, loss))),
        progress=SimpleNamespace(step=9),
        sample=lambda: None,
    )
    train.evaluate(run)
    assert run.val_loss == pytest.approx(tokens.mean())
    assert validated == [(9, run.val_loss)]


def test_a_rank_without_validation_sequences_takes_nothing_from_the_mean():
    def evaluate(part):
        pytest.fail("a mean over nothing is not a number")

    run = SimpleNamespace(
        config=Config(),
        corpus=SimpleNamespace(validation=np.empty((0, 9), dtype=np.int64)),
        engine=SimpleNamespace(evaluate=evaluate, forward_is_collective=False),
        ranks=Alone(others=[6.0, 2.0]),  # another rank's total and count
        history=SimpleNamespace(validated=lambda step, loss: None),
        progress=SimpleNamespace(step=9),
        sample=lambda: None,
    )
    train.evaluate(run)
    assert run.val_loss == 3.0
