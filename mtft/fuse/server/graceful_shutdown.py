"""A server that drains: at SIGTERM or Ctrl-C it finishes what runs, refuses what comes (503), and ends with status 0.

It also ends, with status 1, when its engine can't work again in this process (a device that failed).

uvicorn alone stops to listen at once, so that clients see a refused connection, and at the end sends itself the signal
again, so that a supervisor sees a killed process.
"""

from __future__ import annotations

import os
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

if TYPE_CHECKING:
    from mtft.fuse.server.batch_engine import BatchEngine

PATIENCE = 120.0  # seconds that running answers may take; then they are cut off
SILENCE = 20.0  # seconds in which a connection sends the headers of a request


class DrainingServer(uvicorn.Server):
    """uvicorn's server with other manners at its end, and a limit for clients that never say what they want."""

    def __init__(self, config: uvicorn.Config, engine: BatchEngine, *, silence: float = SILENCE) -> None:
        super().__init__(config)
        self.engine, self.silence = engine, silence
        self._until: float | None = None
        self._silent: dict[Any, tuple[Any, float]] = {}  # connections without a request: their last one, since when

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler. A second signal ends the process at once: there is nothing that could be lost."""
        if self._until is not None:
            sys.stderr.flush()
            os._exit(128 + sig)
        self._until = time.monotonic() + PATIENCE
        self.engine.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self.engine.lost:  # whoever was waiting has heard of it; a supervisor starts another process
            self.should_exit = True
        if self._until is not None and (self.engine.idle or time.monotonic() > self._until):
            self.should_exit = True
        self._close_silent()
        return await super().on_tick(counter)

    def _close_silent(self) -> None:
        """uvicorn waits for the rest of a request's headers for ever."""
        now, before = time.monotonic(), self._silent
        self._silent = {}
        for connection in list(self.server_state.connections):
            last: Any = getattr(connection, "cycle", None)
            if last is not None and not last.response_complete:
                continue
            known, since = before.get(connection, (last, now))
            self._silent[connection] = (last, since if known is last else now)
            if now - self._silent[connection][1] > self.silence:
                connection.transport.close()
