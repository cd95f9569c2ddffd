from __future__ import annotations

import math

import pytest

from pretrain.charts import draw_text, save_png
from pretrain.curves import Curve
from pretrain.errors import ConfigError, StorageError

CURVE = Curve(tuple(range(1, 101)), tuple(10 / step for step in range(1, 101)), (1e-3,) * 100, (50,), (0.3,), (20,))


def test_a_picture_is_written(tmp_path):
    save_png(CURVE, tmp_path / "x.png", "run", 100)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    save_png(Curve((1,), (2.0,), (1e-3,)), tmp_path / "one.png", "run", 1)


def test_where_it_cant_be_written_the_error_says_so(tmp_path):
    with pytest.raises(StorageError):
        save_png(CURVE, tmp_path / "none" / "x.png", "run", 100)
    with pytest.raises(ConfigError, match=r"x\.what"):
        save_png(CURVE, tmp_path / "x.what", "run", 100)


def test_a_chart_of_text_fits_and_falls_from_the_left_to_the_right():
    lines = draw_text(CURVE.steps, CURVE.losses, "loss", 60, 12).splitlines()
    assert lines[0] == "loss" and len(lines) == 12
    assert max(map(len, lines)) <= 60
    assert lines[1].startswith("10.000 │") and lines[9].startswith(" 0.100 │")
    assert lines[-1].split() == ["1", "100"]
    drawn = [line.split("│")[1] for line in lines[1:-2]]
    assert all(row.strip() for row in drawn)  # connected: no row is empty
    assert drawn[0].strip()[0] == drawn[0][0] and not drawn[-1].startswith("⠉")


def test_a_single_point_and_no_point_can_be_drawn():
    assert "2.000" in draw_text([5], [2.0], "loss", 40, 8)
    assert draw_text([5], [math.nan], "loss", 40, 8) == "loss: nothing to show"
