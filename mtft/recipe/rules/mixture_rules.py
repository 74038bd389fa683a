"""Mixtures that change over the run, and how batches hold them."""

from __future__ import annotations

from mtft.recipe.rules.rule import TRAINING, Rule, compares_gradients, epoch_capped, without_eval
from mtft.recipe.schema.mixture import ScheduleShares
from mtft.recipe.schema.recipe import Recipe

# What belongs to one method of mixture.online, or to two
ONLINE_OPTIONS = {
    "bandit": ("scale",),
    "group_dro": ("eta", "smoothing", "reference"),
    "linear_law": ("eta", "probe_steps", "probe_share", "ema", "tokens"),
}
PROBE_STEPS, PROBE_SHARE = 5, 0.75


def online(recipe: Recipe, name: str) -> bool:
    return recipe.mixture.online is not None and recipe.mixture.online.name == name


def strange_options(recipe: Recipe) -> bool:
    """An option of mixture.online is set that its method does not have."""
    online = recipe.mixture.online
    if online is None:
        return False
    every = {option for options in ONLINE_OPTIONS.values() for option in options}
    return any(getattr(online, option) is not None for option in every.difference(ONLINE_OPTIONS[online.name]))


def probes_fit(recipe: Recipe) -> bool:
    """Whether the probes of a round leave steps to play what they say, and tell the tasks apart."""
    online, tasks = recipe.mixture.online, len(recipe.tasks)
    if online is None or online.name != "linear_law" or tasks < 2:
        return True
    steps, share = online.probe_steps or PROBE_STEPS, online.probe_share or PROBE_SHARE
    return tasks * steps < online.every and share > 1 / tasks


MIXTURE_RULES: tuple[Rule, ...] = (
    # --- batches
    Rule("mixture.shares.schedule + sweep", ("check", "mix", "run"),
        lambda r, e, n: r.sweep is not None and isinstance(r.mixture.shares, ScheduleShares),
        "trials and proposals are constant mixtures, and the recipe's own mixture changes over the run",
        "give constant shares for the sweep, or remove the sweep section"),
    # --- mixtures that change online
    Rule("mixture.online + mixture.shares.schedule", TRAINING,
        lambda r, e, n: r.mixture.online is not None and isinstance(r.mixture.shares, ScheduleShares),
        "a schedule says the shares of the whole run beforehand, and mixture.online decides them on the way",
        "give constant shares to start with, or remove mixture.online"),
    Rule("mixture.online + sweep", ("check", "mix", "run"),
        lambda r, e, n: r.sweep is not None and r.mixture.online is not None,
        "trials and proposals are constant mixtures, and the recipe's own mixture changes while it trains",
        "remove mixture.online for the sweep, or remove the sweep section"),
    Rule("mixture.online + one task", TRAINING, lambda r, e, n: r.mixture.online is not None and len(r.tasks) < 2,
        "there is nothing to choose between", "remove mixture.online"),
    Rule("mixture.online + mixture.unit: tokens + max_epochs, alternating", TRAINING,
        lambda r, e, n: r.mixture.online is not None and r.mixture.unit == "tokens"
        and (epoch_capped(r) or r.train.batch_style == "alternating"),
        "with shares of tokens nobody knows at a change how many rows the steps to come will take, and so whether "
        "max_epochs can be kept, or how many steps each task is owed",
        "set mixture.unit: examples, or leave out max_epochs and train.batch_style: alternating"),
    Rule("mixture.online + train.task_patience, weight 0", TRAINING,
        lambda r, e, n: r.mixture.online is not None
        and (r.train.task_patience is not None or any(task.weight == 0 for task in r.tasks)),
        "a task that does not count in the loss (tasks.*.weight: 0, or dropped by train.task_patience) learns nothing "
        "from its share, and would be given more and more",
        "give it a share of 0 instead, and remove train.task_patience"),
    Rule("mixture.online.* + mixture.online.name", TRAINING, lambda r, e, n: strange_options(r),
        "an option belongs to another method: bandit has scale; group_dro eta, smoothing, reference; linear_law eta, "
        "probe_steps, probe_share, ema, tokens",
        "remove it, or set the method it belongs to"),
    Rule("mixture.online: linear_law + tasks.*.eval_data", TRAINING,
        lambda r, e, n: online(r, "linear_law") and bool(without_eval(r)),
        "the law is about held-out losses, and not every task has eval_data",
        "give every task eval_data, or take bandit or group_dro"),
    Rule("mixture.online: linear_law + every", TRAINING, lambda r, e, n: not probes_fit(r),
        "a round holds one probe a task (probe_steps each) and has to go on after them; and a probe is to hold more "
        "than an even share of its task (probe_share)",
        "raise mixture.online.every, or lower probe_steps; probe_share: 0.75"),
    Rule("mixture.online: linear_law + train.batch_style: alternating", TRAINING,
        lambda r, e, n: online(r, "linear_law") and r.train.batch_style == "alternating",
        "a probe of a few steps can't be near its mixture when each step holds one task",
        "set train.batch_style: mixed (or unmixed), or take bandit or group_dro"),
    Rule("mixture.online + run.tune_strong", ("check", "run"),
        lambda r, e, n: r.mixture.online is not None and r.fuse is not None and r.run.tune_strong,
        "the strong model would choose another mixture by its own losses, and be no yardstick of the joint run",
        "set run.tune_strong: false, or remove mixture.online"),
    Rule("train.batch_style: alternating + task gradients", TRAINING,
        lambda r, e, n: r.train.batch_style == "alternating" and compares_gradients(r),
        "a step holds one task only, so there are no gradients of several tasks to compare or mix",
        "set train.batch_style: mixed (or unmixed)"),
    Rule("train.batch_style: alternating + weight 0", TRAINING,
        lambda r, e, n: r.train.batch_style == "alternating"
        and (r.train.task_patience is not None or any(task.weight == 0 for task in r.tasks)),
        "a step of a task that does not count (tasks.*.weight: 0, or dropped by train.task_patience) learns nothing",
        "give the task a share of 0 instead of a weight of 0, remove train.task_patience, or take another batch_style"),
    Rule("train.max_length + train.micro_batch_tokens", TRAINING,
        lambda r, e, n: r.train.max_length > r.train.rows_at_once,
        "a row of max_length tokens does not fit into micro_batch_tokens",
        "raise train.micro_batch_tokens to at least train.max_length, or shorten train.max_length"),
)  # fmt: skip
