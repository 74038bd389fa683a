"""`data`: what tokenises the rows of all tasks. (Which rows they are: `tasks.*.data`.)"""

from __future__ import annotations

from typing import Literal

from mtft.recipe.schema.section import Processes, RecipeSection


class DataSection(RecipeSection):
    """How rows are tokenised, never what comes out: stores are the same, and a run goes on with other keys here."""

    backend: Literal["processes", "ray"] = "processes"
    """Processes of this machine, or Ray (extra `ray`): the cluster of RAY_ADDRESS, else one of this machine alone."""
    workers: Processes | None = None
    """Blocks of rows that are tokenised at the same time; null: with processes as many as pay, at most 16, with Ray one
    for each CPU of the cluster."""
