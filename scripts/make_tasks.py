"""Tasks with exact answers, as many rows as wanted, made offline by libraries that others keep (docs/made-tasks.md).

    python scripts/make_tasks.py made                                # all tasks: 1,000 rows each, and 200 held out
    python scripts/make_tasks.py made --tasks date_to_iso,sql --rows 20000
    python scripts/make_tasks.py --list

Writes OUT/TASK.train.jsonl and OUT/TASK.eval.jsonl, OUT/recipe.yaml that lists them, the files that the recipe needs,
and OUT/made.json: the seed and the versions that the rows depend on. The same seed and versions give the same bytes.
Needs `pip install "mtft[tasks]"`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_mixers.common.suggest import did_you_mean  # noqa: E402
from mtft.common.atomic_io import write_text  # noqa: E402
from mtft.common.errors import UserError  # noqa: E402
from mtft.common.output_paths import check_output_folder  # noqa: E402
from mtft.common.own_files import write_own  # noqa: E402
from scripts.task_makers import MAKERS  # noqa: E402
from scripts.task_makers.base import TaskMaker, make_rows  # noqa: E402
from scripts.task_makers.recipe import recipe  # noqa: E402

BESIDE = ROOT / "scripts" / "task_makers"
RECIPE = "recipe.yaml"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="the folder to write")
    parser.add_argument("--rows", type=int, default=1000, help="training rows of each task")
    parser.add_argument("--eval-rows", type=int, default=200, help="held-out rows of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", help="names with commas between; default: all")
    parser.add_argument("--list", action="store_true", help="say which tasks there are")
    options = parser.parse_args(words)
    if options.list:
        print("\n".join(f"{maker.name:20}{maker.about}" for maker in MAKERS.values()))
        return
    if options.out is None:
        parser.error("OUT is missing: the folder to write")
    try:
        made = make_tasks(options.out, options.rows, options.eval_rows, options.seed, chosen(options.tasks))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"{len(made)} tasks, {options.rows:,} rows each and {options.eval_rows:,} held out: {options.out}")
    print(f"next: mtft check {options.out / RECIPE}")


def chosen(names: str | None) -> list[TaskMaker]:
    """The makers of a list with commas, in the order of MAKERS; all of them for None."""
    asked = MAKERS.keys() if names is None else {name.strip() for name in names.split(",")} - {""}
    for name in sorted(asked):
        if name not in MAKERS:
            what = f"there is no task {name!r}{did_you_mean(name, MAKERS)}"
            raise UserError(what, where="--tasks", do=f"take of: {', '.join(MAKERS)}")
    if not asked:
        raise UserError("no task is named", where="--tasks", do=f"take of: {', '.join(MAKERS)}")
    return [maker for name, maker in MAKERS.items() if name in asked]


def make_tasks(out: Path, rows: int, eval_rows: int, seed: int, makers: Sequence[TaskMaker]) -> list[str]:
    """Writes the folder; the names of its tasks."""
    for option, count in (("--rows", rows), ("--eval-rows", eval_rows)):
        if count < 1:
            raise UserError(f"{count} rows are none", where=option, do="give 1 or more")
    refuse_missing(makers)
    check_output_folder(out)
    text = recipe(makers)
    refuse_other_recipe(out / RECIPE, text)
    for maker in makers:
        for side, held_out, count in (("train", False, rows), ("eval", True, eval_rows)):
            made = make_rows(maker, count, seed, held_out)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            write_text(out / f"{maker.name}.{side}.jsonl", lines)
    for name in sorted({name for maker in makers for name in maker.beside}):
        write_text(out / name, (BESIDE / name).read_text("utf-8"))
    libraries = sorted({name for maker in makers for name in maker.libraries})
    versions = {"python": platform.python_version(), **{name: version(name) for name in libraries}}
    names = [maker.name for maker in makers]
    write_own(out / "made.json", {"seed": seed, "rows": rows, "eval_rows": eval_rows, "tasks": names, **versions})
    write_text(out / RECIPE, text)  # last, so that its presence says that the rest is whole
    return names


def refuse_missing(makers: Sequence[TaskMaker]) -> None:
    """UserError for libraries that are not installed."""
    wanted = {library: maker.name for maker in reversed(makers) for library in maker.libraries}
    missing = sorted(library for library in wanted if importlib.util.find_spec(library) is None)
    if missing:
        needs = ", ".join(f"{library} (for {wanted[library]})" for library in missing)
        raise UserError(f"not installed: {needs}", do=f'pip install "mtft[tasks]", or: pip install {" ".join(missing)}')


def refuse_other_recipe(path: Path, text: str) -> None:
    """UserError where a recipe lies that this call would not write: it may have been edited."""
    if path.exists() and path.read_text("utf-8") != text:
        raise UserError(
            "a recipe of other tasks, or an edited one, is there", where=str(path), do="give another folder"
        )


if __name__ == "__main__":
    main()
