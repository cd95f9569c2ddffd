from __future__ import annotations

import json
import os
import signal
import time

import pytest

from pretrain import doctor
from pretrain.doctor import Examiner, Finding, Question
from pretrain.errors import ConfigError, ShardError, StorageError
from pretrain.kernels import Masking
from scripts import doctor as script

PATIENCE_S = 240.0  # for a machine that is busy with something else


def says(word: str) -> Finding:
    return doctor.ok("word", word)


def raises_what_is_known() -> Finding:
    raise StorageError("the bucket is gone", "Make it.")


def raises_what_nobody_expected() -> Finding:
    raise ZeroDivisionError("division by zero")


def dies() -> Finding:
    os.write(2, b"a library's last words\n")
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError


def hangs() -> Finding:
    time.sleep(60)
    raise AssertionError


def test_one_check_that_dies_or_hangs_costs_its_own_line_and_no_other():
    patient = {"timeout_s": PATIENCE_S}  # each of them may begin with a process that imports torch
    with Examiner() as examiner:
        assert examiner.ask(Question("word", says, ("first",), **patient))[0].found == "first"
        (dead,) = examiner.ask(Question("dead", dies, kind=StorageError, **patient))
        assert (dead.name, dead.status, dead.exit_code) == ("dead", "fail", 4)
        assert "SIGSEGV" in dead.found and "a library's last words" in dead.mend
        (hung,) = examiner.ask(Question("hung", hangs, kind=ShardError, timeout_s=0.2))
        assert (hung.status, hung.exit_code) == ("fail", 3) and "no answer within 0 s" in hung.found
        assert hung.seconds >= 0.2
        assert examiner.ask(Question("word", says, ("last",), **patient))[0].found == "last"
        assert examiner._process is not None
        process = examiner._process
    assert not process.is_alive()


def test_errors_of_a_check_are_lines_with_their_mend_and_their_code():
    (known,) = doctor.answer(Question("bucket", raises_what_is_known))
    assert known == Finding("bucket", "fail", "the bucket is gone", "Make it.", 4)
    (unknown,) = doctor.answer(Question("sum", raises_what_nobody_expected))
    assert (unknown.status, unknown.found, unknown.exit_code) == ("fail", "ZeroDivisionError: division by zero", 2)
    assert "raises_what_nobody_expected" in unknown.trace


def test_the_exit_code_is_that_of_what_no_restart_mends():
    data, storage = doctor.fail("a", ShardError("x")), doctor.fail("b", StorageError("y"))
    harmless = [doctor.ok("c", ""), doctor.warn("d", "", ""), doctor.skip("e", "")]
    assert doctor.exit_code(harmless) == 0
    assert doctor.exit_code([*harmless, storage]) == 4
    assert doctor.exit_code([storage, data]) == 3
    assert doctor.exit_code([storage, data, doctor.fail("f", ConfigError("z"))]) == 2


def test_no_secret_is_shown(capsys):
    finding = doctor.warn("w", "https://x/?X-Goog-Signature=abcdef0123456789", "WANDB_API_KEY=0123456789abcdef")
    text = json.dumps(finding.to_json())
    script.show(finding, script.Console(markup=False))
    for shown in (text, capsys.readouterr().out):
        assert "abcdef" not in shown and "***" in shown


def test_without_a_word_of_data_the_machine_alone_is_looked_at():
    assert script.read_words([], 1).config.data.source == ""
    assert script.read_words(["--data", "x"], 1).config.data.source == "x"
    assert script.read_words(["--config", "test"], 1).config.data.source == "demo/shards"
    assert script.read_words(["--config=production"], 8).config.data.source == ""
    with pytest.raises(ConfigError, match="max_files -1"):
        script.read_words(["--data.max_files", "-1"], 1)


def test_each_question_has_a_name_of_its_own_and_only_chooses_among_them(capsys):
    questions = script.questions_for(script.read_words(["--force"], 2), 0, 2, 1)
    names = [question.name for question in questions]
    assert len(set(names)) == len(names)
    assert [question.name for question in script.chosen(questions, "clock,python")] == ["python", "clock"]
    assert script.main(["--only", "pyton"]) == 2
    assert "there is no check 'pyton'. There are python, packages" in capsys.readouterr().err
    assert script.main(["--lr", "-1", "--only", "python"]) == 2
    assert "optim.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "masking"),
    [
        ([], None),
        (["--engine", "ddp", "--precision", "fp8"], None),
        (["--data.document_mask", "true"], Masking(0.1, False)),
        (["--data.document_mask", "true", "--train.compile", "true"], Masking(0.1, True)),
        (["--engine", "ddp", "--data.document_mask", "true", "--precision", "fp8"], Masking(0.1, True)),
    ],
)
def test_kernels_and_memory_are_looked_at_as_documents_and_compilation_want_them(words, masking):
    invocation = script.read_words(["--model.dropout", "0.1", *words], 2)
    asked = {question.name: question.arguments for question in script.questions_for(invocation, 0, 2, 1)}
    assert asked["attention"][3] == masking
    assert asked["host_memory"][0].document_mask == asked["gpu_memory"][0].document_mask == (masking is not None)
    assert asked["compile"] == ("--train.compile" in words or "fp8" in words,)


def test_the_disk_is_looked_at_for_the_run_and_its_nodes_and_each_source_has_its_time():
    parts = '[{source: "a", weight: 0.5, name: "a"}, {source: "b", weight: 0.5, name: "b"}]'
    words = ["--run", "mine", "--data.sources", parts, "--max-steps", "9", "--batch.global_size", "24"]
    invocation = script.read_words(words, 6)
    asked = {question.name: question for question in script.questions_for(invocation, 0, 2, 3)}
    _, run, size, nodes = asked["checkpoint_disk"].arguments
    assert (run, nodes) == ("mine", 3) and size > 0
    assert asked["shards"].timeout_s == 2 * 120


def test_a_table_and_one_object(capsys):
    assert script.main(["--only", "python,driver,clock", "--json"]) == 0
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert (tree["name"], tree["passed"], tree["exit_code"]) == ("doctor", True, 0) and tree["device"]
    assert [check["name"] for check in tree["checks"]] == ["python", "driver", "clock"]
    assert all(check["passed"] for check in tree["checks"])
    assert "ready to train" in err and "python" in err
