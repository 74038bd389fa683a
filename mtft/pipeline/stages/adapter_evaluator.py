"""A base model, loaded once, with adapters put on and taken off: what a merge needs when it looks at data.

Rows of each task are dealt into three parts by a fixed shuffle: `choose` (search, gates, routers and Gram matrices see
these), `check` (the verdict of a search) and `rest`, on which what the merge kept is reported. All three are held-out
rows, or (`merge.rows_from: data`) the first two are training rows, and `rest` is all that is held out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtft.common.errors import UserError
from mtft.data.batching.batch import IGNORE, PADDING, Batch
from mtft.data.batching.batches import eval_batches
from mtft.data.batching.packed_attention import model_inputs, packing_refusal
from mtft.data.tokenize.encode import Example
from mtft.evaluation.evaluation_mode import evaluation_mode
from mtft.evaluation.heldout_loss import BatchLayout, score_tasks
from mtft.evaluation.score_cache import Scores
from mtft.recipe.schema.recipe import Recipe

PARTS = ("choose", "check", "rest")


def split_rows(total: int, rows: int) -> dict[str, np.ndarray]:
    """Row numbers of the parts: `rows` each for choosing and checking, at most a third of all; the rest."""
    order = np.random.default_rng(0).permutation(total)
    count = min(rows, total // 3)
    cuts = (order[:count], order[count : 2 * count], order[2 * count :])
    return {name: np.sort(part) for name, part in zip(PARTS, cuts, strict=True)}


def _row_count(store: Any) -> int:
    return len(np.unique(store.row_numbers))


class RowSubset:
    """Some rows of a token store, with all their examples, as a store. rows: ascending row numbers."""

    def __init__(self, store: Any, rows: np.ndarray) -> None:
        self._store, self.task = store, store.task
        self._examples = np.flatnonzero(np.isin(store.row_numbers, rows))

    @property
    def num_examples(self) -> int:
        return len(self._examples)

    @property
    def lengths(self) -> np.ndarray:
        return np.asarray(self._store.lengths)[self._examples]

    @property
    def row_numbers(self) -> np.ndarray:
        return self._store.row_numbers[self._examples]

    @property
    def ids(self) -> list[str]:
        return [self._store.ids[int(i)] for i in self._examples]

    @property
    def row_ids(self) -> list[str]:
        """Of each row once: that of its first example."""
        return [self._store.ids[int(self._examples[i])] for i in np.unique(self.row_numbers, return_index=True)[1]]

    def example(self, i: int) -> Example:
        return self._store.example(int(self._examples[i]))

    def place(self, example: int) -> str:
        """file:line of the row that an example came from."""
        return self._store.place(int(self._examples[example]))


def select_examples(scores: Scores, ids: Mapping[str, Sequence[str]]) -> Scores:
    """The scores of the examples in `ids` (task -> ids); other tasks as they are."""
    selected = {}
    for task, of in scores.items():
        wanted = set(ids.get(task, of.ids))
        at = np.array([i for i, name in enumerate(of.ids) if name in wanted], dtype=np.int64)
        selected[task] = of.taken(at)
    return selected


class AdapterEvaluator:
    """The recipe's base and its tasks' held-out rows. Nothing is loaded before it is needed.

    rows: of each task, for choosing. stores: held-out stores that are open already.
    UserError when no task has held-out rows, or one has fewer than six rows to be dealt.
    """

    def __init__(self, recipe: Recipe, rows: int, stores: Sequence[Any | None] | None = None) -> None:
        self.recipe = recipe
        if stores is None:
            from mtft.data.store.token_store import open_stores

            stores = open_stores(recipe, self._tokenizer, "eval")
        self._stores = {store.task: store for store in stores if store is not None}
        if not self._stores:
            what = "the merge looks at held-out rows, and no task has any"
            raise UserError(what, where="tasks: eval_data", do="give eval_data, or merge without looking at data")
        key = "eval_data" if recipe.merge is None else recipe.merge.rows_from
        self._seen = self._stores if key == "eval_data" else self._training_stores()
        self._rows = {task: split_rows(_row_count(store), rows) for task, store in self._seen.items()}
        if short := [task for task, parts in self._rows.items() if len(parts["choose"]) < 2]:
            what = f"{short[0]} has fewer than six rows"
            raise UserError(f"{what} that a merge could look at", where=f"tasks.{short[0]}.{key}", do="give more")

    def _training_stores(self) -> dict[str, Any]:
        from mtft.data.store.token_store import open_stores

        stores = open_stores(self.recipe, self._tokenizer, "train")
        return {store.task: store for store in stores if store is not None and store.task in self._stores}

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._stores)

    @cached_property
    def _tokenizer(self) -> Any:
        from mtft.models.loading import load_tokenizer

        return load_tokenizer(self.recipe.model)

    @cached_property
    def model(self) -> Any:
        """The base, on the GPU if there is one."""
        from mtft.models.loading import load_base

        network: Any = load_base(self.recipe.model)
        if torch.cuda.is_available() and self.recipe.model.quantise == "none":
            network = network.to(torch.device("cuda"))
        return network

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def _packable(self) -> bool:
        return packing_refusal(self.model.config, self.model.config._attn_implementation) is None

    def layout(self, *, packing: bool = True) -> BatchLayout:
        from mtft.models.loading import pad_id

        train = self.recipe.train
        packed = packing and train.packing and self._packable
        return BatchLayout(train.rows_at_once, train.max_length, pad_id(self._tokenizer), packed)

    def ids(self, part: str) -> dict[str, list[str]]:
        """Task -> row ids of one part."""
        return {task: self._part(task, part).row_ids for task in self.tasks}

    def _part(self, task: str, part: str) -> RowSubset:
        if part == "rest" and self._seen is not self._stores:
            store = self._stores[task]
            return RowSubset(store, np.unique(store.row_numbers))
        return RowSubset(self._seen[task], self._rows[task][part])

    @contextmanager
    def adapter(self, folder: Path | None) -> Iterator[Any]:
        """The model with a PEFT adapter on it (None: the base alone), in evaluation mode; the base again afterwards."""
        from mtft.models.adapters import load_adapter

        network = self.model if folder is None else load_adapter(self.model, folder)
        try:
            with evaluation_mode(network):
                yield network
        finally:
            if folder is not None:
                network.unload()

    def scores(self, adapter: Path | None, part: str | None = None, tasks: Sequence[str] | None = None) -> Scores:
        """Scores of the base with an adapter, on one part of the rows (None: all)."""
        with self.adapter(adapter) as network:
            return self.scored(self.score_with(network), part, tasks, packing=True)

    def routed_scores(self, folder: Path, part: str | None = None) -> Scores:
        """Scores of the experts in `folder` behind their router (mtft.merge.experts.routed_model), each row routed by
        its prompt.
        """
        from mtft.adapters.routers import ArrowRouter
        from mtft.merge.experts.routed_model import load_routed

        routed = load_routed(self.model, folder)
        by_token = isinstance(routed.router, ArrowRouter)
        score = self.score_with(self.model)

        def score_routed(batch: Batch):
            if not by_token:
                routed.route(batch.input_ids_BT, prompt_mask(batch))
            return score(batch)

        try:
            with evaluation_mode(self.model):
                return self.scored(score_routed, part, None, packing=by_token)
        finally:
            routed.remove()

    def score_with(self, network: Any) -> Callable[[Batch], Any]:
        from mtft.losses.token_scores import token_scores
        from mtft.models.loading import compute_dtype

        dtype = compute_dtype(self.recipe.model)

        def score(batch: Batch):
            lower = dtype != torch.float32
            with torch.autocast(self.device.type, dtype=dtype if lower else torch.bfloat16, enabled=lower):
                return token_scores(network, batch)

        return score

    def scored(self, score, part: str | None, tasks: Sequence[str] | None, *, packing: bool) -> Scores:
        chosen = [task for task in self.tasks if tasks is None or task in tasks]
        stores = [self._stores[task] if part is None else self._part(task, part) for task in chosen]
        return score_tasks(score, stores, self.layout(packing=packing), device=self.device)

    def batches(self, task: str, part: str) -> Iterator[Batch]:
        """Rows of a task, one example a row, as little as one row of max_length together; on the model's device."""
        layout = self.layout(packing=False)
        for piece in eval_batches(
            self._part(task, part),
            self.tasks.index(task),
            micro_batch_tokens=layout.max_length,
            max_length=layout.max_length,
            packing=False,
            pad_id=layout.pad_id,
        ):
            yield piece.batch.to(self.device)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the model's forward."""
        return model_inputs(batch, self.model.config._attn_implementation, packed_ok=self._packable)


def prompt_mask(batch: Batch) -> torch.Tensor:
    """int64 [B, T]: 1 up to the token that predicts the first supervised one. One example a row."""
    supervised_BT = batch.labels_BT != IGNORE
    before_BT = supervised_BT.long().cumsum(dim=1) - supervised_BT.long() == 0
    real_BT = batch.segment_ids_BT != PADDING
    return (before_BT & real_BT).long()
