"""What can't go together in a recipe: one table, each row the combination, why, and what to do."""

from __future__ import annotations

from mtft.common.errors import UserError
from mtft.distributed.launch import LaunchConfig
from mtft.recipe.rules.adapter_rules import ADAPTER_RULES
from mtft.recipe.rules.mixture_rules import MIXTURE_RULES
from mtft.recipe.rules.rule import BalancerFacts, Rule, Stage
from mtft.recipe.rules.task_rules import TASK_RULES
from mtft.recipe.rules.training_rules import TRAINING_RULES
from mtft.recipe.rules.warning_rules import WARNING_RULES
from mtft.recipe.schema.recipe import Recipe

TABLE: tuple[Rule, ...] = (*TASK_RULES, *TRAINING_RULES, *MIXTURE_RULES, *ADAPTER_RULES, *WARNING_RULES)


def check_compatibility(
    recipe: Recipe,
    *,
    stage: Stage,
    engine: LaunchConfig | None = None,
    needs: BalancerFacts | None = None,
) -> list[str]:
    """Warnings for this recipe in this stage; UserError that lists all combinations that can't work.

    engine  how the process was launched; None reads it from the environment of `accelerate launch`
    needs   the `needs` of the recipe's balancer, where the caller has made one
    """
    engine = LaunchConfig.from_environment() if engine is None else engine
    hits = [row for row in TABLE if stage in row.stages and row.when(recipe, engine, needs)]
    fatal = [row for row in hits if row.fatal]
    if len(fatal) == 1:
        raise UserError(fatal[0].reason(recipe), where=fatal[0].keys, do=fatal[0].do)
    if fatal:
        lines = [f"{len(fatal)} things in the recipe can't go together"]
        lines += [f"  {row.keys}: {row.reason(recipe)}; {row.do}" for row in fatal]
        raise UserError("\n".join(lines), do="mend these, then run `mtft check`")
    return [f"{row.reason(recipe)} ({row.keys}): {row.do}" for row in hits]
