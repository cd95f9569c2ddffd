"""scripts/evaluate.py on what train.py wrote: the same loss as training's own, from shards, buckets and text."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint_manifest import Manifest
from pretrain.tokenizers import encode, load_tokenizer, save_tokenizer, train_bpe
from scripts import evaluate
from tests.helpers_training import upload_checkpoint
from tests.runs import PATIENCE_S, ROOT, RUN, SEQ_LEN, VOCAB_SIZE, metrics, plain_environment, store_of, train

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # grüße 🙂\n" for i in range(120)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run on text, its shards, validation shards and raw text."""
    folder: Path = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe(TEXTS, VOCAB_SIZE)
    for name, texts in (("shards", TEXTS[:100]), ("val", TEXTS[100:])):
        (folder / name).mkdir()
        save_tokenizer(tokenizer, folder / name / "tokenizer.json")
        np.savez(folder / name / "a.npz", input_ids=np.concatenate(list(encode(tokenizer, texts))))
    (folder / "val.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS[100:]))
    options = ("--data.val_source", "val", "--train.eval_sequences", "10000", "--train.max_steps", "6")
    ended = train(folder, *options)
    assert ended.code == 0, ended.output
    return folder


@pytest.fixture(autouse=True)
def _in_the_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(place)
    yield
    package = logging.getLogger("pretrain")  # the script sets it up for the process that it usually is
    package.handlers, package.propagate = [], True


def told(*options: str, capsys: pytest.CaptureFixture[str]) -> dict:
    """The object that --json prints; it is all of stdout."""
    code = evaluate.main([*options, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return json.loads(printed.out)


def n_tokens() -> int:
    return sum(len(ids) for ids in encode(load_tokenizer(Path("val/tokenizer.json")), TEXTS[100:]))


def test_the_loss_on_shards_is_that_of_trainings_own_validation(place):
    whole_windows = (n_tokens() - 1) // SEQ_LEN * SEQ_LEN
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), f"checkpoints/{RUN}", "--data", "val", "--json"]
    command += ["--max_tokens", str(whole_windows)]  # a training window is never cut
    ran = subprocess.run(
        command, cwd=place, env=plain_environment(), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    (row,) = found["evaluations"]
    assert row["loss"] == pytest.approx(metrics(place)[-1]["val_loss"], rel=1e-5)
    assert (found["name"], found["step"], found["stride"], row["tokens"]) == ("evaluate", 6, SEQ_LEN, whole_windows)
    assert f"context {SEQ_LEN}, stride {SEQ_LEN}" in ran.stderr and "bits per byte" in ran.stderr


def test_shards_in_a_bucket_and_raw_text_side_by_side(place, bucket_url, capsys):
    for path in (place / "val").iterdir():
        store_of(bucket_url).upload(path, f"val/{path.name}")
    (checkpoint,) = (place / "checkpoints" / RUN).glob("checkpoint-*")
    manifest = Manifest.from_bytes((checkpoint / "manifest.json").read_bytes(), "test")
    upload_checkpoint(store_of(bucket_url), RUN, checkpoint.parent, manifest)
    words = ("--data", f"{bucket_url}/val", "--text", "val.jsonl", "--text_key", "body", "--cache_dir", "cache2")
    shards, text = told(f"{bucket_url}/{RUN}", *words, capsys=capsys)["evaluations"]  # fetched, and no word of it
    assert text["tokens"] == n_tokens() == shards["tokens"] + 1  # text has an end of text before it
    assert text["bytes"] == len("".join(TEXTS[100:]).encode()) == shards["bytes"] + 1
    assert text["loss"] == pytest.approx(shards["loss"], rel=0.02)
    assert 0 < text["bits_per_byte"] < 8


def test_ctrl_c_shows_no_traceback(monkeypatch, capsys):
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "score_of", interrupted)
    assert evaluate.main([f"checkpoints/{RUN}", "--data", "val"]) == 130
    assert capsys.readouterr().err.endswith("stopped by Ctrl+C\n")


def test_a_table_for_people(capsys):
    assert evaluate.main([f"checkpoints/{RUN}", "--text", "val.jsonl", "--text_key", "body", "--stride", "8"]) == 0
    printed = capsys.readouterr().out
    assert "step 6" in printed and "stride 8" in printed and "perplexity" in printed
    assert f"{n_tokens():,}" in printed


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ([], 2, "nothing to evaluate on"),
        (["--data", "val", "--stride", "33"], 2, r"--stride 33 must be in \[1, 32\]"),
        (["--data", "val", "--batch_size", "0"], 2, "--batch_size 0 must be at least 1"),
        (["--data", "val", "--limit", "3", "--num_fewshot", "1"], 2, "--limit and --num_fewshot mean nothing"),
        (["--data", "val", "--text_key", "body"], 2, "--text_key mean nothing without --text"),
        (["--text", "val.jsonl", "--max_files", "1", "--pattern", "a*"], 2, "--pattern and --max_files mean nothing"),
        (["--data", "val", "--tasks", "x", "--task_path", "none"], 2, "--task_path none is no folder"),
        (["--data", "none"], 3, "no shards under"),
        (["--data", "other"], 3, r"vocab_size 999 .*model\.vocab_size 257\. Evaluate on shards of"),
        (["--data", "single"], 3, "found 1 tokens, expected at least 2"),
        (["--text", "empty.txt"], 3, "empty.txt: found no text"),
        (["--text", "latin1.txt"], 3, "latin1.txt: not UTF-8"),
        (["--text", "val.jsonl"], 3, "byte 0: 'text' is not among the keys .*--text_key"),
        (["--text", "empty.txt", "--tokenizer", "none.json"], 3, "can't read tokenizer"),
    ],
)
def test_bad_input_is_one_line_with_its_code(place, options, code, says, capsys):
    make_bad_input(place)
    assert evaluate.main([f"checkpoints/{RUN}", *options]) == code
    assert_one_line(capsys, says)


