"""`mtft check`: everything that can be wrong before any weight is loaded, and what the recipe would do.

Order: names that need no data (balancer, merge method, optimizer), then the data and the plan, then what only fits
together once both are known (the balancer's needs), then the memory, for which the model's config is enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtft.common.collector import collector_paused
from mtft.recipe.compatibility import check_compatibility
from mtft.recipe.schema.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Group

    from mtft.data.summary.data_summary import DataSummary
    from mtft.training.memory.memory_estimate import MemoryEstimate


@dataclass(frozen=True)
class CheckReport:
    """What `mtft check` prints."""

    data: DataSummary
    memory: MemoryEstimate
    warnings: tuple[str, ...]
    online: str | None = None
    """With mixture.online: when the shares will change, by what, and between which limits."""
    user_code: tuple[str, ...] = ()
    """Metrics that run code of the user's own."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: the description's keys, with `memory` (bytes) and all warnings."""
        content = self.data.as_dict()
        content |= {"memory": self.memory.as_dict(), "warnings": [*content["warnings"], *self.warnings]}
        return {**content, "online": self.online, "user_code": list(self.user_code)}

    def render_rest(self, *, everything: bool = False) -> Group:
        """For a rich console, below the data. everything: each warning, however many there are."""
        from rich.console import Group
        from rich.text import Text

        from mtft.data.summary.render_console import warning_text

        *more, memory = self._more()
        return Group(*map(Text, more), *map(warning_text, self._warnings(everything)), Text(memory))

    def text(self, *, everything: bool = False) -> str:
        """For files and pipes."""
        from mtft.data.summary.render_console import summary_text, warning_text

        said = [warning_text(line).plain for line in self._warnings(everything)]
        return "\n".join([summary_text(self.data, everything=everything).rstrip("\n"), *self._more(), *said])

    def _warnings(self, everything: bool) -> list[str]:
        from mtft.data.summary.brief import warning_lines

        return warning_lines(self.warnings, [task.name for task in self.data.tasks], everything=everything)

    def _more(self) -> list[str]:
        return [*([self.online] if self.online else []), *self.user_code, self.memory.text()]


def check_recipe(recipe: Recipe, on_data: Callable[[DataSummary], None] = lambda data: None) -> CheckReport:
    """Check a recipe as far as that goes without its weights.

    on_data: told what is known of the data, before the model is asked, which takes longer.

    Raises UserError or MixError for what `mtft train`, `mtft mix`, `mtft merge` and `mtft run` would refuse.
    """
    with collector_paused():  # nearly all of this is imports
        check_compatibility(recipe, stage="check")  # the cheapest first; again below, with the balancer's needs
        check_names(recipe)

        from data_mixers.plan.replanned import ReplannedPlan
        from mtft.data.batching.packed_attention import packing_refusal
        from mtft.data.planning import make_plan
        from mtft.data.store.token_store import open_stores
        from mtft.data.summary.summarize import summarize_data
        from mtft.data.tokenize.vocabulary_check import check_vocabulary
        from mtft.evaluation.lm_eval_tasks import LmEvalTasks
        from mtft.evaluation.questions import AskedMetrics, check_questions, cut_questions
        from mtft.losses.balancers import make_balancer
        from mtft.models.cpu_precision import precision_warnings
        from mtft.models.loading import load_tokenizer, read_config
        from mtft.models.segment_attention import segments_refusal
        from mtft.pipeline.model_facts import model_facts
        from mtft.training.checkpoint.run_basis import run_basis
        from mtft.training.preflight import (
            folder_refusal,
            position_warning,
            refuse_attention,
            refuse_rows,
            refuse_settings,
        )
        from mtft.training.training_inputs import TrainingInputs

        refuse_settings(recipe)
        others = {"sweep.model": recipe.sweep and recipe.sweep.model, "fuse.strong": recipe.fuse and recipe.fuse.strong}
        for key, section in others.items():
            if section is not None:
                refuse_attention(section, key)
        tokenizer, config = load_tokenizer(recipe.model), read_config(recipe.model)
    stores, held_out = open_stores(recipe, tokenizer, "train"), open_stores(recipe, tokenizer, "eval")
    check_vocabulary([*stores, *held_out], tokenizer, config)
    refuse_rows(config, [*stores, *held_out])
    plan = make_plan(recipe, stores)
    data = summarize_data(recipe, tokenizer, stores=stores, held_out=held_out, plan=plan)
    balancer = make_balancer(
        recipe.loss.balancer,
        recipe.task_names,
        [task.weight for task in recipe.tasks],
        recipe.seed,
        normalise=recipe.loss.normalise,
        examples=[task.examples for task in data.tasks],
        tokens=[task.supervised_tokens for task in data.tasks],
    )
    warnings = check_compatibility(recipe, stage="check", needs=balancer.needs)
    on_data(data)
    learnt = sum(task.tokens_per_step * task.supervised_tokens / task.tokens for task in data.tasks if task.tokens)
    facts = model_facts(
        recipe,
        config,
        learnt_share=min(1.0, learnt / data.tokens_per_step),
        longest=max((task.longest for task in data.tasks), default=None),
    )
    refusal = packing_refusal(config, facts.attention) if recipe.train.packing else None
    if refusal is not None:
        warnings.append(f"{refusal}: one example a row, so train.packing has no effect")
    elif recipe.train.packing and facts.attention in ("sdpa", "eager") and (why := segments_refusal(config)):
        warnings.append(f"{why}: packed rows keep a mask, whose cost grows with the square of train.max_length")
    warnings += precision_warnings({"model": recipe.model, **others})
    identity = TrainingInputs(tokenizer, stores, held_out).identity(plan)
    more = position_warning(recipe, config), folder_refusal(recipe, identity, run_basis(recipe, tokenizer))
    warnings += [line for line in more if line is not None]
    warnings += [*facts.notes, *fusion_notes(recipe)]
    online = None
    if isinstance(plan, ReplannedPlan):
        from mtft.training.online_mixture import describe_online_mixture, make_controller

        online = describe_online_mixture(recipe, make_controller(recipe, plan))
    if recipe.eval.lm_eval is not None:
        LmEvalTasks.load(recipe.eval.lm_eval)
    asked = AskedMetrics.of(recipe, tokenizer)
    check_questions(held_out, asked)
    warnings += cut_questions(held_out, asked)
    return CheckReport(data, facts.memory, tuple(warnings), online, tuple(asked.describe()))


def check_without_weights(recipe: Recipe, adapted: Any) -> list[str]:
    """What training would refuse once the model is loaded, and the merge and fuse stages after it, as far as models
    without weights tell.

    adapted: the model with its adapter, on the meta device. Returns what is worth knowing.
    """
    from mtft.pipeline.model_facts import adapter_notes

    return [*adapter_notes(recipe, adapted), *fusion_notes(recipe)]


def fusion_notes(recipe: Recipe) -> list[str]:
    """What the recipe's fusion covers. UserError, as the fuse stage would, where its models don't fit."""
    if recipe.fuse is None:
        return []
    from mtft.fuse.from_recipe import plan_recipe

    coverage = plan_recipe(recipe, trained=False).coverage()
    return [] if coverage is None else [coverage]


def check_names(recipe: Recipe) -> None:
    """Names and options that a room looks up in its own table, before anything is loaded or run.

    Raises UserError (or MergeError) for the first that is unknown.
    """
    from mtft.evaluation.metrics import make_metrics
    from mtft.losses.balancers import balancer_class
    from mtft.training.optim.optimizers import optimizer_name

    balancer_class(recipe.loss.balancer)
    gradients, merge = recipe.loss.gradients, recipe.merge
    if gradients is not None and gradients.aggregator is not None:
        from mtft.gradients.aggregators import make_aggregator

        make_aggregator(gradients.aggregator, gradients.options)
    if merge is not None:
        from mtft.merge.methods import make_method

        make_method(merge.method, merge.options, key="merge.")
        for rule in merge.per_module:
            if rule.method is not None or rule.options is not None:
                make_method(rule.method or merge.method, rule.options, key="merge.per_module.")
    optimizer_name(recipe.train.optimizer)
    for task in recipe.tasks:
        make_metrics(task)
