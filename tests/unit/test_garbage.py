from __future__ import annotations

import gc
import weakref

import pytest

from pretrain import garbage


class Ring:
    def __init__(self) -> None:
        self.me = self


def test_circles_wait_for_a_known_step(monkeypatch):
    monkeypatch.setattr(garbage, "EVERY_STEPS", 3)
    with garbage.held():
        assert not gc.isenabled()
        kept = Ring()
        garbage.collect_after(1)
        assert gc.get_freeze_count() > 0  # what there is after the first step is looked at no more
        gone = weakref.ref(Ring())
        garbage.collect_after(2)
        assert gone() is not None
        garbage.collect_after(3)
        assert gone() is None and kept.me is kept
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_it_is_as_before_after_an_error_and_where_it_was_off():
    with pytest.raises(KeyError), garbage.held():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage.held():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_loop_that_does_not_hold_the_collector_leaves_it_alone():
    garbage.collect_after(1)
    assert gc.isenabled() and gc.get_freeze_count() == 0
