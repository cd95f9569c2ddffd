"""train.py on raw text: prepared on the way, killed in the middle of it, and resumed on another machine."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from pretrain.files import crc32c_of_file
from pretrain.tokenizers import train_bpe
from tests.runs import TrainingProcess, losses, train

VOCAB_SIZE = 400


@pytest.fixture
def options(tmp_path: Path) -> tuple[str, ...]:
    """Files shaped as C4's, of the sources of Python's standard library, and a tokenizer of them."""
    raw = tmp_path / "raw"
    raw.mkdir()
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:120]
    texts = [path.read_text(encoding="utf-8") for path in modules]
    for number in range(6):
        with gzip.open(raw / f"c4-train.{number:05d}-of-01024.json.gz", "wt", encoding="utf-8") as file:
            for text in texts[number::6]:
                file.write(json.dumps({"text": text, "url": "https://x.org"}) + "\n")
    train_bpe((text[:2000] for text in texts), VOCAB_SIZE).save(str(tmp_path / "tokenizer.json"))
    source = ("--data", str(raw / "c4-train.0000[0-4]-of-01024.json.gz"))
    validation = ("--data.val_source", str(raw / "c4-train.00005-of-01024.json.gz"))
    how = ("--data.tokenizer", str(tmp_path / "tokenizer.json"), "--data.tokenizer_num_workers", "2")
    return (*source, *validation, *how, "--model.vocab_size", str(VOCAB_SIZE), "--train.eval_sequences", "8")


def shards_of(folder: Path) -> dict[str, str]:
    """Checksums of the prepared shards."""
    return {path.name: crc32c_of_file(path) for path in sorted((folder / "cache").glob("prepared-*/shards/*"))}


def test_a_run_on_raw_text_killed_while_it_prepares_and_while_it_trains_is_the_same_run(tmp_path, options):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    steps = ("--max-steps", "20", "--checkpoint.every_steps", "5", "--no-background-upload")
    alone = train(whole, *options, *steps)
    assert alone.code == 0, alone.output
    assert "20 documents, none skipped" in alone.output and "100 documents, none skipped" in alone.output
    with TrainingProcess(killed, *options, *steps) as training:
        training.until(lambda: list((killed / "cache").rglob("*.tokens")), "tokens of the first unit")
        training.kill()
    assert not losses(killed)
    with TrainingProcess(killed, *options, *steps, "--resume", "auto") as training:
        training.until_step(8)
        training.kill()
    assert shards_of(killed) == shards_of(whole)
    shutil.rmtree(killed / "cache")  # another machine, that has only the text
    again = train(killed, *options, *steps, "--resume", "auto")
    assert again.code == 0, again.output
    assert re.search(r"resumed checkpoint-\S+: step 5", again.output)
    assert losses(killed) == losses(whole)


def test_on_two_ranks_one_prepares_and_what_it_meets_ends_both_with_one_line(tmp_path, options):
    run = tmp_path / "run"
    run.mkdir()
    good = train(run, *options, "--max-steps", "4", ranks=2)
    assert good.code == 0, good.output
    assert good.output.count("100 documents, none skipped") == 1
    path = tmp_path / "raw" / "c4-train.00003-of-01024.json.gz"
    path.write_bytes(path.read_bytes()[:-500])
    bad = train(run, *options, "--max-steps", "4", "--data.cache_dir", "other", "--run", "bad", ranks=2)
    assert bad.code == 3, bad.output
    assert len(bad.errors) == 1 and "c4-train.00003" in bad.errors[0], bad.output
