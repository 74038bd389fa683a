"""`merge`: how adapters become one."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtft.recipe.schema.section import (
    INPUT,
    MERGE_OPTIONS,
    OUTPUT,
    Count,
    NotNegative,
    Number,
    Numbers,
    Options,
    Positive,
    Processes,
    Rank,
    RecipeSection,
    Texts,
)


class ModuleRule(RecipeSection):
    """Another way to merge some of the modules."""

    modules: str
    """Regular expression, searched in the module's full name."""
    method: str | None = None
    """Method for these modules; null: the section's, with its own default options."""
    options: Annotated[Options | None, MERGE_OPTIONS] = None
    """The method's options for these modules."""
    weights: Numbers | None = None
    """Weight of each adapter in these modules."""
    rank: Rank | None = None
    """Largest rank of these modules."""


class WeightSearch(RecipeSection):
    """Search the adapters' weights on rows (`rows_from`). The winner has to beat the uniform merge on other rows."""

    by: Literal["grid", "cobyqa", "cma", "lorahub", "front"] = "grid"
    """grid: one common scale; cobyqa, cma, lorahub: a weight each; front: spread over all trade-offs, for `prefer`."""
    budget: Count = 40
    """Merges to try."""
    rows: Annotated[int, Field(gt=1, le=10**9)] = 64
    """Rows of each task to choose on (and as many for the verdict); at most a third of what there is."""
    worst: NotNegative = 0.0
    """How much the worst task counts beyond the mean."""
    prefer: dict[str, NotNegative] = {}
    """What each task counts; {} = all the same. With `front` another preference costs no new trial."""


class GateTraining(RecipeSection):
    """Learn the adapters' weights by gradients, each layer or module its own, and fold them in."""

    kind: Literal[
        "adamerging_task", "adamerging_layer", "atlas", "self_positioning", "cat_gates", "scalearn", "concrete"
    ] = "adamerging_layer"
    """adamerging_*, concrete: by the entropy of the output, no labels; the others by labels (docs/merging.md)."""
    rows: Annotated[int, Field(gt=1, le=10**9)] = 64
    """Rows of each task to learn on; at most a third of what there is."""
    steps: Count | None = None
    """null = the method's own."""
    learning_rate: Positive | None = None
    """null = the method's own."""
    negate: Texts = ()
    """Tasks to unlearn (atlas)."""


class Experts(RecipeSection):
    """Keep the adapters apart and route between them at inference."""

    kind: Literal["twin", "arrow"] = "twin"
    """twin: the merged adapter plus a small residual each, by request; arrow: the adapters themselves, by token."""
    rank: Rank = 8
    """Rank of a residual (twin)."""
    with_shared: bool = False
    """Each expert holds the shared adapter too: one plain LoRA a request, for servers (twin)."""
    router: Literal["centroid", "mlp"] = "centroid"
    """By the prompt's last state: nearest centroid, or a trained network (twin)."""
    rows: Annotated[int, Field(gt=1, le=10**9)] = 64
    """Prompts of each task to fit the router on; at most a third of what there is (twin)."""
    top: Count | None = None
    """Experts that serve one token; null = all (arrow)."""
    general: Annotated[Texts, INPUT] = ()
    """Folders of adapters for general ability, whose mean delta is taken off every expert (arrow)."""


class MergeSection(RecipeSection):
    method: str = "linear"
    """linear, cat, svd, ties, tsv, ... (docs/papers.md)."""
    adapters: Annotated[Texts | None, INPUT] = None
    """Folders of PEFT adapters; null in `mtft run`: the single-task adapters."""
    base: Annotated[str | None, INPUT] = None
    """Folder of a base model: then `adapters` are whole models that were fine-tuned from it."""
    weights: Numbers | None = None
    """Weight of each adapter, multiplying its delta; null = 1 each."""
    search: WeightSearch | None = None
    """Choose the weights on rows (`rows_from`)."""
    gates: GateTraining | None = None
    """Learn the weights by gradients, per layer or module."""
    experts: Experts | None = None
    """Keep the adapters apart, with a router."""
    scale: Number = 1.0
    """Multiplies the result."""
    average: bool = False
    """Divide by the sum of the weights."""
    rows_from: Literal["eval_data", "data"] = "eval_data"
    """Where searches, gates, routers and `regmean` take the rows that they look at. eval_data: at most a third of the
    held-out rows; data: the training rows, which leaves all held-out rows unseen."""
    rank: Literal["auto", "lossless"] | Rank = "auto"
    """Rank of the merged adapter. auto: the smallest usual rank that keeps `energy`."""
    energy: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the squared singular values that rank auto keeps."""
    min_energy: Annotated[float, Field(ge=0, le=1)] | None = None
    """A merge that keeps less than this share at its rank is refused. null = 0.5; with a number as rank: a warning."""
    saved: str = "error"
    """Full tensors in the adapters (modules_to_save, biases): error, average, or `take: ADAPTER`."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the merged adapter on disk; auto = as the inputs."""
    vllm: bool = False
    """Refuse what vLLM can't load (biases, full tensors)."""
    options: Annotated[Options, MERGE_OPTIONS] = {}
    """The method's own options."""
    per_module: Annotated[tuple[ModuleRule, ...], Field(strict=False)] = ()
    """Other methods, weights or ranks for some modules; the first rule that matches counts."""
    allow_base_mismatch: bool = False
    """Merge although the adapters name different bases (one model under two names)."""
    workers: Processes = 1
    """Processes, one LAPACK thread each."""
    out: Annotated[str | None, OUTPUT] = None
    """Folder of the merged adapter; null: <output.dir>/merge/adapter."""
    overwrite: bool = False
    """Replace an adapter that is there already."""
