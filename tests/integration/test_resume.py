"""A run that is killed, stopped, started twice or elsewhere: real processes, and the real client on an emulator.

Every comparison is with a run that was left alone. On as many ranks it is exact: losses, gradient norms, learning
rates, weights and moments, to the last bit, with dropout on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from pretrain.discovery import damaged_objects
from pretrain.uploads import list_commits
from tests.emulators import free_port
from tests.helpers_training import flip_a_byte
from tests.runs import (
    ROOT,
    RUN,
    Ended,
    TrainingProcess,
    become_a_new_machine,
    commits,
    differing,
    final_state,
    losses,
    make_shards,
    metrics,
    plain_environment,
    remove_local_checkpoints,
    store_of,
    train,
)

ZERO2_BF16 = ("--engine", "deepspeed", "--precision", "bf16")
NATIVE_BF16 = ("--engine", "native", "--precision", "bf16", "--max-steps", "120")
RELATIVE_TOLERANCE = 1e-5  # fp32 sums in another order, over the rest of a run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A machine's disk, with the shards that every machine has."""
    make_shards(tmp_path / "shards")
    return tmp_path


@pytest.fixture(scope="module")
def without_a_compiler(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run left alone, that asked for DeepSpeed on a machine with neither compiler nor ninja: its folder, its end."""
    folder = tmp_path_factory.mktemp("without-a-compiler")
    make_shards(folder / "shards")
    (folder / "bin").mkdir()
    environment = plain_environment(PATH=str(folder / "bin"), TORCH_EXTENSIONS_DIR=str(folder / "extensions"))
    environment = {name: value for name, value in environment.items() if name not in ("CC", "CXX")}
    ended = train(folder, *ZERO2_BF16, "--max-steps", "120", ranks=2, environment=environment)
    assert ended.code == 0, ended.output
    return folder, ended


def another(folder: Path, name: str) -> Path:
    """The disk of another machine."""
    shutil.copytree(folder / "shards", folder / name / "shards")
    return folder / name


def lines_of_metrics(folder: Path) -> int:
    return len((folder / "logs" / RUN / "metrics.jsonl").read_text().splitlines())


def checkpoint_named(url: str, step: int) -> str:
    return next(str(name) for name in list_commits(store_of(url), RUN) if name.step == step)


def damaged_steps(url: str) -> list[int]:
    """Steps whose commit in the bucket doesn't verify."""
    store = store_of(url)
    manifests = [(name.step, commit.manifest) for name, commit in list_commits(store, RUN).items()]
    return [step for step, manifest in manifests if not manifest or damaged_objects(manifest, store, RUN)]


# ---- killed ----


def test_a_run_killed_on_two_ranks_under_zero_2_resumes_as_if_it_never_was(folder, bucket_url):
    options = (*ZERO2_BF16, "--max-steps", "60", "--checkpoint.every_steps", "7")
    undisturbed = another(folder, "undisturbed")
    here = ("--checkpoints", f"{bucket_url}/killed", "--resume", "auto")
    held = plain_environment(PRETRAIN_FAILPOINT="loop.before_step:25:hang")  # or it may be over before it is killed
    with (
        TrainingProcess(undisturbed, *options, "--checkpoints", f"{bucket_url}/alone", ranks=2) as alone,
        TrainingProcess(folder, *options, *here, ranks=2, environment=held) as training,
    ):
        training.until(lambda: commits(f"{bucket_url}/killed"), "a commit")
        training.until_step(24)
        training.kill()
        assert training.process.returncode == -signal.SIGKILL
        left_alone = alone.wait()
    assert left_alone.code == 0 and "engine deepspeed, bf16, 2 ranks" in left_alone.output, left_alone.output
    killed_at, newest = training.step, commits(f"{bucket_url}/killed")[-1]
    assert newest < killed_at < 60

    remove_local_checkpoints(folder)
    resumed = train(folder, *options, *here, ranks=2)
    assert resumed.code == 0, resumed.output
    assert f": step {newest}, Position(" in resumed.output
    assert lines_of_metrics(folder) == killed_at + 60 - newest  # the steps after the checkpoint were taken twice
    assert losses(folder) == losses(undisturbed) and len(losses(folder)) == 60
    assert differing(final_state(folder), final_state(undisturbed)) == []
    assert commits(f"{bucket_url}/killed") == commits(f"{bucket_url}/alone") == [49, 56, 60]
    assert damaged_steps(f"{bucket_url}/killed") == []


@pytest.mark.parametrize(
    "passages",
    [[(1, "native")], pytest.param([(1, "deepspeed"), (2, "native")], marks=pytest.mark.slow)],
    ids=["both", "each"],
)
def test_a_checkpoint_resumes_on_other_ranks_and_another_engine(folder, passages):
    # Dropout is off: its seed is (seed, step, rank), so another number of ranks draws other masks.
    options = ("--max-steps", "16", "--checkpoint.every_steps", "6", "--model.dropout", "0", "--resume", "auto")
    alone = train(folder, *options, "--engine", "deepspeed", ranks=2)
    assert alone.code == 0, alone.output
    (middle,) = (folder / "checkpoints" / RUN).glob("checkpoint-*-step6-*")
    expected = losses(folder)
    for ranks, engine in passages:
        machine = another(folder, f"{engine}-{ranks}")
        shutil.copytree(middle, machine / "checkpoints" / RUN / middle.name)
        ended = train(machine, *options, "--engine", engine, ranks=ranks)
        assert ended.code == 0, ended.output
        assert f"engine {engine}, fp32, {ranks} rank" in ended.output and "step6-files" in ended.output
        assert list(losses(machine)) == list(range(7, 17))
        for step, measured in losses(machine).items():
            assert measured == pytest.approx(expected[step], rel=RELATIVE_TOLERANCE)


def test_what_a_kill_of_the_launcher_kept_from_the_bucket_is_uploaded_by_the_next_start(
    folder, fault_proxy, bucket_url
):
    options = ("--max-steps", "16", "--checkpoint.every_steps", "4", "--checkpoint.keep", "2")
    options += ("--checkpoints", bucket_url, "--resume", "auto")
    fault_proxy.inject("stall", match="^POST .*upload", times=1_000_000, skip=1)  # the probe at the start passes
    saved = folder / "checkpoints" / RUN
    with TrainingProcess(folder, *options, ranks=2) as training:
        training.until(lambda: len(list(saved.glob("checkpoint-*/manifest.json"))) == 4, "four local commits")
        training.signal(signal.SIGKILL)
        training.until_all_gone()  # its ranks end with it: left behind, they would go on writing
    assert commits(bucket_url) == []
    attempts = {
        path.parent.name: json.loads(path.read_text())["attempt"] for path in saved.glob("checkpoint-*/manifest.json")
    }

    fault_proxy.clear()
    resumed = train(folder, *options)
    assert resumed.code == 0, resumed.output
    assert resumed.output.count("was not uploaded before: queued") == 4
    in_bucket = {str(name): commit.manifest for name, commit in list_commits(store_of(bucket_url), RUN).items()}
    assert {name: manifest.attempt for name, manifest in in_bucket.items()} == {
        name: attempt for name, attempt in attempts.items() if "-step12-" in name or "-step16-" in name
    }
    assert damaged_steps(bucket_url) == []


# ---- stopped ----


@pytest.mark.parametrize(
    "numbers",
    # tests/unit/test_launch.py passes a Ctrl+C on to every rank in the ordinary suite, and test_stopping.py answers it
    [(signal.SIGTERM,), pytest.param((signal.SIGTERM, signal.SIGINT), marks=pytest.mark.slow)],
    ids=["SIGTERM", "both"],
)
def test_sigterm_and_ctrl_c_save_and_the_resumed_run_goes_on_as_if_never_stopped(
    folder, bucket_url, without_a_compiler, numbers
):
    options = (*NATIVE_BF16, "--checkpoints", bucket_url, "--resume", "auto")
    for number in numbers:
        with TrainingProcess(folder, *options, ranks=2) as training:
            before = training.step
            training.until_step(before + 5)
            training.signal(number)
            stopped = training.wait()
        assert stopped.code == 75, stopped.output
        assert f"asked to stop ({number.name}): ending at step {training.step}" in stopped.output
        assert before < training.step < 120
        assert commits(bucket_url)[-1] == training.step and damaged_steps(bucket_url) == []
        assert json.loads((folder / "logs" / RUN / "summary.json").read_text())["finished"] is False
        remove_local_checkpoints(folder)
    ended = train(folder, *options, ranks=2)
    assert ended.code == 0, ended.output
    undisturbed, _ = without_a_compiler
    assert losses(folder) == losses(undisturbed) and len(losses(folder)) == lines_of_metrics(folder) == 120
    assert differing(final_state(folder), final_state(undisturbed)) == []


# ---- what to start from ----


def test_resume_finds_the_newest_sound_checkpoint_and_refuses_what_is_not_there(folder, bucket_url):
    options = ("--max-steps", "12", "--checkpoint.every_steps", "4", "--checkpoints", bucket_url)
    started = train(folder, *options, "--resume", "auto", "--no-background-upload")
    assert started.code == 0, started.output
    assert f"run {RUN} has no checkpoint yet, starting afresh" in started.output
    said = started.output
    assert "Memory Requirements of one rank" in said and ": Feasible" in said and "GB were resident at most" in said
    for step in (4, 8, 12):  # in the bucket before the training goes on
        name = checkpoint_named(bucket_url, step)
        assert 0 < said.index(f"{name} committed to {bucket_url}") < said.index(f"{name}: snapshot taken")
    first_losses, first_state = losses(folder), final_state(folder)

    somewhere, elsewhere = another(folder, "somewhere"), another(folder, "elsewhere")
    with (
        TrainingProcess(somewhere, *options) as afresh,
        TrainingProcess(elsewhere, *options, "--resume", "checkpoint-epoch0-step5-files0") as missing,
    ):
        for ended, problem in (
            (afresh.wait(), f"run {RUN} already has checkpoints (newest: {checkpoint_named(bucket_url, 12)})"),
            (missing.wait(), "there is no checkpoint checkpoint-epoch0-step5-files0: there are checkpoint-"),
        ):
            assert ended.code == 5 and len(ended.errors) == 1 and "Traceback" not in ended.output, ended.output
            assert ended.errors[0].startswith(f"checkpoint error: {problem}"), ended.output
    assert commits(bucket_url) == [4, 8, 12] and not any((elsewhere / "checkpoints").rglob("checkpoint-*"))

    replace_an_object(bucket_url, 12, folder / "damaged")
    assert damaged_steps(bucket_url) == [12]
    become_a_new_machine(folder)
    resumed = train(folder, *options, "--resume", "auto")
    assert resumed.code == 0, resumed.output
    assert f"passed over {checkpoint_named(bucket_url, 12)} (bucket): optimizer-00001-of-00001" in resumed.output
    assert f"resumed {checkpoint_named(bucket_url, 8)}: step 8" in resumed.output
    assert commits(bucket_url) == [4, 8, 12] and damaged_steps(bucket_url) == []
    assert losses(folder) == first_losses and lines_of_metrics(folder) == 12 + 4
    here = folder / "logs" / RUN
    for file in ("metrics.jsonl", "events.jsonl"):  # not a line of the first machine's is gone
        assert store_of(bucket_url).read_bytes(f"{RUN}/logs/{file}") == (here / file).read_bytes()
    assert "starting afresh" in (here / "training.log").read_text()
    ledger = json.loads((here / "summary.json").read_text())["ledger"]
    assert (ledger["restarts"], ledger["lost_steps"]) == (1, 4)
    assert differing(final_state(folder), first_state) == []


def replace_an_object(url: str, step: int, scratch: Path) -> None:
    """One bit of a checkpoint's moments is another one in the bucket."""
    store = store_of(url)
    (name,) = (info.name for info in store.list(f"{RUN}/") if re.search(f"-step{step}-.*/optimizer", info.name))
    store.download(name, scratch)
    flip_a_byte(scratch)
    store.delete(name)
    store.upload(scratch, name)


# ---- two trainers on one run ----


# an old attempt that wakes up when a new one has won: tests/chaos/test_writers.py in the ordinary suite
@pytest.mark.parametrize("winner", ["first", pytest.param("second", marks=pytest.mark.slow)])
def test_of_two_trainers_on_one_run_one_ends_it_and_the_other_stops(folder, bucket_url, winner):
    # Each in turn stands still, so that who commits first is no matter of luck. With one checkpoint kept, who is behind
    # finds none of the steps that it would commit.
    options = ("--max-steps", "200", "--checkpoint.every_steps", "50", "--checkpoint.keep", "1", "--resume", "auto")
    options += ("--checkpoints", bucket_url)
    elsewhere = another(folder, "elsewhere")
    committed = plain_environment(PRETRAIN_FAILPOINT="upload.after_commit:1:stop")
    begun = plain_environment(PRETRAIN_FAILPOINT="loop.before_step:2:stop")
    with TrainingProcess(folder, *options, environment=committed) as first:
        first.until(first.is_stopped, "a commit")
        with TrainingProcess(elsewhere, *options, environment=begun) as second:
            second.until(second.is_stopped, "a step")  # it has found what there was
            ahead, behind = (first, second) if winner == "first" else (second, first)
            ahead.thaw()
            goes_on = ahead.wait()
            behind.thaw()
            stops = behind.wait()
    assert goes_on.code == 0, goes_on.output
    assert stops.code == 5 and len(stops.errors) == 1 and "Traceback" not in stops.output, stops.output
    assert stops.errors[0].startswith("checkpoint error: somebody else is writing this run: ")
    assert "give this run its own name with --run" in stops.errors[0]
    assert stops.output.count("committed to gs://") <= (winner == "second")  # the first's own, before the second came
    assert commits(bucket_url) == [200] and damaged_steps(bucket_url) == []
    assert losses(folder if winner == "first" else elsewhere)[200]


# ---- machines and launchers ----


def test_without_a_compiler_the_native_engine_trains_and_says_why(without_a_compiler):
    folder, ended = without_a_compiler
    assert "DeepSpeed's CPU op can't be built here" in ended.output and "Traceback" not in ended.output
    assert "engine native, bf16, 2 ranks" in ended.output and len(losses(folder)) == 120


@pytest.mark.parametrize(
    ("launcher", "arguments", "engine"),
    [
        ("torchrun", ["--standalone", "--nproc_per_node=2"], "native"),
        ("deepspeed", ["--num_accelerators=2", "--master_port={port}"], "deepspeed"),
    ],
    ids=["torchrun", "deepspeed"],
)
def test_other_launchers_train_on_two_ranks(folder, launcher, arguments, engine):
    console_script = Path(sys.executable).parent / launcher
    arguments = [argument.format(port=free_port()) for argument in arguments]
    command = [str(console_script), *arguments, str(ROOT / "train.py")]
    options = ("--run-name", RUN, "--max-steps", "3", "--engine", engine)
    ended = train(folder, *options, command=command, environment=plain_environment(DS_ACCELERATOR="cpu"))
    assert ended.code == 0, ended.output
    assert f"engine {engine}, fp32, 2 ranks" in ended.output and len(losses(folder)) == 3


@pytest.mark.slow  # test_telemetry.py reads what such a run shows in the ordinary suite
def test_a_resumed_run_is_the_same_run_on_weights_and_biases(folder):
    options = ("--wandb", "--resume", "auto", "--checkpoint.every_steps", "2")
    environment = plain_environment(WANDB_MODE="offline")
    ids = []
    for steps in ("2", "4"):
        ended = train(folder, *options, "--max-steps", steps, environment=environment)
        assert ended.code == 0, ended.output
        ids.append((folder / "logs" / RUN / "wandb_run_id").read_text().strip())
    assert ids[0] == ids[1] and ids[0]
    started = sorted((folder / "logs" / RUN / "wandb").glob("offline-run-*"))
    assert len(started) == 2 and all(path.name.endswith(f"-{ids[0]}") for path in started)
    assert [record["step"] for record in metrics(folder)] == [1, 2, 3, 4]
    assert os.listdir(folder / "logs") == [RUN]
