"""A trainer from Python objects: `datasets.Dataset`s or lists of dicts in, a recipe and its ordinary data path behind.

The rows of each task are written to <output_dir>/data/<task>.jsonl and read like any other data, so a run from objects
is the run of the recipe that names those files: the same rows in the same order, the same losses, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.data.readers.arrow_rows import dataset_rows
from mtft.recipe.load import recipe_of_values
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_files.run_dir import RECIPE
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
    task_options: Mapping[str, Mapping[str, Any]] | None = None,
    sections: Mapping[str, Any] | None = None,
) -> tuple[Recipe, int | None]:
    """The recipe of `MultiTaskTrainer.from_datasets`, with the rows written where it says; examples in a step, or None.

    Raises:
        UserError: for bad input, or rows that would replace those of another run.
    """
    if not isinstance(datasets, Mapping) or not datasets:
        raise UserError("datasets must be {task: rows}", where="datasets", do='for example {"sql": sql_rows}')
    if not isinstance(eval_datasets, Mapping | None):
        raise UserError(
            "eval_datasets must be {task: rows}", where="eval_datasets", do='such as {"sql": held_out_rows}'
        )
    held_out = dict(eval_datasets or {})
    if unknown := [name for name in held_out if name not in datasets]:
        raise UserError(f"no task {unknown[0]!r}", where="eval_datasets", do=f"tasks: {', '.join(datasets)}")
    further = _task_options(task_options, datasets)
    sections = dict(sections or {})
    for name, argument in (("tasks", "datasets"), ("mixture", "shares")):
        values = sections.get(name)
        if values is not None and (name == "tasks" or (isinstance(values, Mapping) and "shares" in values)):
            raise UserError(f"{name} is said twice", where=name, do=f"say it with {argument} only")
    content, examples = _settings(args)
    if not held_out and content["train"].get("eval_every"):
        what = "evaluations are asked for, and there are no held-out rows"
        raise UserError(what, where="eval_datasets", do="give eval_datasets, or leave eval_every (eval_strategy) out")
    run_dir = Path(content["output"].setdefault("dir", "runs/from_datasets"))
    content["name"] = run_dir.name
    if isinstance(model, str | Path):
        model = {"path": str(model)}
    if isinstance(model, Mapping):
        content["model"] |= model
    else:
        content["model"]["path"] = _check_loaded(model, tokenizer, sections)
        content["model"] |= _precision(model)
        if not hasattr(model, "peft_config"):
            content["lora"] = None  # the model as it is; what requires gradients is trained
    content["mixture"] = {"shares": dict(shares) if isinstance(shares, Mapping) else shares}
    texts = {}
    content["tasks"] = []
    for name, rows in datasets.items():
        task: dict[str, Any] = {"name": name, "data": str(_path(run_dir, name, "train")), **further.get(name, {})}
        texts[Path(task["data"])] = _as_jsonl(rows, name, "datasets")
        if name in held_out:
            task["eval_data"] = str(_path(run_dir, name, "eval"))
            texts[Path(task["eval_data"])] = _as_jsonl(held_out[name], name, "eval_datasets")
        content["tasks"].append(task)
    for section, values in sections.items():
        both = isinstance(values, Mapping) and content.get(section)
        content[section] = {**content[section], **values} if both else values
    tasks = "task_options" if further else "datasets"
    said = {"train": "args", "seed": "args", "output": "args", "tasks": tasks, "mixture": "shares"}
    origins = {section: said.get(section, section) for section in content}
    recipe = recipe_of_values(content, origins, "from_datasets")
    for path, text in texts.items():  # every rank puts the same bytes in place, so none waits
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if path.is_file() and (run_dir / RECIPE).is_file():
            what = f"the folder holds a run on other rows ({path.name} differs)"
            raise UserError(what, where=str(run_dir), do="give another output_dir, or move the folder away")
        write_text(path, text)
    return recipe, examples


def _task_options(options: Any, datasets: Mapping[str, Rows]) -> dict[str, dict[str, Any]]:
    """{task: further keys of its section}."""
    where = "task_options"
    if not isinstance(options, Mapping | None) or not all(isinstance(of, Mapping) for of in (options or {}).values()):
        raise UserError(f"{where} must be {{task: {{key: value}}}}", where=where, do='such as {"sql": {"weight": 2.0}}')
    for name, of in (options or {}).items():
        if name not in datasets:
            raise UserError(f"no task {name!r}", where=where, do=f"tasks: {', '.join(datasets)}")
        if twice := of.keys() & {"name", "data", "eval_data"}:
            what = f"{sorted(twice)[0]} of task {name} is said twice"
            raise UserError(what, where=where, do="rows are given with datasets and eval_datasets only")
    return {name: dict(of) for name, of in (options or {}).items()}


def _settings(args: Any) -> tuple[dict[str, Any], int | None]:
    """Sections of the recipe, and the examples of a step if they are counted, of a dict or a TrainingArguments."""
    if hasattr(args, "per_device_train_batch_size"):
        return read_transformers_arguments(args)
    if args is not None and not isinstance(args, Mapping):
        raise UserError(
            f"args is a {type(args).__name__}", where="args", do='give {"max_steps": 100, ...} or a TrainingArguments'
        )
    train: dict[str, Any] = {}
    for name, value in (args or {}).items():
        key = str(_ALIASES.get(name, name))
        if key in train:
            raise UserError(
                f"{name} is said twice: it is the same as {key}", where=f"args.{name}", do="keep one of them"
            )
        train[key] = value
    output = {"dir": str(train.pop("output_dir"))} if "output_dir" in train else {}
    content = {"model": {}, "output": output, **({"seed": train.pop("seed")} if "seed" in train else {})}
    if "steps" not in train and "epochs" not in train:
        raise UserError("how long should it train?", where="args", do='give args {"max_steps": 100, ...}')
    return {**content, "train": train}, None


def _check_loaded(model: Any, tokenizer: Any, sections: Mapping[str, Any]) -> str:
    """Where a loaded model is from."""
    if not hasattr(model, "config") or not hasattr(model, "parameters"):
        raise UserError(f"model is a {type(model).__name__}", where="model", do="give a path, a hub name or a model")
    if sections.get("lora"):
        do = "give the model's path and lora, or a PeftModel without lora"
        raise UserError("lora is for a model that is loaded here, and this one is loaded already", where="lora", do=do)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        do = "for a saved adapter: PeftModel.from_pretrained(base, folder, is_trainable=True)"
        raise UserError("nothing in the model requires gradients", where="model", do=do)
    path = str(model.config._name_or_path)
    if not path and tokenizer is None:
        raise UserError("the model does not say where its tokenizer is", where="tokenizer", do="give the tokenizer")
    return path or type(model).__name__


def _precision(model: Any) -> dict[str, str]:
    """The precision that a loaded model has, where there is no GPU: `auto` is for models that are loaded here."""
    import torch

    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    held = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} or {
        parameter.dtype for parameter in model.parameters()
    }
    dtype = held.pop() if len(held) == 1 else None
    return {} if torch.cuda.is_available() or dtype not in names else {"dtype": names[dtype]}


def _path(run_dir: Path, task: str, split: str) -> Path:
    return (run_dir / "data" / f"{task}.{split}.jsonl").absolute()


def _plain_rows(rows: Rows) -> Iterable[Any]:
    """The rows, without the nulls that Arrow puts where another row has a key (see arrow_rows.py)."""
    from datasets import Dataset

    plain = isinstance(rows, Dataset) and rows.format["type"] is None
    return dataset_rows(rows) if plain else rows


def _as_jsonl(rows: Rows, task: str, argument: str) -> str:
    """The rows as JSON lines; the labels of a data set's ClassLabel columns by their names."""
    where = f"{argument}.{task}"
    example = 'give a datasets.Dataset or dicts, such as {"prompt": "...", "response": "..."} or {"messages": [...]}'
    if isinstance(rows, Mapping | str) or not isinstance(rows, Iterable):
        raise UserError(f"the rows of task {task} are a {type(rows).__name__}", where=where, do=example)
    features = getattr(rows, "features", None) or {}
    labels = {column: feature.names for column, feature in features.items() if hasattr(feature, "int2str")}
    lines = []
    for number, row in enumerate(_plain_rows(rows)):
        if not isinstance(row, Mapping):
            what = f"row {number} of task {task} is a {type(row).__name__}, not a dict of columns"
            raise UserError(what, where=where, do=example)
        named = {column: names[row[column]] for column, names in labels.items() if isinstance(row[column], int)}
        for column, value in row.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                what = f"row {number} of task {task}, column {column!r}, can't be written as JSON: {error}"
                raise UserError(
                    what, where=where, do="turn it into text or a number, or leave the column out"
                ) from error
        lines.append(json.dumps({**row, **named}, ensure_ascii=False))
    if not lines:
        raise UserError(f"task {task} has no rows", where=where, do=example)
    return "\n".join(lines) + "\n"
