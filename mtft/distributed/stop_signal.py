"""SIGTERM and SIGINT: finish the optimizer step, save, then stop.

Schedulers send a signal to a launcher and to its processes, and the launcher passes it on: so a second one is no more
than the first. Only Ctrl-C, again after a while, stops at once; kill -9 always does.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

EXIT_CODES = {signal.SIGTERM: 0, signal.SIGINT: 130}
SAME = 2.0  # seconds in which a second SIGINT counts as the first


class StopSignal:
    """As a context manager, catches both signals in the main thread (elsewhere it catches nothing).

    `seen`: the signal that every rank has agreed to stop for, None so far.
    """

    def __init__(self) -> None:
        self.seen: signal.Signals | None = None
        self._here = 0
        self._first = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self._here:
            self._here, self._first = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._first > SAME:
            signal.signal(number, self._before[signal.SIGINT])
            signal.raise_signal(number)

    def agreed(self, device: torch.device) -> bool:
        """True on all ranks in the same step as soon as one of them has caught a signal. A collective call."""
        number = self._here
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            largest = torch.tensor(number, device=device)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            number = int(largest)
        if number:
            self.seen = signal.Signals(number)
        return bool(number)
