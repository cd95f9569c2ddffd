"""Checkpoints packed into archives in the bucket: resumed from, mixed with plain ones, damaged, seen by the tools."""

from __future__ import annotations

import json
import shutil

import pytest

from pretrain.checkpoint_manifest import MANIFEST_FILE
from pretrain.uploads import list_commits
from scripts import checkpoint_viewer, upload_manager
from tests.runs import (
    RUN,
    commits,
    differing,
    final_state,
    losses,
    make_shards,
    remove_local_checkpoints,
    store_of,
    train,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    make_shards(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def manifests(url):
    return {name.step: commit.manifest for name, commit in list_commits(store_of(url), RUN).items()}


def objects(url, step):
    """Names of the objects of one commit, the manifest left out, below its attempt."""
    infos = store_of(url).list(f"{RUN}/checkpoint-epoch0-step{step}-")
    return sorted(info.name.split("/")[-1] for info in infos if not info.name.endswith(MANIFEST_FILE))


def run_json(tool, capsys, *words):
    capsys.readouterr()
    code = tool.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_archives_mix_in_one_run_and_the_losses_are_the_uninterrupted_ones(folder, bucket_url, capsys):
    whole = folder / "whole"
    make_shards(whole / "shards")
    options = ("--checkpoints", bucket_url, "--resume", "auto", "--checkpoint.keep", "0")
    schedule = ("--optim.schedule", "constant")
    assert train(whole, *schedule, "--max-steps", "6").code == 0
    for kind, ranks, step in (("tar.zst", 1, 3), ("none", 1, 6), ("tar", 2, 9)):
        ended = train(folder, *options, *schedule, "--checkpoint.archive", kind, "--max-steps", str(step), ranks=ranks)
        assert ended.code == 0, ended.output
        made = [name for name in objects(bucket_url, step) if name.startswith("rank-")]
        assert len(made) == (0 if kind == "none" else ranks) and all(name.endswith(f".{kind}") for name in made)
        assert any(name.endswith(".safetensors") for name in objects(bucket_url, step)) == (kind == "none")
        remove_local_checkpoints(folder)
    assert commits(bucket_url) == [3, 6, 9]
    resumed = losses(folder)
    assert len(resumed) == 9
    assert {step: resumed[step] for step in range(1, 7)} == losses(whole)  # then there are two ranks

    code, found = run_json(upload_manager, capsys, "verify", "--url", bucket_url)
    assert code == 0
    code, found = run_json(checkpoint_viewer, capsys, "list", "--url", bucket_url)
    rows = [(row["step"], row["where"], row["verified"], row["loss"] is not None) for row in found["checkpoints"]]
    assert rows == [(step, "bucket", True, True) for step in (3, 6, 9)]
    assert run_json(upload_manager, capsys, "download", "latest", "--url", bucket_url)[1]["downloaded"] is True
    assert run_json(upload_manager, capsys, "download", "latest", "--url", bucket_url)[1]["downloaded"] is False
    state = final_state(folder)
    remove_local_checkpoints(folder)
    assert train(folder, *options, *schedule, "--max-steps", "9").code == 0
    assert differing(state, final_state(folder)) == []


def test_a_damaged_archive_is_passed_over_and_uploaded_again_by_hand(folder, bucket_url, capsys):
    options = ("--checkpoints", bucket_url, "--checkpoint.every_steps", "6", "--checkpoint.archive", "tar.gz")
    assert train(folder, *options).code == 0
    store, manifest = store_of(bucket_url), manifests(bucket_url)[12]
    name = next(name for name in objects(bucket_url, 12) if name.startswith("rank-"))
    target = f"{RUN}/{manifest.name}/{manifest.attempt}/{name}"
    store.download(target, folder / "damaged")
    data = bytearray((folder / "damaged").read_bytes())
    data[len(data) // 2] ^= 1
    store.delete(target)
    store.create(target, bytes(data))
    shutil.move(folder / "checkpoints", folder / "kept")
    code, found = run_json(upload_manager, capsys, "verify", "--url", bucket_url)
    assert code == 5 and list(found["damaged"]) == [f"{RUN}/{manifest.name}"]
    resumed = train(folder, *options, "--resume", "auto", "--max-steps", "7", "--run", RUN)
    assert f"passed over {manifest.name} (bucket): {name} has" in resumed.output, resumed.output
    assert "resumed checkpoint-epoch0-step6-" in resumed.output
    shutil.rmtree(folder / "checkpoints")
    shutil.move(folder / "kept", folder / "checkpoints")
    assert run_json(upload_manager, capsys, "upload", str(manifest.name), "--url", bucket_url)[0] == 0
    assert manifests(bucket_url)[12].archives == {}  # by hand it goes up plain, over the packed commit of the same
    assert run_json(checkpoint_viewer, capsys, "verify", str(manifest.name), "--url", bucket_url)[0] == 0
