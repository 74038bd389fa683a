"""`eval`: what is measured of a model beside the tasks' own held-out rows."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mtft.recipe.schema.section import INPUT, Count, RecipeSection, SomeTexts


class LmEvalSection(RecipeSection):
    """Tasks of lm-evaluation-harness (extra `eval`), at the end of a run, in `mtft eval`, and in trials whose objective
    names one: {lm_eval/arc_easy/acc: 1}."""

    tasks: SomeTexts
    """Names of its tasks or groups."""
    limit: Count | None = None
    """Use only the first documents of each task."""
    include_path: Annotated[str | None, INPUT] = None
    """Folder with tasks of your own (YAML, which may name Python functions beside it: they run with your rights)."""
    num_fewshot: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Demonstrations in each prompt; null: as the task says."""
    apply_chat_template: bool = False
    """Put prompts into the model's chat template."""


class EvalSection(RecipeSection):
    lm_eval: LmEvalSection | None = None
    """null: none of lm-eval's tasks."""
