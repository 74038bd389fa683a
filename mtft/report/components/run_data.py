"""Reads what a run left on disk. Every part is optional: a report of half a run is a report of that half.

What can't be read, or has holes, is listed in RunData.problems, and the rest is shown.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from mtft.common.errors import UserError
from mtft.common.own_files import Types, defect, read_own, read_own_text
from mtft.common.run_history import EVALS, METRICS, evaluated_steps, read_history
from mtft.recipe.load import load_recipe
from mtft.recipe.schema.metric import lower_is_better, metric_key

MOST_STEPS = 10**7  # steps of a result.json that are looked for: a damaged number must not take all memory


@dataclass(frozen=True)
class TrainRunData:
    """One training run: a folder with metrics.jsonl."""

    name: str
    folder: Path
    steps: list[dict]  # lines of metrics.jsonl, in order of step; a resumed step replaces the earlier line
    evals: list[dict]  # lines of eval.jsonl
    plan: dict  # plan.json: asked and realised shares
    env: dict
    affinity: dict = field(default_factory=dict)  # affinity.json: how the tasks' gradients get on with each other

    @property
    def tasks(self) -> list[str]:
        names: dict[str, None] = {}
        for line in (*self.steps, *self.evals):
            names.update(dict.fromkeys(line.get("tasks", {})))
        return list(names)

    def curve(self, task: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of one task's key in metrics.jsonl; steps where the task was absent are left out."""
        return _curve(self.steps, task, key)

    def eval_curve(self, task: str, key: str) -> tuple[list[int], list[float]]:
        return _curve(self.evals, task, key)

    @property
    def share_curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and asked share of each task, as a staircase, where mixture.online has changed it; else {}."""
        changes = [*self.plan.get("changes", []), *(line["mixture"] for line in self.steps if "mixture" in line)]
        shares_from = {change["from"]: change["shares"] for change in changes if "shares" in change}
        if len(shares_from) < 2:
            return {}
        firsts = sorted(shares_from)
        ends = [*firsts[1:], max(firsts[-1], self.steps[-1]["step"] if self.steps else 0)]
        x = [at for first, end in zip(firsts, ends, strict=True) for at in (first, end)]
        return {
            task: (x, [shares_from[first].get(task, 0.0) for first in firsts for _ in "ab"])
            for task in shares_from[firsts[0]]
        }

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of all steps by their seconds; the first step, which warms up, is left out when there are more."""
        lines = [line for line in self.steps if line.get("tokens") and line.get("seconds")]
        lines = lines[1:] if len(lines) > 1 else lines
        seconds = sum(line["seconds"] for line in lines)
        return sum(line["tokens"] for line in lines) / seconds if seconds else None


@dataclass(frozen=True)
class RunData:
    """Everything the page shows of one run directory."""

    name: str
    folder: Path
    results: dict  # results.json: {stage: {task: {metric: value}}}
    trains: list[TrainRunData]
    fit: dict = field(default_factory=dict)  # mix/fit.json
    proposal: dict = field(default_factory=dict)  # mix/proposal.json
    retention: dict = field(default_factory=dict)  # merge/retention.json
    merge: dict = field(default_factory=dict)  # merge/adapter/merge.json
    front: dict = field(default_factory=dict)  # merge/front.json
    fusion: dict = field(default_factory=dict)  # fuse/fusion.json
    recipe: str = ""
    directions: dict[str, int] = field(default_factory=dict)  # metric -> 1 (higher is better) or -1, as the recipe says
    problems: list[str] = field(default_factory=list)  # what is damaged or missing, in words

    @property
    def tasks(self) -> list[str]:
        names: dict[str, None] = {}
        for stage in self.results.values():
            names.update(dict.fromkeys(stage))
        for train in self.trains:
            names.update(dict.fromkeys(train.tasks))
        return list(names)

    @cached_property
    def auxiliary(self) -> tuple[str, ...]:
        """The tasks that count in no mean, as the recipe says; none where it can't be read."""
        return _auxiliary(self.recipe)

    def label(self, task: str) -> str:
        """How a task is called in tables."""
        return f"{task} (auxiliary)" if task in self.auxiliary else task


def load_run(folder: Path) -> RunData:
    """Reads a folder of `mtft run` or of `mtft train`. Raises UserError when there is nothing in it to report."""
    if not folder.is_dir():
        raise UserError(f"there is no run directory {folder}", do="give the output.dir of a recipe that has been run")
    read = _Reader(folder)
    trains = [read.train(folder, folder.name)] if os.path.lexists(folder / METRICS) else []
    for metrics in sorted((folder / "train").glob(f"*/{METRICS}")):
        if not re.search(r"\.old-\d+$", metrics.parent.name):  # what --fresh moved aside
            trains.append(read.train(metrics.parent, metrics.parent.name))
    trains.sort(key=lambda run: (run.name.startswith("single-"), run.name != "joint", run.name))
    recipe = read.text(folder / "recipe.yaml")
    data = RunData(
        name=_name(folder, recipe),
        folder=folder,
        results=read.results(folder / "results.json"),
        trains=trains,
        fit=read.json(folder / "mix" / "fit.json", {"targets": dict}),
        proposal=read.json(folder / "mix" / "proposal.json", {"text": str}),
        retention=read.json(folder / "merge" / "retention.json", {"tasks": dict, "method": str}),
        merge=read.json(folder / "merge" / "adapter" / "merge.json"),
        front=read.json(folder / "merge" / "front.json", {"trials": list, "tasks": list}),
        fusion=read.json(folder / "fuse" / "fusion.json", {"gap": dict, "rule": str}),
        recipe=recipe,
        directions=_directions(folder / "recipe.yaml"),
        problems=read.problems,
    )
    if not (trains or data.results or data.fit or data.problems):
        raise UserError(
            f"{folder} holds no run: no metrics.jsonl, no train/*/metrics.jsonl, no results.json",
            do="give the output.dir of a recipe that has been run",
        )
    return data


