"""JSONL in, JSONL out, in buckets, resumable: what is done stands in OUT.part, and a killed run goes on from there.

OUT.part starts with a fingerprint; every further line is one answer with its index and the hash of its request. Buckets
are made from all requests, done or not, so a resumed run computes exactly what an uninterrupted one does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtft.common.atomic_io import finite
from mtft.common.fingerprint import content_hash
from mtft.fuse.alpha.spec import FusionError

Row = dict[str, Any]
Work = Callable[[list[Row]], list[Row]]


@dataclass
class JsonlRequest:
    """One request: its index among the rows, its hash, the row itself, or why it can't be done."""

    index: int
    hash: str
    row: Row
    cost: int = 0  # rows of near cost share a bucket
    error: str | None = None


@dataclass(frozen=True)
class BatchSummary:
    """rows done in all, how many failed, and how many had been done by an earlier, broken-off run."""

    rows: int
    failed: int
    resumed: int


def check_paths(source: Path, target: Path, overwrite: bool) -> None:
    """Can the input be read and the output be written? Asked before any weight is loaded."""
    if not source.is_file():
        raise FusionError("there is no such input", where=str(source), do="give a UTF-8 JSONL file")
    if target.exists() and not overwrite:
        raise FusionError(
            "the output is there already", where=str(target), do="remove it, give another --out, or --overwrite"
        )


def read_requests(source: Path, prepare: Callable[[int, Row], int]) -> list[JsonlRequest]:
    """All rows of `source`. `prepare(index, row)` checks a row and returns its cost; its FusionError marks the row."""
    try:
        lines = [line for line in source.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise FusionError(
            f"the input can't be read: {error}", where=str(source), do="give a UTF-8 JSONL file"
        ) from error
    jobs = []
    for index, line in enumerate(lines):
        job = JsonlRequest(index, content_hash(line)[:16], {})
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise FusionError(f"the row is {type(row).__name__}, not an object")
            job.row = row
            job.cost = prepare(index, row)
        except FusionError as error:
            job.error = error.what
        except (ValueError, RecursionError) as error:
            job.error = f"no JSON: {error}"
        jobs.append(job)
    if not jobs:
        raise FusionError("the input has no rows", where=str(source), do="give one JSON object a line")
    return jobs


def run_buckets(
    jobs: Sequence[JsonlRequest], target: Path, fingerprint: str, work: Work, *, bucket: int
) -> BatchSummary:
    """Do all jobs and write `target`, sorted by index. `work` gives an answer for each row of a bucket."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    done = _resume(part, fingerprint, jobs)
    resumed = len(done)
    invalid = [job for job in jobs if job.error is not None]
    valid = sorted((job for job in jobs if job.error is None), key=lambda job: (job.cost, job.index))
    with part.open("a", encoding="utf-8") as file:

        def write(group: Sequence[JsonlRequest], answers: Sequence[Row]) -> None:
            pairs = [(job, answer) for job, answer in zip(group, answers, strict=True) if job.index not in done]
            lines = [
                {"index": job.index, "id": job.row.get("id"), "request": job.hash, **answer} for job, answer in pairs
            ]
            _append(file, lines)
            done.update((line["index"], line) for line in lines)

        if not file.tell():
            _append(file, [{"fingerprint": fingerprint}])
        write(invalid, [{"error": job.error} for job in invalid])
        for start in range(0, len(valid), bucket):
            group = valid[start : start + bucket]
            if any(job.index not in done for job in group):
                write(group, _work_isolated(group, work))
    _finish(target, part, done)
    return BatchSummary(len(jobs), sum("error" in line for line in done.values()), resumed)


def _work_isolated(group: list[JsonlRequest], work: Work) -> list[Row]:
    """The answers of a bucket; if it fails as a whole, each row alone, so that one bad row stays one bad row."""
    try:
        return work([job.row for job in group])
    except FusionError as error:
        if len(group) == 1:
            return [{"error": error.what}]
    return [answer for job in group for answer in _work_isolated([job], work)]


def _append(file: Any, lines: Sequence[Row]) -> None:
    """On disk before the next bucket starts."""
    file.writelines(json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    file.flush()
    os.fsync(file.fileno())


def _resume(part: Path, fingerprint: str, jobs: Sequence[JsonlRequest]) -> dict[int, Row]:
    """Answers that stand already. A torn last line is cut off; an answer to another request is forgotten."""
    if not part.exists():
        return {}
    text = part.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        with part.open("r+b") as file:
            file.truncate(len(complete))
    lines = [json.loads(line) for line in complete.splitlines()]
    if lines and lines[0].get("fingerprint") != fingerprint:
        raise FusionError(
            "a broken-off run with another recipe, seed or other weights stands here",
            where=str(part),
            do="remove it, or give another --out",
        )
    hashes = {job.index: job.hash for job in jobs}
    return {line["index"]: line for line in lines[1:] if hashes.get(line["index"]) == line["request"]}


def _finish(target: Path, part: Path, done: dict[int, Row]) -> None:
    complete = target.with_name(target.name + ".sorted")
    with complete.open("w", encoding="utf-8") as file:
        lines = [{key: value for key, value in done[index].items() if key != "request"} for index in sorted(done)]
        _append(file, lines)
    complete.replace(target)
    part.unlink()
