"""The recipe: one YAML file that says what a run does. Frozen, strict: an unknown key is an error at any depth.

This file only declares. Reading, overrides and error messages are in load.py; what can't go together is in compat.py.
Every field carries its description: `mtft schema` and docs/recipe.md are made from them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

Share = Annotated[float, Field(ge=0)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class RecipeSection(BaseModel):
    """Base of all sections: no unknown keys, no change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSection(RecipeSection):
    path: str
    """Folder of a model, `quickstart:weak`, `quickstart:strong`, or a hub name."""
    revision: str = "main"
    """Branch, tag or commit of a hub model."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the weights and of the forward pass. `auto`: bf16 on a GPU that has it, else fp32."""
    quantise: Literal["none", "nf4", "int8"] = "none"
    """Load the base in 4 bit (QLoRA: NF4, double quantisation) or 8 bit through bitsandbytes."""
    attention: Literal["auto", "sdpa", "eager", "flex_attention", "flash_attention_2"] = "auto"
    """Attention implementation of transformers."""
    trust_remote_code: bool = False
    """Run code that ships with the model. Off, and never switched on for you."""


class TaskSection(RecipeSection):
    name: TaskName
    """Short name: letters, digits, `_ . -`. It stands in metrics, mixtures and overrides (tasks.NAME.weight=2)."""
    data: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """File, glob, folder of `save_to_disk`, `hub:org/name`, `quickstart:TASK`; or a list of them.
    Relative to the recipe."""
    split: str | None = None
    """Split of a `hub:` or saved dataset that `data` names (null: train); `eval_data` takes validation, else test."""
    format: str | dict[str, str] = "auto"
    """How a row becomes prompt and response: a format's name, or {prompt: COLUMN, response: COLUMN}.
    `auto` looks at the columns."""
    template: str | None = None
    """Jinja template over the columns (sandboxed) that gives the prompt; the response comes from `format`."""
    eval_data: str | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | None = None
    """Held-out rows of this task, same format."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """The user's weight of this task in the loss; multiplies the balancer's."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """How often a row may be seen at the most. The plan refuses, or redistributes, what goes beyond."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Use only the first rows."""
    metrics: Annotated[tuple[Literal["loss", "token_accuracy", "exact_match"], ...], Field(strict=False)] = (
        "loss",
        "token_accuracy",
        "exact_match",
    )
    """What `mtft eval` reports for this task."""


class TemperatureShares(RecipeSection):
    temperature: float
    """Share of task k ~ size_k ** temperature: 1 = natural, 0 = uniform, below 0 the small ones get more. (Others write
    the exponent as 1/T.)"""


class FileShares(RecipeSection):
    file: str
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

    tasks: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
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
    every: Annotated[int, Field(gt=0)] = 20
    """Optimizer steps between two decisions (linear_law: the length of a round). After step s the shares of step s + 1
    on are decided."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps at the start whose losses don't count."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """bandit: what a loss is divided by; smaller = bolder. null: 10, as in the paper."""
    eta: Annotated[float, Field(gt=0)] | None = None
    """group_dro, linear_law: step size of a decision. null: 1 for group_dro, 0.5 for linear_law."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] | None = None
    """group_dro: part of the shares that is spread evenly at each decision. null: 1e-4."""
    reference: dict[str, Share] | str | None = None
    """group_dro: the loss that each task can be expected to reach, {task: nats a token}, or the folder of a finished
    run (its held-out losses; relative to the recipe). null: 0, so the loss itself counts."""
    probe_steps: Annotated[int, Field(gt=0)] | None = None
    """linear_law: steps of the probe of each task, at the start of each round. null: 5."""
    probe_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """linear_law: share of the probed task in its probe. null: 0.75."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """linear_law: part of what earlier rounds found that is kept. null: each round starts from the shares before it."""
    tokens: Annotated[int, Field(gt=0)] | None = None
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
    max_epochs: Annotated[float, Field(gt=0)] | None = None
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


class LoraSection(RecipeSection):
    r: Annotated[int, Field(gt=0)] = 16
    """Rank."""
    alpha: Annotated[float, Field(gt=0)] = 32
    """Scale: the update is alpha/r * B A (alpha/sqrt(r) with rslora)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of A."""
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = "all-linear"
    """Modules that get an adapter: all linears but the head, or names as PEFT matches them."""
    rslora: bool = False
    """Scale by alpha/sqrt(r) (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024). Not mergeable by `mtft merge`."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "mica"] = "default"
    """How A and B start (PEFT's init_lora_weights). pissa and olora change the base weights; export converts them.
    mica trains A only. (PEFT's eva, corda, loftq and lora_ga want data or other weights first: not offered.)"""
    freeze_a: bool = False
    """Train B only. A stays as drawn from `seed`, so that all runs with one seed share it: their adapters then differ
    in B alone and merge exactly (LoRA-FA; half of the optimizer's state, and A's inputs need not be kept)."""
    start: str | None = None
    """Folder of a LoRA adapter of this base to train on from, in place of a fresh one. Relative to the recipe."""
    plus: Annotated[float, Field(ge=1)] = 1.0
    """LoRA+: how many times as fast as A the Bs learn (the paper: 16, with about half the usual learning rate)."""


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
    sharpness: Annotated[float, Field(gt=0)] = 0.4
    """Of the softmax over a group's samples (not focal): small = few samples count."""
    group: Literal["task", "all"] = "task"
    """Samples that are compared: those of one task, or all, in one micro-batch of all ranks (not focal)."""
    burn_in: Annotated[int, Field(ge=0)] = 500
    """Optimizer steps with equal weights first."""
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """Exponent of focal: (1 - mean token probability) ** gamma."""


