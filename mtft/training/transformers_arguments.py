"""What `MultiTaskTrainer.from_datasets` reads of a TrainingArguments or an SFTConfig: sections of a recipe.

A setting is translated, or has no say in the result, or is refused by its name when it was changed: none is ignored.
"""

from __future__ import annotations

import dataclasses
import warnings
from enum import Enum
from typing import Any

from transformers import TrainingArguments

from mtft.common.errors import UserError
from mtft.distributed.launch import world_size
from mtft.recipe.schema.train import TrainSection

_SAME = {  # setting of transformers -> key of the recipe, with the same meaning
    "learning_rate": "train.learning_rate",
    "weight_decay": "train.weight_decay",
    "adam_beta1": "train.beta1",
    "adam_beta2": "train.beta2",
    "max_grad_norm": "train.max_grad_norm",
    "warmup_steps": "train.warmup",
    "activation_checkpointing": "train.gradient_checkpointing",
    "eval_on_start": "train.eval_on_start",
    "label_smoothing_factor": "loss.label_smoothing",
    "seed": "seed",
    "full_determinism": "train.deterministic",
}
_OPTIONAL = {  # the same where they are set
    "neftune_noise_alpha": "train.neftune",
    "max_length": "train.max_length",
    "packing": "train.packing",
}
KEEP_ALL = 1_000_000
_SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay")
_TRANSLATED = (
    *("output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "optim", "bf16", "fp16", "report_to", "gradient_checkpointing", "truncation_mode"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "activation_checkpointing_kwargs"),
    "gradient_checkpointing_kwargs",
    "save_total_limit",
)
# How it is logged, loaded and spread over devices: decided by mtft and accelerate, and the result is the same.
_NO_SAY = ("logging", "log_", "dataloader", "ddp_", "run_name", "disable_tqdm", "project", "trackio", "use_cpu", "do_")
_NO_SAY += ("per_device_eval", "padding_free", "dataset_num_proc", "remove_unused_columns", "use_cache", "local_rank")
_NO_SAY += ("include_num_input_tokens", "skip_memory", "average_tokens", "prediction_loss_only", "label_names", "tf32")
_NO_SAY += ("pad_to_multiple_of", "shuffle_dataset", "accelerator_config", "packing_strategy")


def read_transformers_arguments(args: TrainingArguments) -> tuple[dict[str, Any], int | None]:
    """Sections of a recipe, and the examples of a step where the batch is counted in examples (None: in tokens).

    A step holds per_device_train_batch_size * gradient_accumulation_steps * ranks examples, as with transformers; with
    an SFTConfig's `packing` so many rows of max_length tokens.

    Raises:
        UserError: for a setting that was changed and that a multi-task run does not have.
    """
    _refuse_unknown(args)
    sections: dict[str, Any] = {"train": {}, "loss": {}, "output": {}, "model": {}}
    translated = {key: getattr(args, name) for name, key in _SAME.items()}
    translated |= {key: getattr(args, name) for name, key in _OPTIONAL.items() if getattr(args, name, None) is not None}
    for key, value in translated.items():
        section, _, name = key.rpartition(".")
        (sections[section] if section else sections)[name] = value
    train, output = sections["train"], sections["output"]
    if args.max_steps > 0:
        train["steps"] = args.max_steps
    else:
        train["epochs"] = args.num_train_epochs
    schedule = _value(args.lr_scheduler_type)
    if schedule not in _SCHEDULES:
        do = f"one of {', '.join(_SCHEDULES)}"
        raise UserError(f"schedule {schedule!r} is not offered", where="args.lr_scheduler_type", do=do)
    train["schedule"] = "wsd" if schedule == "warmup_stable_decay" else schedule
    train["optimizer"] = _value(args.optim)
    settings = vars(args)
    if "max_length" in settings:  # an SFTConfig
        if settings["max_length"] is None:
            do = "give the longest length in tokens; what is longer is counted and reported"
            raise UserError("rows of any length are not offered", where="args.max_length", do=do)
        train["too_long"] = "truncate_left" if settings["truncation_mode"] == "keep_end" else "truncate_right"
    sections["model"]["dtype"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    output["trackers"] = list(args.report_to or ())
    output["dir"] = args.output_dir
    output["keep"] = args.save_total_limit or KEEP_ALL
    for name, section, key in (("eval", train, "eval_every"), ("save", output, "save_every")):
        strategy, every = _value(getattr(args, f"{name}_strategy")), getattr(args, f"{name}_steps")
        if strategy == "steps" and every is not None and every >= 1:
            section[key] = int(every)
        elif strategy != "no":
            what = f"{name}_strategy {strategy!r} with {name}_steps {every!r} is not offered"
            do = f'"no", or "steps" with {name}_steps a number of optimizer steps'
            raise UserError(what, where=f"args.{name}_strategy", do=do)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size()
    max_length = train.get("max_length", TrainSection.model_fields["max_length"].default)
    train["micro_batch_tokens"] = args.per_device_train_batch_size * max_length
    train["batch_tokens"] = rows * max_length
    return sections, None if getattr(args, "packing", False) else rows


def _refuse_unknown(args: TrainingArguments) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the class says of its own defaults
        untouched = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu, bf16=args.bf16, fp16=args.fp16)
    known = {*_SAME, *_OPTIONAL, *_TRANSLATED}
    for field in dataclasses.fields(args):
        name = field.name
        if name in known or name.startswith(_NO_SAY):
            continue
        if getattr(args, name) != getattr(untouched, name):
            raise UserError(
                f"a multi-task run has no setting {name} (it is {getattr(args, name)!r})",
                where=f"args.{name}",
                do="leave it at its default, or give args as a dict with the keys of a recipe's train section "
                "(docs/recipe.md)",
            )


def _value(setting: Any) -> str:
    return str(setting.value if isinstance(setting, Enum) else setting)
