"""A stage is a folder whose content follows from its inputs: kept while the inputs stand, made again when they change.

    <folder>/started.json   the inputs, written before the work begins
    <folder>/done.json      the same and the seconds it took, written when everything else is on disk

Nothing is deleted: `fresh` moves what is there aside to <folder>.old-1, .old-2, ...
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from mtft.adapters.base_identity import fingerprint
from mtft.common.atomic_io import write_json
from mtft.common.errors import UserError
from mtft.common.fingerprint import file_hash, json_hash
from mtft.common.folder_lock import sole_writer
from mtft.common.own_files import Types, read_own, write_own
from mtft.models.loading import expand_quickstart
from mtft.recipe.schema.model import ModelSection

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
    begun = _readable(folder, fresh=fresh)
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
    write_own(folder / DONE, {"seconds": round(time.perf_counter() - begin, 2)})
    return True


def _readable(folder: Path, *, fresh: bool) -> dict | None:
    """started.json: the inputs as they are, since its keys are the stage's own. UserError if it, or done.json, is
    damaged; with `fresh` such a folder moves aside.
    """
    try:
        read_json(folder / DONE)
        return read_json(folder / STARTED)
    except UserError:
        if not fresh:
            raise
        move_aside(folder)
        return None


def model_state(section: ModelSection) -> str:
    """Digest of a model: its section, and the weights in its folder, which may change under the same path."""
    folder = Path(expand_quickstart(section.path))
    return json_hash([section.model_dump(mode="json"), fingerprint(folder) if folder.is_dir() else None])


def adapter_state(folder: Path) -> str:
    """Digest of an adapter: its weights, and the settings that say how they act."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return json_hash([file_hash(folder / name) if (folder / name).is_file() else None for name in names])


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


def read_json(path: Path, needs: Mapping[str, Types] | None = None) -> dict | None:
    """The file's content; None if it isn't there. needs: keys with their types. UserError if it is damaged."""
    if not os.path.lexists(path):
        return None
    return read_own(path, needs, do=f"delete {path.parent} (or run with --fresh): its stage runs again")


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
