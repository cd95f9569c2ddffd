"""Bad input and faults, met by the real command: the exit code of the contract and one line that names the mend.

A start that is refused leaves nothing behind; a run that meets a fault it can outlast ends as if there had been none.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.checkpoint import damaged_files
from pretrain.discovery import take_inventory
from pretrain.manifest import DataManifest
from pretrain.storage import ObjectStore
from scripts.make_demo_data import entry_of
from tests.runs import (
    PATIENCE_S,
    ROOT,
    RUN,
    VOCAB_SIZE,
    Ended,
    commits,
    make_shards,
    plain_environment,
    store_of,
    train,
)

TRAIN_PY = str(ROOT / "train.py")
KEY_IN_PROJECT = str(ROOT / "credentials" / "key.json")
IMPATIENT = ("--storage.timeout_s", "1", "--storage.deadline_s", "30", "--storage.max_backoff_s", "0.02")
GIVES_UP = ("--storage.deadline_s", "0.5", "--storage.max_backoff_s", "0.02")  # once something has failed
LISTING, STAT, DOWNLOAD, UPLOAD = r"GET \S+/o\?", r"GET /storage\S+/o/", "GET /download", "POST /upload"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run starts, with shards beside it."""
    make_shards(tmp_path / "shards")
    return tmp_path


@pytest.fixture
def shards_in_bucket(folder: Path, bucket_url: str) -> str:
    """The shards of `folder`, one of them in a nested folder of the bucket."""
    upload(folder, f"{bucket_url}/data")
    return f"{bucket_url}/data"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB: two checkpoints of the tiny run, not three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with contextlib.ExitStack() as stack:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small disk needs the right to mount one")
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        yield disk


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


def upload(folder: Path, url: str) -> ObjectStore:
    store = store_of(url)
    for index, path in enumerate(sorted((folder / "shards").iterdir())):
        store.upload(path, f"nested/{path.name}" if index == 1 else path.name)
    return store


def assert_refused(ended: Ended, code: int, *words: str) -> None:
    """The exit code, and one line that holds these words."""
    assert ended.code == code, ended.output
    assert "Traceback" not in ended.output, ended.output
    assert len(ended.errors) == 1, ended.output
    missing = [word for word in words if word not in ended.errors[0]]
    assert not missing, ended.output


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "logs" / RUN / "summary.json").read_text()))


def training_log(folder: Path) -> str:
    return (folder / "logs" / RUN / "training.log").read_text()


def local_steps(folder: Path) -> list[int]:
    """Steps of the local checkpoints that verify, file by file; another that claims to be one fails the test."""
    inventory = take_inventory(folder, None, RUN)
    assert not inventory.damaged
    for name, manifest in inventory.local.items():
        assert damaged_files(manifest, folder / str(name)) == []
    return sorted(name.step for name in inventory.local)


# ---- settings: exit code 2 ----


def test_every_mistake_is_told_at_once_and_before_torch_is_imported(folder):
    mistakes = ("--max-stepz", "5", "--model.size", "2B", "--train.precision", "fp17", "--batch.micro_size", "two")
    command = [sys.executable, "-X", "importtime", TRAIN_PY]
    ended = train(folder, *mistakes, command=command)
    imported = {line.split("|")[-1].strip() for line in ended.output.splitlines() if line.startswith("import time:")}
    assert "jsonargparse" in imported and not imported & {"torch", "numpy", "google.cloud.storage"}
    told = [line for line in ended.output.splitlines() if not line.startswith("import time:")]
    assert (ended.code, told[0]) == (2, "config error: 3 problems"), ended.output
    assert len(told) == 4
    for problem in ("--max-stepz: did you mean --max-steps?", "'fp17', expected one of", "micro_size is 'two'"):
        assert any(problem in line for line in told[1:])
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lerning_rate", "1"], ["unknown option --lerning_rate"]),
        (["--data.sauce", "x"], ["unknown option --data.sauce", "did you mean --data.source?"]),
        (["--batch.global_size", "7"], ["7 is not divisible by micro_size 2", "one of [1, 7]"]),
        (["--model.size", "2B"], ["model.size is '2B'", "125M", "custom"]),
        (["--config", "nothing"], ["no config 'nothing'", "production, test"]),
        (["--config", "bad.yaml"], ["bad.yaml is not valid YAML", "line 2"]),
        (["--config", "wrong.yaml"], ["wrong.yaml: unknown option --model.depth"]),
        (["--engine", "deepspeed", "--engine.ds_config", "ds.json"], ["ds.json says train_batch_size = 3", "gives 8"]),
    ],
    ids=lambda value: value[-1] if value[0].startswith("--") else "",
)
def test_a_wrong_setting_is_named_with_its_mend(folder, options, words):
    (folder / "bad.yaml").write_text("model: {size: [\n")
    (folder / "wrong.yaml").write_text("model: {depth: 3}\n")
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 3}')
    assert_refused(train(folder, *options), 2, *words)


