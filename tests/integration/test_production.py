"""setup_prod.sh and prod_train.sh as a user runs them, on two CPU processes and the embedded bucket."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pretrain.arguments import parse, to_yaml
from pretrain.manifest import DataManifest
from tests.emulators import embedded_bucket
from tests.fault_proxy import FaultProxy
from tests.helpers_training import flip_a_byte
from tests.runs import ROOT, Ended, StartedProcess, commits, losses, make_shards, store_of, tiny_config

DOWNLOAD = "GET /download"
NO_GPU = "exit 9"
KEPT = ("PATH", "HOME", "TMPDIR", "LANG", "STORAGE_EMULATOR_HOST")  # a developer's own GPUS or DATA must not leak in


@dataclass(frozen=True)
class Machine:
    """A folder to work in, and a PATH on which `nvidia-smi` says what the test wants."""

    folder: Path

    def run(self, script: str, *arguments: str, gpus: str = NO_GPU, **variables: str) -> Ended:
        """`bash SCRIPT ARGUMENTS` with these environment variables."""
        tool = self.folder / "bin" / "nvidia-smi"
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f"#!/bin/sh\n{gpus}\n")
        tool.chmod(0o755)
        environment = {name: os.environ[name] for name in KEPT if name in os.environ}
        environment |= {"PATH": f"{tool.parent}:{environment['PATH']}", "CUDA_VISIBLE_DEVICES": "", **variables}
        environment["OMP_NUM_THREADS"] = "1"
        with StartedProcess(self.folder, ["bash", str(ROOT / script), *arguments], environment) as started:
            return started.wait()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """The embedded bucket gs://demo with six shards, two of them in a nested folder; the proxy counts its requests."""
    paths = sorted(make_shards(tmp_path / "shards").iterdir())
    with embedded_bucket(tmp_path / "bucket") as emulator, FaultProxy(emulator.endpoint) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.endpoint)
        store = store_of("gs://demo/tokenized")
        for index, path in enumerate(paths):
            store.upload(path, f"part-1/{path.name}" if index > 3 else path.name)
        proxy.clear()
        yield proxy


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.npz")}


def test_setup_prod_stages_every_shard_once_and_mends_a_damaged_one(machine, bucket):
    staged, variables = machine.folder / "staged", {"DATA": "gs://demo/tokenized"}
    variables["DATA_DIR"] = str(staged)
    first = machine.run("setup_prod.sh", **variables)
    assert first.code == 0, first.output
    assert "6 shards" in first.output and "12,000 tokens" in first.output and "6 downloaded now" in first.output
    assert f"DATA={staged} CHECKPOINTS=gs://your-bucket/Checkpoints bash prod_train.sh" in first.output
    originals = {path.name: path.read_bytes() for path in (machine.folder / "shards").iterdir()}
    there = contents(staged)
    assert {name.rpartition("/")[2]: data for name, data in there.items()} == originals
    assert sorted(name for name in there if "/" in name) == [f"part-1/tokenized_cleaned_00{n}.npz" for n in (4, 5)]
    manifest = DataManifest.from_json((staged / "manifest.json").read_bytes())
    assert [entry.name for entry in manifest.shards] == sorted(there) and manifest.n_tokens == 12_000
    assert bucket.count(DOWNLOAD) == 6

    bucket.clear()
    second = machine.run("setup_prod.sh", **variables)
    assert second.code == 0 and "0 downloaded now" in second.output, second.output
    assert bucket.count(DOWNLOAD) == 0

    flip_a_byte(staged / "part-1" / "tokenized_cleaned_005.npz", offset=500)
    third = machine.run("setup_prod.sh", **variables)
    assert third.code == 0 and "1 downloaded now" in third.output, third.output
    assert contents(staged) == there
    assert bucket.count(DOWNLOAD) == 1


