"""A trainer from Python objects: `datasets.Dataset`s or lists of dicts in, a recipe and its ordinary data path behind.

The rows of each task are written to <output_dir>/data/<task>.jsonl and read like any other data, so a run from objects
is the run of the recipe that names those files: the same rows in the same order, the same losses, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.transformers_arguments import read_transformers_arguments

Rows = Iterable[Mapping[str, Any]]
# Names that a user of transformers or TRL writes in a dict -> keys of the recipe's `train` section.
_ALIASES = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "warmup_steps": "warmup",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
}


def recipe_of_datasets(
    model: Any,
    datasets: Mapping[str, Rows],
    *,
    shares: str | Mapping[str, float] = "natural",
    tokenizer: Any = None,
    args: Any = None,
    eval_datasets: Mapping[str, Rows] | None = None,
    sections: Mapping[str, Any] | None = None,
) -> tuple[Recipe, int | None]:
    """The recipe of `MultiTaskTrainer.from_datasets`, with the rows written where it says; examples in a step, or None.

    Raises:
        UserError: for bad input.
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise UserError("datasets must be {task: rows}", where="datasets", do='for example {"sql": sql_rows}')
    held_out = dict(eval_datasets or {})
    if unknown := [name for name in held_out if name not in datasets]:
        raise UserError(f"no task {unknown[0]!r}", where="eval_datasets", do=f"tasks: {', '.join(datasets)}")
    content, examples = _settings(args)
    run_dir = Path(content["output"].setdefault("dir", "runs/from_datasets"))
    content["name"] = run_dir.name
    if isinstance(model, str | Path):
        model = {"path": str(model)}
    if isinstance(model, Mapping):
        content["model"] |= model
    else:
        path = str(model.config._name_or_path)
        if not path and tokenizer is None:
            raise UserError("the model does not say where its tokenizer is", where="tokenizer", do="give the tokenizer")
        content["model"]["path"] = path or type(model).__name__
        if not hasattr(model, "peft_config"):
            content["lora"] = None  # the model as it is; what requires gradients is trained
    content["mixture"] = {"shares": shares if isinstance(shares, str) else dict(shares)}
    content["tasks"] = []
    for name, rows in datasets.items():
        task = {"name": name, "data": str(_write_rows(run_dir, name, "train", rows))}
        if name in held_out:
            task["eval_data"] = str(_write_rows(run_dir, name, "eval", held_out[name]))
        content["tasks"].append(task)
    for section, values in (sections or {}).items():
        content[section] = {**content[section], **values} if content.get(section) else values
    try:
        return Recipe.model_validate(content), examples
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        do = "args takes output_dir, seed and the keys of the recipe's train section (docs/recipe.md)"
        raise UserError(f"the arguments are no valid recipe: {first['msg']}", where=where, do=do) from error


def _settings(args: Any) -> tuple[dict[str, Any], int | None]:
    """Sections of the recipe, and the examples of a step if they are counted, of a dict or a TrainingArguments."""
    if args is not None and not isinstance(args, Mapping):
        return read_transformers_arguments(args)
    train = {_ALIASES.get(name, name): value for name, value in (args or {}).items()}
    output = {"dir": str(train.pop("output_dir"))} if "output_dir" in train else {}
    content = {"model": {}, "output": output, **({"seed": train.pop("seed")} if "seed" in train else {})}
    if "steps" not in train and "epochs" not in train:
        raise UserError("how long should it train?", where="args", do='give args {"max_steps": 100, ...}')
    return {**content, "train": train}, None


def _write_rows(run_dir: Path, task: str, split: str, rows: Rows) -> Path:
    """<run_dir>/data/<task>.<split>.jsonl, absolute. Every rank puts the same bytes in place, so none waits."""
    lines = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            what = f"row {number} of task {task} is a {type(row).__name__}, not a dict of columns"
            do = 'give rows such as {"prompt": "...", "response": "..."} or {"messages": [...]}'
            raise UserError(what, where=f"datasets.{task}", do=do)
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False))
        except TypeError as error:
            raise UserError(
                f"row {number} of task {task} can't be written as JSON: {error}", where=f"datasets.{task}"
            ) from error
    if not lines:
        raise UserError(f"task {task} has no rows", where=f"datasets.{task}")
    path = (run_dir / "data" / f"{task}.{split}.jsonl").absolute()
    write_text(path, "\n".join(lines) + "\n")
    return path
