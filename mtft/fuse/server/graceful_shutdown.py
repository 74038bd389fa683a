"""A server that drains: at SIGTERM or Ctrl-C it finishes what runs, refuses what comes (503), and ends with status 0.

uvicorn alone stops to listen at once, so that clients see a refused connection, and at the end sends itself the signal
again, so that a supervisor sees a killed process.
"""

from __future__ import annotations

import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from mtft.fuse.server.batch_engine import BatchEngine

PATIENCE = 120.0  # seconds that running answers may take; then they are cut off


class DrainingServer(uvicorn.Server):
    """uvicorn's server with other manners at its end. A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, engine: BatchEngine) -> None:
        super().__init__(config)
        self.engine = engine
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self._until is not None:
            self.should_exit = self.force_exit = True
            return
        self._until = time.monotonic() + PATIENCE
        self.engine.drain()

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if self._until is not None and (self.engine.idle or time.monotonic() > self._until):
            self.should_exit = True
        return await super().on_tick(counter)