class FlatMinimaSection(RecipeSection):
    """Steps towards flat minima (mtft/experimental/flat_minima.py): one process or DDP; K more forward and backward
    passes.
    """

    name: Literal["f_mtl", "samo"]
    """f_mtl: perturbed by each task's own gradient; samo: by a mix of the mean gradient and two forward passes."""
    rho: Annotated[float, Field(gt=0)] | None = None
    """Length of the perturbation; null: 0.05 for f_mtl, 0.001 for samo."""
    adaptive: bool = False
    """f_mtl: scale the perturbation by the size of each weight (ASAM)."""
    beta: Annotated[float, Field(ge=0, le=1)] = 0.5
    """samo: share of the task's own estimate in its perturbation."""
    probe: Annotated[float, Field(gt=0)] = 0.01
    """samo: length of the two-sided difference that estimates a task's gradient."""


class GradientSection(RecipeSection):
    """Gradients of single tasks, all out of one backward pass (mtft/gradients)."""

    aggregator: str | None = None
    """Each step follows this mix of the task gradients (docs/gradients.md): upgrad, pcgrad, mgda, ... One process or
    DDP; elsewhere `loss.balancer: {name: lagged}`. null: the weighted sum, as without this section."""
    options: dict[str, StrictInt | StrictFloat | StrictStr | bool] = {}
    """The aggregator's own options."""
    every: Annotated[int, Field(gt=0)] | None = None
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
    path: Literal["auto", "gather", "fused"] = "auto"
    """How the per-token losses are computed; equal results, different speed."""
    sample_weights: SampleWeightsSection | None = None
    """Weights of single samples; null: all equal."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over the whole vocabulary. Counts in the losses that training reports."""
    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Adds z_loss * logsumexp(logits)^2 to each token's loss (1e-4 in PaLM); counts in the reported losses."""
    orthogonal: Annotated[float, Field(ge=0)] = 0.0
    """OrthoReg: weight of a penalty that keeps the columns of each LoRA update orthogonal, for merging."""


