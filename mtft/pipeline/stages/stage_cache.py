"""A stage is a folder whose content follows from its inputs: kept while the inputs stand, made again when they change.

    <folder>/started.json   the inputs, written before the work begins
    <folder>/done.json      the same and the seconds it took, written when everything else is on disk

Nothing is deleted: `fresh` moves what is there aside to <folder>.old-1, .old-2, ...
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from mtft.common.atomic_io import write_json
from mtft.common.errors import UserError
from mtft.common.folder_lock import sole_writer

STARTED, DONE = "started.json", "done.json"


def run_cached_stage(folder: Path, inputs: dict, work: Callable[[], None], *, fresh: bool = False) -> bool:
    """Runs `work` unless `folder` already holds its result for the same `inputs`. Returns True if it ran.

    Work that broke off is called again on the same folder: it has to continue by itself (all of ours do).
    With other inputs: UserError that names what differs, or, with `fresh`, a new start beside the old folder.
    """
    inputs = json.loads(json.dumps(inputs))
    with sole_writer(folder):
        return _run(folder, inputs, work, fresh=fresh)


def _run(folder: Path, inputs: dict, work: Callable[[], None], *, fresh: bool) -> bool:
    begun = read_json(folder / STARTED)
    if begun is not None and begun != inputs:
        if not fresh:
            raise UserError(
                f"the stage was run before with other inputs: {'; '.join(differences(begun, inputs)[:6])}",
                where=str(folder),
                do="--fresh runs changed stages again (what is there moves aside to "
                f"{folder.name}.old-N), or give the recipe another output.dir",
            )
        move_aside(folder)
    if read_json(folder / DONE) is not None:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STARTED, inputs)
    begin = time.perf_counter()
    work()
    write_json(folder / DONE, {"seconds": round(time.perf_counter() - begin, 2)})
    return True


def move_aside(folder: Path) -> Path:
    """Renames `folder` to the first free <folder>.old-N."""
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(old)
    return old


def differences(before: dict, after: dict, prefix: str = "") -> list[str]:
    """`key was A, is B` for each leaf that differs."""
    out = []
    for key in dict.fromkeys((*before, *after)):
        a, b, path = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{path}.")
        elif a != b:
            out.append(f"{path} was {_short(a)}, is {_short(b)}")
    return out


def read_json(path: Path) -> dict | None:
    """The file's content; None if it isn't there."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"not valid JSON: {error}", where=str(path), do="delete the file: its stage runs again"
        ) from error


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
