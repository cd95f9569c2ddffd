"""inspect_data as a user runs it: on a folder, on a bucket, on a run that rolled back, on damaged shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.batches import Batches
from pretrain.config import DataConfig, StorageConfig
from pretrain.data_stats import DataStats
from pretrain.npz import read_npz
from pretrain.shards import fetch_shards
from pretrain.storage import open_store
from pretrain.tokenizers import load_tokenizer
from scripts import inspect_data, make_demo_data
from tests.runs import PATIENCE_S, ROOT, RUN, SEQ_LEN, VOCAB_SIZE, make_shards, plain_environment, tiny_config, train

GLOBAL_SIZE, SEED = 8, 1234
VOCAB = 1000
SHAPE = {"size": "custom", "n_layer": 1, "n_head": 1, "d_model": 16, "seq_len": 64}
SMALL = [word for key, value in SHAPE.items() for word in (f"--model.{key}", str(value))]
DEMO = [*SMALL, "--model.vocab_size", str(VOCAB), "--batch.global_size", "4", "--batch.micro_size", "4"]
DEMO += ["--data.shuffle_shards", "1"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real text in five shards, one of them of padded rows."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = ["--output_dir", str(folder), "--shards", "5", "--tokens", "50000", "--vocab_size", str(VOCAB)]
    assert make_demo_data.main(arguments) == 0
    return folder / "shards"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The object of --json."""
    assert inspect_data.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def batches_of(source: Path | str, folder: Path, vocab_size: int, seq_len: int, global_size: int) -> Batches:
    data = DataConfig(cache_dir=str(folder / "cache"), shuffle_shards=2 if vocab_size == VOCAB_SIZE else 1)
    shards = fetch_shards(open_store(str(source), StorageConfig()), data, vocab_size=vocab_size).shards
    how = {"seq_len": seq_len, "global_size": global_size, "shuffle_shards": data.shuffle_shards}
    return Batches(shards, seed=SEED, **how)


def ids_of(found: Any) -> list[list[int]]:
    """Token ids of every window of a step that was shown without a tokenizer."""
    texts = [[doc["text"] for part in window["parts"] for doc in part["documents"]] for window in found["windows"]]
    return [[int(word) for text in each for word in text.split()] for each in texts]


# ---- a step ----


def test_a_step_is_shown_as_the_text_it_was_trained_on(demo, tmp_path, capsys):
    found = inspect(capsys, "--step", 7, "--data", demo, *DEMO)
    batches = batches_of(demo, tmp_path, VOCAB, 64, 4)
    taken, _ = batches.take(batches.position_after(24), 0, 1)
    tokenizer = load_tokenizer(demo / "tokenizer.json")
    for window, tokens in zip(found["windows"], taken, strict=True):
        documents = [document for part in window["parts"] for document in part["documents"]]
        pieces = [document["text"] for document in documents]
        lengths = [document["end"] - document["begin"] for document in documents]
        bounds = np.cumsum([0, *lengths])
        assert bounds[-1] == len(tokens) == 65
        decoded = [tokenizer.decode(tokens[a:b].tolist(), skip_special_tokens=False) for a, b in pairwise(bounds)]
        assert pieces == decoded
        for document in documents:  # nothing but the last token of a document ends one
            assert "<|endoftext|>" not in document["text"] or document["end"] == document["length"]
    assert "settings alone" in found["found_by"]
    assert sum(row["tokens"] for row in found["shards"]) == 4 * 65


