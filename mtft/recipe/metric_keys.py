"""What the metrics of a task are called in results: each by a name of its own that means nothing else there."""

from __future__ import annotations

from mtft.recipe.schema.metric import RESULT_KEYS, metric_key
from mtft.recipe.targets import FORWARD
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
