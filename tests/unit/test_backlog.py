from __future__ import annotations

import json

import pytest

from pretrain.backlog import Backlog
from pretrain.checkpoint_manifest import CheckpointName, Manifest
from pretrain.uploads import UploadJob


def make_job(folder, sequence, *, step=None, loss=None, validation=None):
    """A job whose metadata.json tells these losses; None where there is no such file."""
    name = CheckpointName(0, step or sequence, 0)
    path = folder / str(name)
    path.mkdir(parents=True, exist_ok=True)
    if loss is not None:
        losses = [] if validation is None else [9.0, validation]
        (path / "metadata.json").write_text(json.dumps({"current_loss": loss, "validation_losses": losses}))
    return UploadJob(Manifest(name, "attempt", sequence, {}), path, ())


def filled(folder, losses, validations=()):
    backlog = Backlog()
    for sequence, loss in enumerate(losses, 1):
        validation = validations[sequence - 1] if validations else None
        backlog.put(make_job(folder, sequence, loss=loss, validation=validation))
    return backlog


def test_what_is_too_much_goes_oldest_first_and_neither_the_best_nor_the_newest(tmp_path):
    backlog = filled(tmp_path, [5.0, 4.0, 1.0, 3.0, 2.0, 6.0])
    assert backlog.too_many(6) == []
    assert backlog.too_many(4) == [1, 2]
    assert backlog.too_many(3) == [1, 2, 4]
    assert backlog.too_many(1) == [1, 2, 4, 5]  # the best and the newest stay whatever the limit is


def test_a_validation_loss_counts_before_a_training_loss(tmp_path):
    backlog = filled(tmp_path, [1.0, 5.0, 2.0, 3.0], [None, 7.0, 8.0, None])
    assert backlog.too_many(2) == [1, 3]
    backlog = filled(tmp_path / "equal", [4.0, 4.0, 4.0, 4.0])
    assert backlog.too_many(2) == [1, 2]  # of equals the newest is the best: the two newest stay


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"current_loss": null}', '{"current_loss": "x"}', '{"current_loss": NaN}']
)
def test_a_loss_that_can_not_be_read_is_not_the_best(tmp_path, text):
    backlog = filled(tmp_path, [None, 3.0, 2.0])
    (tmp_path / str(CheckpointName(0, 1, 0)) / "metadata.json").write_text(text)
    backlog.put(make_job(tmp_path, 4, loss=5.0))
    assert backlog.too_many(2) == [1, 2]


def test_one_that_is_being_uploaded_is_spared(tmp_path):
    backlog = filled(tmp_path, [5.0, 4.0, 3.0, 2.0])
    assert backlog.get(1).manifest.sequence == 1
    assert backlog.too_many(2) == [2, 3]
    backlog.tried([1])
    assert backlog.too_many(2) == [1, 2]


def test_a_later_save_of_the_same_name_takes_the_earlier_one_s_place(tmp_path):
    backlog = filled(tmp_path, [5.0, 4.0])
    backlog.put(make_job(tmp_path, 3, step=1))
    assert backlog.sequences == [2, 3]
    assert backlog.names == [f"checkpoint-epoch0-step{step}-files0" for step in (2, 1)]


def test_what_rank_0_has_no_more_is_forgotten_and_what_it_does_not_have_yet_is_not(tmp_path):
    backlog = filled(tmp_path, [5.0, 4.0, 3.0, 2.0])
    backlog.keep_only([2], up_to=3)
    assert backlog.sequences == [2, 4] and backlog.untried == {2, 4} and backlog.last == 4
    assert [job.manifest.sequence for job in backlog.remove([2, 3])] == [2]
    assert backlog.get(2) is None
