from __future__ import annotations

import pytest

from pretrain.errors import StorageError
from pretrain.files import make_writable


def test_a_folder_is_made_and_tried_and_nothing_stays_in_it(tmp_path):
    make_writable(tmp_path / "a" / "b", "--checkpoint.dir")
    make_writable(tmp_path / "a" / "b", "--checkpoint.dir")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_names_the_option_that_chooses_another(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        StorageError, match=r"file/b can't be written: Not a directory. Choose .* with --checkpoint\.dir"
    ):
        make_writable(tmp_path / "file" / "b", "--checkpoint.dir")