def test_tables_and_a_whole_window(demo, capsys):
    assert inspect_data.main(["--step", "2", "--data", str(demo), *DEMO]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("step 2: 4 windows of 64 tokens from epoch 0")
    assert "begins with" in lines[-5] and [line.split()[0] for line in lines[-4:]] == list("0123")
    assert inspect_data.main(["--step", "2", "--window", "3", "--data", str(demo), *DEMO]) == 0
    shown = capsys.readouterr().out
    assert ", document " in shown and len(shown.splitlines()) > 3
    assert inspect_data.main(["--step", "2", "--window", "4", "--data", str(demo), *DEMO]) == 2
    assert "They are 0 to 3" in capsys.readouterr().err


def test_a_run_that_rolled_back_is_followed_past_the_data_it_left_behind(tmp_path, capsys):
    make_shards(tmp_path / "shards", n_shards=8)
    poisoned = plain_environment(PRETRAIN_FAILPOINT="loss.poison:33-44:poison")  # four a step: steps 9 to 11
    options = ("--lr", "0.01", "--checkpoint.every_steps", "4", "--train.max_skipped", "2", "--max-steps", "14")
    ended = train(tmp_path, *options, environment=poisoned)
    assert ended.code == 0 and "Back to checkpoint-epoch0-step4" in ended.output, ended.output
    batches = batches_of(tmp_path / "shards", tmp_path, VOCAB_SIZE, SEQ_LEN, GLOBAL_SIZE)
    for step, steps_before in ((3, 2), (5, 11), (14, 20)):
        found = inspect(capsys, "--step", step, "--run", RUN)
        taken, _ = batches.take(batches.position_after(steps_before * GLOBAL_SIZE), 0, 1)
        assert ids_of(found) == taken.tolist()
        assert found["found_by"].startswith(f"checkpoint {RUN}/checkpoint-epoch")
    alone = inspect(capsys, "--step", 5, "--config", tiny_config(tmp_path))
    assert ids_of(alone) != ids_of(inspect(capsys, "--step", 5, "--run", RUN))

    np.savez(tmp_path / "shards" / "zzz.npz", input_ids=np.arange(50))
    assert inspect_data.main(["--step", "5", "--run", RUN]) == 5
    assert "trained in another data order: fingerprint" in capsys.readouterr().err
    assert inspect_data.main(["--step", "5", "--run", "nobody"]) == 5
    assert "there is no checkpoint latest of run nobody" in capsys.readouterr().err


def test_a_bucket_is_looked_into(demo, bucket_url, tmp_path, capsys):
    store = open_store(bucket_url, StorageConfig())
    for path in demo.iterdir():
        store.upload(path, path.name)
    step = ("--step", 3, *DEMO)
    there, here = inspect(capsys, *step, "--data", bucket_url), inspect(capsys, *step, "--data", demo)
    assert there["windows"] == here["windows"]
    stats = [inspect(capsys, "--stats", "--data", each) for each in (bucket_url, demo)]
    assert [{**each, "source": ""} for each in stats] == [{**stats[0], "source": ""}] * 2


# ---- statistics ----


def test_statistics_add_up(demo, capsys):
    found = inspect(capsys, "--stats", "--data", demo, "--top", 3)
    arrays = [read_npz(path) for path in sorted(demo.glob("*.npz"))]
    tokens = np.concatenate([tokens for tokens, _ in arrays])
    lengths = np.concatenate([lengths for _, lengths in arrays])
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    assert (found["tokens"], found["documents"]) == (len(tokens), len(lengths))
    assert found["unigram_entropy_nats"] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-5)
    assert [count for _, count, _ in found["top_tokens"]] == sorted(counts.tolist())[:-4:-1]
    assert found["document_lengths"]["max"] == lengths.max() and found["document_lengths"]["min"] == lengths.min()
    assert found["document_lengths"]["p50"] == np.quantile(lengths, 0.5, method="inverted_cdf")
    assert sum(documents for _, documents in found["length_histogram"]) == len(lengths)
    slots = sum(np.load(path)["input_ids"].size for path in demo.glob("*.npz"))
    assert found["padding_share"] == pytest.approx(1 - len(tokens) / slots, abs=1e-6) and found["padding_share"] > 0
    assert found["passed"] and found["checks"][0]["goal"] == 5
    tokenizer = load_tokenizer(demo / "tokenizer.json")
    assert found["top_tokens"][0][2] == repr(tokenizer.decode([found["top_tokens"][0][0]], skip_special_tokens=False))


def test_bad_shards_are_named_and_the_others_counted(tmp_path, capsys):
    folder = make_shards(tmp_path / "shards", n_shards=3)
    (folder / "tokenized_cleaned_001.npz").write_bytes(b"torn")
    np.savez(folder / "wide.npz", input_ids=np.array([VOCAB_SIZE]))
    arguments = ["--stats", "--json", "--data", str(folder), *SMALL, "--model.vocab_size", str(VOCAB_SIZE)]
    assert inspect_data.main(arguments) == 3
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert (found["tokens"], found["checks"][0]["value"], found["passed"]) == (4000, 2, False)
    assert [bool(shard["problem"]) for shard in found["shards"]] == [False, True, False, True]
    assert (
        "tokenized_cleaned_001.npz: found not a readable .npz" in printed.err
        and "wide.npz: found token id" in printed.err
    )
    assert inspect_data.main([*arguments, "--data.on_bad_shard", "skip"]) == 0
    capsys.readouterr()
    step = ["--step", "1", "--config", str(tiny_config(tmp_path))]
    assert inspect_data.main(step) == 3
    assert "tokenized_cleaned_001.npz" in capsys.readouterr().err
    assert inspect_data.main([*step, "--data.on_bad_shard", "skip"]) == 0
    assert "left out, as data.on_bad_shard says: tokenized_cleaned_001.npz" in capsys.readouterr().out


def test_a_shard_that_the_manifest_names_is_missed_or_differs(demo, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in demo.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    names = sorted(path.name for path in folder.glob("*.npz"))
    (folder / names[0]).unlink()
    np.savez(folder / names[1], input_ids=np.arange(9))
    assert inspect_data.main(["--stats", "--data", str(folder)]) == 3
    errors = capsys.readouterr().err.splitlines()
    assert f"{names[0]}: not there" in errors[1] and f"{names[1]}: found 9 tokens" in errors[0]


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    make_shards(tmp_path / "one", n_shards=1, tokens_each=50_000)
    path = next((tmp_path / "one").iterdir())
    stats = DataStats()
    for number in range(50):
        stats.add(f"{number}", path, pad_token_id=-1, vocab_size=VOCAB_SIZE)
    assert stats.n_tokens == 50 * 50_000 and len(stats.token_counts) == VOCAB_SIZE
    assert stats.length_counts == {50_000: 50}


def test_the_picture_and_the_help(demo, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "inspect_data.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    how = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": PATIENCE_S}
    run = subprocess.run([*command, "--stats", "--data", str(demo), "--save", "x.png"], **how)
    assert run.returncode == 0 and "written: x.png" in run.stdout, run.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert "Exit codes" in subprocess.run([*command, "--help"], **how).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "0", "--data", "shards"], "there is no step 0"),
        (["--step", "1", "--dta", "shards"], "unknown option --dta: did you mean --data?"),
        (["--stats", "--data", "quux://x"], "quux:// is not supported"),
    ],
)
def test_wrong_settings_are_told(arguments, message, tmp_path, capsys):
    make_shards(tmp_path / "shards")
    assert inspect_data.main([*arguments, "--config", str(tiny_config(tmp_path))]) == 2
    assert message in capsys.readouterr().err
    for wrong in (["--step", "1", "--stats"], [], ["--stats", "--window", "1"], ["--step", "1", "--save", "x.png"]):
        with pytest.raises(SystemExit):
            inspect_data.main(wrong)
