"""`sweep`: the trials that a mixture is chosen from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.section import Count, NotNegative, Processes, RecipeSection, Share, Steps, Tokens


class ResourcesSection(RecipeSection):
    """What Ray holds for each trial (`sweep.backend: ray`)."""

    cpus: Processes = 1
    """CPU cores."""
    gpus: Annotated[float, Field(ge=0, le=64)] | None = None
    """GPUs: a part of one (0.5: two trials on each) or whole ones; null: one where the cluster has GPUs, else none."""


class SweepSection(RecipeSection):
    """Trials for `mtft mix` and the mix stage of `mtft run`: ordinary runs of this recipe with another mixture."""

    trials: Annotated[int, Field(gt=0, le=10**4)] = 32
    """Mixtures to try, the current one and its repeats included."""
    design: Literal["dirichlet", "space_filling", "damo", "cocktail"] = "dirichlet"
    """RegMix's Dirichlet around the natural shares, space-filling under the mixture's floors and caps, DaMo's
    compositions of a trial's batch (each share a whole number of its examples, all within the bounds alike likely), or
    the grid of single tasks, pairs, all, and all but one in equal shares (which neither `trials` nor bounds change)."""
    repeats: Annotated[int, Field(ge=0, le=10**4)] = 0
    """Extra runs of the current mixture with other seeds: the estimate of the noise."""
    model: ModelSection | None = None
    """Proxy model; null: the recipe's own."""
    lora: LoraSection | Literal["full"] | None = None
    """LoRA of the trials; null: the recipe's own; full: full fine-tuning."""
    steps: Steps = 50
    """Optimizer steps of a trial."""
    batch_tokens: Tokens | None = None
    """Tokens in a step of a trial; null: the recipe's own."""
    eval_limit: Count | None = None
    """Use only the first held-out rows of each task in trials."""
    surrogate: str = "auto"
    """Model of score by mixture: auto, linear, ridge, lightgbm, exp, power, gp, ..."""
    objective: Annotated[str, Field(pattern=r"^(mean|worst)(/[A-Za-z0-9_.-]+)?$")] | dict[str, Share] = "mean"
    """What the proposal improves: mean or worst of the tasks' held-out losses (mean/KEY: of a metric), or weights of
    tasks' losses and metrics, {sql: 1, chat/rouge_l: 2}. Each score is standardised over the trials."""
    kl: NotNegative = 0.05
    """Pull towards the prior (the natural shares)."""
    checks: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = ()
    """Shares of a trial's steps, such as [0.3, 0.6], at which it is scored and given up if hopeless; empty: never."""
    full_trials: Annotated[int, Field(ge=6, le=10**4)] = 8
    """With `checks`: the first trials, which run to the end and say what is hopeless."""
    workers: Processes = 1
    """Trials at the same time, one process each."""
    backend: Literal["process", "ray"] = "process"
    """Local processes or a Ray cluster (extra `ray`)."""
    resources: ResourcesSection | None = None
    """With `backend: ray`: what is held for each trial; null: one CPU, and one GPU where the cluster has GPUs."""
