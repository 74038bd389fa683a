"""Files that metrics run: a function of the user's own (`python`), the command of pass_at_k.

Both run with the user's rights. So a function's file lies in the recipe's folder or below it, whatever links say: a
recipe that came with its folder runs nothing that did not come with it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mtft.common.cache_folder import expand_home
from mtft.common.own_files import irregular
from mtft.recipe.schema.metric import NamedMetricSection, PythonMetricSection
from mtft.recipe.yaml_source import KeyPath, YamlProblem, YamlSource, child

_FORM = re.compile(r".*[^/]\.py:[^\W\d]\w*", re.DOTALL)


def check_functions(source: YamlSource, base: Path, *, exist: bool) -> list[YamlProblem]:
    """Functions of the user's own whose place is no FILE.py:FUNCTION or lies elsewhere. exist: or is not there.

    base  the recipe's folder
    """
    problems = []
    tasks = source.value(("tasks",))
    for number, task in enumerate(tasks if isinstance(tasks, list) else []):
        metrics = child(task, "metrics")
        for index, metric in enumerate(metrics if isinstance(metrics, list) else []):
            python = child(metric, "python")
            if isinstance(python, str):
                path: KeyPath = ("tasks", number, "metrics", index)
                problems += _function(path, python, child(metric, "folder"), base, exist=exist)
    return problems


def _function(path: KeyPath, python: str, folder: Any, base: Path, *, exist: bool) -> list[YamlProblem]:
    here: KeyPath = (*path, "python")
    if not _FORM.fullmatch(python):
        return [YamlProblem(here, f"is {python!r}, not a file and a function", "write my_metrics.py:function")]
    if isinstance(folder, str):
        if not os.path.isabs(folder):
            return [YamlProblem((*path, "folder"), "is no absolute path", "leave it out: it is the recipe's folder")]
        base = Path(folder)
    file = Path(os.path.normpath(base / expand_home(python.rpartition(":")[0])))
    if outside(file, base):
        what = f"lies outside of {base}: {os.path.realpath(file)}"
        return [YamlProblem(here, what, "copy the file beside the recipe: code is run from there only")]
    if exist and (kind := irregular(file)) is not None:
        return [YamlProblem(here, f"names {kind}, not a file: {file}", "give a Python file")]
    if exist and not file.is_file():
        do = "check the path; it is relative to the recipe"
        return [YamlProblem(here, f"names a file that is not there: {file}", do)]
    return []


def outside(file: Path, folder: Path) -> bool:
    """Whether a file is neither in a folder nor below it, once all links are followed."""
    return Path(os.path.realpath(folder)) not in Path(os.path.realpath(file)).parents


def command_of(metric: NamedMetricSection) -> list[str]:
    """The `command` of a metric that has one."""
    command = (metric.model_extra or {}).get("command")
    return [word for word in command if isinstance(word, str)] if isinstance(command, list | tuple) else []


def placed(metric: NamedMetricSection | PythonMetricSection, base: Path) -> dict[str, Any]:
    """What changes of a metric when a recipe in folder `base` is resolved: paths of files there become absolute."""
    if isinstance(metric, PythonMetricSection):
        return {} if metric.folder is not None else {"folder": os.path.normpath(base)}
    words = command_of(metric)
    if not words or len(words) != len((metric.model_extra or {})["command"]):
        return {}
    return {"command": [_word(word, base, program=place == 0) for place, word in enumerate(words)]}


def _word(word: str, base: Path, *, program: bool) -> str:
    """A word of a command; a program without a slash is one of PATH, as in a shell."""
    if not word or "{" in word or (program and "/" not in word):
        return word
    place = os.path.normpath(base / expand_home(word))
    return place if os.path.isfile(place) else word
