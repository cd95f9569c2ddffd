from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import log
from pretrain.errors import StorageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def restore_logger():
    yield
    root = logging.getLogger("pretrain")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.propagate = True


def test_rank_0_shows_info_and_keeps_everything_in_training_log(tmp_path, capsys):
    log.setup(0, tmp_path / "run")
    log.get("uploads").info("hello %d", 7)
    log.get("uploads").debug("detail")
    shown = capsys.readouterr().out
    assert re.fullmatch(r"\d\d:\d\d:\d\d INFO    hello 7\n", shown)
    kept = (tmp_path / "run" / "training.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d .* INFO    pretrain.uploads  hello 7$", kept, re.M)
    assert "detail" in kept


def test_other_ranks_show_only_warnings_under_their_rank_and_write_no_file(tmp_path, capsys):
    log.setup(3, tmp_path)
    log.get("x").info("quiet")
    log.get("x").warning("slow disk")
    assert re.fullmatch(r"\d\d:\d\d:\d\d WARNING \[rank 3\] slow disk\n", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_debug_on_every_rank(capsys):
    log.setup(1, None, debug=True)
    log.get("x").debug("detail")
    assert "[rank 1] detail" in capsys.readouterr().out


def test_a_second_setup_replaces_the_first(tmp_path, capsys):
    log.setup(0, tmp_path)
    log.setup(0, tmp_path)
    log.get("x").info("once")
    assert capsys.readouterr().out.count("once") == 1
    assert (tmp_path / "training.log").read_text().count("once") == 1


def test_a_restart_appends_to_training_log(tmp_path):
    for word in ("first", "second"):
        log.setup(0, tmp_path)
        log.get("x").info(word)
    assert re.findall("first|second", (tmp_path / "training.log").read_text()) == ["first", "second"]


def test_training_log_goes_on_in_the_file_that_took_its_place(tmp_path, capsys):
    log.setup(0, tmp_path)
    log.get().info("first")
    (tmp_path / "earlier").write_text("earlier\n")
    (tmp_path / "earlier").replace(tmp_path / "training.log")
    log.get().info("second")
    assert re.findall("earlier|first|second", (tmp_path / "training.log").read_text()) == ["earlier", "second"]
    shutil.rmtree(tmp_path)
    log.get().info("third")  # no folder any more: said, and no error
    assert "can't be written any more" in capsys.readouterr().err


def test_long_lines_and_brackets_stay_as_they_are(capsys):
    log.setup(0, None)
    line = "[bold]/" + "x" * 300 + "[/bold] :smile:"
    log.get("x").info(line)
    assert line in capsys.readouterr().out


def test_file_only_records_stay_off_the_console(tmp_path, capsys):
    log.setup(0, tmp_path)
    log.get("x").info("step 1", extra=log.FILE_ONLY)
    assert capsys.readouterr().out == ""
    assert "step 1" in (tmp_path / "training.log").read_text()


def test_an_unwritable_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"training\.log can't be written.*--log\.dir"):
        log.setup(0, tmp_path / "file" / "run")


def test_loggers_outside_the_package_name_go_under_it():
    assert log.get("pretrain.storage").name == "pretrain.storage"
    assert log.get("train").name == "pretrain.train"
    assert log.get("pretraining").name == "pretrain.pretraining"


SECRETS = [
    ("Authorization: Bearer ya29.a0AfB_byC-secret", "secret"),
    ("header Bearer abcdef1234567890", "abcdef"),
    ("Authorization: Basic dXNlcjpwYXNz", "dXNl"),
    ("GET https://host/o?key=AIzaTop&alt=json", "AIzaTop"),
    ("WANDB_API_KEY=0123456789abcdef", "0123456789"),
    ("login(api_key='top secret')", "top secret"),
    ("hf_token=abcdefgh", "abcdefgh"),
    ('{"private_key": "-----BEGIN PRIVATE KEY-----\\nMIIE\\n-----END PRIVATE KEY-----\\n"}', "MIIE"),
    ("{'private_key_id': 'f00ba4', 'x': 1}", "f00ba4"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "MIIE"),
    ("https://user:pass@host/path", "pass@"),
    ("X-Goog-Signature=deadbeef&X=1", "deadbeef"),
    ('"client_secret": "quoted \\" inside"', "inside"),
]


@pytest.mark.parametrize(("text", "secret"), SECRETS)
def test_secrets_are_masked(text, secret):
    masked = log.mask(text)
    assert secret not in masked
    assert "***" in masked


@pytest.mark.parametrize(
    "text",
    [
        "tokens=512 loss 5.1 at gs://bucket/prefix/file.npz",
        "pad_token_id=0, eot token: 50256",
        "basic understanding of bearers",
        "http://127.0.0.1:9023 as anonymous",
        "team@example.org wrote https://host/a@b",
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert log.mask(text) == text


def test_secrets_in_arguments_and_tracebacks_reach_neither_console_nor_file(tmp_path, capsys):
    log.setup(0, tmp_path)
    try:
        raise ValueError("refused: Bearer abcdef1234567890")
    except ValueError:
        log.get("x").exception("with %s", "api_key=hunter2")
    for text in (capsys.readouterr().out, (tmp_path / "training.log").read_text()):
        assert "Traceback" in text
        assert "abcdef1234567890" not in text
        assert "hunter2" not in text


def test_a_reader_that_goes_away_does_not_end_the_program():
    program = (
        "import sys; from pretrain import log; log.setup(0, None)\n"
        "sys.stdin.readline()\n"  # the reader has closed its end by now
        "for k in range(5): log.get('x').info('line %d', k)\n"
        "print('alive', file=sys.stderr)\n"
    )
    read_end, write_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write_end)
    os.close(read_end)
    _, errors = process.communicate("go\n", timeout=120)
    assert (process.returncode, errors) == (0, "alive\n")
