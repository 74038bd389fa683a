"""Python's collector of cycles, kept out of the way while modules are imported and when a command ends.

It looks at everything that there is, over and over, while torch and transformers make a million objects that stay: a
tenth of the time of a short command, and as much once more at its end.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Nothing is collected inside the block. For imports: what works on data may leave cycles that have to go."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def end_at_once() -> None:
    """At the end of the process nothing is collected: its memory goes back all the same."""
    atexit.register(gc.freeze)
