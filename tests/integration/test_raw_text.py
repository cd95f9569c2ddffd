"""train.py on raw text: it trains while the text is prepared, is killed and resumed, and ends where the text does."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import signal
import sysconfig
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from pretrain.failpoints import VARIABLE
from pretrain.files import crc32c_of_file
from pretrain.tokenizers import train_bpe
from scripts import inspect_data
from tests.runs import TrainingProcess, losses, plain_environment, tiny_config, train

VOCAB_SIZE = 400
N_FILES, N_DOCUMENTS, DOCUMENT_CHARS = 6, 30, 3000
STEPS = 200  # 1.3 epochs


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Files shaped as C4's, of the sources of Python's standard library, and a tokenizer of them."""
    folder = tmp_path_factory.mktemp("text")
    modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [text[:DOCUMENT_CHARS] for path in modules if len(text := path.read_text(encoding="utf-8")) > 2000]
    write_c4(folder / "raw", texts)
    train_bpe(iter(texts), VOCAB_SIZE).save(str(folder / "tokenizer.json"))
    validation = ("--data.val_source", str(folder / "raw" / "c4-train.00005-of-01024.json.gz"))
    how = ("--data.tokenizer", str(folder / "tokenizer.json"), "--data.tokenizer_num_workers", "2")
    sizes = ("--data.raw_shard_tokens", "3000", "--model.vocab_size", str(VOCAB_SIZE), "--train.eval_sequences", "8")
    others = ("--model.dropout", "0", "--max-steps", str(STEPS), "--log.report", "false")
    return (*source(folder / "raw"), *validation, *how, *sizes, *others)


def write_c4(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    for number in range(N_FILES):
        with gzip.open(folder / f"c4-train.{number:05d}-of-01024.json.gz", "wt", encoding="utf-8") as file:
            for text in texts[number : N_FILES * (N_DOCUMENTS // N_FILES) : N_FILES]:
                file.write(json.dumps({"text": text, "url": "https://x.org"}) + "\n")


def source(folder: Path) -> tuple[str, ...]:
    return ("--data", str(folder / "c4-train.0000[0-4]-of-01024.json.gz"))


def shards_of(folder: Path) -> dict[str, str]:
    """Checksums of all that was prepared."""
    return {path.name: crc32c_of_file(path) for path in sorted((folder / "cache").glob("prepared-*/shards/*"))}


def held_after(files: int) -> dict[str, str]:
    """An environment in which the process that prepares stops itself once so many files are in shards."""
    return plain_environment(**{VARIABLE: f"prepare.after_journal:{files}:stop"})


def preparing(training: TrainingProcess) -> psutil.Process | None:
    """The process that prepares, once it has stopped itself."""
    for child in psutil.Process(training.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "pretrain.raw_worker" in child.cmdline() and child.status() == psutil.STATUS_STOPPED:
                return child
    return None


def new_folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, options: tuple[str, ...]) -> Path:
    """A run that nobody disturbs, but that finds only a part of its text prepared for a while."""
    folder = tmp_path_factory.mktemp("whole")
    with TrainingProcess(folder, *options, environment=held_after(3)) as training:
        held = training.until(lambda: preparing(training), "three files in shards")
        assert held
        training.until_said("data: waiting for raw text: ")
        training.until_step(1)  # on a busy machine the first step has waited already
        assert training.step < STEPS // 2
        assert len(list(folder.glob("cache/prepared-*/shards/manifest.json"))) == 1  # of the validation text
        held.resume()
        ended = training.wait()
    assert ended.code == 0, ended.output
    assert f"{N_DOCUMENTS - N_DOCUMENTS // N_FILES} documents, none skipped" in ended.output
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    return folder


def test_a_run_that_is_stopped_and_killed_on_raw_text_and_loses_its_cache_is_the_same_run(tmp_path, options, whole):
    words = (*options, "--checkpoint.every_steps", "20", "--no-background-upload")
    with TrainingProcess(tmp_path, *words, environment=held_after(2)) as training:
        training.until_said("data: waiting for raw text: ")
        training.until_step(1)
        training.signal(signal.SIGTERM)
        training.until_all_gone()
        assert training.wait().code == 75, training.output
    stopped_at = max(losses(tmp_path))
    with TrainingProcess(tmp_path, *words, "--resume", "auto", environment=held_after(3)) as training:
        training.until_step(stopped_at + 25)
        training.process.kill()  # the kernel ends the others
        training.until_all_gone()
    shutil.rmtree(tmp_path / "cache")  # another machine, that has only the text
    again = train(tmp_path, *words, "--resume", "auto")
    assert again.code == 0, again.output
    assert re.search(rf"resumed checkpoint-epoch0-step(?!{stopped_at}\b)\d+", again.output)
    assert losses(tmp_path) == losses(whole)
    assert shards_of(tmp_path) == shards_of(whole)


def test_text_that_can_not_be_prepared_ends_both_ranks_with_one_line_after_a_save(tmp_path, options, whole):
    raw = tmp_path / "raw"
    shutil.copytree(Path(options[1]).parent, raw)
    path = raw / "c4-train.00003-of-01024.json.gz"
    path.write_bytes(path.read_bytes()[:-500])
    words = (*options, *source(raw))
    with TrainingProcess(tmp_path, *words, ranks=2, environment=held_after(2)) as training:
        held = training.until(lambda: preparing(training), "two files in shards")
        assert held
        training.until_step(5)
        held.resume()
        ended = training.wait()
    assert ended.code == 3, ended.output
    assert len(ended.errors) == 1 and "c4-train.00003" in ended.errors[0], ended.output
    last = max(losses(tmp_path))
    assert list((tmp_path / "checkpoints" / "tiny").glob(f"checkpoint-epoch0-step{last}-*/manifest.json"))
    alone = losses(whole)
    for step, (loss, _, _) in losses(tmp_path).items():
        assert loss == pytest.approx(alone[step][0], abs=1e-4)


def test_text_may_be_prepared_first_and_killed_meanwhile(tmp_path, options, whole, capsys):
    words = (*options, "--data.raw_ahead", "false", "--max-steps", "4")
    with TrainingProcess(tmp_path, *words, environment=held_after(1)) as training:
        training.until(training.is_stopped, "a file in shards")
        assert list((tmp_path / "cache").rglob("*.tokens"))  # of the units that are taken
        training.kill()
    settings = ("--config", str(tiny_config(tmp_path)), *words, "--data.cache_dir", str(tmp_path / "cache"))
    assert inspect_data.main(["--step", "1", *settings]) == 3
    assert "Start train.py with these settings" in capsys.readouterr().err
    good = train(tmp_path, *words)
    assert good.code == 0, good.output
    assert shards_of(tmp_path) == shards_of(whole)
    assert losses(tmp_path)[1] != losses(whole)[1]  # shards in a seeded order
    assert inspect_data.main(["--step", "4", *settings]) == 0


def test_a_step_of_text_prepared_ahead_is_looked_up(options, whole, capsys):
    settings = ("--config", str(tiny_config(whole)), *options, "--data.cache_dir", str(whole / "cache"))
    for step, epoch in ((1, 0), (STEPS, 1)):
        assert inspect_data.main(["--step", str(step), *settings, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["position"]["epoch"] == epoch
        names = {each["name"] for each in found["shards"]}
        assert (names <= {"tokenized_cleaned_00000.npz", "tokenized_cleaned_00001.npz"}) == (step == 1)
