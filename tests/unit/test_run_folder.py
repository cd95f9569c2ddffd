"""What a start does with what a kill left in the folder; test_keeper.py has it with the saves themselves."""

from __future__ import annotations

import pytest

from pretrain.checkpoint import saving_folder
from pretrain.run_folder import RunFolder
from pretrain.run_lock import RunLock
from tests.helpers_training import run_two_ranks, single_rank, write_checkpoint


@pytest.fixture(scope="module")
def ranks():
    with single_rank() as only:
        yield only


def leave_unfinished(folder):
    """A save without its manifest, and a half-made archive."""
    saving = folder / ".checkpoint-epoch0-step9-files9.saving"
    saving.mkdir(parents=True)
    (saving / "model-00001-of-00001.safetensors").write_bytes(b"half")
    (folder / ".checkpoint-epoch0-step5-files5.0.1234.part").write_bytes(b"half")
    older = folder / "checkpoint-epoch0-step7-files7"  # as a download that was cut off leaves it
    older.mkdir()
    return [*folder.glob(".*"), older]


def test_what_was_not_whole_is_removed_and_all_else_stays(tmp_path, ranks):
    manifest = write_checkpoint(tmp_path, 5, 1)
    (tmp_path / "notes.txt").write_text("mine")
    left = leave_unfinished(tmp_path)
    RunFolder(ranks, tmp_path, has_bucket=True).release()
    assert not any(path.exists() for path in left)
    assert {path.name for path in tmp_path.iterdir()} == {str(manifest.name), "notes.txt"}


def test_nothing_is_removed_while_another_process_may_be_writing_it(tmp_path, ranks, caplog):
    left = leave_unfinished(tmp_path)
    other = RunLock(tmp_path)  # with a bucket two trainers may meet: the commits tell which one is to stop
    RunFolder(ranks, tmp_path, has_bucket=True).release()
    assert all(path.exists() for path in left) and "half-made stays" in caplog.text
    other.release()
    RunFolder(ranks, tmp_path, has_bucket=True).release()
    assert not any(path.exists() for path in left)


def test_a_first_save_that_was_whole_gets_its_name(tmp_path, ranks):
    manifest = write_checkpoint(tmp_path, 5, 1)
    path = tmp_path / str(manifest.name)
    path.rename(saving_folder(path))
    RunFolder(ranks, tmp_path, has_bucket=True).release()
    assert [each.name for each in tmp_path.iterdir()] == [str(manifest.name)]


TWO_NODES = """
    import os
    from pathlib import Path
    from pretrain.checkpoint import read_manifest, replaced_folder, saving_folder
    from pretrain.run_folder import RunFolder
    from tests.helpers_training import write_checkpoint

    def begin(run, wrote):
        folder = Path(sys.argv[1]) / f"node{me.rank}" / run
        path = folder / str(write_checkpoint(folder, 5, 2, "later").name)
        path.rename(saving_folder(path))
        if me.rank not in wrote:  # killed before it vouched for its part
            (saving_folder(path) / "manifest.json").unlink()
        write_checkpoint(folder, 5, 1, "earlier")
        if run == "begun" and me.rank == 0:
            path.rename(replaced_folder(path))
        if run == "begun" and me.rank == 1:
            replaced_folder(path).mkdir()
            os.rename(path, replaced_folder(path))
            saving_folder(path).rename(path)
        return folder, path

    result = {}
    for run, wrote in (("both", (0, 1)), ("one", (0,)), ("begun", (0, 1))):
        folder, path = begin(run, wrote)
        held = RunFolder(me, folder, has_bucket=True)
        assert held.keeps_disk
        held.release()
        result[run] = [read_manifest(path).attempt, len(list(folder.iterdir()))]
    shared = RunFolder(me, Path(sys.argv[1]) / "shared" / "run", has_bucket=True)
    result["keeps_shared"] = shared.keeps_disk
    print(json.dumps(result))
"""


def test_a_save_of_several_nodes_gets_its_name_on_all_of_them_or_on_none(tmp_path):
    for rank, told in enumerate(run_two_ranks(TWO_NODES, nodes=2, arguments=(str(tmp_path),))):
        assert told["both"] == ["later", 1]
        assert told["one"] == ["earlier", 1]
        assert told["begun"] == ["later", 1]
        assert told["keeps_shared"] == (rank == 0)