def test_another_version_of_a_package_is_refused_unless_told_otherwise(folder):
    older = folder / "packages" / "tenacity-0.0.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: tenacity\nVersion: 0.0.1\n")
    environment = plain_environment(PYTHONPATH=f"{older.parent}:{ROOT}")
    (folder / "empty").mkdir()
    options = ("--log.version_check", "true", "--data", "empty")
    refused = train(folder, *options, environment=environment)
    assert_refused(refused, 2, "tenacity is 0.0.1, requirements.txt pins", "setup_env.sh", "--no-version-check")
    assert_refused(train(folder, *options, "--no-version-check", environment=environment), 3, "no shards")


def test_fp16_on_a_cpu_names_what_the_cpu_can(folder):
    words = ("fp16", "a CPU can't", "fp32, bf16", "--precision bf16")
    assert_refused(
        train(folder, "--precision", "fp16", environment=plain_environment(CUDA_VISIBLE_DEVICES="")), 2, *words
    )


def test_a_port_in_use_is_named(folder):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        two_nodes = ["--nnodes=2", "--node_rank=0", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
        launcher = [
            sys.executable,
            "-m",
            "pretrain.launch",
            *two_nodes,
            f"--master_port={port}",
            str(ROOT / "train.py"),
        ]
        assert_refused(train(folder, command=launcher), 2, f"127.0.0.1:{port}", "in use", "take another MASTER_PORT")
        by_hand = plain_environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        assert_refused(train(folder, environment=by_hand), 2, f"MASTER_PORT {port}", "in use", "Take another")


def test_the_embedded_buckets_port_in_use_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, str(ROOT / "scripts" / "embedded_bucket.py"), "--root", str(tmp_path / "root")]
        command += ["--port", port, "--endpoint-file", str(tmp_path / "endpoint")]
        done = subprocess.run(
            command, env=plain_environment(), capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    assert_refused(Ended(done.returncode, done.stdout + done.stderr), 4, f"port {port}", "in use", "--port 0")
    assert not (tmp_path / "endpoint").exists()


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("STORAGE_EMULATOR_HOST", "127.0.0.1:9023", ["needs a scheme", "http://127.0.0.1:9023"]),
        (
            "GOOGLE_APPLICATION_CREDENTIALS",
            str(ROOT / "credentials" / "key.json"),
            ["inside the project", "Move it out"],
        ),
    ],
)
def test_the_way_to_the_bucket_is_checked_before_it_is_taken(folder, variable, value, words):
    assert_refused(train(folder, "--data", "gs://b/p", environment=plain_environment(**{variable: value})), 2, *words)


# ---- data: exit code 3 ----


def test_a_prefix_without_shards_says_what_is_there_instead(folder, shards_in_bucket):
    store_of(shards_in_bucket).create("notes/readme.txt", b"nothing here")
    assert_refused(train(folder, "--data", f"{shards_in_bucket}/nowhere"), 3, "/nowhere", "found nothing")
    assert_refused(train(folder, "--data", f"{shards_in_bucket}/notes"), 3, "found 1 other objects", "readme.txt")


# two ranks and a bad shard: test_streaming.py in the ordinary suite
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_truncated_shard_stops_the_run_with_one_line_however_many_ranks_see_it(folder, bucket_url, ranks):
    path = sorted((folder / "shards").iterdir())[3]
    path.write_bytes(path.read_bytes()[:300])
    upload(folder, bucket_url)
    stopped = train(folder, "--data", bucket_url, ranks=ranks)
    assert_refused(stopped, 3, f"{bucket_url}/{path.name}", "not a readable .npz", "--data.on_bad_shard skip")
    if ranks == 1:
        gone_on = train(folder, "--data", bucket_url, "--data.on_bad_shard", "skip", "--max-steps", "3")
        assert (gone_on.code, gone_on.errors) == (0, []), gone_on.output
        told = summary(folder)
        assert (told["shards_skipped"], told["skipped_shard_names"], told["steps"]) == (1, [path.name], 3)
        assert f"left out: shard {bucket_url}/{path.name}" in training_log(folder)


