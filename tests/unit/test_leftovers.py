from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pretrain.catalog import Catalog
from pretrain.checkpoint import damaged_files, replaced_folder, saving_folder
from pretrain.checkpoint_manifest import MANIFEST_FILE
from pretrain.leftovers import find_leftovers, remove_leftover
from pretrain.storage import LocalStore
from tests.helpers_training import upload_checkpoint, write_checkpoint


@pytest.fixture
def catalog(tmp_path):
    return Catalog(tmp_path / "local", LocalStore(tmp_path / "bucket"))


def commit(catalog, step, sequence=1, attempt="attempt1", run="a"):
    manifest = write_checkpoint(catalog.folder / run, step, sequence, attempt)
    upload_checkpoint(catalog.store, run, catalog.folder / run, manifest)
    return manifest


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def everything(catalog):
    return files_below(catalog.folder), files_below(catalog.store.root)


def test_what_is_committed_is_no_leftover(catalog):
    commit(catalog, 5)
    commit(catalog, 10, 2)
    assert find_leftovers(catalog) == []


def test_a_damaged_commit_is_no_leftover(catalog):
    manifest = commit(catalog, 5)
    (catalog.folder / "a" / str(manifest.name) / MANIFEST_FILE).write_text("{")
    (catalog.store.root / "a" / str(manifest.name) / MANIFEST_FILE).write_text("{")
    assert find_leftovers(catalog) == []


def test_every_kind_is_found_and_removed_and_nothing_else(catalog):
    commit(catalog, 5)
    before = everything(catalog)
    torn = write_checkpoint(catalog.folder / "a", 10, 2, "killed")
    (catalog.folder / "a" / str(torn.name) / MANIFEST_FILE).unlink()
    (catalog.folder / "a" / "checkpoint-epoch0-step5-files5" / ".config.yaml.1234.part").write_text("half")
    catalog.store.create("a/checkpoint-epoch0-step10-files10/killed/config.yaml", b"never committed")
    catalog.store.create("a/checkpoint-epoch0-step5-files5/other/config.yaml", b"another attempt of it")
    found = find_leftovers(catalog)
    assert sorted((each.place, Path(each.path).name) for each in found) == [
        ("bucket", "killed"),
        ("bucket", "other"),
        ("local", ".config.yaml.1234.part"),
        ("local", "checkpoint-epoch0-step10-files10"),
    ]
    assert {each.bytes for each in found if each.place == "bucket"} == {15, 21}
    assert all(remove_leftover(each, catalog) for each in found)
    assert everything(catalog) == before
    assert find_leftovers(catalog) == []


def test_of_a_save_that_takes_a_name_only_what_is_no_more_needed_is_a_leftover(catalog):
    manifest = commit(catalog, 5)
    run = catalog.folder / "a"
    name = run / str(manifest.name)
    saving, replaced = saving_folder(name), replaced_folder(name)
    name.rename(replaced)
    shutil.copytree(replaced, saving)
    assert find_leftovers(catalog) == []  # a kill between the two names: both are whole, the next start takes one
    saving.rename(name)
    [leftover] = find_leftovers(catalog)
    assert leftover.path == str(replaced)
    assert remove_leftover(leftover, catalog)
    assert find_leftovers(catalog) == [] and list(run.iterdir()) == [name]
    assert damaged_files(manifest, name) == []


def test_a_part_file_in_an_unfinished_folder_goes_with_it(catalog):
    folder = catalog.folder / "a" / "checkpoint-epoch0-step5-files5"
    folder.mkdir(parents=True)
    (folder / ".config.yaml.1234.part").write_text("half")
    [leftover] = find_leftovers(catalog, "a")
    assert leftover.path == str(folder)


def test_what_was_committed_after_it_was_listed_stays(catalog):
    manifest = write_checkpoint(catalog.folder / "a", 5, 1)
    folder = catalog.folder / "a" / str(manifest.name)
    data = (folder / MANIFEST_FILE).read_bytes()
    (folder / MANIFEST_FILE).unlink()
    for name in manifest.files:
        catalog.store.upload(folder / name, f"a/{manifest.name}/{manifest.attempt}/{name}")
    found = find_leftovers(catalog)
    assert {each.place for each in found} == {"local", "bucket"}
    (folder / MANIFEST_FILE).write_bytes(data)
    catalog.store.create(f"a/{manifest.name}/{MANIFEST_FILE}", data)
    before = everything(catalog)
    assert [remove_leftover(each, catalog) for each in found] == [False, False]
    assert everything(catalog) == before


def test_what_a_trainer_removes_while_it_is_looked_at_is_absent(catalog, monkeypatch):
    whole, going = commit(catalog, 5), commit(catalog, 10, 2)
    saving = catalog.folder / "a" / ".checkpoint-epoch0-step15-files15.saving"
    saving.mkdir()
    (saving / "model.part").write_text("half")
    read, stat = Path.read_bytes, Path.stat

    def gone(path):
        return path.parent in (catalog.folder / "a" / str(going.name), saving)

    def read_bytes(path):
        if gone(path):
            shutil.rmtree(path.parent, ignore_errors=True)
        return read(path)

    def stat_of(path, **options):
        if gone(path):
            shutil.rmtree(path.parent, ignore_errors=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    [entry] = [entry for entry in catalog.entries("a") if entry.is_local]
    assert entry.name == whole.name
    monkeypatch.setattr(Path, "stat", stat_of)
    find_leftovers(catalog)
    assert [each.path for each in find_leftovers(catalog)] == [] and not saving.exists()


def test_the_age_is_that_of_the_newest_file(catalog):
    folder = catalog.folder / "a" / "checkpoint-epoch0-step5-files5"
    folder.mkdir(parents=True)
    for name, age_s in (("old", 7200), ("new", 600)):
        (folder / name).write_text(name)
        at = os.stat(folder / name).st_mtime - age_s
        os.utime(folder / name, (at, at))
    os.utime(folder, (0, 0))
    [leftover] = find_leftovers(catalog)
    assert 590 < leftover.age_s < 700


def test_an_object_of_unknown_age_counts_as_new(catalog, monkeypatch):
    catalog.store.create("a/checkpoint-epoch0-step10-files10/killed/config.yaml", b"never committed")
    [info] = catalog.store.list()
    unknown = type(info)(info.name, info.size)
    monkeypatch.setattr(catalog.store, "list", lambda prefix="": [unknown])
    [leftover] = find_leftovers(catalog, "a")
    assert leftover.age_s == 0
