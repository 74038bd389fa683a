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
from mtft.common.own_files import defect, irregular, read_own_lines
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.batch.request_rows import ROW_ERRORS, JsonlRequest, Row

REASONS = 5  # failures that are told; the others stand in the output
Work = Callable[[list[Row]], list[Row]]


@dataclass(frozen=True)
class BatchSummary:
    """rows done in all, how many failed, how many had been done by an earlier, broken-off run; the first failures."""

    rows: int
    failed: int
    resumed: int
    reasons: tuple[str, ...] = ()


def check_paths(source: Path, target: Path, overwrite: bool) -> None:
    """Can the input be read and the output be written? Asked before any weight is loaded."""
    if not source.is_file():
        raise FusionError("there is no such input", where=str(source), do="give a file of rows (JSONL)")
    if target.exists() and not overwrite:
        raise FusionError(
            "the output is there already", where=str(target), do="remove it, give another --out, or --overwrite"
        )


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
                {"index": job.index, "id": job.id, "request": job.hash}
                | ({"line": job.line} if "error" in answer else {})
                | answer
                for job, answer in pairs
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
    failed = [done[index] for index in sorted(done) if "error" in done[index]]
    reasons = [f"line {line.get('line')}: {line['error']}" for line in failed[:REASONS]]
    return BatchSummary(len(jobs), len(failed), resumed, tuple(reasons))


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
    return [answer for job in group for answer in _work_isolated([job], work)]


def _append(file: Any, lines: Sequence[Row]) -> None:
    """On disk before the next bucket starts."""
    file.writelines(json.dumps(finite(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
    file.flush()
    os.fsync(file.fileno())


def _resume(part: Path, fingerprint: str, jobs: Sequence[JsonlRequest]) -> dict[int, Row]:
    """Answers that stand already. A torn last line is cut off; an answer to another request is forgotten."""
    if not os.path.lexists(part):
        return {}
    if (kind := irregular(part)) is not None:
        raise FusionError(f"{kind}, not a file", where=str(part), do="remove it, or give another --out")
    text = part.read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    if len(complete) < len(text):
        with part.open("r+b") as file:
            file.truncate(len(complete))
    do = "remove it, or give another --out"
    head = read_own_lines(part, do=do)
    if complete and (not head.rows or head.numbers[0] != 1 or "fingerprint" not in head.rows[0]):
        raise FusionError("no broken-off run of ours, or its first line is damaged", where=str(part), do=do)
    # a damaged answer is not there: its request is done again
    lines = [line for line in head.rows[1:] if defect(line, {"index": int, "request": str}) is None]
    if complete and head.rows[0]["fingerprint"] != fingerprint:
        raise FusionError(
            "a broken-off run with another recipe, seed, chat template or other weights stands here",
            where=str(part),
            do="remove it, or give another --out",
        )
    hashes = {job.index: job.hash for job in jobs}
    return {line["index"]: line for line in lines if hashes.get(line["index"]) == line["request"]}


def _finish(target: Path, part: Path, done: dict[int, Row]) -> None:
    complete = target.with_name(target.name + ".sorted")
    with complete.open("w", encoding="utf-8") as file:
        lines = [{key: value for key, value in done[index].items() if key != "request"} for index in sorted(done)]
        _append(file, lines)
    complete.replace(target)
    part.unlink()
