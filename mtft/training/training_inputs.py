"""What a run reads, and by what it knows that this is the same: tokenizer and token stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.replanned import ReplannedPlan
from mtft.data.store.token_store import open_stores
from mtft.models.loading import load_tokenizer
from mtft.recipe.schema.recipe import Recipe


@dataclass(frozen=True)
class TrainingInputs:
    """What a run reads: tokenizer and token stores, one a task (held-out: None for a task without eval_data)."""

    tokenizer: Any
    stores: Sequence[Any]
    held_out: Sequence[Any | None]

    @property
    def evaluates(self) -> bool:
        """Whether any task has held-out rows."""
        return any(store is not None for store in self.held_out)

    def identity(self, plan: MixturePlan | ReplannedPlan) -> dict[str, str]:
        """What must be the same for a run to go on."""
        return {"plan": plan.fingerprint, **data_identity(self.stores)}


def data_identity(stores: Sequence[Any]) -> dict[str, str]:
    """{"data of TASK": fingerprint} of the training rows."""
    return {f"data of {store.task}": store.fingerprint for store in stores}


def held_out_identity(stores: Sequence[Any | None]) -> dict[str, str]:
    """{"held-out rows of TASK": fingerprint}: what the scores of a run are of."""
    return {f"held-out rows of {store.task}": store.fingerprint for store in stores if store is not None}


def read_training_inputs(recipe: Recipe, *, eval_limit: int | None = None, tokenizer: Any = None) -> TrainingInputs:
    """Tokenizer and token stores of a recipe; the stores are built by one process where they don't stand yet.

    eval_limit: only the first held-out rows of each task. tokenizer: in place of the model's own.
    """
    tokenizer = load_tokenizer(recipe.model) if tokenizer is None else tokenizer
    held_out = open_stores(recipe, tokenizer, "eval", limit=eval_limit)
    return TrainingInputs(tokenizer, open_stores(recipe, tokenizer, "train"), held_out)
