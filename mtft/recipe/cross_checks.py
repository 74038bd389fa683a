"""Checks over several keys of a recipe: names of tasks, sums of shares, files that must exist.

They read the values as written, whatever else is wrong with them, so that all problems come out at once, each with its
line. What can't go together although each key is right is in compatibility.py.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from data_mixers.common.errors import MixError
from data_mixers.common.suggest import closest_match
from data_mixers.mixture.mixture import SUM_TOLERANCE, Mixture
from mtft.common.listing import listed
from mtft.common.own_files import irregular
from mtft.recipe.metric_keys import (
    check_metric_keys,
    dotted_targets,
    unknown_harness_tasks,
    unknown_metrics,
    unknown_watch,
)
from mtft.recipe.rules.task_rules import GIVEN
from mtft.recipe.schema.mixture import FileShares, ScheduleShares, TemperatureShares
from mtft.recipe.targets import LM_EVAL
from mtft.recipe.yaml_source import KeyPath, YamlProblem, YamlSource, child, kind_of

# keys of `shares` that are no task's name
RULES = (*TemperatureShares.model_fields, *FileShares.model_fields, *ScheduleShares.model_fields)


def check_source(source: YamlSource) -> list[YamlProblem]:
    """Problems that concern more than one key, in the order of the recipe."""
    names = _task_names(source)
    return [
        *_names(source),
        *_prompts(source, names),
        *(problem for path in _share_paths(source) for problem in _shares(source, path, names)),
        *_stops(source),
        *_bounds(source, names),
        *_reference(source, names),
        *_objective(source, names),
        *_watch(source),
        *_length(source),
        *_merge_weights(source),
        *_task_weights(source),
        *check_metric_keys(source),
    ]


def check_files(source: YamlSource, resolve: Callable[[str], str]) -> list[YamlProblem]:
    """Files and folders that the recipe reads and that are not there. `resolve` makes a path absolute."""
    problems = []
    for path, written in _data(source):
        place = resolve(written)
        if place == written and ":" in written.partition("/")[0]:  # hub:..., quickstart:...
            continue
        if glob.has_magic(place):
            if not glob.glob(place, recursive=True):
                problems.append(YamlProblem(path, f"matches no file: {place}", "check the pattern"))
        elif (kind := irregular(Path(place))) not in (None, "a folder"):
            problems.append(YamlProblem(path, f"names {kind}, not a file: {place}", "give files, or a saved dataset"))
        elif not Path(place).exists():
            problems.append(YamlProblem(path, f"names a file that is not there: {place}", _near_file(Path(place))))
    reference: KeyPath = ("mixture", "online", "reference")
    if isinstance(run := source.value(reference), str) and not (Path(resolve(run)) / "scores").is_dir():
        what = f"names no finished run: there is no {Path(resolve(run)) / 'scores'}"
        problems.append(
            YamlProblem(reference, what, "give the output.dir of a run with held-out rows, or {task: loss}")
        )
    for shares in _share_paths(source):
        file = source.value((*shares, "file"))
        if isinstance(file, str):
            problems += _mixture_file((*shares, "file"), Path(resolve(file)), _task_names(source))
    return problems


def _mixture_file(path: KeyPath, place: Path, names: tuple[str, ...]) -> list[YamlProblem]:
    if (kind := irregular(place)) is not None:
        return [YamlProblem(path, f"names {kind}, not a file: {place}", "give a mixture.yaml")]
    if not place.is_file():
        do = "`mtft mix propose RECIPE` writes it; or give shares by a rule (natural, uniform)"
        return [YamlProblem(path, f"names a file that is not there: {place}", do)]
    try:
        Mixture.from_yaml(place, names=names or None)
    except MixError as error:
        return [
            YamlProblem(path, f"cannot be used: {error.what} ({error.where or place})", error.do or "check the file")
        ]
    return []


def _items(source: YamlSource, *path: str | int) -> list[tuple[KeyPath, Any]]:
    """(path, value) of each item of the list at a path; none where there is no list."""
    value = source.value(path)
    return [((*path, index), item) for index, item in enumerate(value)] if isinstance(value, list) else []


def _data(source: YamlSource) -> Iterator[tuple[KeyPath, str]]:
    for task, _ in _items(source, "tasks"):
        for keys in (("data",), ("eval_data",), ("shots", "from", "data")):
            path: KeyPath = (*task, *keys)
            for place, written in _items(source, *path) or [(path, source.value(path))]:
                if isinstance(written, str):
                    yield place, written


def _near_file(place: Path) -> str:
    if not place.parent.is_dir():
        return f"the folder {place.parent} is not there either; paths are relative to the recipe"
    near = closest_match(place.name, (other.name for other in place.parent.iterdir()))
    return f"did you mean {near}?" if near else "check the path; it is relative to the recipe"


def _task_names(source: YamlSource) -> tuple[str, ...]:
    """The names of all tasks; none if one has no name, since then nothing can be said about other names."""
    names = [child(task, "name") for _, task in _items(source, "tasks")]
    return tuple(names) if all(isinstance(name, str) for name in names) else ()


def _names(source: YamlSource) -> list[YamlProblem]:
    problems = []
    seen: dict[str, KeyPath] = {}
    for task, _ in _items(source, "tasks"):
        path: KeyPath = (*task, "name")
        name = source.value(path)
        if not isinstance(name, str):
            continue
        if name in seen:
            what = f"is {name!r}, the name of another task already ({source.origin(seen[name])})"
            problems.append(YamlProblem(path, what, "give each task its own name"))
        elif name in RULES:
            what = f"is {name!r}, which is a rule of mixture.shares"
            problems.append(YamlProblem(path, what, f"call the task something else, for example {name}-task"))
        seen.setdefault(name, path)
    return problems


def _prompts(source: YamlSource, names: tuple[str, ...]) -> list[YamlProblem]:
    """What stands in front of prompts: a system prompt that says something, options of the template, demonstrations."""
    problems = []
    for task, _ in _items(source, "tasks"):
        path: KeyPath = (*task, "system")
        if isinstance(system := source.value(path), str) and not system.strip():
            problems.append(YamlProblem(path, "says nothing", "write a system prompt, or leave the key out"))
        path = (*task, "chat_template_kwargs")
        if isinstance(given := source.value(path), dict):
            do = "leave it out: it comes from the rows, the tokenizer, or this program"
            problems += [
                YamlProblem((*path, name), "is not for the recipe to set", do) for name in given if name in GIVEN
            ]
        path = (*task, "shots", "from")
        if isinstance(pool := source.value(path), str):
            problems += [YamlProblem(path, found.what, found.do) for found in _unknown_tasks(path, [pool], names)]
    return problems


def _numbers(value: Any) -> dict[str, float]:
    """The entries of a mapping that are usable numbers; others are reported by the schema."""
    if not isinstance(value, dict):
        return {}
    return {key: number for key, number in value.items() if type(number) in (int, float) and 0 <= number < float("inf")}


def _unknown_tasks(path: KeyPath, given: Iterable[str], names: tuple[str, ...], also: tuple = ()) -> list[YamlProblem]:
    problems = []
    for name in given if names else ():
        if name not in names:
            near = closest_match(name, [*names, *also])
            do = f"did you mean {near}?" if near else f"the tasks are {listed(names)}"
            problems.append(YamlProblem((*path, name), f"names a task that is not there: {name!r}", do))
    return problems


def _without(path: KeyPath, given: Mapping[str, Any], names: tuple[str, ...], what: str, do: str) -> list[YamlProblem]:
    """A mapping that has no number for some of the tasks. what: "share"."""
    lost = [name for name in names if name not in given]
    return [YamlProblem(path, f"has no {what} for {listed(lost)}", do)] if lost else []


def _share_paths(source: YamlSource) -> list[KeyPath]:
    """Where shares stand: mixture.shares, or each stop of its schedule."""
    stops = _items(source, "mixture", "shares", "schedule")
    return [(*path, "shares") for path, _ in stops] or [("mixture", "shares")]


def _stops(source: YamlSource) -> list[YamlProblem]:
    places = [((*path, "at"), child(stop, "at")) for path, stop in _items(source, "mixture", "shares", "schedule")]
    if not all(type(at) in (int, float) for _, at in places):
        return []
    return [
        YamlProblem(path, f"is {at:g}, behind a stop at {before:g}", "put the stops in their order")
        for (_, before), (path, at) in itertools.pairwise(places)
        if at < before
    ]


def _shares(source: YamlSource, path: KeyPath, names: tuple[str, ...]) -> list[YamlProblem]:
    value = source.value(path)
    if not isinstance(value, dict):
        return []
    here = ".".join(map(str, path))
    rules = [rule for rule in RULES if rule in value and rule not in names]
    if rules:  # {temperature: ...} or {file: ...}; with another key beside it, it would pass as a mapping of tasks
        rule, wanted = rules[0], {"file": (str, "text"), "schedule": (list, "a list of stops")}
        kind, words = wanted.get(rule, (object, ""))
        if not isinstance(value[rule], kind):
            return [YamlProblem((*path, rule), f"is {kind_of(value[rule])}, and must be {words}")]
        return [
            YamlProblem((*path, key), f"{key!r} is not a key of {here} beside {rules[0]}", "a rule stands alone")
            for key in value
            if key != rules[0]
        ]
    problems = _unknown_tasks(path, value, names, also=RULES)
    if not problems:
        do = "add the task with its share; 0 leaves it out of the training"
        problems = _without(path, value, names, "share", do)
    shares = _numbers(value)
    if len(shares) == len(value):  # else the schema reports the bad one, and the sum means nothing
        total = sum(shares.values())
        if total == 0:
            do = "give at least one task a share above 0; together they make 1"
            problems.append(YamlProblem(path, "adds up to 0", do))
        elif abs(total - 1) > SUM_TOLERANCE and not problems:
            scaled = listed((f"{name}: {share / total:.4g}" for name, share in shares.items()), 40)
            problems.append(YamlProblem(path, f"adds up to {total:.6g}, not 1", f"in these proportions: {{{scaled}}}"))
    return problems


def _bounds(source: YamlSource, names: tuple[str, ...]) -> list[YamlProblem]:
    problems = []
    bounds = {key: _numbers(source.value(("mixture", key))) for key in ("floors", "caps")}
    for key, given in bounds.items():
        problems += _unknown_tasks(("mixture", key), given, names)
        problems += [
            YamlProblem(("mixture", key, name), f"is {bound:g}, more than the whole", "shares lie between 0 and 1")
            for name, bound in given.items()
            if bound > 1
        ]
    floors, caps = bounds["floors"], bounds["caps"]
    if problems:
        return problems
    for name, floor in floors.items():
        problems += _crossed(("mixture", "floors", name), floor, caps.get(name, 1.0))
    if sum(floors.values()) > 1 + SUM_TOLERANCE:
        problems.append(
            YamlProblem(("mixture", "floors"), f"adds up to {sum(floors.values()):g}, more than 1", "lower some")
        )
    if names and caps.keys() >= set(names) and sum(caps.values()) < 1 - SUM_TOLERANCE:
        what = f"adds up to {sum(caps.values()):g}: no mixture of all tasks can reach 1"
        problems.append(YamlProblem(("mixture", "caps"), what, "raise some, or leave a task without a cap"))
    return problems + _groups(source, names)


def _crossed(path: KeyPath, floor: float, cap: float) -> list[YamlProblem]:
    what = f"is {floor:g}, above the cap {cap:g}"
    return [YamlProblem(path, what, "lower the floor or raise the cap")] if floor > cap else []


def _groups(source: YamlSource, names: tuple[str, ...]) -> list[YamlProblem]:
    groups = source.value(("mixture", "groups"))
    problems = []
    for name, group in groups.items() if isinstance(groups, dict) else ():
        path: KeyPath = ("mixture", "groups", name)
        if not isinstance(group, dict):
            continue
        members = dict.fromkeys(task for _, task in _items(source, *path, "tasks") if isinstance(task, str))
        for problem in _unknown_tasks(path, members, names):
            problems.append(YamlProblem((*path, "tasks"), problem.what, problem.do))
        limits = _numbers(group)
        problems += _crossed((*path, "floor"), limits.get("floor", 0), limits.get("cap", 1))
    return problems


def _reference(source: YamlSource, names: tuple[str, ...]) -> list[YamlProblem]:
    path: KeyPath = ("mixture", "online", "reference")
    given = source.value(path)
    if not isinstance(given, dict):
        return []
    return _unknown_tasks(path, given, names) or _without(path, given, names, "loss", "give every task one")


def _objective(source: YamlSource, names: tuple[str, ...]) -> list[YamlProblem]:
    path: KeyPath = ("sweep", "objective")
    given = source.value(path)
    if not isinstance(given, dict):
        return []
    harness = source.value(("eval", "lm_eval", "tasks"))
    problems = unknown_harness_tasks(path, given, harness if isinstance(harness, list) else [])
    own = [name for name in given if not str(name).startswith(f"{LM_EVAL}/")]
    problems += dotted_targets(path, (name for name in own if "/" not in str(name)), names) or _unknown_tasks(
        path, {str(name).partition("/")[0]: name for name in own}, names
    )
    if not problems:
        problems = unknown_metrics(path, own, source)
    if len(_numbers(given)) == len(given) and sum(_numbers(given).values()) == 0:
        problems.append(YamlProblem(path, "adds up to 0", "weigh at least one task above 0"))
    return problems


def _watch(source: YamlSource) -> list[YamlProblem]:
    path: KeyPath = ("train", "watch")
    watch = source.value(path)
    if not isinstance(watch, str) or watch.startswith(f"{LM_EVAL}/"):  # the table of rules says that those can't be
        return []
    return unknown_watch(path, watch, source)


def _length(source: YamlSource) -> list[YamlProblem]:
    train = source.value(("train",))
    if not isinstance(train, dict):
        return []
    steps, epochs = train.get("steps"), train.get("epochs")
    if steps is None and epochs is None:
        return [YamlProblem(("train",), "says neither steps nor epochs", "give one: steps: 1000, or epochs: 2")]
    if steps is not None and epochs is not None:
        do = "remove one of the two (an override `train.steps=` empties it)"
        return [YamlProblem(("train", "epochs"), "is given, and train.steps too", do)]
    return []


def _merge_weights(source: YamlSource) -> list[YamlProblem]:
    weights, adapters = source.value(("merge", "weights")), source.value(("merge", "adapters"))
    if isinstance(weights, list) and isinstance(adapters, list) and len(weights) != len(adapters):
        what = f"has {len(weights)} weights for {len(adapters)} adapters"
        return [YamlProblem(("merge", "weights"), what, "one weight each, in the order of merge.adapters")]
    return []


def _task_weights(source: YamlSource) -> list[YamlProblem]:
    weights = [child(task, "weight") for _, task in _items(source, "tasks")]
    if weights and all(type(weight) in (int, float) and weight == 0 for weight in weights):
        do = "give at least one a weight above 0"
        return [YamlProblem(("tasks",), "all have weight 0: nothing would be learnt", do)]
    return []
