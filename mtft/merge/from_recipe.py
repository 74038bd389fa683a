"""The merge section of a recipe, run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtft.adapters.lora_factors import LoraAdapter
from mtft.common.errors import MergeError
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.engine.report import MergeReport
from mtft.recipe.schema.merge import MergeSection
from mtft.recipe.schema.recipe import Recipe


def merge_from_recipe(
    recipe: Recipe,
    adapters: Sequence[str | Path | LoraAdapter] | None = None,
    out: str | Path | None = None,
    *,
    diagnostics: bool = True,
) -> MergeReport:
    """Merge as `recipe.merge` says. adapters, out: win over the section's (`mtft run` passes the trained singles).

    What needs data (search, gates, experts) is in mtft.pipeline.stages.merge. Raises MergeError if neither names
    adapters.
    """
    section = merge_section(recipe)
    return merge_adapters(
        chosen_adapters(section, adapters),
        out or merge_folder(recipe),
        method=section.method,
        options=dict(section.options),
        weights=section.weights,
        average=section.average,
        diagnostics=diagnostics,
        **merge_options(recipe),
    )


def merge_options(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of merge() that hold whatever the method and the weights are."""
    section = merge_section(recipe)
    return {
        "scale": section.scale,
        "rank": section.rank,
        "energy": section.energy,
        "min_energy": section.min_energy,
        "saved": section.saved,
        "dtype": None if section.dtype == "auto" else section.dtype,
        "vllm": section.vllm,
        "per_module": [
            (rule.modules, rule.model_dump(exclude={"modules"}, exclude_none=True)) for rule in section.per_module
        ],
        "allow_base_mismatch": section.allow_base_mismatch,
        "workers": section.workers,
        "seed": recipe.seed,
        "overwrite": section.overwrite,
    }


def merge_section(recipe: Recipe) -> MergeSection:
    if recipe.merge is None:
        raise MergeError("the recipe has no section `merge`", where="merge", do="add one: merge: {method: linear}")
    return recipe.merge


def merge_folder(recipe: Recipe) -> Path:
    """Where the result goes."""
    section = merge_section(recipe)
    return Path(section.out) if section.out else Path(recipe.output.dir) / "merge" / "adapter"


def chosen_adapters(
    section: MergeSection, adapters: Sequence[str | Path | LoraAdapter] | None = None
) -> list[str | Path | LoraAdapter]:
    """The adapters given, else the section's. MergeError if there are none."""
    chosen = adapters if adapters is not None else section.adapters
    if not chosen:
        raise MergeError("no adapters to merge", where="merge.adapters", do="list their folders, or use `mtft run`")
    return list(chosen)
