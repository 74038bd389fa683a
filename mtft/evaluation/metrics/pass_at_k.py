"""pass_at_k: does an answer pass a check that the user wrote. Their command is run, never an answer alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import comb
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mtft.common.errors import UserError
from mtft.common.fingerprint import file_hash, json_hash
from mtft.common.listing import clipped
from mtft.evaluation.metrics.base import Answer, Metric
from mtft.evaluation.metrics.process_group import end_group, start_group
from mtft.evaluation.metrics.text_matches import column

_AT_ONCE = 8
Tries = Annotated[int, Field(ge=1, le=1000)]


@dataclass(frozen=True)
class PassAtK(Metric):
    """Mean over rows of 1 - C(n - c, k) / C(n, k): the chance that of k answers one passes, from n answers of which c
    pass (Chen et al. 2021, arXiv 2107.03374, eq. 1).

    command  words of a command, without a shell: {answer} stands for the path of a file with one answer, {row} for that
             of a JSON file with prompt, reference and row; exit code 0 passes. Files beside the recipe are found
    k        answers of which one should pass
    samples  n, answers to each row's prompt; k at least
    timeout  seconds until an answer has failed

    The command runs once for each answer, in an empty temporary folder, with the user's rights and environment: it is
    the user's to lock it in. What it says is dropped. It is killed after its time with what it started, but for
    processes that left its session.
    """

    NAME = "pass_at_k"
    AGGREGATE = "share"
    NEEDS_ROW = True

    command: list[str]
    k: Tries = 1
    samples: Tries = 1  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout: Annotated[float, Field(gt=0, le=86400)] = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        where = f"metrics.{self.NAME}"
        if self.samples < self.k:
            what = (
                f"pass@{self.k} can't be told from {self.samples} answer{'s' if self.samples > 1 else ''} to a prompt"
            )
            raise UserError(what, where=f"{where}.samples", do=f"set samples: {self.k} or more")
        if not any("{answer}" in word for word in self.command):
            do = 'give the check the path of the answer: command: [python, check.py, "{answer}"]'
            raise UserError("no word of the command is {answer}", where=f"{where}.command", do=do)
        if any("\0" in word for word in self.command):
            raise UserError("a word of the command holds a zero byte", where=f"{where}.command", do="remove it")
        program = self.command[0]
        if (os.sep in program and not os.path.isabs(program)) or shutil.which(program) is None:
            what = f"there is no program {clipped(program, 80)!r}"
            do = "install it, or write its path (./NAME for one beside the recipe) and make it executable"
            raise UserError(what, where=f"{where}.command", do=do)

    @property
    def digest(self) -> str | None:
        files = {word: file_hash(Path(word)) for word in self.command if os.path.isabs(word) and os.path.isfile(word)}
        return json_hash(files) if files else None

    def describe(self) -> str:
        said = f"runs your command: {' '.join(self.command)}"
        return f"{said} (sha256 {self.digest[:12]}...)" if self.digest else said

    def statistics(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        runs = [(answer, text) for answer in answers for text in answer.texts[: self.samples]]
        with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
            try:
                passed = iter(list(pool.map(self._passes, runs)))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return column([self._estimate([next(passed) for _ in answer.texts[: self.samples]]) for answer in answers])

    def _estimate(self, passed: list[bool]) -> float:
        n, c = len(passed), sum(passed)
        return 1 - comb(n - c, self.k) / comb(n, self.k)

    def _passes(self, run: tuple[Answer, str]) -> bool:
        try:
            with TemporaryDirectory(prefix="mtft-pass-at-k-", ignore_cleanup_errors=True) as folder:
                return self._passes_in(Path(folder), *run)
        except OSError as error:
            what, do = f"the command can't be run: {error}", "try it in a shell; the folder of $TMPDIR must have room"
            raise UserError(what, where=f"metrics.{self.NAME}.command", do=do) from None

    def _passes_in(self, folder: Path, answer: Answer, text: str) -> bool:
        files = {"{answer}": folder / "answer.txt", "{row}": folder / "row.json"}
        files["{answer}"].write_text(text, encoding="utf-8", errors="replace", newline="")
        given = {"prompt": answer.prompt, "reference": answer.reference, "row": dict(answer.row)}
        files["{row}"].write_text(json.dumps(given, default=str, skipkeys=True), encoding="utf-8")
        words = self.command
        for mark, file in files.items():
            words = [word.replace(mark, str(file)) for word in words]
        empty = folder / "empty"
        empty.mkdir()
        process = start_group(words, empty)
        try:
            return process.wait(self.timeout) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            end_group(process)
