"""What the metrics of a task are called in results: each by a name of its own that means nothing else there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from data_mixers.common.suggest import closest_match
from mtft.common.listing import listed
from mtft.recipe.schema.metric import RESULT_KEYS, metric_key
from mtft.recipe.targets import FORWARD, LM_EVAL, OVER_TASKS, split_target
from mtft.recipe.yaml_source import KeyPath, YamlProblem, YamlSource, child


def check_metric_keys(source: YamlSource) -> list[YamlProblem]:
    """Metrics whose key can't be used, in the order of the recipe."""
    problems = []
    tasks = source.value(("tasks",))
    for number, task in enumerate(tasks if isinstance(tasks, list) else []):
        metrics = child(task, "metrics")
        seen: dict[str, KeyPath] = {}
        for index, metric in enumerate(metrics if isinstance(metrics, list) else []):
            path: KeyPath = ("tasks", number, "metrics", index)
            key = metric_key(metric)
            name = metric if isinstance(metric, str) else child(metric, "name")
            if key is None:
                continue
            do = f"give it another key: {{key: {key}-2, ...}}"
            if name in FORWARD and key != name:
                what = f"is {key!r}, and {name} is always called {name}"
                problems.append(YamlProblem((*path, "key"), what, "leave it out"))
            elif key in FORWARD and key != name:
                problems.append(YamlProblem(path, f"has the key {key!r}, the name of another metric", do))
            elif key in RESULT_KEYS:
                problems.append(YamlProblem(path, f"has the key {key!r}, which results use for something else", do))
            elif key in seen:
                what = f"has the key {key!r}, as another metric of this task has ({source.origin(seen[key])})"
                problems.append(YamlProblem(path, what, do))
            seen.setdefault(key, path)
    return problems


def unknown_harness_tasks(path: KeyPath, given: Iterable[str], tasks: Sequence[Any]) -> list[YamlProblem]:
    """Names of "lm_eval/TASK/METRIC" that eval.lm_eval does not measure."""
    problems = []
    for name in given:
        if str(name).startswith(f"{LM_EVAL}/"):
            parts = str(name).split("/", 2)
            if len(parts) < 3:
                problems.append(YamlProblem((*path, name), "names no metric", f"write {LM_EVAL}/TASK/METRIC"))
            elif parts[1] not in tasks:
                what = f"names a task that eval.lm_eval.tasks does not have: {parts[1]!r}"
                problems.append(YamlProblem((*path, name), what, f"add {parts[1]} to eval.lm_eval.tasks"))
    return problems


def dotted_targets(path: KeyPath, given: Iterable[str], names: tuple[str, ...]) -> list[YamlProblem]:
    """Metrics that are written as keys of the recipe are, task.metric; a name of a task may hold dots itself."""
    problems = []
    for name in map(str, given):
        task = next((task for task in names if name not in names and name.startswith(f"{task}.")), None)
        if task is not None:
            do = f"did you mean {task}/{name.removeprefix(f'{task}.')}? A task and its metric are joined by a slash"
            problems.append(YamlProblem((*path, name), f"names a task that is not there: {name!r}", do))
    return problems


def unknown_watch(path: KeyPath, watch: str, source: YamlSource) -> list[YamlProblem]:
    """What is wrong with "mean", "worst", a task, or one of them with "/metric"."""
    keys = _metrics_of_tasks(source)
    of, metric = split_target(watch)
    if keys and of not in (*keys, *OVER_TASKS):
        near = closest_match(of, [*keys, *OVER_TASKS])
        written = watch.replace(of, near, 1) if near else None
        do = f"did you mean {written}?" if near else f"one of {listed([*OVER_TASKS, *keys])}, or of them with /METRIC"
        return [YamlProblem(path, f"names a task that is not there: {of!r}", do)]
    known = list(dict.fromkeys(key for task, own in keys.items() if of in (task, *OVER_TASKS) for key in own))
    if not known or metric in known:
        return []
    near = closest_match(metric, known)
    whose = "no task has" if of in OVER_TASKS else f"{of} does not have"
    do = f"did you mean {of}/{near}?" if near else f"measured are {listed(known)}; add it to tasks.*.metrics"
    return [YamlProblem(path, f"names a metric that {whose}: {metric!r}", do)]


def unknown_metrics(path: KeyPath, given: Iterable[str], source: YamlSource) -> list[YamlProblem]:
    """Names of "task/metric" whose task has no such metric."""
    keys = _metrics_of_tasks(source)
    problems = []
    for name in given:
        task, slash, metric = str(name).partition("/")
        if slash and metric not in keys.get(task, [metric]):
            near = closest_match(metric, keys[task])
            do = f"did you mean {task}/{near}?" if near else f"{task} has {listed(keys[task])}; add it to its metrics"
            problems.append(YamlProblem((*path, name), f"names a metric that {task} does not have: {metric!r}", do))
    return problems


def _metrics_of_tasks(source: YamlSource) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    tasks = source.value(("tasks",))
    for section in tasks if isinstance(tasks, list) else []:
        metrics = child(section, "metrics")
        found = map(metric_key, metrics if isinstance(metrics, list) else [])
        keys[str(child(section, "name"))] = list(dict.fromkeys([*FORWARD, *filter(None, found)]))
    return keys
