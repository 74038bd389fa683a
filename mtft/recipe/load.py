"""Read a recipe: YAML and overrides in, a frozen `Recipe` with absolute paths out, or one error with every problem.

    recipe = load_recipe("recipes/quickstart.yaml", ["train.steps=20", "tasks.sql.weight=2"])

Inputs (data, models, adapters, mixture files) are relative to the recipe's folder, outputs to the working directory.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from mtft.common.errors import UserError
from mtft.common.fingerprint import json_hash
from mtft.recipe.cross_checks import check_files, check_source
from mtft.recipe.error_messages import explain
from mtft.recipe.schema.fuse import FuseSection
from mtft.recipe.schema.merge import MergeSection
from mtft.recipe.schema.mixture import FileShares, ScheduleShares
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.sweep import SweepSection
from mtft.recipe.schema.task import TaskSection
from mtft.recipe.yaml_source import YamlProblem, YamlSource, apply_override, read_yaml

DATA_SCHEMES = ("hub:", "quickstart:")
MODEL_SCHEMES = ("quickstart:",)


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, files: bool = True) -> Recipe:
    """Read and check a recipe.

    path       a YAML file
    overrides  `key=value` by dotted path, applied in order: train.steps=20, tasks.sql.weight=2, lora=null, train.steps=
    files      also check that data and mixture files are there; False for commands that don't read them

    Raises UserError with all problems, each with its line, key and a way out.
    """
    file = Path(path)
    source = read_yaml(file)
    for override in overrides:
        apply_override(source, override)
    problems = list(source.problems)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(source.values)
    except ValidationError as error:
        problems += explain(error, source)
    base = file.absolute().parent
    problems += check_source(source)
    if files:
        problems += check_files(source, lambda text: _place(text, base, DATA_SCHEMES))
    if problems or recipe is None:
        raise _as_error(problems, source)
    return _absolute(recipe, base)


def _as_error(problems: Sequence[YamlProblem], source: YamlSource) -> UserError:
    """One error for all problems, in the order of the file."""

    def order(problem: YamlProblem) -> tuple[int, int]:
        kind, _, number = source.origin(problem.path).partition(" ")
        return (0, int(number)) if kind == "line" else (1, 0)

    unique: dict[tuple, YamlProblem] = {}
    for problem in sorted(problems, key=order):
        known = unique.setdefault(problem.path, problem)
        if problem.do.startswith("did you mean") and not known.do:  # of two views of one key, the one that knows it
            unique[problem.path] = problem
    distinct = list(unique.values())

    def sentence(problem: YamlProblem) -> str:
        shown = source.show(problem.path)
        return problem.what if problem.what.startswith("'") else f"{shown or 'the recipe'} {problem.what}"

    if len(distinct) == 1:
        origin = source.origin(distinct[0].path)
        place = f"{source.file}, {origin}" if origin.startswith("line") else f"command line, {origin}"
        key = source.show(distinct[0].path)
        return UserError(
            sentence(distinct[0]), where=f"{place}, key {key}" if key else place, do=distinct[0].do or None
        )
    lines = [f"{len(distinct)} problems in the recipe"]
    for problem in distinct:
        lines.append(f"  {source.origin(problem.path)}: {sentence(problem)}{'; ' + problem.do if problem.do else ''}")
    return UserError("\n".join(lines), where=str(source.file), do="mend these, then run `mtft check` on it")


def _place(text: str, base: Path, schemes: tuple[str, ...]) -> str:
    """An absolute path, unless the text names something that is not a file."""
    return text if text.startswith(schemes) else os.path.normpath(base / Path(text).expanduser())


def _model(section: ModelSection | None, base: Path) -> ModelSection | None:
    """A model's path: what looks like a path or is a folder beside the recipe is one; anything else is a hub name."""
    if section is None or section.path.startswith(MODEL_SCHEMES):
        return section
    place = _place(section.path, base, ())
    is_path = section.path.startswith(("/", "./", "../", "~")) or section.path in (".", "..") or os.path.isdir(place)
    return section.model_copy(update={"path": place}) if is_path else section


def _shares(shares: Any, base: Path) -> Any:
    """Shares with the path of their file, if they are one, absolute."""
    return FileShares(file=_place(shares.file, base, ())) if isinstance(shares, FileShares) else shares


def _absolute(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with every path absolute."""
    here = Path.cwd()

    def data(value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, tuple):
            return tuple(_place(item, base, DATA_SCHEMES) for item in value)
        return None if value is None else _place(value, base, DATA_SCHEMES)

    def folders(value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else tuple(_place(item, base, ()) for item in value)

    def task(section: TaskSection) -> TaskSection:
        return section.model_copy(update={"data": data(section.data), "eval_data": data(section.eval_data)})

    update: dict[str, Any] = {
        "model": _model(recipe.model, base),
        "tasks": tuple(task(section) for section in recipe.tasks),
        "output": recipe.output.model_copy(update={"dir": _place(recipe.output.dir, here, ())}),
    }
    shares = recipe.mixture.shares
    if isinstance(shares, ScheduleShares):
        stops = tuple(stop.model_copy(update={"shares": _shares(stop.shares, base)}) for stop in shares.schedule)
        shares = ScheduleShares(schedule=stops)
    online = recipe.mixture.online
    if online is not None and isinstance(online.reference, str):
        online = online.model_copy(update={"reference": _place(online.reference, base, ())})
    update["mixture"] = recipe.mixture.model_copy(update={"shares": _shares(shares, base), "online": online})
    if recipe.lora is not None and recipe.lora.start is not None:
        update["lora"] = recipe.lora.model_copy(update={"start": _place(recipe.lora.start, base, ())})
    balancer = recipe.loss.balancer
    if isinstance(groups := (balancer.model_extra or {}).get("groups"), str):  # of a former run's affinity.json
        balancer = balancer.model_copy(update={"groups": _place(groups, base, ())})
        update["loss"] = recipe.loss.model_copy(update={"balancer": balancer})
    if isinstance(sweep := recipe.sweep, SweepSection):
        update["sweep"] = sweep.model_copy(update={"model": _model(sweep.model, base)})
    if isinstance(merge := recipe.merge, MergeSection):
        out = None if merge.out is None else _place(merge.out, here, ())
        whole = None if merge.base is None else _place(merge.base, base, ())
        apart = merge.experts
        if apart is not None:
            apart = apart.model_copy(update={"general": folders(apart.general)})
        places = {"adapters": folders(merge.adapters), "base": whole, "experts": apart, "out": out}
        update["merge"] = merge.model_copy(update=places)
    if isinstance(fuse := recipe.fuse, FuseSection):
        models = {"strong": _model(fuse.strong, base), "base": _model(fuse.base, base)}
        update["fuse"] = fuse.model_copy(update={"adapters": folders(fuse.adapters), **models})
    return recipe.model_copy(update=update)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every key written out; `load_recipe` gives the same recipe back."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    # Keep the order of the schema. (The attribute is declared as None there.)
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    yaml.width = 4096
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), stream)
    return stream.getvalue()


def fingerprint(recipe: Recipe, *, without: Sequence[str] = ()) -> str:
    """SHA-256 (hex) of the recipe's canonical JSON, leaving out the dotted keys in `without` ("output", "train.steps").

    Raises KeyError if such a key is not in the recipe: a misspelt one would silently count.
    """
    values = recipe.model_dump(mode="json")
    for dotted in without:
        *sections, key = dotted.split(".")
        section = values
        for name in sections:
            section = section[name]
        del section[key]
    return json_hash(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