class TrainSection(RecipeSection):
    steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps. Give steps or epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over as many rows as all tasks have together."""
    batch_tokens: Annotated[int, Field(gt=0)] = 32768
    """Tokens in one optimizer step, over all ranks (examples in a step = batch_tokens // mean length)."""
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(gt=0)] = 8192
    """Tokens (with padding) that one rank holds in one forward pass. auto: the largest that fits a GPU, or that is
    still faster on a CPU, found by trial before the first step. The gradient is the same with any."""
    max_length: Annotated[int, Field(gt=1)] = 2048
    """Longest example, and length of a packed row."""
    too_long: Literal["drop", "truncate_left", "truncate_right", "error"] = "truncate_left"
    """What happens to longer examples. Counted per task and reported."""
    bad_rows: Literal["error", "skip"] = "error"
    """Broken rows: stop at the first file with any, or skip up to 1 % of a file and count."""
    packing: bool = True
    """Several examples in one row, isolated from each other."""
    batch_style: Literal["mixed", "unmixed", "alternating"] = "mixed"
    """mixed: the mixture in every micro-batch; unmixed: one task a micro-batch, the mixture in every step; alternating:
    one task a step, as many steps of each as its share says."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant", "constant_with_warmup"] = "linear"
    """Learning rate after the warm-up: linear and cosine go down to `min_lr`, wsd stays and goes down at the end."""
    min_lr: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Where linear, cosine and wsd end, as a part of the peak."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps in which wsd goes down, linearly."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Share of the steps (below 1) or number of steps (from 1)."""
    optimizer: str = "adamw_torch"
    """adamw, adamw_8bit, paged_adamw_8bit, lion, adafactor, ademamix, muon, schedule_free, ..., or any name of
    transformers' `optim` (docs/training.md)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's first moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's second moment decay."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradient norm; 0 = off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    mezo: Annotated[float, Field(gt=0)] | None = None
    """MeZO: estimate the gradient from two forward passes, this far up and down a random direction (1e-3 in the paper):
    no activations are kept. For adapters, with optimizer: sgd, max_grad_norm: 0 and many more steps. null: backward."""
    neftune: Annotated[float, Field(ge=0)] = 0.0
    """NEFTune: noise on the embeddings while training, uniform in +-neftune/sqrt(length * width); 0 = off, usual 5."""
    eval_every: Annotated[int, Field(gt=0)] | None = None
    """Steps between evaluations; null: at the start and at the end only."""
    eval_on_start: bool = True
    """Evaluate before the first step too."""
    watch: str = "mean"
    """Held-out loss that `patience` and output.export: best look at: mean or worst over the tasks, or a task's name."""
    patience: Annotated[int, Field(gt=0)] | None = None
    """End the run after so many evaluations in a row without a better `watch`; null: never."""
    task_patience: Annotated[int, Field(gt=0)] | None = None
    """Drop a task from the loss after so many evaluations in a row without a better held-out loss of its own; its
    share of the loss goes to the others. null: never."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """By how much a held-out loss must fall to count as better."""
    max_bad_steps: Annotated[int, Field(gt=0)] = 10
    """Stop after so many steps in a row with a non-finite loss or gradient, or with no supervised token."""

    @property
    def rows_at_once(self) -> int:
        """micro_batch_tokens as a number where nothing was tried (evaluation, trials): 8192, or one row, for auto."""
        asked = self.micro_batch_tokens
        return max(8192, self.max_length) if asked == "auto" else asked


class OutputSection(RecipeSection):
    dir: str
    """Run directory. Relative to the working directory, as for every other tool's output."""
    save_every: Annotated[int, Field(gt=0)] | None = None
    """Steps between checkpoints; null: only at the end and on a signal."""
    keep: Annotated[int, Field(gt=0)] = 2
    """Checkpoints that stay on disk."""
    export: Literal["last", "best"] = "last"
    """Weights that the run hands over: those after the last step, or those of the evaluation with the best
    train.watch."""
    trackers: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Trackers of transformers: tensorboard, trackio, wandb, mlflow, ... metrics.jsonl is always written."""


class SweepSection(RecipeSection):
    """Trials for `mtft mix` and the mix stage of `mtft run`: ordinary runs of this recipe with another mixture."""

    trials: Annotated[int, Field(gt=0)] = 32
    """Mixtures to try, the current one and its repeats included."""
    design: Literal["dirichlet", "space_filling"] = "dirichlet"
    """RegMix's Dirichlet around the natural shares, or space-filling under the mixture's floors and caps."""
    repeats: Annotated[int, Field(ge=0)] = 0
    """Extra runs of the current mixture with other seeds: the estimate of the noise."""
    model: ModelSection | None = None
    """Proxy model; null: the recipe's own."""
    lora: LoraSection | Literal["full"] | None = None
    """LoRA of the trials; null: the recipe's own; full: full fine-tuning."""
    steps: Annotated[int, Field(gt=0)] = 50
    """Optimizer steps of a trial."""
    batch_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens in a step of a trial; null: the recipe's own."""
    eval_limit: Annotated[int, Field(gt=0)] | None = None
    """Use only the first held-out rows of each task in trials."""
    surrogate: str = "auto"
    """Model of score by mixture: auto, linear, ridge, lightgbm, exp, power, gp, ..."""
    objective: Literal["mean", "worst"] | dict[str, Share] = "mean"
    """What the proposal minimises over the tasks' held-out losses, each standardised over the trials."""
    kl: Annotated[float, Field(ge=0)] = 0.05
    """Pull towards the prior (the natural shares)."""
    checks: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = ()
    """Shares of a trial's steps, such as [0.3, 0.6], at which it is scored and given up if hopeless; empty: never."""
    full_trials: Annotated[int, Field(ge=6)] = 8
    """With `checks`: the first trials, which run to the end and say what is hopeless."""
    workers: Annotated[int, Field(gt=0)] = 1
    """Trials at the same time, one process each."""
    backend: Literal["process", "ray"] = "process"
    """Local processes or a Ray cluster (extra `ray`)."""


