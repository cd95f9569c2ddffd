"""scripts/generate.py on checkpoints as the trainer writes them, here and in a bucket, and as one talks to it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from model import GPT
from pretrain.checkpoint import write_documents, write_manifest, write_parts
from pretrain.checkpoint_manifest import CheckpointName, Manifest
from pretrain.generation import Sampling, end_of_text, generate, prompt_ids
from pretrain.model_config import ModelConfig
from pretrain.snapshot import take_snapshot
from pretrain.tokenizers import load_tokenizer, train_bpe
from scripts.generate import main
from tests.helpers_training import upload_checkpoint
from tests.runs import PATIENCE_S, ROOT, plain_environment, store_of

VOCAB_SIZE, SEQ_LEN = 300, 48
SILENCE_S = 5.0  # after which a key is pressed again
TEXTS = [f"def f_{i}(x):\n    return x + {i}  # grüße, 世界 🙂 {i * 7919}\n" for i in range(200)]
SHAPE = {"n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": VOCAB_SIZE, "dropout": 0.1, "seq_len": SEQ_LEN}


def write_run(
    folder: Path, *, tokenizer: bool = True, never_drawn: int = VOCAB_SIZE, **shape: object
) -> tuple[Path, GPT]:
    """A run's folder with one checkpoint of a model that has strong opinions; and the model.

    Args:
        never_drawn: a token whose logit is always 0, which is never the highest.
    """
    config = ModelConfig(**{"size": "custom", **SHAPE, "family": "llama", "n_kv_head": 2, **shape})
    torch.manual_seed(0)
    model = GPT(config.resolve()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.tok_emb.weight[VOCAB_SIZE:] = 0
        model.head_weight[VOCAB_SIZE:] = 0
        model.head_weight[never_drawn : never_drawn + 1] = 0
    path = folder / str(CheckpointName(0, 7, 7))
    path.mkdir(parents=True)
    zeros = ((name, p.detach(), torch.zeros_like(p)) for name, p in model.named_parameters())
    states = [(name, {"weight": weight, "exp_avg": zero, "exp_avg_sq": zero}) for name, weight, zero in zeros]
    documents = {"config.yaml": yaml.safe_dump({"model": dataclasses.asdict(config)}), "trainer_state.json": "{}"}
    if tokenizer:
        documents["tokenizer.json"] = train_bpe(TEXTS, VOCAB_SIZE).to_str()
    files = write_parts(take_snapshot(states, 0, 1), path, 0, 1) | write_documents(documents, path)
    write_manifest(Manifest(CheckpointName(0, 7, 7), "attempt1", 1, files), path)
    return folder, model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT]:
    return write_run(tmp_path_factory.mktemp("checkpoints") / "tiny")


def written(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict:
    """The JSON of a call that succeeds."""
    capsys.readouterr()
    assert main([*map(str, words), "--json", "--device", "cpu"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_text_is_what_the_model_continues_the_prompt_with(run, capsys):
    folder, model = run
    tokenizer = load_tokenizer(folder / "checkpoint-epoch0-step7-files7" / "tokenizer.json")
    stop = (end_of_text(tokenizer),)
    sampling = Sampling(0.7, 20, 0.9, seed=3, max_new_tokens=15, stop_ids=stop)
    words = ("--temperature", "0.7", "--top_k", "20", "--top_p", "0.9", "--seed", "3", "--max_new_tokens", "15")
    found = written(capsys, folder, "--prompt", "def f", "--prompt", "grü", "--n_samples", "2", *words)
    prompts = [prompt_ids(tokenizer, text) for text in ("def f", "def f", "grü", "grü")]
    expected = [[token for token in row if token not in stop] for row in generate(model, prompts, sampling)]
    assert [sample["tokens"] for sample in found["samples"]] == expected
    assert [sample["prompt"] for sample in found["samples"]] == ["def f", "def f", "grü", "grü"]
    for sample in found["samples"]:
        assert sample["text"] == tokenizer.decode(sample["tokens"], skip_special_tokens=False)
    assert (found["checkpoint"], found["step"], found["dtype"]) == ("checkpoint-epoch0-step7-files7", 7, "float32")

    greedy = ("--prompt", "def f", "--prompt", "grü", "--temperature", "0", "--max_new_tokens", "9")
    samples = written(capsys, folder, *greedy)["samples"]
    for stream in ("--stream", "--no-stream"):
        assert main([str(folder), *greedy, stream]) == 0
        out, err = capsys.readouterr()
        texts = [f"--- {i} of 2 ---\n{each['prompt']}{each['text']}\n" for i, each in enumerate(samples, 1)]
        assert out == "".join(texts)
        assert "tokens/s" in err and "fp32 on cpu" in err


def test_texts_end_where_they_are_told_to(run, capsys):
    folder, _ = run
    greedy = (folder, "--prompt", "def f", "--temperature", "0")
    (free,) = written(capsys, *greedy)["samples"]
    assert free["ended_by"] == "context" and len(free["tokens"]) < SEQ_LEN
    (short,) = written(capsys, *greedy, "--max_new_tokens", "3")["samples"]
    assert (short["ended_by"], short["tokens"]) == ("max_new_tokens", free["tokens"][:3])
    (eot,) = written(capsys, *greedy, "--eot_id", str(free["tokens"][4]))["samples"]
    assert (eot["ended_by"], eot["tokens"]) == (
        "end of text",
        free["tokens"][: free["tokens"].index(free["tokens"][4])],
    )
    stop = free["text"][5:8]
    (stopped,) = written(capsys, *greedy, "--stop", "never met", "--stop", stop)["samples"]
    assert (stopped["ended_by"], stopped["text"]) == ("stop text", free["text"][: free["text"].index(stop)])
    assert main([*map(str, greedy)]) == 0
    assert f"1 of 1 ended because the context of {SEQ_LEN} tokens is full" in capsys.readouterr().err


def test_prompts_come_from_files_stdin_ids_or_nowhere(run, capsys, tmp_path, monkeypatch):
    folder, _ = run
    new = ("--max_new_tokens", "4")
    (tmp_path / "prompt.txt").write_text("def f", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("grü".encode())))
    found = written(
        capsys, folder, *new, "--prompt_file", tmp_path / "prompt.txt", "--prompt_file", "-", "--tokens", "9,8"
    )
    assert [sample["prompt"] for sample in found["samples"]][:2] == ["def f", "grü"]
    (nothing,) = written(capsys, folder, *new)["samples"]
    assert nothing["prompt"] == "" and nothing["tokens"]


def test_a_checkpoint_without_tokenizer_takes_ids_or_a_tokenizer(run, capsys, tmp_path):
    folder, model = write_run(tmp_path / "bare", tokenizer=False)
    assert main([str(folder), "--prompt", "x"]) == 2
    assert "has no tokenizer.json, and text needs one. Give one with --tokenizer" in capsys.readouterr().err
    expected = generate(model, [[1, 2, 3]], Sampling(temperature=0, max_new_tokens=5))[0]
    assert main([str(folder), "--tokens", "1,2,3", "--temperature", "0", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out == ",".join(map(str, [1, 2, 3, *expected])) + "\n"
    other = run[0] / "checkpoint-epoch0-step7-files7" / "tokenizer.json"
    assert written(capsys, folder, "--tokenizer", other, "--prompt", "x")["samples"][0]["text"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--prompt", "def " * 40], 2, "more than the model's context of 48: shorten it"),
        (["--max_new_tokens", "48"], 2, "1 more than the model's context of 48: ask for at most 47"),
        (["--tokens", "1,x"], 2, "--tokens '1,x' are no token ids"),
        (["--tokens", "999"], 2, "token id 999, outside the model's vocabulary of 300"),
        (["--eot_id", "300"], 2, "token id 300 can't end a text"),
        (["--eot_id", "-1"], 2, "token id -1 can't end a text"),
        (["--top_p", "0", "--n_samples", "0", "--max_new_tokens", "0"], 2, "3 problems"),
        (["--chat", "--json"], 2, "--chat asks for its own prompts"),
        (["--prompt_file", "missing.txt"], 2, "--prompt_file missing.txt can't be read"),
        (["--tokenizer", "missing.json"], 3, "can't read tokenizer missing.json"),
    ],
)
def test_what_can_not_be_is_one_line(run, capsys, words, code, said):
    assert main([str(run[0]), *words]) == code
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_a_place_without_checkpoint_and_a_tokenizer_of_another_model_are_refused(run, capsys, tmp_path):
    assert main([str(tmp_path / "none"), "--prompt", "x"]) == 5
    train_bpe(TEXTS, VOCAB_SIZE + 1).save(str(tmp_path / "large.json"))
    assert main([str(run[0]), "--tokenizer", str(tmp_path / "large.json")]) == 2
    assert "the tokenizer has 301 ids and the model 300" in capsys.readouterr().err


def test_it_reads_a_bucket(run, capsys, bucket_url, tmp_path, monkeypatch):
    folder, _ = run
    (path,) = folder.iterdir()
    manifest = Manifest.from_bytes((path / "manifest.json").read_bytes(), "test")
    upload_checkpoint(store_of(bucket_url), "tiny", folder, manifest)
    monkeypatch.chdir(tmp_path)  # what is fetched goes to ./cache
    words = ("--prompt", "def f", "--temperature", "0", "--max_new_tokens", "6")
    assert written(capsys, f"{bucket_url}/tiny", *words)["samples"] == written(capsys, folder, *words)["samples"]


@pytest.mark.parametrize(
    "shape",
    [{}, {"family": "gpt", "n_kv_head": 0}, {"family": "neox", "n_kv_head": 0}],
    ids=["llama", "gpt", "neox"],
)
def test_greedy_text_is_that_of_transformers_on_the_export(shape, capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    from scripts.export_hf import main as export

    folder, _ = write_run(tmp_path / "run", **shape)
    assert export([str(folder), str(tmp_path / "exported")]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    words = ("--temperature", "0", "--max_new_tokens", "20")
    for place in (folder, tmp_path / "exported"):
        for text in ("def f", "grüße, 世界"):
            (found,) = written(capsys, place, "--prompt", text, *words)["samples"]
            inputs = tokenizer(text, return_tensors="pt")
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=20)[
                0, inputs.input_ids.shape[1] :
            ].tolist()
            assert found["tokens"] == [token for token in tokens if token != tokenizer.eos_token_id]


class Terminal:
    """A chat in a process with a terminal of its own."""

    def __init__(self, folder: Path, *words: str) -> None:
        command = [
            sys.executable,
            str(ROOT / "scripts" / "generate.py"),
            str(folder),
            "--chat",
            "--device",
            "cpu",
            *words,
        ]
        self._master, terminal = pty.openpty()
        # a shell that starts the tests in the background has them ignore Ctrl+C, and their children with them
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                command,
                stdin=terminal,
                stdout=terminal,
                stderr=terminal,
                env=plain_environment(),
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        os.close(terminal)
        self.said = b""

    def until(self, text: str, on_silence: Callable[[], None] = lambda: None) -> str:
        """Read until `text` came; all that came up to there."""
        deadline = time.monotonic() + PATIENCE_S
        while text.encode() not in self.said:
            assert time.monotonic() < deadline, self.said
            if not select.select([self._master], [], [], SILENCE_S)[0]:
                on_silence()
                continue
            try:
                self.said += os.read(self._master, 4096)
            except OSError as error:  # the other side has closed
                raise AssertionError(f"ended before {text!r}: {self.said!r}") from error
        before, _, self.said = self.said.partition(text.encode())
        return before.decode(errors="replace")

    def interrupt(self, text: str) -> None:
        """Ctrl+C until `text` came: one that falls between a prompt and the reading behind it waits for a key."""
        again = functools.partial(self.process.send_signal, signal.SIGINT)
        again()
        self.until(text, again)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def talk():
    opened = []

    def start(folder: Path, *words: str) -> Terminal:
        opened.append(Terminal(folder, *words))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_a_chat_remembers_forgets_and_ends(run, talk):
    chat = talk(run[0], "--max_new_tokens", "8", "--eot_id", "0")
    chat.until("User: ")
    chat.type("hi\n")
    chat.until("Assistant:")
    chat.until("User: ")
    chat.type("more and more\n")
    chat.until("turns forgotten: the context holds 48 tokens")
    chat.until("User: ")
    chat.type("x" * 60 + "\n")
    chat.until("config error: the prompt has")
    chat.until("User: ")
    chat.type("/reset\n")
    chat.until("(all forgotten)")
    chat.until("User: ")
    chat.type("/help\n")
    chat.until("/reset forgets what was said")
    chat.until("User: ")
    chat.type("\x04")  # Ctrl+D
    chat.until("tokens/s")
    assert chat.process.wait(PATIENCE_S) == 0


def test_a_chat_shows_whole_answers_where_streaming_is_off(run, monkeypatch, capsys):
    answers = []
    for stream in ("--stream", "--no-stream"):
        lines, shown = iter(["hi", "/quit"]), []
        monkeypatch.setattr("builtins.input", functools.partial(next, lines))
        monkeypatch.setattr("scripts.generate.put", shown.append)
        assert main([str(run[0]), "--chat", "--max_new_tokens", "8", stream]) == 0
        answers.append([piece for piece in shown if piece])
    live, whole = answers
    assert "".join(live) == "".join(whole) and len(live) > len(whole) == 2


def test_ctrl_c_while_the_checkpoint_is_read_is_one_line_and_130(run, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("scripts.generate.load_pretrained", interrupted)
    assert main([str(run[0]), "--prompt", "x"]) == 130
    assert capsys.readouterr().err == "stopped by Ctrl+C\n"


def test_ctrl_c_that_a_library_swallows_ends_the_text_all_the_same(run, monkeypatch, capsys):
    def swallowing(model, prompts, sampling, on_token):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        on_token(0, 5, False)
        raise AssertionError("it went on")

    monkeypatch.setattr("pretrain.writer.generate", swallowing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main([str(run[0]), "--prompt", "x"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_answer_and_not_the_chat(tmp_path, talk):
    never = VOCAB_SIZE - 1  # of a text that ends nowhere: it is still written when the signal comes
    folder, _ = write_run(tmp_path / "long", never_drawn=never, seq_len=4096)
    chat = talk(folder, "--max_new_tokens", "3900", "--temperature", "0", "--eot_id", str(never))
    chat.until("User: ")
    chat.type("hi\n")
    chat.until("Assistant:")
    chat.interrupt("(stopped)")
    chat.until("User: ")
    chat.interrupt("/quit or Ctrl+D ends the chat")
    chat.type("/quit\n")
    chat.until("tokens/s")
    assert chat.process.wait(PATIENCE_S) == 0


def test_a_reader_that_has_enough_ends_it_quietly(run):
    command = f"{sys.executable} {ROOT}/scripts/generate.py {run[0]} --prompt x --n_samples 40 | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=plain_environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0 and done.stdout == "--- 1 of 40 ---\n"
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr
