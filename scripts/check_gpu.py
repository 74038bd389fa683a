"""Is this machine's GPU trained, merged and fused on rightly, and how fast? One page, one JSON, a few minutes.

    python scripts/check_gpu.py                            # everything that fits into five minutes
    python scripts/check_gpu.py --minutes 15 --json gpu.json
    python scripts/check_gpu.py --only packing fusion      # some checks; --list names them

Random models, no network. Each line is PASS or MISS with its figure and its bar, INFO where there is no bar, or SKIP
with what the machine lacks. Exit status 0 if nothing missed, 1 if something did. What needs no GPU runs on a machine
without one too, on smaller shapes; nothing is said of a GPU then.

Checks run one after the other in a worker process. One that dies of a check (a CUDA error ends it too: nothing after
it on that device could be believed), or takes far longer than it should (--patience), is a MISS, and the next worker
goes on with the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu_checks import Bench, Check, Line, all_checks, reason, skip  # noqa: E402

START = 12.0  # seconds in which a worker has imported its libraries
PATIENCE = 10.0  # a check is stopped after so many times what it should take, and a minute more


def visible_gpus() -> tuple[str, ...]:
    """Of CUDA_VISIBLE_DEVICES, or all that nvidia-smi knows. Nothing is imported."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(name.strip() for name in chosen.split(",") if name.strip() and name.strip() != "-1")
    if shutil.which("nvidia-smi") is None:
        return ()
    asked = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    return tuple(done.stdout.split()) if done.returncode == 0 else ()


# ---- the worker


def facts() -> dict[str, Any]:
    """Of the machine, by torch."""
    import platform

    import torch

    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else "no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else None
    return {
        "device": "cuda" if on_gpu else "cpu",
        "card": name,
        "card_gib": memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
    }


def quiet() -> None:
    """What libraries say is for the log."""
    import logging
    import warnings

    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bar()