class ModuleRule(RecipeSection):
    """Another way to merge some of the modules."""

    modules: str
    """Regular expression, searched in the module's full name."""
    method: str | None = None
    """Method for these modules; null: the section's, with its own default options."""
    options: dict[str, StrictInt | StrictFloat | StrictStr | bool] | None = None
    """The method's options for these modules."""
    weights: Annotated[tuple[float, ...], Field(strict=False)] | None = None
    """Weight of each adapter in these modules."""
    rank: Annotated[int, Field(gt=0)] | None = None
    """Largest rank of these modules."""


class WeightSearch(RecipeSection):
    """Search the adapters' weights on held-out rows. The winner has to beat the uniform merge on other rows."""

    by: Literal["grid", "cobyqa", "cma", "lorahub", "front"] = "grid"
    """grid: one common scale; cobyqa, cma, lorahub: a weight each; front: spread over all trade-offs, for `prefer`."""
    budget: Annotated[int, Field(gt=0)] = 40
    """Merges to try."""
    rows: Annotated[int, Field(gt=1)] = 64
    """Held-out rows of each task to choose on (and as many for the verdict); at most a third of what there is."""
    worst: Annotated[float, Field(ge=0)] = 0.0
    """How much the worst task counts beyond the mean."""
    prefer: dict[str, Annotated[float, Field(ge=0)]] = {}
    """What each task counts; {} = all the same. With `front` another preference costs no new trial."""


class GateTraining(RecipeSection):
    """Learn the adapters' weights by gradients, each layer or module its own, and fold them in."""

    kind: Literal[
        "adamerging_task", "adamerging_layer", "atlas", "self_positioning", "cat_gates", "scalearn", "concrete"
    ] = "adamerging_layer"
    """adamerging_*, concrete: by the entropy of the output, no labels; the others by labels (docs/merging.md)."""
    rows: Annotated[int, Field(gt=1)] = 64
    """Held-out rows of each task to learn on; at most a third of what there is."""
    steps: Annotated[int, Field(gt=0)] | None = None
    """null = the method's own."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """null = the method's own."""
    negate: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Tasks to unlearn (atlas)."""


class Experts(RecipeSection):
    """Keep the adapters apart and route between them at inference."""

    kind: Literal["twin", "arrow"] = "twin"
    """twin: the merged adapter plus a small residual each, by request; arrow: the adapters themselves, by token."""
    rank: Annotated[int, Field(gt=0)] = 8
    """Rank of a residual (twin)."""
    with_shared: bool = False
    """Each expert holds the shared adapter too: one plain LoRA a request, for servers (twin)."""
    router: Literal["centroid", "mlp"] = "centroid"
    """By the prompt's last state: nearest centroid, or a trained network (twin)."""
    rows: Annotated[int, Field(gt=1)] = 64
    """Held-out prompts of each task to fit the router on; at most a third of what there is (twin)."""
    top: Annotated[int, Field(gt=0)] | None = None
    """Experts that serve one token; null = all (arrow)."""
    general: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Folders of adapters for general ability, whose mean delta is taken off every expert (arrow)."""


class MergeSection(RecipeSection):
    method: str = "linear"
    """linear, cat, svd, ties, tsv, ... (docs/papers.md)."""
    adapters: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """Folders of PEFT adapters; null in `mtft run`: the single-task adapters."""
    base: str | None = None
    """Folder of a base model: then `adapters` are whole models that were fine-tuned from it."""
    weights: Annotated[tuple[float, ...], Field(strict=False)] | None = None
    """Weight of each adapter, multiplying its delta; null = 1 each."""
    search: WeightSearch | None = None
    """Choose the weights on held-out rows."""
    gates: GateTraining | None = None
    """Learn the weights by gradients, per layer or module."""
    experts: Experts | None = None
    """Keep the adapters apart, with a router."""
    scale: float = 1.0
    """Multiplies the result."""
    average: bool = False
    """Divide by the sum of the weights."""
    rank: Literal["auto", "lossless"] | Annotated[int, Field(gt=0)] = "auto"
    """Rank of the merged adapter. auto: the smallest usual rank that keeps `energy`."""
    energy: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of the squared singular values that rank auto keeps."""
    min_energy: Annotated[float, Field(ge=0, le=1)] = 0.5
    """A merge that keeps less than this share at its rank is refused."""
    saved: str = "error"
    """Full tensors in the adapters (modules_to_save, biases): error, average, or `take: ADAPTER`."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the merged adapter on disk; auto = as the inputs."""
    vllm: bool = False
    """Refuse what vLLM can't load (biases, full tensors)."""
    options: dict[str, StrictInt | StrictFloat | StrictStr | bool] = {}
    """The method's own options."""
    per_module: Annotated[tuple[ModuleRule, ...], Field(strict=False)] = ()
    """Other methods, weights or ranks for some modules; the first rule that matches counts."""
    allow_base_mismatch: bool = False
    """Merge although the adapters name different bases (one model under two names)."""
    workers: Annotated[int, Field(gt=0)] = 1
    """Processes, one LAPACK thread each."""
    out: str | None = None
    """Folder of the merged adapter; null: <output.dir>/merge/adapter."""
    overwrite: bool = False
    """Replace an adapter that is there already."""


