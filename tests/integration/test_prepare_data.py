"""prepare_data as a user runs it: real processes, killed in the middle, into a folder and into a bucket."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from pretrain.config import StorageConfig
from pretrain.npz import read_npz
from pretrain.storage import open_store
from tests.runs import ROOT, StartedProcess, plain_environment, train

OPTIONS = ("--vocab_size", "400", "--shard_tokens", "20000", "--val_fraction", "0.05", "--dedup", "--unit_mb", "0.05")
SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "ou", "ü")]


def make_raw(folder: Path, n_documents: int = 3000) -> Path:
    """Two files of about half a megabyte, one compressed, with duplicates within and across."""
    folder.mkdir(parents=True, exist_ok=True)
    source = random.Random(7)
    words = ["".join(source.choices(SYLLABLES, k=source.randint(1, 3))) for _ in range(500)]
    texts = [" ".join(source.choices(words, k=source.randint(3, 100))) for _ in range(n_documents)]
    texts += texts[:100]
    lines = [(json.dumps({"text": text}) + "\n").encode() for text in texts]
    (folder / "a.jsonl").write_bytes(b"".join(lines[: n_documents // 2]))
    (folder / "b.json.gz").write_bytes(gzip.compress(b"".join(lines[n_documents // 2 :])))
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *map(str, arguments)]


def start(folder: Path, *arguments: object, failpoint: str = "") -> StartedProcess:
    environment = plain_environment(PRETRAIN_FAILPOINT=failpoint) if failpoint else plain_environment()
    return StartedProcess(folder, command(*arguments), environment)


def run(folder: Path, *arguments: object) -> str:
    with start(folder, *arguments) as process:
        ended = process.wait()
    assert ended.code == 0, ended.output
    return ended.output


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_raw(tmp_path_factory.mktemp("source") / "raw")


@pytest.fixture(scope="module")
def prepared(source: Path) -> Path:
    """What one worker makes of it without any interruption."""
    run(source.parent, "--input_dir", source, "--output_dir", "out", "--num_workers", 1, *OPTIONS)
    return source.parent / "out"


@pytest.mark.parametrize("workers", [2, 3])
def test_kills_and_workers_leave_no_trace_in_the_bytes(workers, source, prepared, tmp_path):
    """kill -9 to the main process alone, twice: its workers end by themselves, and the third start ends the work."""
    arguments = ("--input_dir", source, "--output_dir", "out", "--num_workers", workers, *OPTIONS)
    work = tmp_path / "out" / ".prepare"
    for some_parts in (True, False):
        # None gets past its first journal, so that there is always something left.
        with start(tmp_path, *arguments, failpoint="prepare.after_journal:1:stop") as process:
            if some_parts:  # are done, perhaps nothing is cut yet
                process.until(lambda: len(list(work.glob("parts/*.json"))) >= 2)
            else:
                process.until(process.is_stopped, "the failpoint")
            process.signal(signal.SIGKILL)
            process.until_all_gone()
        assert not (tmp_path / "out" / "metadata.json").exists()
    run(tmp_path, *arguments)
    assert content(tmp_path / "out") == content(prepared)
    assert "complete in" in run(tmp_path, *arguments)
    assert content(tmp_path / "out") == content(prepared)


def test_the_counts_add_up_in_what_is_printed(source, prepared, tmp_path):
    with start(
        tmp_path, "--input_dir", source, "--output_dir", prepared, "--num_workers", 2, "--json", *OPTIONS
    ) as process:
        output = process.wait().output
    told = json.loads(output[output.index("{") :])
    assert told["passed"] and told["checks"][0]["value"] == told["documents"] == 3100
    assert told["skipped"] == {"duplicate": 100}
    lengths = [read_npz(path)[1] for path in prepared.rglob("*.npz")]
    assert sum(map(len, lengths)) == 3000
    shards = sorted((prepared / "shards").glob("*.npz"))
    assert len(shards) > 3 and all(read_npz(path)[1].sum() >= 20_000 for path in shards[:-1])


def test_a_stop_signal_ends_it_in_order_and_the_same_command_goes_on(source, prepared, tmp_path):
    arguments = ("--input_dir", source, "--output_dir", "out", "--num_workers", 1, *OPTIONS)
    with start(tmp_path, *arguments, failpoint="prepare.after_journal:1:hang") as process:
        process.until(lambda: list((tmp_path / "out" / ".prepare").glob("parts/*.json")))
        process.signal(signal.SIGTERM)
        ended = process.wait()
        process.until_all_gone()
    assert ended.code == 75 and "stopped; the same command goes on from here" in ended.output
    assert "Traceback" not in ended.output
    run(tmp_path, *arguments)
    assert content(tmp_path / "out") == content(prepared)


def test_a_worker_that_is_killed_is_an_error_and_the_next_start_goes_on(source, prepared, tmp_path):
    arguments = ("--input_dir", source, "--output_dir", "out", "--num_workers", 1, *OPTIONS)
    with start(tmp_path, *arguments, failpoint="prepare.after_journal:1:stop") as process:
        process.until(process.is_stopped, "the failpoint")  # units are left that the worker was not given yet
        [worker] = [
            child
            for child in psutil.Process(process.process.pid).children(recursive=True)
            if "spawn_main" in " ".join(child.cmdline())
        ]
        worker.kill()
        process.signal(signal.SIGCONT)
        ended = process.wait()
        process.until_all_gone()
    assert ended.code == 4 and "storage error: a worker process was killed" in ended.output
    run(tmp_path, *arguments)
    assert content(tmp_path / "out") == content(prepared)


def test_from_a_bucket_into_a_bucket_the_bytes_are_the_same(source, prepared, bucket_url, tmp_path):
    store = open_store(bucket_url, StorageConfig())
    for path in source.iterdir():
        store.upload(path, f"raw/{path.name}")
    arguments = ("--output_dir", f"{bucket_url}/out", "--num_workers", 2, *OPTIONS)
    with start(tmp_path, "--input", f"{bucket_url}/raw/*.json*", *arguments) as process:
        process.until(lambda: any(info.name.endswith(".npz") for info in store.list("out/shards/")))
        process.signal(signal.SIGKILL)
        process.until_all_gone()
    run(tmp_path, "--input", f"{bucket_url}/raw/*.json*", *arguments)
    names = [info.name.removeprefix("out/") for info in store.list("out/")]
    expected = content(prepared)
    assert sorted(names) == sorted(expected)
    for name in names:
        if name not in ("recipe.json", "metadata.json"):  # they name the input
            assert store.read_bytes(f"out/{name}") == expected[name], name
    assert list((tmp_path / ".prepare").iterdir()) == []


def test_what_was_prepared_trains_and_validates(prepared, tmp_path):
    data = ("--data.source", str(prepared / "shards"), "--data.val_source", str(prepared / "val"))
    ended = train(tmp_path, *data, "--model.vocab_size", "400", "--train.max_steps", "3", "--train.eval_sequences", "8")
    assert ended.code == 0, ended.output
    summary = json.loads((tmp_path / "logs" / "tiny" / "summary.json").read_text())
    assert summary["unigram_entropy"] > 4 and summary["val_loss"] > 0


CUT_GZIP = gzip.compress(random.Random(0).randbytes(999).hex().encode())[:500]


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text"\n', "a.jsonl, byte 17: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl, byte 0: 'text' is not among the keys body"),
        ("a.txt", b"\xff\xfe", "a.txt: not UTF-8"),
        ("a.json.gz", CUT_GZIP, "a.json.gz: truncated: the file ends at byte 500"),
        ("a.parquet", b"PAR1 nothing", "a.parquet: not a readable parquet file"),
        ("a.md", b"text", "no raw text below raw, only 1 others such as a.md"),
    ],
)
def test_bad_input_ends_in_one_line_with_the_contracts_code(name, data, says, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(data)
    with start(tmp_path, "--input_dir", "raw", "--output_dir", "out", "--num_workers", 1) as process:
        ended = process.wait()
    assert ended.code == 3, ended.output
    (line,) = ended.errors
    assert line.startswith("data error: ") and says in line


def test_a_tiktoken_encoding_is_used_as_it_is(source, tmp_path):
    """An encoding that tiktoken finds by its own plug-ins; the known ones are fetched from the network."""
    tiktoken = pytest.importorskip("tiktoken")
    (tmp_path / "plugins" / "tiktoken_ext").mkdir(parents=True)
    (tmp_path / "plugins" / "tiktoken_ext" / "tiny.py").write_text(
        "def tiny():\n"
        "    ranks = {bytes([byte]): byte for byte in range(256)} | {b'ba': 256, b' b': 257, b' ba': 258}\n"
        r"    pattern = r' ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+'"
        "\n"
        "    special = {'<|endoftext|>': 300}\n"
        "    return {'name': 'tiny', 'pat_str': pattern, 'mergeable_ranks': ranks, 'special_tokens': special}\n"
        "ENCODING_CONSTRUCTORS = {'tiny': tiny}\n"
    )
    package = str(Path(tiktoken.__file__).parent.parent)
    path = os.pathsep.join([str(ROOT), package, str(tmp_path / "plugins")])
    words = command("--input", source / "a.jsonl", "--output_dir", "out", "--tokenizer", "tiktoken:tiny")
    with StartedProcess(tmp_path, words, plain_environment(PYTHONPATH=path)) as process:
        ended = process.wait()
    assert ended.code == 0, ended.output
    manifest = json.loads((tmp_path / "out" / "shards" / "manifest.json").read_text())
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["eot_id"]) == ("tiktoken-tiny", 301, 300)
    tokens = np.concatenate([read_npz(path)[0] for path in sorted((tmp_path / "out" / "shards").glob("*.npz"))])
    first = json.loads((source / "a.jsonl").read_bytes().split(b"\n")[0])["text"].encode()
    pieces = [bytes([token]) if token < 256 else {256: b"ba", 257: b" b", 258: b" ba"}[token] for token in tokens[:50]]
    assert first.startswith(b"".join(pieces)) and (tokens == 300).sum() == 1500


def test_a_ray_cluster_that_loses_a_worker_gives_the_same_bytes(source, prepared, tmp_path):
    ray = pytest.importorskip("ray")
    arguments = ("--input_dir", source, "--output_dir", "out", "--num_workers", 2, "--ray", "local", *OPTIONS)
    environment = plain_environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(Path(ray.__file__).parent.parent)]))
    with StartedProcess(tmp_path, command(*arguments), environment) as process:

        def at_work() -> list[psutil.Process]:
            found = []
            for child in psutil.Process(process.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # of those that Ray starts some end at once
                    found += [child] if "ray::_do_remote" in " ".join(child.cmdline()) else []
            return found

        worker, *_ = process.until(at_work, "a worker")
        worker.kill()
        ended = process.wait()
    assert ended.code == 0, ended.output
    assert content(tmp_path / "out") == content(prepared)