def work(names: Sequence[str], scratch: Path, checks: dict[str, Check], known: dict[str, Any] | None = None) -> int:
    """Runs the checks; every event is a line of JSON on what was the standard output. known: for `facts()`."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between

    def tell(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    if known is None:
        known = facts()
        quiet()
    bench = Bench(known["device"], scratch, tuple(filter(None, os.environ.get("CHECK_GPU_ALL", "").split(","))))
    tell(event="hello", facts=known)
    for name in names:
        tell(event="begin", check=name)
        if checks[name].gpus and not bench.on_gpu:
            tell(event="line", check=name, line=asdict(skip(checks[name].about, "torch sees no GPU")), seconds=0.0)
            tell(event="end", check=name)
            continue
        begun = time.perf_counter()
        try:
            for line in checks[name].run(bench):
                tell(event="line", check=name, line=asdict(line), seconds=time.perf_counter() - begun)
                begun = time.perf_counter()
        except BaseException as error:  # noqa: BLE001  whatever it was, it is this check's
            traceback.print_exc()
            missed = Line(checks[name].about, "MISS", note=reason(error))
            tell(event="line", check=name, line=asdict(missed), seconds=time.perf_counter() - begun)
            if isinstance(error, KeyboardInterrupt) or not bench.sound():
                tell(event="lost", check=name)
                return 1
        tell(event="end", check=name)
        bench.free()
    return 0


# ---- the process that starts it


@dataclass
class Row:
    """A line of the page with what it belongs to."""

    check: str
    line: Line
    seconds: float = 0.0


@dataclass
class Page:
    """Everything that was found."""

    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def code(self) -> int:
        return 1 if any(row.line.verdict == "MISS" for row in self.rows) else 0

    def counts(self) -> dict[str, int]:
        verdicts = [row.line.verdict for row in self.rows]
        return {verdict: verdicts.count(verdict) for verdict in ("PASS", "MISS", "SKIP", "INFO")}

    def text(self) -> str:
        known = self.facts
        memory = f", {known['card_gib']:.0f} GiB" if known.get("card_gib") else ""
        head = f"{known.get('card', 'no worker answered')}{memory}; torch {known.get('torch', '?')}"
        head += f", Python {known.get('python', '?')}, {known.get('cpus', '?')} CPUs"
        wide = max((len(row.line.what) for row in self.rows), default=0)
        out, last = [head], None
        for row in self.rows:
            if row.check != last:
                out += ["", row.check]
                last = row.check
            line = row.line
            figure = "" if line.figure is None else f"{line.figure:.3g}"
            bar = "" if line.bar is None else f"bar {line.bar:.3g}"
            text = f"  {line.verdict}  {line.what:{wide}}  {figure:>9}  {bar:10}  {row.seconds:5.1f} s  {line.note}"
            out.append(text.rstrip())
        told = ", ".join(f"{count} {verdict}" for verdict, count in self.counts().items() if count)
        return "\n".join([*out, "", f"{told} in {self.seconds:.0f} s"])

    def as_dict(self) -> dict[str, Any]:
        rows = [{"check": row.check, "seconds": round(row.seconds, 2), **asdict(row.line)} for row in self.rows]
        return {"facts": self.facts, "counts": self.counts(), "seconds": round(self.seconds, 1), "lines": rows}


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


def environment(gpus: Sequence[str], scratch: Path) -> dict[str, str]:
    """Of a worker: one GPU, no network, its own cache."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {
        "PYTHONPATH": path,
        "CUDA_VISIBLE_DEVICES": gpus[0] if gpus else "",
        "CHECK_GPU_ALL": ",".join(gpus),
        "HF_HUB_OFFLINE": "1",
        "MTFT_CACHE": str(scratch / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if not gpus:
        own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # tiny shapes: threads only wait
    return {**os.environ, **own}


def main(arguments: Sequence[str] | None = None) -> int:
    checks = all_checks()
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=5.0, help="checks that don't fit any more are skipped")
    options.add_argument("--json", type=Path, metavar="FILE", help="write everything here too")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these checks only")
    options.add_argument("--list", action="store_true", help="name the checks and stop")
    options.add_argument(
        "--patience", type=float, default=PATIENCE, help="times what a check should take until it is stopped"
    )
    options.add_argument("--worker", help=argparse.SUPPRESS)
    options.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    asked = options.parse_args(arguments)
    if asked.list:
        for check in checks.values():
            print(f"{check.name:14} {check.about}")
        return 0
    if asked.worker is not None:
        return work(asked.worker.split(","), asked.scratch, checks)
    if unknown := [name for name in asked.only or () if name not in checks]:
        options.error(f"no check {unknown[0]!r}: choose from {', '.join(checks)}")
    if not (asked.minutes > 0 and asked.patience > 0):
        options.error("--minutes and --patience must be above 0")
    if asked.json is not None and not asked.json.resolve().parent.is_dir():
        options.error(f"there is no folder {asked.json.resolve().parent}")
    gpus = visible_gpus()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worker is ended too
    with tempfile.TemporaryDirectory(prefix="mtft-check-gpu-") as scratch:
        count = iter(range(1_000_000))

        def start(names: Sequence[str]) -> Worker:
            words = [sys.executable, str(Path(__file__).resolve()), "--worker", ",".join(names), "--scratch", scratch]
            return Worker(words, environment(gpus, Path(scratch)), Path(scratch) / f"worker-{next(count)}.log")

        session = Session(
            checks,
            [name for name in checks if asked.only is None or name in asked.only],
            minutes=asked.minutes,
            start=start,
            gpus=len(gpus),
            say=lambda text: print(text, file=sys.stderr, flush=True),
            patience=asked.patience,
        )
        page = session.run()
    if asked.json is not None:
        asked.json.write_text(json.dumps(page.as_dict(), indent=1) + "\n", encoding="utf-8")
    print(page.text())
    return page.code


if __name__ == "__main__":
    sys.exit(main())
