"""`loss`: how token losses become one loss, the balancer, and the gradients of single tasks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mtft.recipe.schema.section import Count, NotNegative, Options, Positive, RecipeSection


class BalancerSection(RecipeSection):
    model_config = ConfigDict(extra="allow", frozen=True)  # the balancer's own class checks its options
    name: str = "uniform"
    """uniform, fixed, ... (see docs/papers.md); the other keys are the balancer's options."""


class SampleWeightsSection(RecipeSection):
    """Weights of single samples by their own loss; the tasks' weights keep their meaning
    (mtft/losses/sample_weights.py).
    """

    rule: Literal["linupper", "quadratic", "extremes", "focal"]
    """linupper: easy samples fade out; quadratic: the middle counts; extremes: the ends; focal: sure ones fade out."""
    sharpness: Positive = 0.4
    """Of the softmax over a group's samples (not focal): small = few samples count."""
    group: Literal["task", "all"] = "task"
    """Samples that are compared: those of one task, or all, in one micro-batch of all ranks (not focal)."""
    burn_in: Annotated[int, Field(ge=0, le=10**8)] = 500
    """Optimizer steps with equal weights first."""
    gamma: NotNegative = 2.0
    """Exponent of focal: (1 - mean token probability) ** gamma."""


class FlatMinimaSection(RecipeSection):
    """Steps towards flat minima (mtft/experimental/flat_minima.py): one process or DDP; K more forward and backward
    passes.
    """

    name: Literal["f_mtl", "samo"]
    """f_mtl: perturbed by each task's own gradient; samo: by a mix of the mean gradient and two forward passes."""
    rho: Positive | None = None
    """Length of the perturbation; null: 0.05 for f_mtl, 0.001 for samo."""
    adaptive: bool = False
    """f_mtl: scale the perturbation by the size of each weight (ASAM)."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """samo: share of the task's own estimate in its perturbation."""
    probe: Positive = 0.01
    """samo: length of the two-sided difference that estimates a task's gradient."""


class GradientSection(RecipeSection):
    """Gradients of single tasks, all out of one backward pass (mtft/gradients)."""

    aggregator: str | None = None
    """Each step follows this mix of the task gradients (docs/gradients.md): upgrad, pcgrad, mgda, ... One process or
    DDP; elsewhere `loss.balancer: {name: lagged}`. null: the weighted sum, as without this section."""
    options: Options = {}
    """The aggregator's own options."""
    every: Count | None = None
    """Steps between two measurements of how tasks get on with each other (metrics, affinity.json, the report)."""
    split: bool = False
    """Measure each task's examples in two halves, so that a step's noise does not pull the cosines of affinity.json
    towards 0 (mtft/gradients/capture/split_halves.py); balancers see what they always see. Holds twice as many
    gradients."""
    partial: bool = False
    """Measure the trained weights that can be measured, and say which are left out, instead of refusing."""
    flat: FlatMinimaSection | None = None
    """Look for flat minima; null: off."""


class LossSection(RecipeSection):
    normalise: Literal["token", "sample", "task_token", "task_sample"] = "task_token"
    """What the mean runs over (MFTCoder's case 1 = token, 2 = sample, 3 = task_token, 4 = task_sample)."""
    balancer: BalancerSection = BalancerSection()
    """How the task weights move."""
    gradients: GradientSection | None = None
    """Gradients of single tasks: surgery, affinity, flat minima; null: none of it is computed."""
    path: Literal["auto", "gather", "chunked", "fused"] = "auto"
    """How the per-token losses are computed; equal results, different speed and memory. gather: the logits of the
    supervised tokens; chunked: some rows of them at a time; fused: trl's, for GPUs. `auto`: chunked for vocabularies of
    32,768 and more over a head that is not trained, else gather."""
    sample_weights: SampleWeightsSection | None = None
    """Weights of single samples; null: all equal."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over the whole vocabulary. Counts in the losses that training reports."""
    z_loss: NotNegative = 0.0
    """Adds z_loss * logsumexp(logits)^2 to each token's loss (1e-4 in PaLM); counts in the reported losses."""
    orthogonal: NotNegative = 0.0
    """OrthoReg: weight of a penalty that keeps the columns of each LoRA update orthogonal, for merging."""
