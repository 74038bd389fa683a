"""JSONL in, JSONL out, in buckets, resumable: a killed run goes on from its side file (answers_file.py).

Every answer is kept with its index and the hash of its request. Buckets are made from all requests, done or not, so a
resumed run computes exactly what an uninterrupted one does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mtft.common.folder_lock import sole_writer
from mtft.common.long_work import LongWork
from mtft.common.out_of_memory import give_back, is_out_of_memory
from mtft.common.output_paths import check_output_file
from mtft.common.own_files import irregular
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.batch.answers_file import Answer, AnswersFile
from mtft.fuse.batch.request_rows import JsonlRequest, Row
from mtft.fuse.request_values import ROW_ERRORS

REASONS = 5  # failures that are told; the others stand in the output
Work = Callable[[list[Row]], list[Row]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class BatchSummary:
    """rows done in all, how many failed, how many had been done by an earlier, broken-off run; the first failures."""

    rows: int
    failed: int
    resumed: int
    reasons: tuple[str, ...] = ()


@contextmanager
def output_of(
    source: Path, target: Path, *, inputs: Iterable[Path] = (), overwrite: bool = False
) -> Iterator[AnswersFile]:
    """The output for itself while the block runs; its side file. Asked before any weight is loaded.

    Raises FusionError or UserError if the input can't be read, the output can't be written, is an input, or is being
    written by another command.
    """
    if (kind := irregular(source)) is not None:
        raise FusionError(f"the input is {kind}, not a file", where=str(source), do="give a file of rows (JSONL)")
    if not os.path.isfile(source):
        raise FusionError("there is no such input", where=str(source), do="give a file of rows (JSONL)")
    check_output_file(target, inputs=[source, *inputs], overwrite=True)
    with sole_writer(target):
        answers = AnswersFile(target)
        # there, by a run that was killed before it could remove its side file: the same command ends it
        check_output_file(target, overwrite=overwrite or answers.is_done)
        try:
            yield answers
        finally:
            answers.close()


def resume(
    jobs: Sequence[JsonlRequest], answers: AnswersFile, fingerprint: str, *, overwrite: bool = False
) -> dict[int, Answer]:
    """What a broken-off run has done of these jobs, by their index. An answer to another request is forgotten."""

    hashes = {job.index: job.hash for job in jobs}
    count = {i: answer for i, answer in answers.answers.items() if hashes.get(i) == answer["request"]}
    if answers.is_done and not (answers.fingerprint == fingerprint and answers.has_written(count)):
        answers.remove()  # of another run, that has its output
        check_output_file(answers.target, overwrite=overwrite)
        count = {}
    answers.claim(fingerprint)
    if answers.damaged:
        lines = "a line is" if answers.damaged == 1 else f"{answers.damaged} lines are"
        warnings.warn(f"{answers.path}: {lines} damaged; what should stand there is computed again", stacklevel=2)
    return count


def run_buckets(
    jobs: Sequence[JsonlRequest],
    answers: AnswersFile,
    done: dict[int, Answer],
    work: Work,
    *,
    bucket: int,
    say: Say | None = None,
) -> BatchSummary:
    """Do the jobs that are not done and write the output, sorted by index. `work` gives an answer for each row of a
    bucket. say: is told of the progress, every ten seconds.
    """
    resumed, missing = len(done), len(jobs) - len(done)
    progress = None if say is None else LongWork(say, "rows:")

    def write(group: Sequence[JsonlRequest], found: Sequence[Row]) -> None:
        lines = [
            {"index": job.index, "id": job.id, "request": job.hash}
            | ({"line": job.line} if "error" in answer else {})
            | answer
            for job, answer in zip(group, found, strict=True)
            if job.index not in done
        ]
        if not lines:
            return
        done.update((line["index"], line) for line in answers.add(lines))
        if progress is not None:
            progress(len(done) - resumed, missing)

    invalid = [job for job in jobs if job.error is not None]
    valid = sorted((job for job in jobs if job.error is None), key=lambda job: (job.cost, job.index))
    write(invalid, [{"error": job.error} for job in invalid])
    for start in range(0, len(valid), bucket):
        group = valid[start : start + bucket]
        if any(job.index not in done for job in group):
            write(group, _work_isolated(group, work))
    answers.finish(done)
    failed = [done[index] for index in sorted(done) if "error" in done[index]]
    reasons = [f"line {line.get('line')}: {line['error']}" for line in failed[:REASONS]]
    return BatchSummary(len(jobs), len(failed), resumed, tuple(reasons))


def _that_still_count(answers: AnswersFile, jobs: Sequence[JsonlRequest]) -> dict[int, Answer]:
    """An answer to another request than the row of today is forgotten."""
    hashes = {job.index: job.hash for job in jobs}
    return {i: answer for i, answer in answers.answers.items() if hashes.get(i) == answer["request"]}


def _answers_all(answers: AnswersFile, fingerprint: str, jobs: Sequence[JsonlRequest]) -> bool:
    return answers.fingerprint == fingerprint and len(_that_still_count(answers, jobs)) == len(jobs)


def _work_isolated(group: list[JsonlRequest], work: Work) -> list[Row]:
    """The answers of a bucket; if it fails as a whole, each row alone, so that one bad row stays one bad row."""
    try:
        return work([job.row for job in group])
    except FusionError as error:
        if len(group) == 1:
            return [{"error": error.what}]
    except (RuntimeError, *ROW_ERRORS) as error:  # memory that does not suffice is a RuntimeError
        if len(group) == 1:
            return [{"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}]
        if is_out_of_memory(error):
            give_back(error)  # before the rows are tried alone
    return [answer for job in group for answer in _work_isolated([job], work)]
