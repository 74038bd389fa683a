"""`mixture`: the share of each task, constant, scheduled or decided online."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtft.recipe.schema.section import INPUT, Count, Positive, RecipeSection, Share, SomeTexts, TaskName


class TemperatureShares(RecipeSection):
    temperature: Annotated[float, Field(ge=-20, le=20)]
    """Share of task k ~ size_k ** temperature: 1 = natural, 0 = uniform, below 0 the small ones get more. (Others write
    the exponent as 1/T.)"""


class FileShares(RecipeSection):
    file: Annotated[str, INPUT]
    """A mixture.yaml as `mtft mix propose` writes it. Relative to the recipe."""


OneMixture = Literal["natural", "uniform"] | TemperatureShares | FileShares | dict[str, Share]


# pydantic's own choice takes {temperature: 0.5} for a mapping from a task `temperature` to its share.
IN_ORDER = Field(union_mode="left_to_right")


class ScheduleStop(RecipeSection):
    at: Annotated[float, Field(ge=0, le=1)]
    """Progress of the run: 0 = its start, 1 = its end."""
    shares: Annotated[OneMixture, IN_ORDER]
    """The mixture at this place: a rule, a file, or {task: share}."""


class ScheduleShares(RecipeSection):
    schedule: Annotated[tuple[ScheduleStop, ...], Field(strict=False, min_length=1)]
    """A curriculum: the shares move in straight lines from stop to stop; two stops at one place make a jump."""


class GroupSection(RecipeSection):
    """Tasks whose shares count together."""

    tasks: SomeTexts
    """Names of the group's tasks; a task may be in several groups."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Smallest sum of their shares."""
    cap: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Largest sum of their shares."""


class OnlineSection(RecipeSection):
    """Shares that follow what the run shows (docs/mixing.md). Floors, caps, groups and max_epochs hold all the way."""

    name: Literal["bandit", "group_dro", "linear_law"]
    """bandit: what still has a high training loss is drawn more (ODM's EXP3); group_dro: what is above its `reference`
    loss (DoReMi's rule); linear_law: what lowers the held-out losses of all tasks most, by probes (Aioli)."""
    every: Count = 20
    """Optimizer steps between two decisions (linear_law: the length of a round). After step s the shares of step s + 1
    on are decided."""
    warmup: Annotated[int, Field(ge=0, le=10**8)] = 0
    """Steps at the start whose losses don't count."""
    scale: Positive | None = None
    """bandit: what a loss is divided by; smaller = bolder. null: 10, as in the paper."""
    eta: Positive | None = None
    """group_dro, linear_law: step size of a decision. null: 1 for group_dro, 0.5 for linear_law."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    """group_dro: part of the shares that is spread evenly at each decision. null: 1e-4."""
    reference: Annotated[dict[str, Share] | str | None, INPUT] = None
    """group_dro: the loss that each task can be expected to reach, {task: nats a token}, or the folder of a finished
    run (its held-out losses; relative to the recipe). null: 0, so the loss itself counts."""
    probe_steps: Count | None = None
    """linear_law: steps of the probe of each task, at the start of each round. null: 5."""
    probe_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """linear_law: share of the probed task in its probe. null: 0.75."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """linear_law: part of what earlier rounds found that is kept. null: each round starts from the shares before it."""
    tokens: Count | None = None
    """linear_law: held-out tokens of a measurement, over all ranks. null: as many as a step has, at most 16384."""


class MixtureSection(RecipeSection):
    shares: Annotated[ScheduleShares | OneMixture, IN_ORDER] = "natural"
    """Asked share of each task: a rule, a file, {task: share} adding up to 1, or a schedule of these over the run."""
    unit: Literal["tokens", "examples"] = "examples"
    """What a share counts."""
    floors: dict[str, Share] = {}
    """Smallest share of a task. Rules (natural, uniform, temperature) and proposals keep to it; shares that are written
    out or in a file are played as they stand."""
    caps: dict[str, Share] = {}
    """Largest share of a task, in the same way."""
    groups: dict[TaskName, GroupSection] = {}
    """Floors and caps of several tasks together, in the same way: {code: {tasks: [sql, python], cap: 0.5}}."""
    max_epochs: Positive | None = None
    """How often any row may be seen at the most; a task's own max_epochs wins."""
    on_cap: Literal["error", "redistribute"] = "error"
    """What happens when a share asks for more epochs than allowed."""
    online: OnlineSection | None = None
    """Change the shares while training, by what its losses show: they begin as `shares` says, and a task of share 0
    stays out. null: `shares` are played as they are."""

    @property
    def moves(self) -> bool:
        """Whether the shares change over the run."""
        return self.online is not None or isinstance(self.shares, ScheduleShares)
