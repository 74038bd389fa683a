"""Reads what a run left on disk. Every part is optional: a report of half a run is a report of that half."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from mtft.common.errors import UserError


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

    @property
    def tasks(self) -> list[str]:
        names: dict[str, None] = {}
        for stage in self.results.values():
            names.update(dict.fromkeys(stage))
        for train in self.trains:
            names.update(dict.fromkeys(train.tasks))
        return list(names)


def load_run(folder: Path) -> RunData:
    """Reads a folder of `mtft run` or of `mtft train`. Raises UserError when there is nothing in it to report."""
    if not folder.is_dir():
        raise UserError(f"there is no run directory {folder}", do="give the output.dir of a recipe that has been run")
    single = (folder / "metrics.jsonl").is_file()
    trains = [_load_train(folder, folder.name)] if single else []
    for sub in sorted((folder / "train").glob("*/metrics.jsonl")):
        if not sub.parent.name.endswith(".old"):
            trains.append(_load_train(sub.parent, sub.parent.name))
    trains.sort(key=lambda run: (run.name.startswith("single-"), run.name != "joint", run.name))
    data = RunData(
        name=_name(folder),
        folder=folder,
        results=_json(folder / "results.json"),
        trains=trains,
        fit=_json(folder / "mix" / "fit.json"),
        proposal=_json(folder / "mix" / "proposal.json"),
        retention=_json(folder / "merge" / "retention.json"),
        merge=_json(folder / "merge" / "adapter" / "merge.json"),
        front=_json(folder / "merge" / "front.json"),
        fusion=_json(folder / "fuse" / "fusion.json"),
        recipe=_text(folder / "recipe.yaml"),
    )
    if not (trains or data.results or data.fit):
        raise UserError(
            f"{folder} holds no run: no metrics.jsonl, no train/*/metrics.jsonl, no results.json",
            do="give the output.dir of a recipe that has been run",
        )
    return data


def _load_train(folder: Path, name: str) -> TrainRunData:
    by_step = {int(line["step"]): line for line in _jsonl(folder / "metrics.jsonl")}
    evals = {int(line["step"]): line for line in _jsonl(folder / "eval.jsonl")}
    return TrainRunData(
        name=name,
        folder=folder,
        steps=[by_step[step] for step in sorted(by_step)],
        evals=[evals[step] for step in sorted(evals)],
        plan=_json(folder / "plan.json"),
        env=_json(folder / "env.json"),
        affinity=_json(folder / "affinity.json"),
    )


def _curve(lines: list[dict], task: str, key: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line.get("tasks", {}).get(task, {}).get(key)) for line in lines]
    finite = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _name(folder: Path) -> str:
    for line in _text(folder / "recipe.yaml").splitlines():
        if line.startswith("name:"):
            return line.removeprefix("name:").strip().strip("'\"")
    return folder.resolve().name


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"not valid JSON: {error}", where=str(path), do="delete the file and run its stage again"
        ) from error


def _jsonl(path: Path) -> list[dict]:
    """Lines of a JSONL file that a running process may still be writing: a torn last line is left out."""
    lines = _text(path).splitlines()
    out = []
    for number, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"not valid JSON: {error}", where=f"{path}:{number}", do="mend or delete the line"
            ) from error
    return out
