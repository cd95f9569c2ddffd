"""make_demo_data and download_data as a user runs them, through the real storage client where a bucket is meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pytest

from pretrain.config import DataConfig, StorageConfig
from pretrain.files import crc32c_of_file
from pretrain.manifest import DataManifest
from pretrain.npz import read_npz
from pretrain.shards import fetch_shards
from pretrain.storage import open_store
from scripts import download_data, make_demo_data
from tests.runs import PATIENCE_S, make_shards, train

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO = ["--shards", "7", "--tokens", "70005", "--vocab_size", "1000"]


def run_script(name, *arguments, cwd):
    """A script as its own process, started from a folder that is not the repository's."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, str(REPOSITORY / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    run = run_script("make_demo_data", "--output_dir", folder / "demo", *DEMO, cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "demo"


@pytest.fixture
def source(tmp_path):
    """Four small shards, two of them in a nested folder."""
    root = tmp_path / "source"
    (root / "part").mkdir(parents=True)
    for index in range(4):
        path = root / ("part" if index > 1 else "") / f"s_{index}.npz"
        np.savez(path, input_ids=np.arange(50 + index), sequence_lengths=np.array([20, 30 + index]))
    return root


def download(source, target, *arguments):
    return download_data.main(["--data", str(source), "--output_dir", str(target), *arguments])


# --- make_demo_data ---------------------------------------------------------------------------------------------------