class _Reader:
    """Reads the files of a run folder; what is damaged counts as not there, and is noted in `problems`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.problems = folder, []

    def json(self, path: Path, needs: Mapping[str, Types] | None = None) -> dict[str, Any]:
        """The object in a file; {} if it isn't there or is damaged."""
        if not os.path.lexists(path):
            return {}
        try:
            content = read_own(path, needs, do="")
        except UserError as error:
            self._note(path, error.what)
            return {}
        content.pop("format", None)
        return content

    def text(self, path: Path) -> str:
        if not os.path.lexists(path):
            return ""
        try:
            return read_own_text(path, do="")
        except UserError as error:
            self._note(path, error.what)
            return ""

    def results(self, path: Path) -> dict[str, Any]:
        """{stage: {task: {metric: value}}}, without the stages that aren't such."""
        whole = {}
        for stage, tasks in self.json(path).items():
            shaped = isinstance(tasks, dict) and all(isinstance(row, dict) for row in tasks.values())
            if shaped and all(_is_number(value) for row in tasks.values() for value in row.values()):
                whole[stage] = tasks
            else:
                self._note(path, f"damaged: key {stage} holds no scores of tasks")
        return whole

    def train(self, folder: Path, name: str) -> TrainRunData:
        """One training run, with what is wrong with its history."""
        result = self.json(folder / "result.json") if os.path.lexists(folder / "result.json") else {}
        plan = self.json(folder / "plan.json")
        steps = self._lines(folder / METRICS)
        last = max((line["step"] for line in steps), default=0)
        done = result.get("steps")
        last = max(last, done) if isinstance(done, int) and done <= MOST_STEPS else last
        every, at_start = plan.get("eval_every"), plan.get("eval_on_start") is True
        # the evaluation after the last step of a run that goes on may be under way
        evaluated = last if result else last - 1
        every = every if isinstance(every, int) and every > 0 else None
        evals = self._lines(folder / EVALS, evaluated_steps(evaluated, every, at_start=at_start))
        self._holes(folder / METRICS, range(1, last + 1))
        noted = result.get("history")
        for note in noted if isinstance(noted, list) else ():
            self._note(folder / "result.json", str(note))
        return TrainRunData(
            name=name,
            folder=folder,
            steps=steps,
            evals=evals,
            plan=plan,
            env=self.json(folder / "env.json"),
            affinity=self.json(folder / "affinity.json"),
        )

    def _lines(self, path: Path, expected: Iterable[int] = ()) -> list[dict[str, Any]]:
        """The lines in order of step; a torn last line, which a running process may still be writing, is left out."""
        try:
            history = read_history(path, expected)
        except UserError as error:
            self._note(path, error.what)
            return []
        whole = []
        for problem in history.problems:
            self._note(path, problem.removeprefix(f"{path.name}: "))
        for step in sorted(history.by_step):
            if (problem := _line_defect(history.by_step[step])) is None:
                whole.append(history.by_step[step])
            else:
                self._note(path, f"step {step}: damaged: {problem}")
        return whole

    def _holes(self, path: Path, expected: Iterable[int]) -> None:
        with contextlib.suppress(UserError):  # has been noted
            for problem in read_history(path, expected).problems:
                self._note(path, problem.removeprefix(f"{path.name}: "))

    def _note(self, path: Path, what: str) -> None:
        line = f"{path.relative_to(self.folder)}: {what}"
        if line not in self.problems:
            self.problems.append(line)


def _line_defect(line: dict[str, Any]) -> str | None:
    """What is wrong with the numbers of a line; None if nothing is."""
    for key in ("loss", "tokens", "seconds"):
        if not _is_number(line.get(key)):
            return f"key {key} is no number"
    for task, values in line["tasks"].items():
        if (problem := defect(values, {})) is not None:
            return f"key tasks.{task}: {problem}"
        for key, value in values.items():
            if not _is_number(value):
                return f"key tasks.{task}.{key} is no number"
    return None


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _curve(lines: list[dict], task: str, key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line.get("tasks", {}).get(task, {}).get(key)) for line in lines]
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _directions(path: Path) -> dict[str, int]:
    """{metric: 1 or -1} of the metrics that the recipe of a run names; {} where it can't be read any more."""
    try:
        tasks = load_recipe(path, files=False).tasks if path.is_file() else ()
    except UserError:  # of another version; what is wrong with the file is told elsewhere
        return {}
    return {str(metric_key(metric)): -1 if lower_is_better(metric) else 1 for task in tasks for metric in task.metrics}


def _auxiliary(recipe: str) -> tuple[str, ...]:
    try:
        values = YAML(typ="safe", pure=True).load(recipe)
    except (YAMLError, ValueError, RecursionError):  # somebody's own file, or a damaged one
        return ()
    tasks = values.get("tasks") if isinstance(values, dict) else None
    named = [task for task in tasks if isinstance(task, dict)] if isinstance(tasks, list) else []
    return tuple(str(task.get("name")) for task in named if task.get("auxiliary") is True)


def _name(folder: Path, recipe: str) -> str:
    for line in recipe.splitlines():
        if line.startswith("name:"):
            return line.removeprefix("name:").strip().strip("'\"")
    return folder.resolve().name