def test_token_ids_beyond_the_vocabulary_are_refused(folder):
    np.savez(folder / "shards" / "tokenized_cleaned_002.npz", input_ids=np.array([5, VOCAB_SIZE, 7], dtype=np.uint16))
    words = ("tokenized_cleaned_002.npz", f"token id {VOCAB_SIZE}", f"vocabulary of {VOCAB_SIZE}", "--model.vocab_size")
    assert_refused(train(folder), 3, *words)


def test_a_vocabulary_that_is_not_the_manifests_is_refused(folder):
    entries = tuple(entry_of(path) for path in sorted((folder / "shards").iterdir()))
    (folder / "shards" / "manifest.json").write_text(DataManifest("bpe-300", 300, None, entries).to_json())
    words = ("manifest.json says vocab_size 300", f"model.vocab_size {VOCAB_SIZE}", "Set --model.vocab_size 300")
    assert_refused(train(folder), 3, *words)


# ---- storage: exit code 4 ----


def test_a_bucket_that_does_not_exist_is_named(folder, bucket_url):
    words = ("there is no bucket no-such-bucket", "gcloud storage buckets create gs://no-such-bucket")
    assert_refused(train(folder, "--data", "gs://no-such-bucket/shards"), 4, *words)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("403", ["lacks storage.objects.list", "add-iam-policy-binding", "roles/storage.objectViewer"]),
        ("401", ["is not logged in", "gcloud auth application-default login"]),
    ],
)
def test_a_bucket_that_is_closed_says_what_opens_it(folder, shards_in_bucket, fault_proxy, status, words):
    fault_proxy.inject(status, times=-1)
    assert_refused(train(folder, "--data", shards_in_bucket), 4, shards_in_bucket, *words)
    assert fault_proxy.count() == 1  # asking again would not open it


def test_a_bucket_that_never_answers_is_given_up_within_the_deadline(folder, shards_in_bucket, fault_proxy):
    fault_proxy.inject("stall", times=-1)
    options = ("--data", shards_in_bucket, "--checkpoints", "gs://fake/x", "--resume", "auto", *GIVES_UP)
    ended = train(folder, *options, "--storage.timeout_s", "0.3")
    assert_refused(ended, 4, "list gs://fake/x", "gave up after", "timed out", "storage.deadline_s")
    assert "step 1/" not in ended.output  # what can't be read is no reason to start afresh


@pytest.mark.parametrize(
    ("option", "ranks"),
    [("--checkpoint.dir", 1), ("--data.cache_dir", 1), ("--checkpoints", 1), ("--log.dir", 2)],  # rank 0's alone: logs
)
def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(folder, option, ranks):
    (folder / "file").write_text("a file, where a folder is wanted")
    ended = train(folder, option, "file/below", ranks=ranks)
    assert_refused(ended, 4, "file/below", "Not a directory", "" if option == "--checkpoints" else option)
    assert "step 1/" not in ended.output


def test_a_read_only_disk_is_told_before_the_first_step(folder, small_disk):
    remount(small_disk, "ro")
    ended = train(folder, "--checkpoint.dir", str(small_disk))
    assert_refused(ended, 4, str(small_disk), "Read-only file system", "--checkpoint.dir")
    assert "step 1/" not in ended.output


def test_a_disk_that_fills_up_with_checkpoints_stops_the_run_and_keeps_the_good_ones(folder, small_disk):
    options = ("--checkpoint.dir", str(small_disk), "--checkpoint.every_steps", "3")
    ended = train(folder, *options, "--checkpoint.keep", "0")
    assert_refused(ended, 4, str(small_disk), "No space left on device", "--checkpoint.dir")
    assert local_steps(small_disk / RUN) == [3, 6]
    assert len(list((small_disk / RUN).glob("*/"))) == 2  # nothing half-written is left
    remount(small_disk, "size=8m")
    resumed = train(folder, *options, "--resume", "auto")
    assert resumed.code == 0 and "resumed checkpoint-epoch0-step6-files" in resumed.output, resumed.output
    assert local_steps(small_disk / RUN) == [6, 9, 12]


