"""`tasks.*.shots`: demonstrations in front of the prompts of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, create_model

from mtft.recipe.schema.section import DATA, RecipeSection, SomeTexts, TaskName


class DemonstrationRows(RecipeSection):
    """Rows to demonstrate with that are of no task; keys as in `tasks`."""

    data: Annotated[str | SomeTexts, DATA]
    """File, glob, saved dataset, `hub:org/name`, or a list of them. Relative to the recipe."""
    split: str | None = None
    """Split of a `hub:` or saved dataset (null: train)."""
    format: str | dict[str, str] = "auto"
    """How a row becomes prompt and response."""
    template: str | SomeTexts | None = None
    """Jinja template (or several) that gives the prompt."""
    limit: Annotated[int, Field(gt=0, le=10**12)] | None = None
    """Use only the first rows."""


_FROM = """The task whose training rows are the demonstrations, or rows of no task: {data: FILE, format: ...}; null: the
task itself. Of more than 100,000 rows the first ones are used."""

if TYPE_CHECKING:
    _From = RecipeSection
else:  # `from` is a word of Python's own, so the class can't declare it in its body
    _From = create_model(
        "_From",
        __base__=RecipeSection,
        **{"from": (TaskName | DemonstrationRows | None, Field(None, description=_FROM))},
    )


class ShotsSection(_From):
    """Each row gets its own demonstrations. A row is never its own, and held-out rows are none at all."""

    n: Annotated[int, Field(gt=0, le=64)]
    """Demonstrations of a row. Where they make it longer than train.max_length, the farthest are left out."""
    retrieve: Literal["random", "bm25"] = "random"
    """random: drawn from `seed`; bm25: those whose prompts are most like the row's, the nearest last (extra
    `retrieve`)."""

    @property
    def source(self) -> str | DemonstrationRows | None:
        """The key `from`."""
        return getattr(self, "from")
