"""`train`: length, batches, optimizer and evaluation of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtft.recipe.schema.section import Count, NotNegative, Positive, RecipeSection, Steps, Tokens


class TrainSection(RecipeSection):
    steps: Steps | None = None
    """Optimizer steps. Give steps or epochs."""
    epochs: Annotated[float, Field(gt=0, le=10**5)] | None = None
    """Passes over as many rows as all tasks have together."""
    batch_tokens: Tokens = 32768
    """Tokens in one optimizer step, over all ranks (examples in a step = batch_tokens // mean length)."""
    micro_batch_tokens: Literal["auto"] | Tokens = 8192
    """Tokens (with padding) that one rank holds in one forward pass. auto: the largest that fits a GPU, or that is
    still faster on a CPU, found by trial before the first step. The gradient is the same with any."""
    max_length: Annotated[int, Field(gt=1, le=2**24)] = 2048
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
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 2e-4
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "wsd", "inverse_sqrt", "constant", "constant_with_warmup"] = "linear"
    """Learning rate after the warm-up: linear and cosine go down to `min_lr`, wsd stays and goes down at the end."""
    min_lr: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Where linear, cosine and wsd end, as a part of the peak."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps in which wsd goes down, linearly."""
    warmup: NotNegative = 0.03
    """Share of the steps (below 1) or number of steps (from 1)."""
    optimizer: str = "adamw_torch"
    """adamw, adamw_8bit, paged_adamw_8bit, lion, adafactor, ademamix, muon, schedule_free, ..., or any name of
    transformers' `optim` (docs/training.md)."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled decay."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Adam's first moment decay."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Adam's second moment decay."""
    max_grad_norm: NotNegative = 1.0
    """Clip the gradient norm; 0 = off."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    mezo: Positive | None = None
    """MeZO: estimate the gradient from two forward passes, this far up and down a random direction (1e-3 in the paper):
    no activations are kept. For adapters, with optimizer: sgd, max_grad_norm: 0 and many more steps. null: backward."""
    neftune: NotNegative = 0.0
    """NEFTune: noise on the embeddings while training, uniform in +-neftune/sqrt(length * width); 0 = off, usual 5."""
    eval_every: Count | None = None
    """Steps between evaluations; null: at the start and at the end only."""
    eval_on_start: bool = True
    """Evaluate before the first step too."""
    watch: str = "mean"
    """Held-out score that `patience` and output.export: best look at: mean or worst over the tasks' losses, or a task's
    name; of another metric with its key: mean/rouge_l, sql/exact_match (then answers are made at each evaluation)."""
    patience: Count | None = None
    """End the run after so many evaluations in a row without a better `watch`; null: never."""
    task_patience: Count | None = None
    """Drop a task from the loss after so many evaluations in a row without a better held-out loss of its own; its
    share of the loss goes to the others. null: never."""
    min_delta: NotNegative = 0.0
    """By how much a held-out score must improve to count as better."""
    deterministic: bool = False
    """Only kernels that give the same bits every time: two runs on the same GPUs and versions are equal to the bit
    (docs/training.md). Slower, flash attention's backward most of all; an operation without such a kernel is an error.
    """
    max_bad_steps: Count = 10
    """Stop after so many steps in a row with a non-finite loss or gradient, or with no supervised token."""

    @property
    def rows_at_once(self) -> int:
        """micro_batch_tokens as a number where nothing was tried (evaluation, trials): 8192, or one row, for auto."""
        size = self.micro_batch_tokens
        return max(8192, self.max_length) if size == "auto" else size