class FuseSection(RecipeSection):
    strong: ModelSection
    """The large model that is steered; its weights are never touched."""
    base: ModelSection | None = None
    """The small base of the adapters; null: the recipe's `model`."""
    adapters: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """LoRA experts on the small base; null in `mtft run`: the joint adapter."""
    alpha_rule: Literal["fixed", "forward", "jeffreys", "paper", "paper_grid"] = "jeffreys"
    """How far each token is moved (docs/papers.md); fixed = proxy-tuning / EFT."""
    alpha: Annotated[float, Field(ge=0, le=10)] = 1.0
    """The constant of alpha_rule `fixed`."""
    alpha_max: Annotated[float, Field(gt=0, le=10)] = 2.0
    """Upper end of the search for the other rules."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 64
    """Length limit of `mtft fuse generate`."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 = greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling, after fusion."""
    batch_size: Annotated[int, Field(gt=0)] = 8
    """Prompts decoded together."""
    weights: Literal["active", "onehot", "uniform", "user", "router"] = "active"
    """How several experts share the step: by how much each has to say, the loudest alone, evenly, `user_weights`, or as
    `router` says for each prompt."""
    user_weights: Annotated[tuple[float, ...], Field(strict=False)] | None = None
    """One weight per expert for weights: user; they add up to 1."""
    router: str | None = None
    """File for weights: router; `mtft merge` with merge.experts.kind: twin writes one (router.safetensors)."""
    plausibility: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """After fusion drop tokens below this share of the strong model's best probability; 0 = off."""
    speculative: Literal["off", "auto"] | Annotated[int, Field(ge=0, le=16)] = "off"
    """Let the expert draft tokens that the strong model only judges: the same text in fewer passes. Drafts, or auto."""
    tokens: Literal["strict", "prefix", "map"] = "strict"
    """How much the tokenizers must agree. prefix: extra ids at the end are allowed, but not steered. map: the small
    model reads the text anew in its own tokens, and steers those that it has too (slower, without speculation)."""


class RunSection(RecipeSection):
    """What `mtft run` does beside the main line mix -> train -> merge -> fuse -> report."""

    baseline: Literal["uniform", "natural", "none"] = "uniform"
    """Also train a joint adapter on this mixture, to compare with."""
    predicted: Literal["if_better", "always"] = "if_better"
    """Train on the predicted mixture only if the trials say that it is better than the current one, or always."""
    singles: bool = True
    """Also train one adapter per task (what the merge stage merges, and the yardstick of retention)."""
    tune_strong: bool = True
    """Also tune the strong model by LoRA on the same mixture: the yardstick of fusion's gap closed."""
    single_steps: Annotated[int, Field(gt=0)] | None = None
    """Steps of a single-task run; null: the joint run's steps times the task's share, at least 10."""


class Recipe(RecipeSection):
    """A whole recipe. Sections that a command does not need may be left out."""

    name: str
    """Name of the run in reports and trackers."""
    seed: Annotated[int, Field(ge=0)] = 17
    """Seed of everything: plan, initialisation, dropout, sampling."""
    model: ModelSection
    tasks: Annotated[tuple[TaskSection, ...], Field(strict=False, min_length=1)]
    mixture: MixtureSection = MixtureSection()
    lora: LoraSection | None = LoraSection()
    """null = full fine-tuning."""
    loss: LossSection = LossSection()
    train: TrainSection
    output: OutputSection
    sweep: SweepSection | None = None
    merge: MergeSection | None = None
    fuse: FuseSection | None = None
    run: RunSection = RunSection()

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)
