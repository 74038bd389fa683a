"""{python: FILE.py:FUNCTION}: a score that a function of the user's own gives."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_mixers.common.suggest import did_you_mean
from mtft.common.aggregates import AGGREGATES, Aggregate
from mtft.common.errors import UserError
from mtft.common.fingerprint import content_hash
from mtft.common.listing import clipped
from mtft.evaluation.metrics.base import Answer, Metric
from mtft.evaluation.metrics.process_group import end_group, start_group
from mtft.evaluation.metrics.text_matches import column
from mtft.recipe.metric_files import outside

_WORKER = Path(__file__).with_name("python_worker.py")
_SECONDS_TO_END = 5.0  # for what the file does at its process's end


@dataclass(frozen=True)
class PythonMetric(Metric):
    """Mean over rows of FUNCTION(prompt, reference, answer, row) -> number; row: the columns of the row in its file.

    The file is read once; what was read is what runs and what `digest` is of. All rows of a call go through one new
    Python process (the same interpreter), in the file's folder, which is not searched for modules: the file stands
    alone, beside installed packages.

    timeout  seconds until the file is loaded, and then for each row; past it the process and all that it started end
    """

    NAME = "python"
    AGGREGATE = "mean"
    NEEDS_ROW = True

    python: str
    higher_is_better: bool = True
    timeout: Annotated[float, Field(gt=0, le=86400)] = 60.0
    folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is not None and outside(self.file, Path(self.folder)):
            do = "copy the file beside the recipe: code is run from there only"
            raise UserError(f"the file lies outside of {self.folder}", where=str(self.file), do=do)
        try:
            tree = ast.parse(self.source, str(self.file))
        except (SyntaxError, ValueError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            where = f"{self.file}:{line}" if line else str(self.file)
            raise UserError(f"not readable as Python: {error}", where=where, do="mend the file") from None
        names = _names(tree)
        if self.function not in names and "*" not in names:
            what = f"there is no function {self.function!r}{did_you_mean(self.function, names)}"
            raise UserError(what, where=str(self.file), do="name a function of the file: FILE.py:FUNCTION")

    @property
    def aggregate(self) -> Aggregate:
        return AGGREGATES["mean" if self.higher_is_better else "error"]

    @property
    def file(self) -> Path:
        """Where the function stands."""
        return Path(self.python.rpartition(":")[0]).absolute()

    @property
    def function(self) -> str:
        """Its name."""
        return self.python.rpartition(":")[2]

    @cached_property
    def source(self) -> bytes:
        """The file, as it was when it was read first."""
        try:
            return self.file.read_bytes()
        except OSError as error:
            what = f"the file can't be read: {error.strerror}"
            raise UserError(what, where=str(self.file), do="check the path and its permissions") from None

    @property
    def digest(self) -> str:
        return content_hash(self.source)

    def describe(self) -> str:
        return f"runs your code: {self.file.name}:{self.function} (sha256 {self.digest[:12]}...)"

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        return column(_UserProcess(self, answers).scores() if answers else [])


def _names(tree: ast.AST) -> set[str]:
    """Names that a file may give to a function; `*` where it imports whatever there is."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
    return names


def _reply_in(line: bytes) -> dict[str, Any] | None:
    """What the worker says in a line; None if it is none of its."""
    try:
        reply = json.loads(line)
    except ValueError:
        return None
    known = isinstance(reply, dict) and (reply.keys() == {"error", "line"} or reply.keys() == {"score"})
    return reply if known else None


class _UserProcess:
    """One process that scores the rows of one call: a thread sends them, another receives, and we watch the time."""

    def __init__(self, metric: PythonMetric, answers: Sequence[Answer]) -> None:
        self.metric, self.answers = metric, answers
        # -P: neither the worker's folder nor the user's is searched for modules
        command = [sys.executable, "-P", str(_WORKER)]
        try:
            self.process = start_group(command, metric.file.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            what = f"no process can be started for {metric.function}: {error}"
            raise UserError(
                what, where=str(metric.file), do="check the folder, and what the machine has left"
            ) from None
        self.replies: SimpleQueue[bytes] = SimpleQueue()

    def scores(self) -> list[float]:
        """One number a row. Raises UserError for the first that there is none for."""
        threads = [Thread(target=work, daemon=True) for work in (self._send, self._receive)]
        for thread in threads:
            thread.start()
        try:
            self._reply(None)
            scores = [self._reply(answer) for answer in self.answers]
            self._exit_code()
            return scores
        finally:
            end_group(self.process)
            for thread in threads:
                thread.join(_SECONDS_TO_END)  # a pipe may be held open by what has left the process's group

    def _exit_code(self) -> int | None:
        """Of the process, which has nothing more to do; None if it does not end."""
        try:
            return self.process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return None

    def _send(self) -> None:
        metric = self.metric
        start = {"source": metric.source.decode("latin-1"), "file": str(metric.file), "function": metric.function}
        lines = ({"prompt": a.prompt, "reference": a.reference, "answer": a.text, "row": dict(a.row)}
                 for a in self.answers)  # fmt: skip
        pipe: Any = self.process.stdin
        try:
            with pipe:
                for line in (start, *lines):
                    pipe.write(json.dumps(line, default=str, skipkeys=True).encode() + b"\n")
                    pipe.flush()
        except (BrokenPipeError, ConnectionResetError):  # the process has ended: its reply, or none, says why
            pass

    def _receive(self) -> None:
        pipe: Any = self.process.stdout
        with pipe:
            for line in pipe:
                self.replies.put(line)
        self.replies.put(b"")

    def _reply(self, answer: Answer | None) -> float:
        """What the process says of a row; None: of the file."""
        metric = self.metric
        doing = f"loading {metric.file.name}" if answer is None else f"{metric.function} on the row of {answer.where}"
        try:
            line = self.replies.get(timeout=metric.timeout)
        except Empty:
            what = f"{doing} takes more than {metric.timeout:g} s"
            do = f"mend it, or give it more time: timeout: {2 * metric.timeout:g}"
            raise UserError(what, where=str(metric.file), do=do) from None
        if not line:
            what = f"{doing} ended its process (exit code {self._exit_code()})"
            raise UserError(what, where=str(metric.file), do="mend it: it must return a number")
        reply = _reply_in(line)
        if reply is None:
            what = f"{doing} wrote into the pipe of its results"
            raise UserError(what, where=str(metric.file), do="leave file descriptors alone that it did not open")
        if "error" in reply:
            place = f"{metric.file}:{reply['line']}" if reply["line"] else str(metric.file)
            raise UserError(f"{doing}: {clipped(reply['error'], 500)}", where=place, do="mend it, then score again")
        score = 0.0 if answer is None else float(reply["score"])
        if score < 0 and not metric.higher_is_better:
            what = f"{doing} returned {score:g}, and an error (higher_is_better: false) is 0 or more"
            raise UserError(what, where=str(metric.file), do="return 0 for the best answer and more for worse ones")
        return score
