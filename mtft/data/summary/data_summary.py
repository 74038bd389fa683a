"""What `mtft check` knows about the data of a recipe: figures only, without the way they are made or shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TaskSummary:
    """One task: what is in its store, and what the plan makes of it. Shares are of `unit`, tokens before padding."""

    name: str
    rows: int
    examples: int
    eval_examples: int | None
    tokens: int
    prompt_tokens: int
    supervised_tokens: int
    weighted_tokens: int
    mean_length: float
    longest: int
    truncated: int
    dropped: int
    skipped: int
    asked_share: float
    realised_share: float
    token_share: float
    supervised_share: float
    epochs: float
    examples_per_step: float
    tokens_per_step: float
    weight: float
    effective_weight: float
    notes: dict[str, int]
    sample: list[tuple[str, bool]]
    auxiliary: bool = False
    """Whether it counts in no mean over the tasks."""
    templates: tuple[list[tuple[str, bool]], ...] = ()
    """With several templates the first example of each, as `sample`; empty for one that no row looked at has."""

    @property
    def label(self) -> str:
        """How it is called in tables."""
        return f"{self.name} (auxiliary)" if self.auxiliary else self.name


@dataclass(frozen=True)
class DataSummary:
    """All tasks, the plan, and everything that should make the reader stop and think."""

    name: str
    tasks: tuple[TaskSummary, ...]
    unit: str
    steps: int
    batch: int
    examples: int
    tokens: int
    tokens_per_step: float
    micro_batches_per_step: float
    packing: bool
    batch_style: str
    padding_share: float
    sampled: bool
    """Whether micro-batches and padding are told from a part of a step, because steps are so large."""
    spans: tuple[dict[str, Any], ...]
    """Shares in equal parts of the run, where they change: {"steps": [first, last], "asked": {}, "realised": {}}."""
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain lists, dicts, strings and numbers (JSON)."""
        return asdict(self)
