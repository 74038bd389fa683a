"""How scripts/check_gpu.py runs its checks: in workers, one after the other, until all have their lines."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from check_gpu_page import Page, Row
from gpu_checks import Check, Line

START = 12.0  # seconds in which a worker has imported its libraries
PATIENCE = 10.0  # a check is stopped after so many times what it should take, and a minute more


class Worker:
    """A worker process and what it says: `next` gives its events, one after the other, None when it has ended."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self._log = log.open("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment, start_new_session=True
        )
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """TimeoutError if nothing comes in time."""
        try:
            return self._events.get(timeout=max(seconds, 0.1))
        except queue.Empty:
            raise TimeoutError from None

    def stop(self) -> None:
        """Ends it and whatever it has started in its group."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def epitaph(self) -> str:
        """Why it has ended, in a line."""
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return "the worker closed its output"
        self._log.flush()
        self._log.seek(0)
        last = (self._log.read()[-4000:].strip().splitlines() or ["it said nothing"])[-1]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"the worker died: {how}; {last[:200]}"


class Session:
    """Runs checks in workers until all have their lines."""

    def __init__(
        self,
        checks: dict[str, Check],
        names: Sequence[str],
        *,
        minutes: float,
        start: Callable[[Sequence[str]], Worker],
        gpus: int,
        say: Callable[[str], None],
        patience: float = PATIENCE,
    ) -> None:
        self.checks, self.left, self.start, self.gpus = checks, list(names), start, gpus
        self.say, self.patience = say, patience
        self.begun = time.monotonic()
        self.until = self.begun + 60 * minutes
        self.minutes = minutes
        self.page = Page()

    def run(self) -> Page:
        while self.left:
            self._skip_first()
            if self.left:
                self._one_worker()
        order = {name: index for index, name in enumerate(self.checks)}
        self.page.rows.sort(key=lambda row: order[row.check])
        self.page.seconds = time.monotonic() - self.begun
        return self.page

    def expected(self, name: str) -> float:
        return self.checks[name].seconds[1 if self.gpus else 0]

    def _refusal(self, name: str) -> str | None:
        """Why a check is skipped now."""
        check = self.checks[name]
        if check.gpus > self.gpus:
            return "no GPU here" if self.gpus == 0 else f"needs {check.gpus} GPUs, {self.gpus} here"
        if time.monotonic() + self.expected(name) > self.until:
            return f"no time left: --minutes {self.minutes:g}"
        return None

    def _skip_first(self) -> None:
        """Those at the front that can't run here, or have no time left."""
        while self.left and (why := self._refusal(self.left[0])) is not None:
            self._skip(why)

    def _skip(self, why: str) -> None:
        name = self.left.pop(0)
        self._add(name, Line(self.checks[name].about, "SKIP", note=why))

    def _batch(self) -> list[str]:
        """What a worker is asked for: all that can run here. What no longer fits is taken back from it."""
        return [name for name in self.left if self.checks[name].gpus <= self.gpus]

    def _add(self, name: str, line: Line, seconds: float = 0.0) -> None:
        self.page.rows.append(Row(name, line, seconds))
        figure = "" if line.figure is None else f" {line.figure:.3g}"
        self.say(f"{line.verdict}  {name}: {line.what}{figure}{f' ({line.note})' if line.note else ''}")

    def _one_worker(self) -> None:
        worker = self.start(self._batch())
        current: str | None = None
        bound = time.monotonic() + self.patience * START
        try:
            while True:
                try:
                    event = worker.next(bound - time.monotonic())
                except TimeoutError:
                    worker.stop()
                    self._give_up(current, "took too long and was stopped")
                    return
                if event is None:
                    if self._unfinished(current):
                        self._give_up(current, worker.epitaph())
                    return
                if event["event"] == "hello":
                    self.page.facts = self.page.facts or event["facts"]
                    if event["facts"]["device"] == "cpu":
                        self.gpus = 0  # there may be one that this torch can't use
                elif event["event"] == "begin":
                    current = str(event["check"])
                    while self.left[0] != current:  # the worker was not asked for them
                        self._skip(self._refusal(self.left[0]) or "it can't run here")
                    if self._refusal(current) is not None:
                        return  # a new look at what still can
                    bound = time.monotonic() + self.patience * (6 + self.expected(current))
                elif event["event"] == "line":
                    self._add(event["check"], Line(**event["line"]), event["seconds"])
                else:  # end, or lost: its line was told before
                    self.left.remove(event["check"])
                    current = None
                    bound = time.monotonic() + self.patience * START
                    if event["event"] == "lost":
                        return
        finally:
            worker.stop()

    def _unfinished(self, current: str | None) -> bool:
        return current is not None or bool(self._batch())

    def _give_up(self, current: str | None, why: str) -> None:
        """MISS for the check that was running; before the first, for the first that was asked for."""
        name = current if current is not None else self._batch()[0]
        self._add(name, Line(self.checks[name].about, "MISS", note=why))
        self.left.remove(name)