def test_a_cache_without_room_is_told_before_the_download(folder, small_disk, shards_in_bucket, fault_proxy):
    (small_disk / "fill").write_bytes(bytes((1 << 20) - (16 << 10)))
    ended = train(folder, "--data", shards_in_bucket, "--data.cache_dir", str(small_disk / "cache"))
    assert_refused(ended, 4, str(small_disk), "MiB free", "6 shards need", "--data.cache_dir")
    assert fault_proxy.count(DOWNLOAD) == 0


def test_a_disk_that_fills_up_with_the_cache_stops_the_run_and_leaves_no_half_shard(folder, small_disk):
    zeros = np.zeros(1 << 20, dtype=np.uint16)  # 2 MiB that look like 2 KiB before they are inflated
    np.savez_compressed(folder / "shards" / "tokenized_cleaned_003.npz", input_ids=zeros)
    ended = train(folder, "--data.cache_dir", str(small_disk / "cache"))
    assert_refused(ended, 4, str(small_disk), "the disk is full", "Free space")
    left = [path.name for path in (small_disk / "cache").rglob("*") if path.is_file()]
    assert not any(name.startswith((".", "tokenized_cleaned_003")) for name in left), left


# ---- faults that a run outlasts ----


def test_a_run_outlasts_every_fault_of_the_network(folder, shards_in_bucket, bucket_url, fault_proxy):
    answers, breaks = ["503", "429", "500", "408"], ["reset", "stall", "truncate", "lost-reply"]
    for place, faults in {
        LISTING: ["503", "reset", "truncate"],
        STAT: ["429", "reset"],
        DOWNLOAD: [*answers, *breaks, "corrupt"],
        UPLOAD: [*answers, *breaks, "corrupt"],
    }.items():
        for number, fault in enumerate(faults):
            fault_proxy.inject(fault, place, skip=2 * number if place == UPLOAD else 0)
    options = ("--data", shards_in_bucket, "--checkpoints", f"{bucket_url}/saved", "--checkpoint.every_steps", "4")
    # Without copies of the logs, which would meet some of the faults instead of the checkpoints.
    ended = train(folder, *options, "--log.upload", "false", *IMPATIENT)
    assert (ended.code, ended.errors) == (0, []), ended.output
    assert fault_proxy.pending() == 0
    told = summary(folder)
    committed = (told["checkpoints_committed"], told["checkpoints_verified"], told["uploads_failed"])
    assert (told["steps"], *committed) == (12, 3, 3, 0)
    assert commits(f"{bucket_url}/saved") == local_steps(folder / "checkpoints" / RUN) == [4, 8, 12]
    log = training_log(folder)
    for action, least in {"list": 3, "download": 9, "(upload|create)": 9}.items():
        assert len(re.findall(rf"WARNING.* {action} gs://\S+: try \d+ failed \(.+\), next in", log)) >= least, log
    for cause in ("503 injected", "429 injected", "reset by peer", "timed out", "crc32c"):
        assert cause in log


def test_an_outage_leaves_the_checkpoints_here_and_the_next_start_uploads_them(folder, bucket_url, fault_proxy):
    url = f"{bucket_url}/saved"
    options = ("--checkpoints", url, "--checkpoint.every_steps", "3", "--resume", "auto")
    fault_proxy.inject("503", UPLOAD, times=-1, skip=1)  # the probe at the start passes
    cut_off = train(folder, *options, *GIVES_UP)
    assert_refused(cut_off, 4, "the run has ended, but checkpoint-epoch0-step12-", "did not reach", "--resume auto")
    told = summary(folder)
    assert (told["steps"], told["checkpoints_committed"], told["uploads_failed"]) == (12, 0, 4)
    assert cut_off.output.count("stays local, its upload is tried again, by the next start at the latest: ") == 4
    assert local_steps(folder / "checkpoints" / RUN) == [3, 6, 9, 12]  # more than --checkpoint.keep
    assert commits(url) == []

    fault_proxy.clear()
    back = train(folder, *options, "--max-steps", "14")
    assert back.code == 0, back.output
    told = summary(folder)
    assert (told["steps"], told["checkpoints_committed"], told["checkpoints_verified"]) == (14, 5, 3)
    assert commits(url) == local_steps(folder / "checkpoints" / RUN) == [9, 12, 14]