def make_bad_input(place: Path) -> None:
    for name in ("other", "single"):
        (place / name).mkdir(exist_ok=True)
        np.savez(place / name / "a.npz", input_ids=np.array([5], dtype=np.uint16))
    manifest = {"tokenizer": "x", "vocab_size": 999, "eot_id": 0, "shards": []}
    (place / "other" / "manifest.json").write_text(json.dumps(manifest))
    (place / "empty.txt").write_text("")
    (place / "latin1.txt").write_bytes("grüße".encode("latin-1"))


def assert_one_line(capsys: pytest.CaptureFixture[str], says: str) -> None:
    lines = [line for line in capsys.readouterr().err.splitlines() if " error: " in line]
    assert len(lines) == 1 and re.search(says, lines[0]), lines


def test_what_is_no_checkpoint_and_what_has_no_tokenizer(place, capsys):
    assert evaluate.main(["val", "--data", "val"]) == 5
    assert_one_line(capsys, "val is no checkpoint")
    bare = place / "bare"
    bare.mkdir()
    (bare / "shards").mkdir()
    np.savez(bare / "shards" / "a.npz", input_ids=np.arange(600, dtype=np.uint16) % VOCAB_SIZE)
    ended = train(bare, "--train.max_steps", "1")
    assert ended.code == 0, ended.output
    assert evaluate.main([f"bare/checkpoints/{RUN}", "--text", "val.jsonl"]) == 2
    assert_one_line(capsys, "has no tokenizer.json, which --text needs")
    assert evaluate.main([f"bare/checkpoints/{RUN}", "--data", "bare/shards"]) == 0
    assert "no bits per byte" in capsys.readouterr().out
    words = ("--text", "val.jsonl", "--text_key", "body", "--tokenizer", "val/tokenizer.json")
    (row,) = told(f"bare/checkpoints/{RUN}", *words, capsys=capsys)["evaluations"]
    assert row["bits_per_byte"] > 0


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval-harness is installed")
def test_tasks_without_the_harness_say_how_to_install_it(capsys):
    assert evaluate.main([f"checkpoints/{RUN}", "--tasks", "hellaswag"]) == 2
    assert_one_line(capsys, r"lm-eval-harness, which is not installed. Install it: pip install .*requirements-eval.txt")


TASK = """
task: which_number
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {data}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: choices
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval-harness is an extra that the tests' environment doesn't have: requirements-eval.txt",
)
def test_a_local_task_runs_on_the_export(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "datasets"))
    tasks = place / "tasks"
    tasks.mkdir()
    questions = [
        {"query": f"def f_{i}(x):\n    return x", "choices": [f" + {i}", " 世界 ∑ 世界 ∑"], "label": 0}
        for i in range(9)
    ]
    (tasks / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tasks / "task.yaml").write_text(TASK.format(data=tasks / "questions.jsonl"))
    words = ("--tasks", "which_number", "--task_path", str(tasks), "--limit", "6")
    found = told(f"checkpoints/{RUN}", *words, capsys=capsys)
    assert {(row["task"], row["metric"]) for row in found["tasks"]} == {
        ("which_number", "acc"),
        ("which_number", "acc_norm"),
    }
    assert next(row["value"] for row in found["tasks"] if row["metric"] == "acc") == 1.0  # fewer bytes are likelier
    assert evaluate.main([f"checkpoints/{RUN}", "--tasks", "which_numbr", "--task_path", str(tasks)]) == 2
    assert_one_line(capsys, "no task 'which_numbr'; near are .*which_number")
