from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace

import pytest
import safetensors
import torch

from pretrain import checkpoint
from pretrain.checkpoint import (
    INDEX_FILE,
    CheckpointReader,
    damaged_files,
    empty_folder,
    read_manifest,
    remove_folder,
    retract_manifest,
    write_documents,
    write_manifest,
    write_parts,
)
from pretrain.checkpoint_manifest import MANIFEST_FILE, CheckpointName, Manifest
from pretrain.errors import CheckpointError, StorageError
from pretrain.snapshot import part_name
from tests.helpers_training import (
    TinyModel,
    differing,
    flip_a_byte,
    make_snapshot,
    read_states,
    states_of,
    write_checkpoint,
)

SHAPES = {name: tuple(parameter.shape) for name, parameter in TinyModel().named_parameters()}


@pytest.mark.parametrize("world_size", [1, 2, 8])  # at 8 some ranks have no tensor at all
def test_what_was_written_is_read_back_to_the_last_bit(tmp_path, world_size):
    files = {}
    for rank in range(world_size):
        snapshot = make_snapshot(5, rank, world_size)
        files |= write_parts(snapshot, tmp_path / "checkpoint-epoch0-step5-files1", rank, world_size)
    folder = tmp_path / "checkpoint-epoch0-step5-files1"
    files |= write_documents({INDEX_FILE: snapshot.index(), "note.json": '{"text": "ü"}'}, folder)
    manifest = Manifest(CheckpointName(0, 5, 1), "a", 1, files)
    write_manifest(manifest, folder)
    assert read_manifest(folder) == manifest
    assert damaged_files(manifest, folder) == []
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, MANIFEST_FILE])
    assert differing(dict(states_of(5)), read_states(tmp_path, manifest)) == []
    reader = CheckpointReader(folder, manifest)
    reader.check_shapes(SHAPES)
    assert reader.document("note.json") == {"text": "ü"}
    index = json.loads((folder / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(state["weight"].nbytes for _, state in states_of(5))
    for name, file in index["weight_map"].items():  # as transformers reads it
        with safetensors.safe_open(folder / file, framework="pt") as part:
            assert torch.equal(part.get_tensor(name), dict(states_of(5))[name]["weight"])


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o755, 0o644), (0o750, 0o640), (0o700, 0o600)])
def test_who_may_read_the_folder_may_read_the_tensors(tmp_path, folder_mode, file_mode):
    tmp_path.chmod(folder_mode)
    for name in write_parts(make_snapshot(), tmp_path, 0, 1):
        assert (tmp_path / name).stat().st_mode & 0o777 == file_mode


