"""The micro batch that is chosen at start, and what a training says that is out of memory, as real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

from pretrain.errors import ConfigError
from tests.runs import PATIENCE_S, differing, final_state, losses, make_shards, plain_environment, tiny_config, train

OUT_OF_MEMORY = """
import sys, torch, train

def loop(run, stop):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

train.loop = loop
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_run_with_auto_is_the_run_with_the_number(tmp_path: Path):
    make_shards(tmp_path / "shards")
    words = ["--max-steps", "4", "--checkpoint.every_steps", "2"]
    auto = train(tmp_path, *words, "--run", "auto", "--batch.micro_size", "auto")
    typed = train(tmp_path, *words, "--run", "typed", "--batch.micro_size", "8")
    assert auto.code == typed.code == 0, auto.output + typed.output
    assert "batch.micro_size auto: 8 (the plan against the free memory of this host" in auto.output
    assert "8 = 8 × 1 accumulated × 1 ranks" in auto.output
    assert losses(tmp_path, "auto") == losses(tmp_path, "typed") and len(losses(tmp_path, "auto")) == 4
    assert not differing(final_state(tmp_path, "auto"), final_state(tmp_path, "typed"))
    (saved,) = (tmp_path / "checkpoints" / "auto").glob("checkpoint-epoch0-step4-*/config.yaml")
    assert yaml.safe_load(saved.read_text())["batch"] == {"global_size": 8, "micro_size": 8}

    # another machine, another number of ranks: the global batch is what counts
    again = ("--run", "auto", "--batch.micro_size", "auto", "--resume", "auto")
    more = train(tmp_path, "--max-steps", "6", *again, ranks=2)
    assert more.code == 0, more.output
    assert "8 = 4 × 1 accumulated × 2 ranks" in more.output and "resumed checkpoint-epoch0-step4-" in more.output
    assert list(losses(tmp_path, "auto")) == list(range(1, 7))


def test_a_training_out_of_memory_names_the_setting_with_its_number(tmp_path: Path):
    make_shards(tmp_path / "shards")
    done = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, "--config", str(tiny_config(tmp_path))],
        cwd=tmp_path,
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == ConfigError.exit_code, done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "config error: the GPU's memory is full: CUDA out of memory. Tried to allocate 2 GiB. "
        "Give --batch.micro_size 1 (it is 2; the global batch stays the same), or --model.loss_chunks 8, "
        "or --model.activation_checkpointing full."
    )
