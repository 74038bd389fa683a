"""What can't go together although each key is right: one table, each row the combination, why, and what to do.

Rows say nothing about values of one key (schema.py) or names and sums (checks.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from mtft.common.errors import UserError
from mtft.recipe.schema.mixture import ScheduleShares
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe

Stage = Literal["check", "train", "eval", "mix", "merge", "fuse", "run"]
TRAINING: tuple[Stage, ...] = ("check", "train", "mix", "run")
MERGING: tuple[Stage, ...] = ("check", "merge", "run")


class BalancerFacts(Protocol):
    """What of a balancer's needs matters here (mtft.losses.balancers.base.BalancerNeeds has it)."""

    @property
    def valid_every(self) -> int | None: ...


@dataclass(frozen=True)
class ShardingLimits:
    """How the process was launched, as `accelerate launch` tells it.

    zero: DeepSpeed's stage, 0 = no DeepSpeed; fsdp: version, 0 = no FSDP.
    """

    zero: int = 0
    fsdp: int = 0
    ranks: int = 1

    @property
    def cuts_weights(self) -> bool:
        """Each rank holds a part of every weight: only a module's own forward sees them whole."""
        return self.zero == 3 or self.fsdp > 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ShardingLimits:
        ranks = int(environment.get("WORLD_SIZE") or 1)
        asked = environment.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
        fsdp = int(environment.get("FSDP_VERSION") or 1) if asked else 0  # 1 is accelerate's own default
        if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in ("1", "true"):
            return cls(0, fsdp, ranks)
        config = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if config and Path(config).is_file():
            stage = json.loads(Path(config).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0)
        else:
            stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") or 2  # accelerate's own default
        return cls(int(stage), fsdp, ranks)


@dataclass(frozen=True)
class Rule:
    """One row of the table. `when` sees the recipe, the engine, and what the balancer needs (None: not asked)."""

    keys: str
    stages: tuple[Stage, ...]
    when: Callable[[Recipe, ShardingLimits, BalancerFacts | None], bool]
    why: str
    do: str
    fatal: bool = True


def _without_eval(recipe: Recipe) -> list[str]:
    return [task.name for task in recipe.tasks if task.eval_data is None]


def _quantised(model: ModelSection) -> bool:
    return model.quantise != "none"


def _asks(recipe: Recipe, key: str) -> bool:
    """Whether a key of loss.gradients is set."""
    return recipe.loss.gradients is not None and bool(getattr(recipe.loss.gradients, key))


def _compares_gradients(recipe: Recipe) -> bool:
    return recipe.loss.gradients is not None or recipe.loss.balancer.name in ("lagged", "gradnorm")


def _merges_own_adapters(recipe: Recipe) -> bool:
    return recipe.merge is not None and recipe.merge.adapters is None


def _merge_sees_rows(recipe: Recipe) -> bool:
    """The merge chooses something on held-out rows."""
    merge = recipe.merge
    if merge is None or merge.base is not None:
        return False
    routes = merge.experts is not None and merge.experts.kind == "twin"
    return merge.search is not None or merge.gates is not None or routes


# What belongs to one method of mixture.online, or to two
ONLINE_OPTIONS = {
    "bandit": ("scale",),
    "group_dro": ("eta", "smoothing", "reference"),
    "linear_law": ("eta", "probe_steps", "probe_share", "ema", "tokens"),
}
PROBE_STEPS, PROBE_SHARE = 5, 0.75


def _online(recipe: Recipe, name: str) -> bool:
    return recipe.mixture.online is not None and recipe.mixture.online.name == name


def _strange_options(recipe: Recipe) -> bool:
    """An option of mixture.online is set that its method does not have."""
    online = recipe.mixture.online
    if online is None:
        return False
    every = {option for options in ONLINE_OPTIONS.values() for option in options}
    return any(getattr(online, option) is not None for option in every.difference(ONLINE_OPTIONS[online.name]))


