"""Worker processes that don't run the script again which started them.

A spawned process imports the script of its parent, to find functions that are defined there. A script without
`if __name__ == "__main__":` then does everything once more in each worker: it waits for the lock that its parent holds,
and the parent for it. Workers that only run functions of packages need no script.
"""

from __future__ import annotations

import io
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

_starting = threading.Lock()
_WAYS = ("__spec__", "__file__")  # how multiprocessing finds the script


def spawn_context(*sent: object) -> SpawnContext:
    """A context whose processes don't import the script, unless what is `sent` to them is defined there."""
    found = _FindScript(io.BytesIO())
    try:
        found.dump(sent)
    except Exception:  # noqa: BLE001  the start of a process says what can't be sent
        return get_context("spawn")
    return get_context("spawn") if found.needed else _ScriptlessContext()


class _FindScript(pickle.Pickler):
    """Whether what it pickles holds a class or function of the script."""

    needed = False

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) or callable(obj):
            self.needed |= getattr(obj, "__module__", None) == "__main__"
        return NotImplemented


class _ScriptlessProcess(SpawnProcess):
    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with _hidden_script():
            return SpawnProcess._Popen(process_obj)  # type: ignore[attr-defined]


class _ScriptlessContext(SpawnContext):
    Process = _ScriptlessProcess  # type: ignore[assignment]


@contextmanager
def _hidden_script() -> Iterator[None]:
    script = sys.modules["__main__"]
    with _starting:
        before = {name: vars(script)[name] for name in _WAYS if name in vars(script)}
        try:
            for name in before:
                setattr(script, name, None)
            yield
        finally:
            for name, value in before.items():
                setattr(script, name, value)
