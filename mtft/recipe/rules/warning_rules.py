"""Allowed, but likely not what was meant: warnings."""

from __future__ import annotations

from data_mixers.fitting.enough_trials import needed_trials
from mtft.recipe.rules.rule import (
    MERGING,
    TRAINING,
    Rule,
    asked_with_eval,
    asked_without_eval,
    judged_without_eval,
    planned_trials,
)

WARNING_RULES: tuple[Rule, ...] = (
    # --- allowed, but likely not what was meant
    Rule("mixture.online.every + train.steps", TRAINING,
        lambda r, e, n: r.mixture.online is not None and r.train.steps is not None
        and max(r.mixture.online.every, r.mixture.online.warmup) >= r.train.steps,
        "no decision falls into the run: its shares stay as they are", "lower mixture.online.every or warmup",
        fatal=False),
    Rule("mixture.online: group_dro + reference", TRAINING,
        lambda r, e, n: r.mixture.online is not None and r.mixture.online.name == "group_dro"
        and r.mixture.online.reference is None,
        "without reference losses the task with the highest loss gets all that caps and floors leave, whether it can "
        "get better or not",
        "set mixture.online.reference (losses, or a finished run), or mixture.caps", fatal=False),
    Rule("mixture.online.reference + loss.label_smoothing, loss.z_loss", TRAINING,
        lambda r, e, n: r.mixture.online is not None and r.mixture.online.reference is not None
        and bool(r.loss.label_smoothing or r.loss.z_loss),
        "training losses hold the smoothing and the z-loss, which reference losses usually don't",
        "give a reference that was measured in the same way", fatal=False),
    Rule("merge.weights + merge.search", MERGING,
        lambda r, e, n: r.merge is not None and r.merge.search is not None and r.merge.weights is not None,
        "the search chooses the weights; those given are not used", "remove merge.weights", fatal=False),
    Rule("sweep.trials", ("check", "mix", "run"),
        lambda r, e, n: r.sweep is not None and len(r.tasks) > 1
        and planned_trials(r) < needed_trials(len(r.tasks)),
        "too few trials to say anything of other mixtures (a fit needs about 3 x (tasks + 1)): none will be predicted, "
        "and the current mixture will be kept",
        "raise sweep.trials (a cocktail: sweep.repeats)", fatal=False),
    Rule("tasks.*.eval_data", ("check", "train", "run"), lambda r, e, n: bool(judged_without_eval(r)),
        "nothing held-out is measured for tasks that have no eval_data", "give them eval_data", fatal=False,
        tasks=judged_without_eval),
    Rule("tasks.*.metrics + tasks.*.eval_data", ("check", "train", "eval", "mix", "run"),
        lambda r, e, n: bool(asked_without_eval(r)),
        "metrics are asked for, and there is no eval_data to measure them on", "give eval_data, or remove the metrics",
        fatal=False, tasks=asked_without_eval),
    Rule("tasks.*.metrics + fuse, merge.experts", ("check", "run"),
        lambda r, e, n: (r.fuse is not None or (r.merge is not None and r.merge.experts is not None))
        and bool(asked_with_eval(r)),
        "fused models, and experts behind a router, are scored by their forward pass alone: metrics of answers and "
        "labels are left out there", "compare them by loss, token_accuracy and exact_match", fatal=False,
        tasks=asked_with_eval),
    Rule("train.micro_batch_tokens + train.batch_tokens", TRAINING,
        lambda r, e, n: r.train.micro_batch_tokens != "auto"
        and r.train.rows_at_once * e.ranks > r.train.batch_tokens,
        "a whole optimizer step holds fewer tokens than a single pass may",
        "raise train.batch_tokens to use the hardware better; the result is right either way", fatal=False),
    Rule("train.min_lr + train.schedule", TRAINING,
        lambda r, e, n: r.train.min_lr > 0 and r.train.schedule not in ("linear", "cosine", "wsd"),
        "this schedule does not end at train.min_lr", "take linear, cosine or wsd, or remove train.min_lr",
        fatal=False),
    Rule("train.mezo + train.max_grad_norm", TRAINING,
        lambda r, e, n: r.train.mezo is not None and r.train.max_grad_norm > 0,
        "MeZO's estimate is about sqrt(trained weights) times as long as the gradient, so it is always clipped",
        "set train.max_grad_norm: 0", fatal=False),
    Rule("fuse.alpha", ("check", "fuse", "run"),
        lambda r, e, n: r.fuse is not None and r.fuse.alpha != 1.0 and r.fuse.alpha_rule != "fixed",
        "fuse.alpha is the constant of alpha_rule `fixed`; another rule is set, which ignores it",
        "set fuse.alpha_rule: fixed, or remove fuse.alpha", fatal=False),
    Rule("fuse.top_p", ("check", "fuse", "run"),
        lambda r, e, n: r.fuse is not None and r.fuse.temperature == 0 and r.fuse.top_p < 1,
        "fuse.temperature 0 is greedy decoding, which ignores fuse.top_p", "set a temperature", fatal=False),
    Rule("model.dtype: fp16 + lora: null", TRAINING, lambda r, e, n: r.lora is None and r.model.dtype == "fp16",
        "full fine-tuning with fp16 weights loses small updates", "use bf16 or fp32", fatal=False),
)  # fmt: skip
