"""The two tools as users start them, on a folder and on a bucket behind the storage API."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint import read_manifest
from pretrain.checkpoint_manifest import MANIFEST_FILE
from pretrain.run_lock import RunLock
from scripts import checkpoint_viewer, upload_manager
from tests.helpers_training import flip_a_byte, upload_checkpoint, write_checkpoint
from tests.runs import RUN, make_shards, store_of, train

METADATA = {
    "step": 5,
    "current_loss": 2.0,
    "best_loss": 2.0,
    "best_step": 5,
    "history_steps": [1, 5],
    "loss_history": [3.0, 2.0],
    "learning_rates": [1e-3, 5e-4],
    "validation_steps": [],
    "validation_losses": [],
    "validation_metrics": {"loss_trend": "improving"},
    "training_progress": {"tokens": 640, "files_processed": 1},
}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(params=["folder", "bucket"])
def url(request, tmp_path):
    """Where checkpoints are committed; the bucket honours preconditions."""
    return str(tmp_path / "bucket") if request.param == "folder" else request.getfixturevalue("bucket_url")


def commit(step, sequence=1, attempt="attempt1", run=RUN, lr=1):
    documents = {
        "metadata.json": json.dumps(METADATA),
        "training_metrics.json": json.dumps(METADATA),
        "config.yaml": f"optim: {{lr: {lr}, clip: 1.0}}\n",
    }
    return write_checkpoint(Path("checkpoints") / run, step, sequence, attempt, documents)


def folder_of(manifest, run=RUN):
    return Path("checkpoints") / run / str(manifest.name)


def store(url):
    if url.startswith("gs://"):
        return store_of(url)
    from pretrain.storage import LocalStore

    return LocalStore(Path(url))


def run_json(tool, capsys, *words):
    """(exit code, the object on stdout, stderr)."""
    capsys.readouterr()
    code = tool.main([*words, "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def listed(capsys, url):
    code, found, _ = run_json(checkpoint_viewer, capsys, "list", "--url", url)
    assert code == 0
    return [(row["step"], row["where"], row["committed"], row["verified"]) for row in found["checkpoints"]]


def test_up_lost_and_down_again(url, capsys):
    first, second = commit(5), commit(10, 2)
    code, found, _ = run_json(upload_manager, capsys, "status", "--url", url)
    assert (code, found["runs"][RUN]["waiting"]) == (0, [str(first.name), str(second.name)])
    assert run_json(upload_manager, capsys, "upload", str(first.name), "--url", url)[:2] == (
        0,
        {"name": "upload_manager upload", "uploaded": [f"{RUN}/{first.name}"]},
    )
    assert listed(capsys, url) == [(5, "both", True, True), (10, "local", True, True)]
    code, found, _ = run_json(upload_manager, capsys, "upload-all", "--url", url)
    assert (code, found["uploaded"], found["failed"]) == (0, [f"{RUN}/{second.name}"], {})
    assert run_json(upload_manager, capsys, "upload", "latest", "--url", url)[1]["uploaded"] == []  # it is there
    shutil.rmtree("checkpoints")
    assert listed(capsys, url) == [(5, "bucket", True, True), (10, "bucket", True, True)]
    code, found, _ = run_json(upload_manager, capsys, "download", "latest", "--url", url)
    assert (code, found["downloaded"]) == (0, True)
    assert read_manifest(folder_of(second)) == second
    assert run_json(upload_manager, capsys, "download", "latest", "--url", url)[1]["downloaded"] is False
    assert run_json(upload_manager, capsys, "verify", "--url", url)[0] == 0


def test_an_upload_supersedes_an_earlier_commit_of_its_step_and_never_a_later_one(url, capsys):
    earlier = commit(5, 1, "earlier")
    upload_checkpoint(store(url), RUN, Path("checkpoints") / RUN, earlier)
    shutil.rmtree("checkpoints")
    later = commit(5, 3, "later")
    assert listed(capsys, url) == [(5, "both, differ", True, True)]
    assert run_json(upload_manager, capsys, "upload-all", "--url", url)[0] == 0
    assert listed(capsys, url) == [(5, "both", True, True)]
    shutil.rmtree("checkpoints")
    commit(5, 2, "between")
    assert run_json(upload_manager, capsys, "upload-all", "--url", url)[1]["uploaded"] == []
    code, _, err = run_json(upload_manager, capsys, "upload", "latest", "--url", url)
    assert code == 5 and "later commit" in err
    code, _, err = run_json(upload_manager, capsys, "download", "latest", "--url", url)
    assert code == 5 and "another commit" in err
    manifest = store(url).read_bytes(f"{RUN}/{later.name}/{MANIFEST_FILE}")
    assert json.loads(manifest)["attempt"] == "later"


def test_a_missing_object_is_found_and_uploaded_again(url, capsys):
    manifest = commit(5)
    upload_checkpoint(store(url), RUN, Path("checkpoints") / RUN, manifest)
    store(url).delete(f"{RUN}/{manifest.name}/attempt1/config.yaml")
    code, found, _ = run_json(checkpoint_viewer, capsys, "verify", "--url", url)
    assert code == 5 and not found["passed"]
    assert found["damaged"] == {f"{RUN}/{manifest.name}": {"bucket": ["config.yaml is missing"]}}
    assert run_json(upload_manager, capsys, "upload", "latest", "--url", url)[0] == 0
    assert run_json(checkpoint_viewer, capsys, "verify", "latest", "--url", url)[0] == 0


def test_damage_here_is_neither_uploaded_nor_hidden(capsys, tmp_path):
    good, bad = commit(5), commit(10, 2)
    flip_a_byte(folder_of(bad) / "model-00001-of-00001.safetensors")
    code, found, err = run_json(upload_manager, capsys, "upload-all", "--url", str(tmp_path / "bucket"))
    assert (code, found["uploaded"], list(found["failed"])) == (5, [f"{RUN}/{good.name}"], [f"{RUN}/{bad.name}"])
    assert err.count("checkpoint error:") == 1 and "damaged here" in err
    assert run_json(checkpoint_viewer, capsys, "verify", str(bad.name))[0] == 5
    assert run_json(checkpoint_viewer, capsys, "verify", str(good.name))[0] == 0


def test_while_a_trainer_uses_the_run_nothing_is_changed(capsys, tmp_path):
    commit(5)
    url = str(tmp_path / "bucket")
    lock = RunLock(Path("checkpoints") / RUN)
    for words in (["upload", "latest"], ["upload-all"]):
        code, _, err = run_json(upload_manager, capsys, *words, "--url", url)
        assert code == 5 and "in use by a trainer" in err
    (Path("checkpoints") / RUN / "checkpoint-epoch0-step10-files10").mkdir()
    code, _, err = run_json(checkpoint_viewer, capsys, "clean", "--delete", "--older_than_hours", "0")
    assert code == 5 and "in use by a trainer" in err
    assert (Path("checkpoints") / RUN / "checkpoint-epoch0-step10-files10").exists()
    assert listed(capsys, url) == [(10, "local", False, None), (5, "local", True, True)]  # looking is free
    lock.release()
    assert run_json(upload_manager, capsys, "upload-all", "--url", url)[0] == 0


def test_clean_removes_only_what_is_old_and_not_committed_and_only_when_told(url, capsys):
    manifest = commit(5)
    upload_checkpoint(store(url), RUN, Path("checkpoints") / RUN, manifest)
    store(url).create(f"{RUN}/{manifest.name}/killed/config.yaml", b"never committed")
    torn = commit(10, 2)
    (folder_of(torn) / MANIFEST_FILE).unlink()

    def fates(*words):
        code, found, _ = run_json(checkpoint_viewer, capsys, "clean", "--url", url, *words)
        assert code == 0
        return [(each["place"], each["fate"]) for each in found["leftovers"]]

    young = "kept: younger than 1 h"
    assert fates() == [("local", young), ("bucket", young)]
    assert fates("--older_than_hours", "0") == [("local", "would go"), ("bucket", "would go")]
    assert fates("--delete") == [("local", young), ("bucket", young)]
    assert folder_of(torn).exists()
    assert fates("--delete", "--older_than_hours", "0") == [("local", "removed"), ("bucket", "removed")]
    assert fates() == []
    assert listed(capsys, url) == [(5, "both", True, True)]


def test_view_compare_and_plot_tell_what_a_checkpoint_holds(capsys, tmp_path):
    commit(5, lr=1)
    commit(10, 2, lr=2)
    commit(5, run="other")
    names = [f"checkpoint-epoch0-step{step}-files{step}" for step in (5, 10)]
    assert checkpoint_viewer.main(["view", names[1]]) == 0
    text = capsys.readouterr().out
    for words in ("current loss", "2.000000 at step 5", "2.500000 over 2 points", "improving", "640", "5.00e-04"):
        assert words in text
    code, found, _ = run_json(checkpoint_viewer, capsys, "compare", *names, "--run", RUN)
    assert code == 0 and found["settings"] == {"optim.lr": [1, 2]}
    changes = {change["name"]: change for change in found["weights"][0]["changes"]}
    assert set(changes) == {"embedding", "mix", "norm", "head"} and changes["mix"]["relative"] > 0
    assert checkpoint_viewer.main(["compare", f"{RUN}/{names[0]}", f"other/{names[0]}", "--parameters"]) == 0
    text = capsys.readouterr().out
    assert "The settings are the same." in text and "mix.weight" in text
    assert checkpoint_viewer.main(["plot", names[1], "--save", "x.png"]) == 0
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint_viewer.main(["plot", names[1]]) == 0
    assert "3.000 │" in capsys.readouterr().out


def test_weights_that_are_in_the_bucket_only_are_not_guessed(capsys, tmp_path):
    near, far = commit(5), commit(10, 2)
    url = str(tmp_path / "bucket")
    upload_manager.main(["upload-all", "--url", url])
    shutil.rmtree(folder_of(far))
    code, found, err = run_json(checkpoint_viewer, capsys, "compare", str(near.name), str(far.name), "--url", url)
    assert code == 0 and found["weights"][0]["changes"] is None
    assert f"upload_manager.py download {RUN}/{far.name}" in err


def test_the_place_comes_from_a_config_and_options_override_it(capsys, tmp_path):
    commit(5, run="from-config")
    settings = f"checkpoint: {{url: {tmp_path / 'bucket'}}}\nrun: {{name: from-config}}\n"
    Path("mine.yaml").write_text(settings)
    code, found, _ = run_json(upload_manager, capsys, "status", "--config", "mine.yaml")
    assert code == 0 and found["url"] == str(tmp_path / "bucket") and list(found["runs"]) == ["from-config"]
    code, found, _ = run_json(upload_manager, capsys, "status", "--config", "mine.yaml", "--url", "")
    assert code == 0 and found["url"] is None
    assert run_json(upload_manager, capsys, "status", "--config", "mine.yaml", "--run", "nobody")[0] == 5


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["view", "nope"], 5, "no checkpoint nope"),
        (["list", "--run", "nope"], 5, "no checkpoint of run nope"),
        (["compare", "latest"], 2, "at least two"),
        (["list", "--url", "quux://x"], 2, "not supported"),
        (["plot", "latest", "--save", "/nonexistent/x.png"], 4, "No such file"),
        (["list", "--config", "nope.yaml"], 2, "nope"),
    ],
)
def test_what_is_wrong_is_one_line_and_the_contract_s_exit_code(words, code, says, capsys):
    commit(5)
    assert checkpoint_viewer.main(words) == code
    _, err = capsys.readouterr()
    assert says in err and len(err.splitlines()) == 1 and "Traceback" not in err


def test_an_upload_needs_a_bucket(capsys):
    commit(5)
    code, _, err = run_json(upload_manager, capsys, "upload", "latest")
    assert code == 2 and "no bucket is named" in err


def test_a_real_run_that_lost_its_bucket_is_uploaded_by_hand_and_resumed_from_there(tmp_path, bucket_url, capsys):
    make_shards(tmp_path / "shards")
    assert train(tmp_path, "--checkpoint.every_steps", "5", "--checkpoint.keep", "0").code == 0
    code, found, _ = run_json(upload_manager, capsys, "upload-all", "--run", RUN, "--url", bucket_url)
    assert code == 0 and len(found["uploaded"]) == 3
    shutil.rmtree(tmp_path / "checkpoints")
    assert [row[:2] for row in listed(capsys, bucket_url)] == [(5, "bucket"), (10, "bucket"), (12, "bucket")]
    more = ("--checkpoints", bucket_url, "--resume", "auto", "--max-steps", "14")
    assert train(tmp_path, *more).code == 0
    assert checkpoint_viewer.main(["view"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"step +14\n", text) and re.search(r"engine +native\n", text)
    code, found, _ = run_json(checkpoint_viewer, capsys, "plot")
    assert code == 0 and found["curve"]["restarts"] == [12] and found["curve"]["steps"][-1] == 14