def test_prod_train_trains_on_two_ranks_and_goes_on_where_it_ended(machine, bucket):
    folder = machine.folder
    where = ["--checkpoint.dir", str(folder / "checkpoints"), "--log.dir", str(folder / "logs")]
    where += ["--data.cache_dir", str(folder / "cache")]
    options = [*where, "--engine", "deepspeed", "--checkpoint.every_steps", "3"]
    variables = {"GPUS": "2", "PRECISION": "bf16", "CONFIG": str(tiny_config(folder)), "RUN": "rehearsal"}
    variables |= {"DATA": str(folder / "shards"), "CHECKPOINTS": "gs://demo/Checkpoints"}
    first = machine.run("prod_train.sh", *options, "--max-steps", "6", **variables)
    assert first.code == 0, first.output
    assert "0 failed" in first.output and "ready to train" in first.output
    assert "between 2 ranks (gloo)" in first.output  # the doctor's ranks are real ones
    assert "run rehearsal has no checkpoint yet, starting afresh" in first.output
    assert "engine deepspeed, bf16, 2 ranks" in first.output
    assert commits("gs://demo/Checkpoints", "rehearsal") == [3, 6]

    second = machine.run("prod_train.sh", "--skip-doctor", *options, "--max-steps", "9", **variables)
    assert second.code == 0 and "ready to train" not in second.output, second.output
    assert "resumed checkpoint-epoch0-step6-" in second.output
    assert commits("gs://demo/Checkpoints", "rehearsal") == [3, 6, 9]
    assert list(losses(folder, "rehearsal")) == list(range(1, 10))


def test_prod_train_starts_nothing_where_the_doctor_says_no(machine, bucket):
    folder = machine.folder
    bucket.inject("403", match="POST /upload", times=-1)
    where = ["--checkpoint.dir", str(folder / "checkpoints"), "--log.dir", str(folder / "logs")]
    where += ["--data.cache_dir", str(folder / "cache"), "--model.vocab_size", "100"]
    variables = {"GPUS": "2", "CONFIG": str(tiny_config(folder)), "DATA": "gs://demo/tokenized"}
    done = machine.run("prod_train.sh", *where, CHECKPOINTS="gs://demo/Checkpoints", **variables)
    assert done.code == 3, done.output  # data before storage: a bucket may come back
    lines = [line.split() for line in done.output.splitlines()]
    assert [line[1:3] for line in lines if line[:1] == ["FAIL"]] == [["checkpoint", "write"], ["vocabulary", "shard"]]
    assert "lacks storage.objects.create" in done.output and "add-iam-policy-binding gs://demo" in done.output
    assert "not ready (exit code 3)" in done.output and "prod_train: not started" in done.output
    assert "Traceback" not in done.output
    assert not [name for name in ("checkpoints", "logs", "cache") if (folder / name).exists()]


@pytest.mark.parametrize("code", [0, 2, 3, 4, 75])
def test_only_where_nothing_but_storage_failed_prod_train_goes_on(machine, code):
    script = machine.folder / "prod_train.sh"
    script.write_text((ROOT / script.name).read_text())
    (machine.folder / "setup_env.sh").write_text("")
    python = machine.folder / ".venv" / "bin" / "python"  # a doctor that ends with the code, and what would be started
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\n[[ "$1" != scripts/doctor.py ]] || exit {code}\necho "started: $*"\n')
    python.chmod(0o755)
    done = machine.run(str(script), DATA="gs://b/shards", GPUS="2")
    starts = code in (0, 4)
    assert done.code == (0 if starts else code), done.output
    assert ("started: -m pretrain.supervise --max-restarts=3" in done.output) == starts
    assert ("storage failed, and nothing else" in done.output) == (code == 4)
    assert ("prod_train: not started" in done.output) != starts