def _probes_fit(recipe: Recipe) -> bool:
    """Whether the probes of a round leave steps to play what they say, and tell the tasks apart."""
    online, tasks = recipe.mixture.online, len(recipe.tasks)
    if online is None or online.name != "linear_law" or tasks < 2:
        return True
    steps, share = online.probe_steps or PROBE_STEPS, online.probe_share or PROBE_SHARE
    return tasks * steps < online.every and share > 1 / tasks


def _epoch_capped(recipe: Recipe) -> bool:
    return recipe.mixture.max_epochs is not None or any(task.max_epochs is not None for task in recipe.tasks)


def _schedule_free(recipe: Recipe) -> bool:
    return recipe.train.optimizer.startswith("schedule_free")


def _decides_by_evaluation(recipe: Recipe) -> bool:
    train = recipe.train
    return train.patience is not None or train.task_patience is not None or recipe.output.export == "best"


# Optimizers whose state has the shape of the weight, so that a part of a weight is moved as the whole would be.
CUT_OPTIMIZERS = ("adamw", "adamw_torch", "adamw_torch_fused", "sgd", "rmsprop", "adagrad")

TABLE: tuple[Rule, ...] = (
    # --- what stands in the way of a stage
    Rule("sweep", ("mix",), lambda r, e, n: r.sweep is None,
        "the recipe has no sweep section, which says how many trials to run and for how long",
        "add one, for example `sweep: {trials: 16, steps: 50}`"),
    Rule("merge", ("merge",), lambda r, e, n: r.merge is None,
        "the recipe has no merge section",
        "add one, for example `merge: {method: linear, adapters: [runs/a/adapter, runs/b/adapter]}`"),
    Rule("fuse", ("fuse",), lambda r, e, n: r.fuse is None,
        "the recipe has no fuse section", "add one: `fuse: {strong: {path: ...}, adapters: [...]}`"),
    Rule("merge.adapters", ("merge",), lambda r, e, n: _merges_own_adapters(r) and len(r.tasks) < 2,
        "there is nothing to merge: no adapters are named, and the recipe has one task only", "name the adapters"),
    Rule("merge.adapters + run.singles", ("run",), lambda r, e, n: _merges_own_adapters(r) and not r.run.singles,
        "`mtft run` merges the single-task adapters, and run.singles: false trains none",
        "set run.singles: true, or name merge.adapters"),
    Rule("tasks.*.eval_data", ("eval",), lambda r, e, n: len(_without_eval(r)) == len(r.tasks),
        "no task has eval_data, so there is nothing to evaluate on", "give the tasks eval_data"),
    Rule("sweep + tasks.*.eval_data", ("check", "mix", "run"),
        lambda r, e, n: r.sweep is not None and bool(_without_eval(r)),
        "trials are scored on held-out rows, and not every task has eval_data", "give every task eval_data"),
    Rule("loss.balancer + tasks.*.eval_data", TRAINING,
        lambda r, e, n: n is not None and n.valid_every is not None and bool(_without_eval(r)),
        "this balancer moves the weights by validation losses, and not every task has eval_data",
        "give every task eval_data, or take a balancer that reads training losses only (uniform, fixed)"),
    # --- weights that can't be trained
    Rule("lora: null + model.quantise", TRAINING, lambda r, e, n: r.lora is None and _quantised(r.model),
        "quantised weights have no gradient, so full fine-tuning of a quantised model trains nothing",
        "train an adapter (lora: {r: 16}), or set model.quantise: none"),
    Rule("sweep.lora: full + quantise", ("check", "mix", "run"),
        lambda r, e, n: r.sweep is not None and r.sweep.lora == "full" and _quantised(r.sweep.model or r.model),
        "quantised weights have no gradient, so full fine-tuning of a quantised trial model trains nothing",
        "remove sweep.lora, or give sweep.model without quantise"),
    Rule("lora.init + model.quantise", TRAINING,
        lambda r, e, n: r.lora is not None and r.lora.init in ("pissa", "olora", "mica") and _quantised(r.model),
        "pissa, olora and mica start from a decomposition of the base weights, which quantised weights don't allow",
        "set lora.init: default, or model.quantise: none"),
    # --- engines
    Rule("model.quantise + DeepSpeed", TRAINING, lambda r, e, n: _quantised(r.model) and e.zero > 0,
        "DeepSpeed handles float parameters only; the packed weights of a quantised base are none",
        "launch with recipes/accelerate/ddp.yaml: each rank holds the small base; or set model.quantise: none"),
    Rule("model.quantise + FSDP", TRAINING, lambda r, e, n: _quantised(r.model) and e.fsdp > 0,
        "FSDP2 cuts float weights only; a quantised base is packed in bytes and would stay whole on every GPU",
        "launch with recipes/accelerate/ddp.yaml: each rank holds the small base; or set model.quantise: none"),
    Rule("fsdp_version: 1", TRAINING, lambda r, e, n: e.fsdp == 1,
        "FSDP 1 flattens the weights of a layer into one, which mixes frozen and trained ones", "set fsdp_version: 2"),
    Rule("model.dtype: fp16 + FSDP", TRAINING, lambda r, e, n: e.fsdp > 0 and r.model.dtype == "fp16",
        "fp16's loss scaling is not tested with sharded gradients", "set model.dtype: bf16"),
    Rule("train.optimizer + FSDP", TRAINING,
        lambda r, e, n: e.fsdp > 0 and r.train.optimizer not in CUT_OPTIMIZERS,
        "this optimizer is not known to work on parts of a weight (its state is quantised or factored)",
        f"take one of {', '.join(CUT_OPTIMIZERS)}, or launch with recipes/accelerate/ddp.yaml"),
    Rule("lora.init + sharded weights", TRAINING,
        lambda r, e, n: r.lora is not None and r.lora.init in ("pissa", "olora") and e.cuts_weights,
        "an adapter that started from a changed base is converted at the export, which needs whole weights",
        "set lora.init: default, or launch with recipes/accelerate/ddp.yaml (or zero2.yaml)"),
    Rule("loss.orthogonal + sharded weights", TRAINING,
        lambda r, e, n: r.loss.orthogonal > 0 and e.cuts_weights,
        "the penalty looks at the adapter's weights outside of the forward pass, where each rank holds only a part",
        "set loss.orthogonal: 0, or launch with recipes/accelerate/ddp.yaml (or zero2.yaml)"),
    Rule("loss.path: fused + sharded weights", TRAINING,
        lambda r, e, n: r.loss.path == "fused" and e.cuts_weights,
        "the fused loss takes the head's weight outside of the head's forward, where each rank holds only a part",
        "set loss.path: gather (or auto)"),
    Rule("output.export: best + sharded weights", TRAINING,
        lambda r, e, n: r.output.export == "best" and e.cuts_weights,
        "the best weights are put back before the export, which needs whole weights on every rank",
        "set output.export: last, or launch with recipes/accelerate/ddp.yaml (or zero2.yaml)"),
    Rule("train.micro_batch_tokens: auto + sharded weights", TRAINING,
        lambda r, e, n: r.train.micro_batch_tokens == "auto" and e.cuts_weights,
        "sizes are tried on each rank alone, and a rank holds only a part of the weights",
        "give train.micro_batch_tokens a number (`mtft check` estimates the memory)"),
    # --- optimizers and schedules
    Rule("train.optimizer: muon + lora", TRAINING, lambda r, e, n: r.train.optimizer == "muon" and r.lora is not None,
        "muon makes the update of a whole weight matrix orthogonal; A and B are only factors of one",
        "set train.optimizer: adamw (with lora.plus: 16, if you like), or lora: null"),
    Rule("train.optimizer + DeepSpeed", TRAINING,
        lambda r, e, n: e.zero > 0 and (r.train.optimizer == "muon" or _schedule_free(r)),
        "DeepSpeed flattens the weights into one vector: muon needs matrices, and schedule_free is switched by tensor",
        "set train.optimizer: adamw, or launch with recipes/accelerate/ddp.yaml"),
    Rule("train.optimizer: schedule_free + train.schedule", TRAINING,
        lambda r, e, n: _schedule_free(r) and r.train.schedule != "constant",
        "schedule_free averages the weights in place of a schedule; with one on top it would count twice",
        "set train.schedule: constant (train.warmup still counts)"),
    Rule("train.mezo + lora: null", TRAINING, lambda r, e, n: r.train.mezo is not None and r.lora is None,
        "MeZO's noise grows with the number of trained weights, and all of them are put aside in each step",
        "train an adapter (lora: {r: 8}), or remove train.mezo"),
    Rule("train.mezo + task gradients, DeepSpeed, FSDP, fp16", TRAINING,
        lambda r, e, n: r.train.mezo is not None
        and (_compares_gradients(r) or e.zero > 0 or e.fsdp > 0 or r.model.dtype == "fp16"),
        "MeZO has no backward pass, from which these take gradients",
        "remove train.mezo; or launch with recipes/accelerate/ddp.yaml, in bf16 or fp32, and balance by losses"),
    Rule("lora.plus + one trained factor", TRAINING,
        lambda r, e, n: r.lora is not None and r.lora.plus != 1 and (r.lora.freeze_a or r.lora.init == "mica"),
        "lora.plus is the ratio of the learning rates of B and A, and only one of them is trained",
        "set lora.plus: 1, or train both"),
    Rule("lora.start + lora.init", TRAINING,
        lambda r, e, n: r.lora is not None and r.lora.start is not None and (r.lora.init != "default" or r.lora.dora),
        "an adapter that is trained on from has its weights already: nothing is initialised",
        "set lora.init: default and dora: false, or take out lora.start"),
    Rule("lora.freeze_a, lora.init: mica + sharded weights", TRAINING,
        lambda r, e, n: r.lora is not None and (r.lora.freeze_a or r.lora.init == "mica") and e.cuts_weights,
        "only trained weights are gathered for the export, and one factor of the adapter is frozen",
        "train both factors, or launch with recipes/accelerate/ddp.yaml (or zero2.yaml)"),
    Rule("lora.freeze_a + lora.init: mica", TRAINING,
        lambda r, e, n: r.lora is not None and r.lora.freeze_a and r.lora.init == "mica",
        "mica trains A alone and freeze_a trains B alone: nothing would be left", "set one of the two"),
    # --- held-out losses that decide something
    Rule("train.watch", TRAINING, lambda r, e, n: r.train.watch not in ("mean", "worst", *r.task_names),
        "train.watch names no task of the recipe", "set mean, worst, or the name of a task"),
    Rule("train.patience, train.task_patience, output.export: best + tasks.*.eval_data", TRAINING,
        lambda r, e, n: _decides_by_evaluation(r) and bool(_without_eval(r)),
        "held-out losses decide when to stop or what to export, and not every task has eval_data",
        "give every task eval_data, or remove these keys"),
    Rule("train.patience, train.task_patience + train.eval_every", TRAINING,
        lambda r, e, n: r.train.eval_every is None and (r.train.patience or r.train.task_patience) is not None,
        "patience counts evaluations, and without train.eval_every there is none before the end",
        "set train.eval_every"),
    Rule("train.task_patience + task gradients", TRAINING,
        lambda r, e, n: r.train.task_patience is not None and _compares_gradients(r),
        "a dropped task has weight 0 in the loss, and task gradients are taken before the weights",
        "remove train.task_patience, or balance by losses"),
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
        and (_epoch_capped(r) or r.train.batch_style == "alternating"),
        "with shares of tokens nobody knows at a change how many rows the steps to come will take, and so whether "
        "max_epochs can be kept, or how many steps each task is owed",
        "set mixture.unit: examples, or leave out max_epochs and train.batch_style: alternating"),
    Rule("mixture.online + train.task_patience, weight 0", TRAINING,
        lambda r, e, n: r.mixture.online is not None
        and (r.train.task_patience is not None or any(task.weight == 0 for task in r.tasks)),
        "a task that does not count in the loss (tasks.*.weight: 0, or dropped by train.task_patience) learns nothing "
        "from its share, and would be given more and more",
        "give it a share of 0 instead, and remove train.task_patience"),
    Rule("mixture.online.* + mixture.online.name", TRAINING, lambda r, e, n: _strange_options(r),
        "an option belongs to another method: bandit has scale; group_dro eta, smoothing, reference; linear_law eta, "
        "probe_steps, probe_share, ema, tokens",
        "remove it, or set the method it belongs to"),
    Rule("mixture.online: linear_law + tasks.*.eval_data", TRAINING,
        lambda r, e, n: _online(r, "linear_law") and bool(_without_eval(r)),
        "the law is about held-out losses, and not every task has eval_data",
        "give every task eval_data, or take bandit or group_dro"),
    Rule("mixture.online: linear_law + every", TRAINING, lambda r, e, n: not _probes_fit(r),
        "a round holds one probe a task (probe_steps each) and has to go on after them; and a probe is to hold more "
        "than an even share of its task (probe_share)",
        "raise mixture.online.every, or lower probe_steps; probe_share: 0.75"),
    Rule("mixture.online: linear_law + train.batch_style: alternating", TRAINING,
        lambda r, e, n: _online(r, "linear_law") and r.train.batch_style == "alternating",
        "a probe of a few steps can't be near its mixture when each step holds one task",
        "set train.batch_style: mixed (or unmixed), or take bandit or group_dro"),
    Rule("mixture.online + run.tune_strong", ("check", "run"),
        lambda r, e, n: r.mixture.online is not None and r.fuse is not None and r.run.tune_strong,
        "the strong model would choose another mixture by its own losses, and be no yardstick of the joint run",
        "set run.tune_strong: false, or remove mixture.online"),
    Rule("train.batch_style: alternating + task gradients", TRAINING,
        lambda r, e, n: r.train.batch_style == "alternating" and _compares_gradients(r),
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
    # --- losses and adapters
    Rule("loss.label_smoothing, loss.z_loss + loss.path: fused", TRAINING,
        lambda r, e, n: r.loss.path == "fused" and bool(r.loss.label_smoothing or r.loss.z_loss),
        "the fused loss has neither label smoothing nor z-loss", "set loss.path: gather (or auto)"),
    Rule("loss.orthogonal + lora: null", TRAINING, lambda r, e, n: r.lora is None and r.loss.orthogonal > 0,
        "loss.orthogonal is a penalty on LoRA updates, and lora is null", "train an adapter, or loss.orthogonal: 0"),
    Rule("lora.targets + loss.path: fused", TRAINING,
        lambda r, e, n: r.lora is not None and "lm_head" in r.lora.targets and r.loss.path == "fused",
        "the fused loss multiplies with the head's plain weight, so an adapter on lm_head would be skipped",
        "set loss.path: gather (or auto), or take lm_head out of lora.targets"),
    Rule("loss.gradients.aggregator + sharded gradients", TRAINING,
        lambda r, e, n: _asks(r, "aggregator") and (e.zero > 0 or e.fsdp > 0),
        "an aggregator writes each step's gradient, and these engines have cut it up (or taken the step) before it can",
        "launch one process or recipes/accelerate/ddp.yaml, or use loss.balancer: {name: lagged}"),
    Rule("loss.gradients.split + aggregator or flat", TRAINING,
        lambda r, e, n: _asks(r, "split") and (_asks(r, "aggregator") or _asks(r, "flat")),
        "split measures inner products only; an aggregator (or flat) needs the very gradients that it mixes",
        "take loss.gradients.split out, or loss.gradients.aggregator and flat"),
    Rule("loss.gradients.flat + sharded weights", TRAINING,
        lambda r, e, n: _asks(r, "flat") and (e.zero > 0 or e.fsdp > 0),
        "a step towards a flat minimum moves the weights and puts them back, and here each rank holds a part of them",
        "launch one process or recipes/accelerate/ddp.yaml, or take out loss.gradients.flat"),
    Rule("loss.gradients.flat + loss.sample_weights", TRAINING,
        lambda r, e, n: _asks(r, "flat") and r.loss.sample_weights is not None,
        "weights of samples change with their losses, so the tasks' losses at moved weights would be other ones",
        "leave out either loss.sample_weights or loss.gradients.flat"),
    Rule("loss.orthogonal + task gradients", TRAINING, lambda r, e, n: r.loss.orthogonal > 0 and _compares_gradients(r),
        "loss.orthogonal is a penalty on the weights: it belongs to no task, and task gradients would lack it",
        "set loss.orthogonal: 0, or take out loss.gradients and use a balancer that works from losses"),
    Rule("lora.dora + task gradients", TRAINING,
        lambda r, e, n: r.lora is not None and r.lora.dora and _compares_gradients(r),
        "DoRA multiplies with the adapter's weights themselves, so no token's part of their gradient can be told apart",
        "set lora.dora: false, or train without task gradients"),
    Rule("lora: null + task gradients", TRAINING,
        lambda r, e, n: r.lora is None and _compares_gradients(r) and not _asks(r, "partial"),
        "task gradients are captured in linear layers only, and full fine-tuning also trains embeddings and norms",
        "train an adapter (lora: {r: 16}), or set loss.gradients.partial: true to leave these out"),
    Rule("lora.dora + merge", ("check", "merge", "run"),
        lambda r, e, n: _merges_own_adapters(r) and r.lora is not None and r.lora.dora,
        "a DoRA adapter is no low-rank delta of the weights (it rescales the base), so `mtft merge` can't merge it",
        "set lora.dora: false, or remove the merge section"),
    Rule("lora: null + merge", ("check", "merge", "run"), lambda r, e, n: _merges_own_adapters(r) and r.lora is None,
        "full fine-tuning makes no adapters, so there is nothing to merge",
        "train adapters (lora: {r: 16}), or remove the merge section"),
    Rule("lora: null + fuse", ("check", "run"),
        lambda r, e, n: r.fuse is not None and r.fuse.adapters is None and r.lora is None,
        "fusion steers with LoRA experts, and full fine-tuning makes none",
        "train adapters (lora: {r: 16}), or name fuse.adapters"),
    Rule("fuse.weights: router + fuse.router", ("check", "fuse", "run"),
        lambda r, e, n: r.fuse is not None and (r.fuse.weights == "router") != (r.fuse.router is not None),
        "weights: router needs a router's file, and a file serves no other weights",
        "set both fuse.weights: router and fuse.router (router.safetensors of a twin merge), or neither"),
    # --- merges that choose by data, keep experts apart, or take whole models
    Rule("merge.search + merge.gates", MERGING,
        lambda r, e, n: r.merge is not None and r.merge.search is not None and r.merge.gates is not None,
        "both choose the weights of the adapters", "keep one of them"),
    Rule("merge.gates + merge.method", MERGING,
        lambda r, e, n: r.merge is not None and r.merge.gates is not None and r.merge.method != "linear",
        "trained gates are weights of a sum; they go with no other method", "set merge.method: linear"),
    Rule("merge.gates + merge.experts", MERGING,
        lambda r, e, n: r.merge is not None and r.merge.gates is not None and r.merge.experts is not None,
        "the shared adapter of experts is made by a method, not by gates", "keep one of them"),
    Rule("merge.search + merge.average", MERGING,
        lambda r, e, n: r.merge is not None and r.merge.search is not None and r.merge.average,
        "an average divides by the weights' sum, so their size, which the search tries, would do nothing",
        "set merge.average: false"),
    Rule("merge.experts: arrow + merge.method", MERGING,
        lambda r, e, n: r.merge is not None and r.merge.experts is not None and r.merge.experts.kind == "arrow"
        and (r.merge.method != "linear" or r.merge.search is not None),
        "arrow keeps the adapters as they are, so nothing is merged",
        "leave method and search out, or set merge.experts.kind: twin"),
    Rule("merge.search, gates, experts + tasks.*.eval_data", MERGING,
        lambda r, e, n: _merge_sees_rows(r) and bool(_without_eval(r)),
        "weights, gates and routers are chosen on held-out rows, and not every task has eval_data",
        "give every task eval_data, or merge without looking at data"),
    Rule("merge.base", MERGING,
        lambda r, e, n: r.merge is not None and r.merge.base is not None
        and (r.merge.adapters is None or r.merge.search is not None or r.merge.gates is not None
             or (r.merge.experts is not None and r.merge.experts.kind == "arrow")),
        "merge.base is for whole models: `adapters` names their folders, and search, gates and arrow are for LoRAs",
        "name the models in merge.adapters and leave the others out"),
    Rule("merge.base + mtft run", ("run",), lambda r, e, n: r.merge is not None and r.merge.base is not None,
        "`mtft run` compares adapters of one base; whole models are merged by `mtft merge` alone", "run `mtft merge`"),
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
    Rule("tasks.*.eval_data", ("check", "train", "run"), lambda r, e, n: bool(_without_eval(r)),
        "some tasks have no eval_data: nothing held-out is measured for them", "give them eval_data", fatal=False),
    Rule("train.micro_batch_tokens + train.batch_tokens", TRAINING,
        lambda r, e, n: r.train.micro_batch_tokens != "auto"
        and r.train.rows_at_once * e.ranks > r.train.batch_tokens,
        "an optimizer step holds fewer tokens (train.batch_tokens) than the ranks could take in one pass",
        "raise train.batch_tokens for a better use of the hardware; the result is right either way", fatal=False),
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
    Rule("model.trust_remote_code", ("check", "train", "eval", "mix", "fuse", "run"),
        lambda r, e, n: r.model.trust_remote_code or (r.fuse is not None and r.fuse.strong.trust_remote_code),
        "trust_remote_code runs Python that ships with the model, on this machine, with your rights",
        "read that code, or pin model.revision to a commit that you have read", fatal=False),
)  # fmt: skip


def check_compatibility(
    recipe: Recipe,
    *,
    stage: Stage,
    engine: ShardingLimits | None = None,
    needs: BalancerFacts | None = None,
) -> list[str]:
    """Warnings for this recipe in this stage; UserError that lists all combinations that can't work.

    engine  how the process was launched; None reads it from the environment of `accelerate launch`
    needs   the `needs` of the recipe's balancer, where the caller has made one
    """
    engine = ShardingLimits.from_environment() if engine is None else engine
    hits = [row for row in TABLE if stage in row.stages and row.when(recipe, engine, needs)]
    fatal = [row for row in hits if row.fatal]
    if len(fatal) == 1:
        raise UserError(fatal[0].why, where=fatal[0].keys, do=fatal[0].do)
    if fatal:
        lines = [f"{len(fatal)} things in the recipe can't go together"]
        lines += [f"  {row.keys}: {row.why}; {row.do}" for row in fatal]
        raise UserError("\n".join(lines), do="mend these, then run `mtft check`")
    return [f"{row.why} ({row.keys}): {row.do}" for row in hits]
