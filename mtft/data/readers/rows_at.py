"""Rows as they stand in their files, by place: for metrics that look at more columns than prompt and response."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mtft.common.cache_folder import writable_cache
from mtft.data.readers.row_files import FileRow
from mtft.data.readers.sources import find_source_parts
from mtft.recipe.schema.task import TaskSection


def rows_at(task: TaskSection, which: str, places: Collection[str]) -> dict[str, dict[str, Any]]:
    """{file:line: columns} of the rows of a task's `data` (which="train") or `eval_data` ("eval") at these places."""
    left, found = set(places), {}
    for part in find_source_parts(task, which, writable_cache()):
        for row in part.rows():
            place = f"{row.file}:{row.line}"
            if place in left and isinstance(row, FileRow):
                found[place] = row.data
                left.discard(place)
            if not left:
                return found
    return found
