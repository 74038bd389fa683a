"""What stands in the folder of a run, for commands that are given the run and want its adapter."""

from __future__ import annotations

import os
from pathlib import Path

from mtft.common.errors import UserError
from mtft.common.own_files import read_own

ADAPTER, RESULT = "adapter_config.json", "result.json"
PLACES = ("*", "train/*/*", "*/*", "*/*/*")  # of adapters below a run: adapter, train/joint/adapter, merge/adapter
JOINT = "train/joint"  # the run that `mtft run` hands over
RUN_FILES = (RESULT, f"{JOINT}/{RESULT}", "recipe.yaml")  # one of them lies in the folder of a run


def adapters_in(folder: Path) -> list[Path]:
    """Folders of adapters below a run's folder, nearest first; checkpoints are none."""
    found = {path.parent: None for place in PLACES for path in sorted(folder.glob(f"{place}/{ADAPTER}"))}
    return list(found)


def refuse_run_as_adapter(folder: Path, *, where: str | None = None) -> None:
    """UserError that proposes the adapters of a run, where a folder is no adapter itself."""
    if not os.path.isdir(folder) or (folder / ADAPTER).is_file():
        return
    near = [str(path) for path in adapters_in(folder)]
    if near:
        shown = ", ".join(near[:6]) + (" ..." if len(near) > 6 else "")
        what = f"{folder} is the folder of a run, not of an adapter"
        do = f"give {shown}" if len(near) == 1 else f"give one of its adapters: {shown}"
        raise UserError(what, where=where or str(folder), do=do)


def export_of_run(folder: Path) -> Path | None:
    """What a finished run handed over (its adapter, or its model); of a whole pipeline: the joint run's."""
    for run in (folder, folder / JOINT):
        if os.path.lexists(run / RESULT):
            do = f"delete it, and `mtft export {run}` does the end of the run again"
            name = read_own(run / RESULT, {"export": str}, do=do)["export"]
            return run / name if name and (run / name).is_dir() else None
    return None
