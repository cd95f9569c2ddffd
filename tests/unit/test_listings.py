from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from pretrain.listings import age_text, figure_text, print_fields, print_table, size_text, time_text


def printed(terminal, action):
    file = io.StringIO()
    action(Console(file=file, force_terminal=terminal, width=60, markup=False))
    return file.getvalue()


def test_plain_text_is_aligned_and_never_cut():
    rows = [["a" * 70, "5"], ["[b]", "12,345"]]
    lines = printed(
        False, lambda console: print_table(["name", "n"], rows, console, right=["n"], title="T")
    ).splitlines()
    assert lines[0] == "T"
    assert lines[2] == "a" * 70 + "  " + "     5"
    assert lines[3] == "[b]" + " " * 67 + "  12,345"


def test_a_terminal_gets_a_table():
    text = printed(True, lambda console: print_table(["name"], [["[b]"]], console))
    assert "─" in text and "[b]" in text


def test_fields_are_aligned():
    assert printed(False, lambda console: print_fields("T", {"a": "1", "long": "2"}, console)) == (
        "T\n  a     1\n  long  2\n"
    )


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_960, "1.0 MB"), (15.8e9, "15.8 GB"), (2.5e12, "2.5 TB")],
)
def test_sizes(n_bytes, text):
    assert size_text(n_bytes) == text


def test_figures_ages_and_times():
    assert (figure_text(1234, ","), figure_text(None, ","), figure_text("x", ",")) == ("1,234", "–", "–")
    assert [age_text(s) for s in (60, 7200, 2 * 86400, math.inf)] == ["1 min", "2.0 h", "2.0 d", "–"]
    assert (time_text("2026-01-31T12:34:56+00:00"), time_text(None)) == ("2026-01-31 12:34", "–")
