"""The recipe in the words of transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainingArguments

from mtft.distributed.launch import engine, init_cpu_process_group, world_size
from mtft.distributed.sharding import fsdp_settings, set_deepspeed_precision
from mtft.models.loading import compute_dtype, refuse_precision
from mtft.recipe.compatibility import check_compatibility
from mtft.recipe.schema.recipe import Recipe
from mtft.training.determinism import fix_workspace
from mtft.training.optim.lr_schedules import schedule_arguments
from mtft.training.optim.optimizers import MUON, optimizer_name


def training_arguments(recipe: Recipe, run_dir: Path, *, steps: int, evaluates: bool, saves: bool) -> TrainingArguments:
    """TrainingArguments of a recipe.

    One item of our loader is a whole optimizer step, so gradient_accumulation_steps is 1 whatever micro_batch_tokens.
    `evaluates`: per-task evaluation every eval_every steps and at the end.
    `saves`: checkpoints every save_every steps and at the end.
    """
    section = recipe.train
    optimizer = optimizer_name(section.optimizer)
    check_compatibility(recipe, stage="train")  # for callers from Python; the command line has asked already
    on_cpu = not torch.cuda.is_available()
    shards_on_cpu = on_cpu and engine() != "ddp" and world_size() > 1
    if shards_on_cpu:
        init_cpu_process_group()
    if section.deterministic:
        fix_workspace()
    dtype = compute_dtype(recipe.model)
    refuse_precision(recipe.model)
    args = TrainingArguments(
        output_dir=str(run_dir),
        run_name=recipe.name,
        seed=recipe.seed,
        max_steps=steps,
        per_device_train_batch_size=1,  # not a size: the loader's item is the step
        gradient_accumulation_steps=1,
        learning_rate=section.learning_rate,
        **schedule_arguments(section, steps),
        optim="adamw_torch" if optimizer == MUON else optimizer,  # muon is made by mtft.training.optim.optimizers
        weight_decay=section.weight_decay,
        adam_beta1=section.beta1,
        adam_beta2=section.beta2,
        max_grad_norm=section.max_grad_norm,
        activation_checkpointing=section.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if section.gradient_checkpointing else None,
        bf16=dtype == torch.bfloat16 and engine() != "deepspeed",  # see set_deepspeed_precision
        fp16=dtype == torch.float16,
        use_cpu=on_cpu,
        accelerator_config={"use_configured_state": True} if shards_on_cpu else None,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=section.eval_every or steps,
        save_strategy="steps" if saves else "no",
        save_steps=recipe.output.save_every or steps,
        logging_strategy="no",  # ours writes every step; what Trainer would log is a part of it
        logging_nan_inf_filter=False,
        report_to=list(recipe.output.trackers) or "none",
        disable_tqdm=True,  # our own progress line
        ddp_find_unused_parameters=False,  # every rank uses every trainable parameter, also on an empty micro-batch
        ddp_broadcast_buffers=False,
        remove_unused_columns=False,
    )
    if engine() == "fsdp":
        args.fsdp_plugin_args = fsdp_settings(dtype)
    if engine() == "deepspeed":
        set_deepspeed_precision(args.deepspeed_plugin, dtype, full=recipe.lora is None)
    return args


def use_one_gpu(args: TrainingArguments, say: Callable[[str], None]) -> None:
    """A process trains on one GPU, however many it sees.

    Trainer would wrap the model in DataParallel: it copies the weights to every GPU in every pass, splits our batches
    wrongly, and is slower than a launcher's processes.
    """
    if args.n_gpu > 1:
        say(
            f"note: {args.n_gpu} GPUs are visible, and one process trains on one of them ({args.device}). All of them: "
            f"torchrun --nproc_per_node {args.n_gpu} -m mtft train RECIPE (docs/launching.md)"
        )
        args._n_gpu = 1
