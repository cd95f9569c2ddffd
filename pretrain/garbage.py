"""Python's garbage collector, kept out of the imports and the steps: it runs between steps, at known ones.

By itself it runs when enough objects were made, in the middle of whatever does that, and looks at all the objects that
torch's modules are made of: on one rank now and on another then, and all the others wait for it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

EVERY_STEPS = 50  # what forms no circle goes at once, collector or not; circles wait here


@contextlib.contextmanager
def held() -> Iterator[None]:
    """The collector does not run by itself inside the block; at its end it is as it was."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def collect_after(steps_taken: int) -> bool:
    """Collect, where it is time after so many steps of this process; whether it was. What the start has made stays for
    good: after the first step it is set apart, so that later ones look at little. Without `held` nothing is done."""
    if gc.isenabled() or (steps_taken > 1 and steps_taken % EVERY_STEPS):
        return False
    gc.collect()
    if steps_taken == 1:
        gc.freeze()
    return True