def test_the_demo_trains_as_it_is(demo, tmp_path):
    manifest = DataManifest.from_json((demo / "shards" / "manifest.json").read_bytes())
    data = DataConfig(cache_dir=str(tmp_path / "cache"))
    train = fetch_shards(open_store(str(demo / "shards"), StorageConfig()), data, vocab_size=1000)
    val = fetch_shards(open_store(str(demo / "val"), StorageConfig()), data, vocab_size=1000)
    assert len(train.shards) == 7 and train.n_tokens == manifest.n_tokens == 70005
    assert {shard.n_tokens for shard in train.shards} == {70005 // 7, 70005 // 7 + 1} or 70005 % 7 == 0
    assert train.manifest == manifest and manifest.eot_id is not None
    assert 3.0 < manifest.unigram_entropy < np.log(1000)
    assert val.n_tokens > 10_000


def test_the_demo_is_real_text_in_both_dialects(demo):
    from pretrain.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(demo / "shards/tokenizer.json")
    shapes, text = [], ""
    for path in sorted((demo / "shards").glob("*.npz")):
        with np.load(path) as arrays:
            shapes.append((arrays["input_ids"].ndim, "attention_mask" in arrays.files))
        text += tokenizer.decode(read_npz(path)[0].tolist(), skip_special_tokens=False)
    assert shapes.count((1, False)) == 6 and shapes.count((2, True)) == 1
    assert "import " in text and "def " in text and text.count("<|endoftext|>") > 3


def test_the_unigram_entropy_is_that_of_the_tokens_written(demo):
    manifest = DataManifest.from_json((demo / "val" / "manifest.json").read_bytes())
    train = np.concatenate([read_npz(path)[0] for path in sorted((demo / "shards").glob("*.npz"))])
    (val,) = (read_npz(path)[0] for path in (demo / "val").glob("*.npz"))
    counts = np.bincount(train, minlength=1000) + 1
    assert manifest.unigram_entropy == pytest.approx(-np.log(counts[val] / counts.sum()).mean())


def test_the_demo_is_the_same_bytes_again_and_kept_when_complete(demo, tmp_path, capsys):
    assert make_demo_data.main(["--output_dir", str(tmp_path / "again"), *DEMO]) == 0
    assert content(tmp_path / "again") == content(demo)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*")}
    assert make_demo_data.main(["--output_dir", str(tmp_path / "again"), *DEMO]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*")} == before
    damaged = tmp_path / "again" / "shards" / "tokenized_cleaned_00003.npz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert make_demo_data.main(["--output_dir", str(tmp_path / "again"), *DEMO]) == 0
    assert content(tmp_path / "again") == content(demo)


def test_the_demo_is_uploaded_once_and_never_over_other_objects(demo, bucket_url, capsys):
    arguments = ["--output_dir", str(demo), *DEMO, "--upload", bucket_url]
    assert make_demo_data.main(arguments) == 0
    store = open_store(bucket_url, StorageConfig())
    uploaded = {info.name: (info.crc32c, info.generation) for info in store.list()}
    local = {name for name in content(demo) if name != make_demo_data.RECIPE_NAME}
    assert {name: crc for name, (crc, _) in uploaded.items()} == {name: crc32c_of_file(demo / name) for name in local}
    assert make_demo_data.main(arguments) == 0
    assert {info.name: (info.crc32c, info.generation) for info in store.list()} == uploaded
    store.delete("shards/tokenizer.json")
    store.create("shards/tokenizer.json", b"somebody else's")
    assert make_demo_data.main(arguments) == 4
    assert "shards/tokenizer.json is there with another content" in capsys.readouterr().err
    assert store.read_bytes("shards/tokenizer.json") == b"somebody else's"


def test_impossible_demos_are_refused_in_one_line(tmp_path, capsys):
    assert make_demo_data.main(["--output_dir", str(tmp_path), "--tokens", "3"]) == 2
    assert capsys.readouterr().err == "config error: --tokens 3 can't fill --shards 25. Give more tokens.\n"
    assert list(tmp_path.iterdir()) == []


# --- download_data ----------------------------------------------------------------------------------------------------


def test_shards_of_a_bucket_are_staged_verified_and_listed(source, bucket_url, tmp_path, capsys):
    store = open_store(bucket_url, StorageConfig())
    for name in content(source):
        store.upload(source / name, name)
    target = tmp_path / "data"
    assert download(bucket_url, target, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["passed"] and report["tokens"] == 206 and report["downloaded"] == 4
    assert "all verified, 4 downloaded now" in printed.err
    staged = content(target)
    manifest = DataManifest.from_json(staged.pop("manifest.json"))
    assert staged == content(source)
    assert [(entry.name, entry.tokens, entry.documents) for entry in manifest.shards] == [
        ("part/s_2.npz", 52, 2),
        ("part/s_3.npz", 53, 2),
        ("s_0.npz", 50, 2),
        ("s_1.npz", 51, 2),
    ]
    assert all(entry.crc32c == crc32c_of_file(source / entry.name) for entry in manifest.shards)


def test_the_command_runs_from_anywhere_and_help_says_how(source, tmp_path):
    run = run_script("download_data", "--data", "source", "--output_dir", "data", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "4 shards in data: 206 tokens" in run.stdout and run.stderr == ""
    assert "Exit codes" in run_script("download_data", "--help", cwd=tmp_path).stdout
    assert run_script("download_data", "--dta", "x", cwd=tmp_path).returncode == 2


def test_a_second_run_fetches_only_what_is_missing_or_damaged(source, tmp_path, capsys):
    target = tmp_path / "data"
    assert download(source, target) == 0
    kept = target / "s_1.npz"
    before = kept.stat().st_mtime_ns
    (target / "s_0.npz").unlink()
    flipped = bytearray((target / "part" / "s_2.npz").read_bytes())
    flipped[100] ^= 1
    (target / "part" / "s_2.npz").write_bytes(flipped)
    capsys.readouterr()
    assert download(source, target) == 0
    assert "2 downloaded now" in capsys.readouterr().out
    assert {name: data for name, data in content(target).items() if name != "manifest.json"} == content(source)
    assert kept.stat().st_mtime_ns == before


def test_verified_shards_are_opened_again_only_when_asked(source, tmp_path, monkeypatch):
    opened = []

    def counted(path, **options):
        opened.append(path)
        return read_npz(path, **options)

    monkeypatch.setattr(download_data, "read_npz", counted)
    padded = ["--pad_token_id", "3"]
    for arguments, expected in (
        ([], 4),
        ([], 0),
        (["--verify"], 4),
        (padded, 4),
        (padded, 0),
        ([], 4),
        (["--vocab_size", "99"], 4),
    ):
        opened.clear()
        assert download(source, tmp_path / "data", *arguments) == 0
        assert len(opened) == expected


def test_what_is_there_is_verified_alone_and_nothing_is_written(source, tmp_path, capsys, monkeypatch):
    target = tmp_path / "data"
    assert download(source, target, "--verify_only") == 3
    assert capsys.readouterr().err.count("is not there. Without --verify_only this command fetches it") == 4
    assert not target.exists()
    assert download(source, target) == 0
    (target / "manifest.json").unlink()
    staged = content(target)
    assert download(source, target, "--verify_only") == 0
    assert "206 tokens" in capsys.readouterr().out
    (target / "s_0.npz").write_bytes(staged["s_0.npz"][:-1] + b"?")
    (target / "s_1.npz").unlink()
    assert download(source, target, "--verify_only") == 3
    told = capsys.readouterr().err
    assert f"{target / 's_0.npz'} is not what is stored" in told and f"{target / 's_1.npz'} is not there" in told
    assert set(staged) - set(content(target)) == {"s_1.npz"}


def test_every_bad_shard_is_named_in_one_go_and_no_manifest_is_written(source, tmp_path, capsys):
    (source / "s_0.npz").write_bytes(b"torn")
    np.savez(source / "part" / "s_3.npz", input_ids=np.ones(3))
    assert download(source, tmp_path / "data", "--json") == 3
    printed = capsys.readouterr()
    problems = [line for line in printed.err.splitlines() if line.startswith("data error")]
    assert len(problems) == 3
    assert "s_3.npz: found input_ids.npy of dtype float64" in problems[0] and "s_0.npz" in problems[1]
    assert problems[2] == "data error: 2 of 4 shards are bad or missing; no manifest written"
    assert json.loads(printed.out)["checks"][0] == {
        "name": "shards_good",
        "value": 2,
        "goal": 4,
        "unit": "shards",
        "passed": False,
    }
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_the_sources_manifest_is_kept_and_holds_the_vocabulary(demo, tmp_path, capsys):
    target = tmp_path / "data"
    assert download(demo / "shards", target) == 0
    assert content(target) == content(demo / "shards")
    assert "a new manifest" not in capsys.readouterr().out
    assert download(demo / "shards", tmp_path / "other", "--vocab_size", "50257") == 3
    assert "Set --model.vocab_size 1000" in capsys.readouterr().err


def test_a_manifest_that_disagrees_is_written_anew(demo, source, tmp_path, capsys):
    assert download(source, source) == 0  # a manifest beside the shards, in place
    manifest = json.loads((source / "manifest.json").read_text())
    manifest["shards"][0]["tokens"] = 1
    (source / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert download(source, tmp_path / "data") == 0
    assert "says otherwise of 1 shards, such as part/s_2.npz" in capsys.readouterr().out
    assert DataManifest.from_json((tmp_path / "data" / "manifest.json").read_bytes()).n_tokens == 206


def test_a_shard_that_the_sources_manifest_names_is_missed(source, tmp_path, capsys):
    assert download(source, source) == 0
    (source / "s_1.npz").unlink()
    assert download(source, tmp_path / "data") == 3
    assert "s_1.npz: not there, though manifest.json names it" in capsys.readouterr().err
    assert download(source, tmp_path / "data", "--max_files", "2") == 0


def test_a_part_of_the_shards_gets_a_manifest_of_its_own(source, tmp_path, capsys):
    assert download(source, source) == 0
    capsys.readouterr()
    assert download(source, tmp_path / "data", "--pattern", "s_[23]*") == 0
    assert "is of other shards too" in capsys.readouterr().out
    assert sorted(content(tmp_path / "data")) == ["manifest.json", "part/s_2.npz", "part/s_3.npz"]
    assert DataManifest.from_json((tmp_path / "data" / "manifest.json").read_bytes()).n_tokens == 105


def test_a_dry_run_says_what_it_would_do_and_does_nothing(source, tmp_path, capsys):
    assert download(source, tmp_path / "data", "--dry_run") == 0
    assert "would download 4 of 4 shards" in capsys.readouterr().out
    assert not (tmp_path / "data").exists()


def test_wrong_settings_and_places_end_with_the_contracts_exit_codes(source, tmp_path, capsys, monkeypatch):
    assert download(source, tmp_path / "data", "--workers", "0", "--max_files", "-1") == 2
    assert "2 problems" in capsys.readouterr().err
    assert download(tmp_path / "empty", tmp_path / "data") == 3
    assert "found nothing" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert download(source, tmp_path / "file" / "data") == 4
    assert capsys.readouterr().err.startswith("storage error: ")
    monkeypatch.setattr(download_data, "free_disk_bytes", lambda folder: 1000)
    assert download(source, tmp_path / "data") == 4
    assert "4 shards need" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


def test_shards_behind_fsspec_are_staged_and_known_again_by_the_manifest(source, tmp_path, capsys):
    url = f"memory://{tmp_path.name}"
    fs, root = fsspec.url_to_fs(url)
    fs.put(f"{source}/", root, recursive=True)
    for _ in range(2):  # nothing there tells a checksum, so nothing is known to be right
        assert download(url, tmp_path / "data") == 0
        assert "4 downloaded now" in capsys.readouterr().out
    staged = content(tmp_path / "data")
    assert {name: data for name, data in staged.items() if name != "manifest.json"} == content(source)
    fs.pipe_file(f"{root}/manifest.json", staged["manifest.json"])
    (tmp_path / "data" / "s_0.npz").unlink()
    assert download(url, tmp_path / "data") == 0
    assert "1 downloaded now" in capsys.readouterr().out
    assert content(tmp_path / "data") == staged
    fs.pipe_file(f"{root}/s_1.npz", b"torn")
    assert download(url, tmp_path / "data") == 3
    assert "s_1.npz" in capsys.readouterr().err


def test_the_command_stages_a_file_url(source, tmp_path):
    run = run_script("download_data", "--data", source.as_uri(), "--output_dir", "data", "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["tokens"] == 206
    assert {name: data for name, data in content(tmp_path / "data").items() if name != "manifest.json"} == content(
        source
    )


def test_training_reads_a_file_url(tmp_path):
    shards = make_shards(tmp_path / "elsewhere" / "with space")
    ended = train(tmp_path, "--data", shards.as_uri(), "--max-steps", "2")
    assert ended.code == 0, ended.output
    assert "6 shards, 12,000 tokens" in ended.output
    refused = train(tmp_path, "--data", shards.as_uri(), "--checkpoints", "s3://bucket/x")
    assert refused.code == 2 and "a commit needs a creation" in refused.output
