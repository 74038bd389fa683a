"""Read a recipe: YAML and overrides in, a frozen `Recipe` with absolute paths out, or one error with every problem.

    recipe = load_recipe("recipes/quickstart.yaml", ["train.steps=20", "tasks.sql.weight=2"])

Inputs (data, models, adapters, mixture files) are relative to the recipe's folder, outputs to the working directory.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML

from mtft.common.cache_folder import expand_home
from mtft.common.errors import UserError
from mtft.common.fingerprint import json_hash
from mtft.common.listing import clipped, first_lines
from mtft.recipe.cross_checks import check_files, check_source
from mtft.recipe.error_messages import explain
from mtft.recipe.metric_files import check_functions, placed
from mtft.recipe.schema.evaluation import EvalSection
from mtft.recipe.schema.loss import BalancerSection
from mtft.recipe.schema.metric import NamedMetricSection, PythonMetricSection
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.section import BALANCER_OPTIONS, DATA, INPUT, PathKind, RecipeSection
from mtft.recipe.schema.task import LATER_KEYS, TaskSection
from mtft.recipe.yaml_source import YamlProblem, YamlSource, apply_override, read_yaml


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
    problems += check_functions(source, base, exist=files)
    if files:
        problems += check_files(source, lambda text: _place(text, base, DATA))
    if problems or recipe is None:
        raise _as_error(problems, source)
    return _absolute(recipe, base)


def recipe_of_values(values: dict[str, Any], origins: Mapping[str, str], where: str) -> Recipe:
    """A recipe made by a program. origins: what its user calls each section; where: what they called.

    Raises UserError with all problems, each by the user's name of it.
    """
    source = YamlSource(Path(where), values, {(section,): name for section, name in origins.items()})
    problems: list[YamlProblem] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += explain(error, source)
    problems += check_source(source)
    if problems or recipe is None:
        raise _as_error(problems, source)
    return recipe


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
        what = clipped(problem.what, 300)
        return what if what.startswith("'") else f"{clipped(shown, 120) or 'the recipe'} {what}"

    if len(distinct) == 1:
        origin = source.origin(distinct[0].path)
        place = f"command line, {origin}" if origin.startswith("override") else f"{source.file}, {origin}"
        key = clipped(source.show(distinct[0].path), 120)
        return UserError(
            sentence(distinct[0]), where=f"{place}, key {key}" if key else place, do=distinct[0].do or None
        )
    lines = [
        f"  {source.origin(problem.path)}: {sentence(problem)}{'; ' + problem.do if problem.do else ''}"
        for problem in distinct
    ]
    what = "\n".join([f"{len(distinct):,} problems in the recipe", *first_lines(lines)])
    return UserError(what, where=str(source.file), do="mend these, then run `mtft check` on it")


def _place(text: str, base: Path, kind: PathKind) -> str:
    """An absolute path, unless the text names something that is not a file."""
    if text.startswith(kind.schemes):
        return text
    place = os.path.normpath((Path.cwd() if kind.output else base) / expand_home(text))
    try:
        place.encode("utf-8")
    except UnicodeEncodeError:
        do = "call the folder something in UTF-8: what a run writes names its paths"
        raise UserError("the path is not UTF-8", where=ascii(place), do=do) from None
    is_path = not kind.hub or text.startswith(("/", "./", "../", "~")) or text in (".", "..") or os.path.isdir(place)
    return place if is_path else text


def _absolute(value: Any, base: Path, kind: PathKind | None = None) -> Any:
    """A part of a recipe with every path in it absolute. kind: of its key, if that holds paths."""
    if isinstance(value, tuple):
        return tuple(_absolute(item, base, kind) for item in value)
    if isinstance(value, str) and kind is not None:
        return _place(value, base, kind)
    if isinstance(value, dict) and kind is not None:
        paths = {key: value[key] for key in kind.options if isinstance(value.get(key), str)}
        return {**value, **{key: _place(path, base, INPUT) for key, path in paths.items()}}
    if not isinstance(value, RecipeSection):
        return value
    update: dict[str, Any] = {}
    for name, field in type(value).model_fields.items():
        own = next((item for item in field.metadata if isinstance(item, PathKind)), None)
        update[name] = _absolute(getattr(value, name), base, own)
    if isinstance(value, BalancerSection):
        update |= _absolute(value.model_extra, base, BALANCER_OPTIONS)
    if isinstance(value, NamedMetricSection | PythonMetricSection):
        update |= placed(value, base)
    return value.model_copy(update=update)


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

    Keys of later versions stand in it only where they are set: what was there before them keeps its fingerprint.
    Raises KeyError if such a key is not in the recipe: a misspelt one would silently count.
    """
    values = recipe.model_dump(mode="json")
    for dotted in without:
        *sections, key = dotted.split(".")
        section = values
        for name in sections:
            section = section[name]
        del section[key]
    values.pop("data", None)  # how rows are tokenised, not what comes out
    plain = TaskSection(name="a", data="a").model_dump(mode="json", include=set(LATER_KEYS))
    values["tasks"] = [
        {key: value for key, value in task.items() if key not in plain or value != plain[key]}
        for task in values["tasks"]
    ]
    if values.get("eval") == EvalSection().model_dump(mode="json"):
        del values["eval"]
    return json_hash(values, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
