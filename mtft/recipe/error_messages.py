"""The schema in words: what a key may hold, and what is wrong when it holds something else.

pydantic judges; its messages are for programmers, so only the place and the kind of its errors are used here.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from data_mixers.common.suggest import closest_match
from mtft.common.listing import MOST_LINES
from mtft.recipe.schema.recipe import Recipe
from mtft.recipe.schema.section import RecipeSection
from mtft.recipe.yaml_source import KeyPath, YamlProblem, YamlSource, child, kind_of

_HINTS = 2 * MOST_LINES  # unknown keys that are compared with the known ones, which takes time
# What transformers, PEFT and TRL call a key, where the spelling is too far from ours to be found.
_FAMILIAR = {
    "lr": "learning_rate", "max_steps": "steps", "num_train_epochs": "epochs", "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_tokens", "gradient_accumulation_steps": "batch_tokens",
    "train_batch_size": "batch_tokens", "batch_size": "batch_tokens", "max_seq_length": "max_length",
    "lr_scheduler_type": "schedule", "warmup_steps": "warmup", "warmup_ratio": "warmup", "optim": "optimizer",
    "eval_steps": "eval_every", "metric_for_best_model": "watch", "early_stopping_patience": "patience",
    "neftune_noise_alpha": "neftune", "save_steps": "save_every", "output_dir": "dir", "target_modules": "targets",
    "model_name_or_path": "path", "torch_dtype": "dtype", "attn_implementation": "attention",
}  # fmt: skip
_LIMITS = ((Gt, ">", "gt"), (Ge, ">=", "ge"), (Lt, "<", "lt"), (Le, "<=", "le"))


def describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """A type in words: `Annotated[int, Field(gt=0)] | None` -> "a whole number > 0, or null"."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return describe(inner, [*metadata, *more])
    if origin in (Union, types.UnionType):
        parts = [describe(part, metadata) for part in get_args(annotation)]
        return ", or ".join(dict.fromkeys(parts))
    if origin is Literal:
        values = [str(value).lower() if isinstance(value, bool) else str(value) for value in get_args(annotation)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is tuple:
        some = any(isinstance(item, MinLen) for item in _flatten(metadata))
        return f"a list{' of at least one item' if some else ''}, each {describe(get_args(annotation)[0])}"
    if origin is dict:
        return f"a mapping from names to {describe(get_args(annotation)[1])}"
    if annotation is type(None):
        return "null"
    if isinstance(annotation, type) and issubclass(annotation, RecipeSection):
        fields = annotation.model_fields
        if len(fields) > 2:
            return f"a mapping with the keys {', '.join(fields)}"
        more = ", ..." if annotation.model_config.get("extra") == "allow" else ""
        inner = ", ".join(f"{key}: {describe(field.annotation, field.metadata)}" for key, field in fields.items())
        return f"{{{inner}{more}}}"
    constraints = _flatten(metadata)
    if annotation is str:
        pattern = any(getattr(item, "pattern", None) for item in constraints)
        return (
            "a name of at most 100 letters, digits and _ . - that starts with a letter or digit" if pattern else "text"
        )
    word = {int: "a whole number", float: "a number", bool: "true or false"}[annotation]
    limits = [
        f"{sign} {_bound(getattr(item, key))}"
        for item in constraints
        for kind, sign, key in _LIMITS
        if type(item) is kind
    ]
    return " and ".join([f"{word} {limits[0]}", *limits[1:]]) if limits else word


def _bound(value: float) -> str:
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _flatten(metadata: Iterable[Any]) -> list[Any]:
    return [item for entry in metadata for item in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]


def explain(error: ValidationError, source: YamlSource) -> list[YamlProblem]:
    """Every error of pydantic as a problem with our path and words; the many errors of one union become one."""
    unknown: list[YamlProblem] = []
    missing: list[YamlProblem] = []
    wrong: dict[KeyPath, YamlProblem] = {}
    for path, kind in _located(error, source):
        if kind == "extra_forbidden":
            unknown.append(_unknown(path, source, hint=len(unknown) < _HINTS))
        elif kind == "missing":
            missing.append(_missing(path, source))
        else:
            wrong.setdefault(path, _wrong(path, source))
    meant = {(*problem.path[:-1], _nearest(problem.path, source)) for problem in unknown[:_HINTS]}
    problems = unknown + [problem for problem in missing if problem.path not in meant] + list(wrong.values())
    inner = {problem.path[:end] for problem in problems for end in range(len(problem.path))}
    # A list whose items are all wrong is also reported as too short: its items say enough.
    return [
        problem for problem in problems if problem.path not in inner or not isinstance(source.value(problem.path), list)
    ]


def _located(error: ValidationError, source: YamlSource) -> list[tuple[KeyPath, str]]:
    """(path in the recipe, kind) of each error. pydantic's locations also hold the tried branch of each union.

    Of a union only the errors of the branch that the user meant count; if it has none, one error stands for all.
    """
    located: list[tuple[KeyPath, str]] = []
    unions: dict[KeyPath, bool] = {}  # those in meant branches of other unions: whether any error of theirs is kept
    for entry in error.errors(include_url=False, include_context=False, include_input=False):
        value: Any = source.values
        path: KeyPath = ()
        tried: dict[KeyPath, str] = {}
        for position, key in enumerate(entry["loc"]):
            last = position == len(entry["loc"]) - 1
            real = child(value, key) is not None or (isinstance(value, dict) and key in value)
            real = real or (isinstance(value, list) and isinstance(key, int))
            if real or (last and entry["type"] == "missing"):
                value, path = child(value, key), (*path, key)
            else:
                tried.setdefault(path, str(key))
        for prefix, branch in tried.items():
            unions.setdefault(prefix, False)
            if not _is_meant(prefix, branch, source):
                break
        else:
            located.append((path, entry["type"]))
            unions |= dict.fromkeys(tried, True)
    return located + [(prefix, "value") for prefix, told in unions.items() if not told]


def _is_meant(prefix: KeyPath, branch: str, source: YamlSource) -> bool:
    """Whether pydantic's name of a union's branch is the one that the shape of what was written speaks for."""
    meant = _branch(_annotation(prefix, source), source.value(prefix))
    name = getattr(get_origin(meant) or meant, "__name__", "")
    return bool(name) and (branch == name or branch.startswith(f"{name}["))


def _unknown(path: KeyPath, source: YamlSource, *, hint: bool) -> YamlProblem:
    section, key = source.show(path[:-1]) or "the recipe", str(path[-1])
    if not hint:
        return YamlProblem(path, f"{key!r} is not a key of {section}")
    near = _nearest(path, source)
    elsewhere = [name for name, annotation in _top_sections() for model in _sections(annotation)
                 if key in model.model_fields]  # fmt: skip
    if near:
        do = f"did you mean {near}?"
    elif elsewhere or key in Recipe.model_fields:
        do = f"it belongs {'under ' + ' or '.join(elsewhere) if elsewhere else 'at the top level'}"
    else:
        do = f"the keys of {section} are {', '.join(_keys(path[:-1], source))}"
    return YamlProblem(path, f"{key!r} is not a key of {section}", do)


def _top_sections() -> Iterator[tuple[str, Any]]:
    """(name, type) of what stands at the top level; of a list, its items: tasks.*."""
    for name, field in Recipe.model_fields.items():
        listed_type = get_origin(field.annotation) is tuple
        yield (f"{name}.*", get_args(field.annotation)[0]) if listed_type else (name, field.annotation)


def _nearest(path: KeyPath, source: YamlSource) -> str | None:
    keys = _keys(path[:-1], source)
    familiar = _FAMILIAR.get(str(path[-1]))
    return familiar if familiar in keys else closest_match(path[-1], keys)


def _missing(path: KeyPath, source: YamlSource) -> YamlProblem:
    field = _keys(path[:-1], source)[str(path[-1])]
    do = field.description or describe(field.annotation, field.metadata)
    return YamlProblem(path, "is missing", f"add it: {do.splitlines()[0]}")


def _wrong(path: KeyPath, source: YamlSource) -> YamlProblem:
    value, annotation = source.value(path), _annotation(path, source)
    needed = describe(annotation)
    do = ""
    if path == ("data",) and isinstance(value, str | list):
        do = "files of rows stand with their task: tasks: [{name: NAME, data: FILE}]"
    elif isinstance(value, str):
        literals = [member for member in _members(annotation) if get_origin(member) is Literal]
        choices = [str(choice) for member in literals for choice in get_args(member)]
        if near := closest_match(value, choices, cutoff=0.5):
            do = f"did you mean {near}?"
        elif "number" in needed and _is_number(value):
            do = "remove the quotes"
    elif (needed.startswith("text") or ", or text" in needed) and isinstance(value, int | float):
        do = "put it in quotes"
    elif isinstance(value, int | float) and (key := _only_key_for(value, annotation)):
        do = f"did you mean {path[-1]}: {{{key}: {value}}}?"
    elif isinstance(value, dict) and path[:-1] == ("sweep", "objective") and len(value) == 1:
        do = f"a task and its metric are joined by a slash: {path[-1]}/{next(iter(value))}"
    return YamlProblem(path, f"is {kind_of(value)}, and must be {needed}", do)


def _only_key_for(value: float, annotation: Any) -> str | None:
    """The key of the one section that is allowed here, if a single one of its keys may have this value."""
    sections = _sections(annotation)
    if isinstance(value, bool) or len(sections) != 1:
        return None
    fits = []
    for name, field in sections[0].model_fields.items():
        key = field.alias or name
        try:
            sections[0].model_validate({key: value})
        except ValidationError as error:
            if any(entry["loc"][0] == key for entry in error.errors()):
                continue
        fits.append(key)
    return fits[0] if len(fits) == 1 else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _members(annotation: Any) -> list[Any]:
    """The branches of a union, without Annotated."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]


def _sections(annotation: Any) -> list[type[RecipeSection]]:
    return [member for member in _members(annotation) if isinstance(member, type) and issubclass(member, RecipeSection)]


def _branch(annotation: Any, value: Any) -> Any:
    """The member of a union that fits the shape of a value: a section by its keys, a mapping, a list."""
    members = _members(annotation)
    if isinstance(value, list):
        return next((member for member in members if get_origin(member) is tuple), annotation)
    if isinstance(value, dict):
        sections = _sections(annotation)
        best = max(sections, key=lambda section: len(section.model_fields.keys() & value.keys()), default=None)
        mapping = next((member for member in members if get_origin(member) is dict), None)
        if best is not None and (mapping is None or best.model_fields.keys() & value.keys()):
            return best
        return annotation if mapping is None else mapping
    return annotation


def _annotation(path: KeyPath, source: YamlSource) -> Any:
    """The declared type at a path, with its constraints. Where a union forks, what was written decides."""
    annotation: Any = Recipe
    for depth, key in enumerate(path):
        branch = _branch(annotation, source.value(path[:depth]))
        if get_origin(branch) is dict:
            annotation = get_args(branch)[1]
        elif get_origin(branch) is tuple:
            annotation = get_args(branch)[0]
        else:
            field = branch.model_fields[str(key)]
            annotation = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    return annotation


def _keys(path: KeyPath, source: YamlSource) -> dict[str, FieldInfo]:
    """The known keys of the section that stands at a path."""
    return _branch(_annotation(path, source), source.value(path)).model_fields