def test_every_flipped_byte_is_found(tmp_path):
    manifest = write_checkpoint(tmp_path, 1, 1)
    folder = tmp_path / str(manifest.name)
    for name in manifest.files:
        path = folder / name
        whole = path.read_bytes()
        for offset in {0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
            flip_a_byte(path, offset)
            assert damaged_files(manifest, folder) == [f"{name} differs from the manifest's crc32c"], offset
            path.write_bytes(whole)
    assert damaged_files(manifest, folder) == []


def test_every_byte_of_a_small_file_counts(tmp_path):
    manifest = write_checkpoint(tmp_path, 1, 1)
    path = tmp_path / str(manifest.name) / "trainer_state.json"
    for offset in range(path.stat().st_size):
        flip_a_byte(path, offset)
        assert len(damaged_files(manifest, path.parent)) == 1
        flip_a_byte(path, offset)
    assert damaged_files(manifest, path.parent) == []


def test_a_truncated_a_longer_and_a_missing_file_are_found(tmp_path):
    manifest = write_checkpoint(tmp_path, 1, 1)
    folder = tmp_path / str(manifest.name)
    for name, entry in manifest.files.items():
        path = folder / name
        whole = path.read_bytes()
        for data in (whole[:-1], b"", whole + b"\0"):
            path.write_bytes(data)
            expected = f"{name} has {len(data)} bytes, the manifest says {entry.bytes}"
            assert damaged_files(manifest, folder) == [expected]
        path.unlink()
        assert damaged_files(manifest, folder) == [f"{name} is missing"]
        path.write_bytes(whole)


def test_a_file_that_the_disk_can_not_read_is_damaged(tmp_path, monkeypatch):
    manifest = write_checkpoint(tmp_path, 1, 1)

    def unreadable(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "crc32c_of_file", unreadable)
    problems = damaged_files(manifest, tmp_path / str(manifest.name))
    assert len(problems) == len(manifest.files)
    assert "can't be read: Input/output error" in problems[0]


def test_without_a_manifest_there_is_no_checkpoint(tmp_path):
    manifest = write_checkpoint(tmp_path, 1, 1)
    folder = tmp_path / str(manifest.name)
    retract_manifest(folder)
    assert damaged_files(manifest, folder) == []  # whole as it is
    with pytest.raises(CheckpointError, match=r"step1-files1 is no committed checkpoint: manifest\.json"):
        read_manifest(folder)
    retract_manifest(folder)  # nothing to do is no error
    retract_manifest(tmp_path / "nowhere")


def test_a_removal_that_fails_half_way_leaves_no_checkpoint(tmp_path, monkeypatch):
    manifest = write_checkpoint(tmp_path, 1, 1)
    folder = tmp_path / str(manifest.name)

    def fail(path):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with pytest.raises(OSError, match="busy"):
        remove_folder(folder)
    assert not (folder / MANIFEST_FILE).exists()
    with pytest.raises(StorageError, match=f"can't write {folder}.*busy"):
        empty_folder(folder)


def test_emptying_and_removing_a_folder(tmp_path):
    folder = tmp_path / str(write_checkpoint(tmp_path, 1, 1).name)
    empty_folder(folder)
    assert list(folder.iterdir()) == []
    remove_folder(folder)
    assert not folder.exists()
    remove_folder(folder)
    empty_folder(folder / "deeper" / "still")


def test_a_full_disk_is_one_line_and_earlier_checkpoints_hold(tmp_path, monkeypatch):
    earlier = write_checkpoint(tmp_path, 1, 1)

    def full(tensors, path, metadata):
        path.write_bytes(b"torn")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    folder = tmp_path / "checkpoint-epoch0-step2-files2"
    with pytest.raises(StorageError) as caught:
        write_parts(make_snapshot(2), folder, 0, 1)
    assert str(folder / part_name("model", 0, 1)) in caught.value.what
    assert "No space left on device" in caught.value.what
    assert "--checkpoint.dir" in caught.value.mend
    assert damaged_files(read_manifest(tmp_path / str(earlier.name)), tmp_path / str(earlier.name)) == []
    with pytest.raises(CheckpointError):
        read_manifest(folder)


def test_an_error_of_the_tensor_writer_is_a_storage_error(tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(StorageError, match="No space left"):
        write_parts(make_snapshot(2), tmp_path, 0, 1)


def test_a_folder_that_can_not_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"can't write .*Not a directory"):
        write_parts(make_snapshot(1), tmp_path / "file" / "folder", 0, 1)
    with pytest.raises(StorageError):
        empty_folder(tmp_path / "file" / "folder")
    with pytest.raises(StorageError):
        write_documents({"a": "b"}, tmp_path / "file" / "folder")


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({**SHAPES, "mix.weight": (16, 17)}, r"mix.weight is \(16, 16\) in the checkpoint and \(16, 17\) in the model"),
        ({**SHAPES, "more.bias": (3,)}, "more.bias is not in the checkpoint"),
        ({name: shape for name, shape in SHAPES.items() if name != "mix.bias"}, "mix.bias is not in the model"),
        ({"other": (1,)}, r"other is not in the checkpoint; .*head\.bias .*norm\.weight is not in the model\."),
    ],
)
def test_another_models_checkpoint_is_refused(tmp_path, shapes, said):
    manifest = write_checkpoint(tmp_path, 1, 1)
    with pytest.raises(CheckpointError, match=said) as caught:
        CheckpointReader(tmp_path / str(manifest.name), manifest).check_shapes(shapes)
    assert "config.yaml" in caught.value.mend


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    manifest = write_checkpoint(tmp_path, 1, 1)
    optimizer = part_name("optimizer", 0, 1)
    without = replace(manifest, files={name: entry for name, entry in manifest.files.items() if name != optimizer})
    reader = CheckpointReader(tmp_path / str(manifest.name), without)
    with pytest.raises(CheckpointError, match=r"holds no tensor exp_avg/mix\.bias"):
        reader.parameter_state("mix.bias")


def test_a_document_that_is_no_object_is_refused(tmp_path):
    manifest = write_checkpoint(tmp_path, 1, 1, documents={"list.json": "[1]"})
    with pytest.raises(CheckpointError, match=r"list\.json must hold an object, found list"):
        CheckpointReader(tmp_path / str(manifest.name), manifest).document("list.json")


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"], ids=["empty", "noise", "huge"]
)
def test_a_file_that_is_no_safetensors_is_a_checkpoint_error_though_its_manifest_fits(tmp_path, content):
    manifest = write_checkpoint(tmp_path, 1, 1)
    folder = tmp_path / str(manifest.name)
    (folder / part_name("model", 0, 1)).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors can't be read as safetensors"):
        CheckpointReader(folder, manifest)
