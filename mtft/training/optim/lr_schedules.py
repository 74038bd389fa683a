"""Learning-rate schedules in the words of transformers.

    linear                peak -> min_lr over the whole run (default, min_lr = 0)
    cosine                half a cosine from the peak to min_lr
    wsd                   peak, then linearly to min_lr in the last `decay` of the steps (warmup-stable-decay)
    inverse_sqrt          peak * sqrt(warmup / step)
    constant(_with_warmup)

Linear to zero is the default because refinement says so: Defazio et al. 2023 (arXiv 2310.07831) derive the schedule
that is best for the last iterate from measured gradient norms, and get linear decay where these stay level, on most of
their problems; Bergsma et al. 2025 (arXiv 2502.15938) see the same for language models: to zero beats to a tenth, the
more the longer the run. wsd is for runs whose end is not known: a checkpoint before the decay can go on.
"""

from __future__ import annotations

import math
from typing import Any

from mtft.recipe.schema.train import TrainSection


def schedule_arguments(train: TrainSection, steps: int) -> dict[str, Any]:
    """lr_scheduler_type, lr_scheduler_kwargs and warmup_steps of TrainingArguments, for a run of `steps` steps."""
    name, settings = train.schedule, {}
    if name == "wsd":
        name = "warmup_stable_decay"
        decay = min(max(1, round(train.decay * steps)), max(1, steps - warmup_steps(train, steps)))
        settings = {"num_decay_steps": decay, "decay_type": "linear", "min_lr_ratio": train.min_lr}
    elif train.min_lr > 0 and name == "cosine":
        name, settings = "cosine_with_min_lr", {"min_lr_rate": train.min_lr}
    elif train.min_lr > 0 and name == "linear":  # a polynomial of the first degree has an end that can be set
        name, settings = "polynomial", {"power": 1.0, "lr_end": train.min_lr * train.learning_rate}
    # transformers takes a number below 1 for a share of the steps, but hands it to schedule-free as it is, where it
    # would multiply the learning rate of the first step by its inverse: here it is always a number of steps.
    return {
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": settings or None,
        "warmup_steps": warmup_steps(train, steps),
    }


def warmup_steps(train: TrainSection, steps: int) -> int:
    """Steps of the warm-up: `warmup` below 1 is a share of the steps."""
    return math.ceil(train.warmup * steps) if train.warmup < 1 else int(train.warmup)