def test_a_dry_run_prints_the_command_and_the_config_and_starts_nothing(machine):
    variables = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "DATA": "gs://b/a b", "PRECISION": "bf16"}
    variables |= {"MAX_RESTARTS": "5", "GRACE_S": "20"}
    done = machine.run("prod_train.sh", "--dry-run", "--lr", "3e-4", CHECKPOINTS="gs://b/Checkpoints", **variables)
    assert done.code == 0, done.output
    head, _, config = done.output.partition("\n# resolved config on 16 ranks\n")
    *_, title, command, _ = head.split("\n")
    assert title == "# launch command"
    launcher = "--nproc_per_node=8 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500"
    options = ["--config", "production", "--data", "gs://b/a b", "--precision", "bf16"]
    options += ["--checkpoints", "gs://b/Checkpoints", "--resume", "auto", "--lr", "3e-4"]
    supervisor = [".venv/bin/python", "-m", "pretrain.supervise", "--max-restarts=5", "--grace-s=20", "--"]
    expected = [".venv/bin/python", "-m", "pretrain.launch", *launcher.split(), "train.py", *options]
    assert shlex.split(command) == supervisor + expected
    resolved = parse(options, world_size=16).config
    assert config == to_yaml(resolved)
    assert (resolved.model.size, resolved.batch.accumulation(16), resolved.optim.lr) == ("1.2B", 1, 3e-4)
    assert sorted(path.name for path in machine.folder.iterdir()) == ["bin", "output-0.txt"]


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"GPUS": "0"}, ["GPUS=0 is not a number of processes"]),
        ({"GPUS": "eight"}, ["GPUS=eight is not a number of processes", "GPUS=8"]),
        ({"NNODES": "0"}, ["NNODES=0 is not a number of nodes"]),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "x"}, ["NODE_RANK=2", "from 0 to 1"]),
        ({"NNODES": "2:1"}, ["NNODES=2:1 is not a number of nodes", "NNODES=1:4"]),
        ({"NNODES": "2"}, ["NNODES=2 needs MASTER_ADDR"]),
        ({"NNODES": "2", "MASTER_ADDR": "x", "MEET_S": "soon"}, ["MEET_S=soon is not a number of seconds"]),
        ({"HOSTFILE": "hosts", "NNODES": "2"}, ["HOSTFILE and NNODES are both set", "Unset NNODES"]),
        ({"MAX_RESTARTS": "-1"}, ["MAX_RESTARTS=-1 is not a number of restarts"]),
        ({"GRACE_S": "20s"}, ["GRACE_S=20s is not a number of seconds", "GRACE_S=20"]),
        ({}, ["no NVIDIA GPU on this machine", "GPUS=2 PRECISION=bf16"]),
        ({"GPUS": "4", "gpus": "echo 'GPU 0: A'; echo 'GPU 1: B'"}, ["GPUS=4, but this machine has 2", "GPUS=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_variable_that_cannot_be_is_refused_before_anything_starts(machine, variables, words):
    done = machine.run("prod_train.sh", DATA="gs://b/shards", **variables)
    assert done.code == 2, done.output
    (line,) = [line for line in done.output.splitlines() if "error" in line]
    assert line.startswith("prod_train error: ") and all(word in line for word in words)


def test_what_train_py_refuses_the_dry_run_refuses(machine):
    done = machine.run("prod_train.sh", "--dry-run", "--batch.micro_size", "7", DATA="gs://b/shards", PRECISION="fp12")
    assert done.code == 2 and "train.precision is 'fp12'" in done.output, done.output
    without_data = machine.run("setup_prod.sh")
    assert without_data.code == 2 and "DATA is not set" in without_data.output


def test_a_hostfile_gives_the_launch_command_of_this_node_and_a_wrong_one_is_refused(machine):
    hosts = machine.folder / "hosts"
    hosts.write_text("10.255.0.1 slots=4\n10.255.0.2 slots=4\n")
    options = ("--dry-run", "--batch.micro_size", "1")
    done = machine.run("prod_train.sh", *options, DATA="gs://b/shards", HOSTFILE=str(hosts), NODE_RANK="1")
    assert done.code == 0, done.output
    assert "--nproc_per_node=4 --nnodes=2 --node_rank=1 --master_addr=10.255.0.1" in done.output
    assert "# resolved config on 8 ranks" in done.output
    elsewhere = machine.run("prod_train.sh", *options, DATA="gs://b/shards", HOSTFILE=str(hosts))
    assert elsewhere.code == 2 and "has no line for this machine" in elsewhere.output, elsewhere.output
    assert len(elsewhere.errors) == 1
