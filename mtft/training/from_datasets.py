"""A trainer from Python objects: `datasets.Dataset`s or lists of dicts in, a recipe and its ordinary data path behind.

The rows of each task are written to <output_dir>/data/<task>.jsonl and read like any other data, so a run from objects
is the run of the recipe that names those files: the same rows in the same order, the same losses, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from mtft.common.errors import UserError
from mtft.data.planning import make_plan
from mtft.distributed.launch import is_main_process
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.run_files.metrics_log import MetricsLog
from mtft.training.trainer_parts import TrainingInputs, read_training_inputs
from mtft.training.training_arguments import training_arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

Rows = Iterable[Mapping[str, Any]]
# Names that a user of transformers or TRL writes -> keys of the recipe's `train` section.
_ALIASES = {
    "max_steps": "steps",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
}
# What is read of a TrainingArguments (or SFTConfig) object; the rest of it is decided by the recipe's defaults.
_READ = ("max_steps", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "warmup_steps")


@dataclass(frozen=True)
class PreparedRun:
    """All that a trainer is built from."""

    recipe: Recipe
    inputs: TrainingInputs
    plan: Any
    model: Any
    args: TrainingArguments
    log: MetricsLog


def prepare_run(recipe: Recipe, *, model: Any = None, tokenizer: Any = None, quiet: bool = True) -> PreparedRun:
    """Reads data, makes the plan, loads the model (or takes `model`, which has its adapter already)."""
    inputs = read_training_inputs(recipe, tokenizer=tokenizer)
    plan = make_plan(recipe, inputs.stores)
    run_dir = Path(recipe.output.dir)
    if is_main_process():
        run_dir.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(run_dir if is_main_process() else None, steps=plan.steps, quiet=quiet or not is_main_process())
    evaluates = any(store is not None for store in inputs.held_out)
    saves = recipe.output.save_every is not None
    args = training_arguments(recipe, run_dir, steps=plan.steps, evaluates=evaluates, saves=saves)
    return PreparedRun(recipe, inputs, plan, load_for_training(recipe) if model is None else model, args, log)


def recipe_of_datasets(
    model: Any,
    datasets: Mapping[str, Rows],
    *,
    shares: str | Mapping[str, float] = "natural",
    args: Any = None,
    eval_datasets: Mapping[str, Rows] | None = None,
    sections: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of `MultiTaskTrainer.from_datasets`, with the rows written where it says. UserError for bad input."""
    if not isinstance(datasets, Mapping) or not datasets:
        raise UserError("datasets must be {task: rows}", where="datasets", do='for example {"sql": sql_rows}')
    held_out = dict(eval_datasets or {})
    if unknown := [name for name in held_out if name not in datasets]:
        raise UserError(f"no task {unknown[0]!r}", where="eval_datasets", do=f"tasks: {', '.join(datasets)}")
    path = model if isinstance(model, str | Path) else _base_path(model)
    output, seed, train = _settings(args)
    run_dir = Path(output)
    tasks = []
    for name, rows in datasets.items():
        task = {"name": name, "data": str(_write_rows(run_dir, name, "train", rows))}
        if name in held_out:
            task["eval_data"] = str(_write_rows(run_dir, name, "eval", held_out[name]))
        tasks.append(task)
    content: dict[str, Any] = {
        "name": run_dir.name,
        "seed": seed,
        "model": {"path": str(path)},
        "tasks": tasks,
        "mixture": {"shares": shares if isinstance(shares, str) else dict(shares)},
        "train": train,
        "output": {"dir": str(run_dir)},
    }
    for section, values in (sections or {}).items():
        content[section] = {**content[section], **values} if section in content else values
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"the arguments are no valid recipe: {first['msg']}",
            where=where,
            do="args takes output_dir, seed and the keys of the recipe's train section (docs/recipe.md)",
        ) from error


def _settings(args: Any) -> tuple[str, int, dict[str, Any]]:
    """(output_dir, seed, the recipe's `train`) of a dict or of a TrainingArguments object."""
    if args is None or isinstance(args, Mapping):
        given = dict(args or {})
    else:
        given = _read_arguments(args)
    output, seed = str(given.pop("output_dir", "runs/from_datasets")), int(given.pop("seed", 17))
    train = {"batch_tokens": 4096, **{_ALIASES.get(name, name): value for name, value in given.items()}}
    if "steps" not in train:
        raise UserError("how long should it train?", where="args", do='give args {"max_steps": 100, ...}')
    if "learning_rate" not in train:
        train["learning_rate"] = 2e-4
    return output, seed, train


def _read_arguments(args: Any) -> dict[str, Any]:
    """What is used of a TrainingArguments or SFTConfig: a step has as many tokens as its rows have at full length."""
    settings = args.to_dict()
    if not settings.get("max_steps", -1) > 0:
        raise UserError("max_steps is not set: a multi-task run has a length in steps", where="args.max_steps")
    given = {name: settings[name] for name in _READ if settings.get(name) is not None}
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    max_length = settings.get("max_length") or 1024
    given |= {"max_length": max_length, "batch_tokens": rows * max_length}
    given |= {"output_dir": settings["output_dir"] or "runs/from_datasets", "seed": settings["seed"]}
    return given


def _base_path(model: Any) -> str:
    path = str(model.config._name_or_path)
    if not path:
        raise UserError(
            "the model does not say where it was loaded from", where="model", do="give its path or hub name"
        )
    return path


def _write_rows(run_dir: Path, task: str, split: str, rows: Rows) -> Path:
    """<run_dir>/data/<task>.<split>.jsonl, absolute. Written by one process where it differs or is not there."""
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"row {number} of task {task} is a {type(row).__name__}, not a dict of columns",
                where=f"datasets.{task}",
                do='give rows such as {"prompt": "...", "response": "..."} or {"messages": [...]}',
            )
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False))
        except TypeError as error:
            raise UserError(
                f"row {number} of task {task} can't be written as JSON: {error}", where=f"datasets.{task}"
            ) from error
    if not lines:
        raise UserError(f"task {task} has no rows", where=f"datasets.{task}")
    path = (run_dir / "data" / f"{task}.{split}.jsonl").absolute()
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
