"""SIGTERM, SIGINT and SIGHUP: finish the optimizer step, save, then stop. A second signal stops at once.

Schedulers send a signal to a launcher and to its processes, and the launcher passes it on: within two seconds a second
one is no more than the first.
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
if hasattr(signal, "SIGHUP"):  # not on Windows
    EXIT_CODES[signal.SIGHUP] = 0  # the terminal is gone
SAME = 2.0  # seconds in which a second signal counts as the first


class StopSignal:
    """As a context manager, catches the signals in the main thread (elsewhere it catches nothing).

    A signal that is ignored when the block begins (SIGHUP under nohup) stays ignored.
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
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self._here:
            self._here, self._first = number, time.monotonic()
        elif time.monotonic() - self._first > SAME:
            for caught in self._before:  # a third one must not be held up by what the second one set off
                signal.signal(caught, signal.default_int_handler if caught == signal.SIGINT else signal.SIG_DFL)
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
