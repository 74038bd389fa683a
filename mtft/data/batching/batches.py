"""From the plan to the micro-batches of one rank.

The examples of an optimizer step come from the plan, for all ranks together. They are packed once, by lengths alone,
so every world size and every micro-batch size sees the same rows; only then are the rows dealt out. Every rank gets the
same number of micro-batches, which is what keeps ranks from waiting for each other forever; where there are too few
rows, some micro-batches hold padding only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data_mixers.plan.mixture_plan import MixturePlan
from data_mixers.plan.replanned import ReplannedPlan
from mtft.common.errors import UserError
from mtft.data.batching.batch import IGNORE, PADDING, Batch
from mtft.data.batching.packing import pack_evenly
from mtft.data.tokenize.encode import Example

EMPTY_ROW = 8  # positions of a row that holds padding only
EVAL_WINDOW = 4096  # examples that are packed together in evaluation
KEPT = 4  # steps whose content is remembered: the one in training, and what is built ahead of it


class ExampleStore(Protocol):
    """What is needed of a TokenStore."""

    @property
    def task(self) -> str: ...

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def ids(self) -> Sequence[str]: ...

    def example(self, i: int) -> Example: ...


class PlannedStep(NamedTuple):
    """The examples of an optimizer step over all ranks, in the plan's order: task, row of its store, tokens; int64 [n].

    Computed once a step, and the same on every rank.
    """

    task: np.ndarray
    row: np.ndarray
    lengths: np.ndarray


class StepContent(NamedTuple):
    """What an optimizer step holds over all ranks, for each task: [K].

    examples_K  int64;  tokens_K  int64, prompt and response;  share_K  part of the step, in the mixture's unit
    """

    examples_K: np.ndarray
    tokens_K: np.ndarray
    share_K: np.ndarray


class BatchSource:
    """`source[s]`: the micro-batches of optimizer step s for one rank. A map-style dataset of plan.steps items.

    until               number of steps after which the run ends, where that is earlier than the plan does
    micro_batch_tokens  bound on B x T of a micro-batch, padding included
    max_length          longest packed row
    packing             several examples in a row; else one, with rows of similar length together
    unmixed             one task a row and a micro-batch (the step holds the mixture as ever)
    """

    def __init__(
        self,
        stores: Sequence[ExampleStore],
        plan: MixturePlan | ReplannedPlan,
        *,
        micro_batch_tokens: int,
        max_length: int,
        packing: bool,
        pad_id: int,
        unmixed: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        for store in stores:
            _check_fits(store, micro_batch_tokens)
        self.stores, self.plan = list(stores), plan
        self.micro_batch_tokens, self.capacity = micro_batch_tokens, min(max_length, micro_batch_tokens)
        self.packing, self.pad_id, self.unmixed, self.rank, self.world = packing, pad_id, unmixed, rank, world
        self.until: int | None = None
        self._dealt: dict[int, PlannedStep] = {}  # the last steps that were dealt out

    def __len__(self) -> int:
        return self.plan.steps if self.until is None else self.until

    def step(self, s: int) -> PlannedStep:
        """The examples of step s, by asking the plan."""
        task, _, row = self.plan.step(s)
        return self.step_of(task, row)

    def step_of(self, task: np.ndarray, row: np.ndarray) -> PlannedStep:
        """These rows of these tasks with their lengths."""
        lengths = np.empty(len(task), dtype=np.int64)
        for k in np.unique(task):
            lengths[task == k] = self.stores[k].lengths[row[task == k]]
        return PlannedStep(task, row, lengths)

    def layout(self, step: PlannedStep) -> list[list[list[list[int]]]]:
        """[rank][micro-batch][row] -> indices into the arrays of the step. The same on every rank."""
        task, _, lengths = step
        kind = task if self.unmixed else np.zeros_like(task)
        rows: list[list[int]] = []
        for k in np.unique(kind):
            own = np.flatnonzero(kind == k)
            rows += [own[row].tolist() for row in _rows(lengths[own], self.capacity, self.packing)]
        kinds = [int(kind[row[0]]) for row in rows]
        return deal_micro_batches(lengths, rows, self.micro_batch_tokens, self.world, kinds=kinds)

    def padding(self, s: int) -> tuple[int, int]:
        """(real tokens, positions) of step s over all ranks."""
        step = self.step(s)
        return int(step.lengths.sum()), self.positions(step, self.layout(step))

    def positions(self, step: PlannedStep, layout: list[list[list[list[int]]]]) -> int:
        """Positions, padding included, of a step laid out so, over all ranks."""
        return sum(
            len(rows) * max((int(step.lengths[row].sum()) for row in rows), default=EMPTY_ROW)
            for micro_batches in layout
            for rows in micro_batches
        )

    def __getitem__(self, s: int) -> list[Batch]:
        if not 0 <= s < len(self):
            raise IndexError(f"step {s} of {len(self)}")
        step = self.step(s)
        self._dealt[s] = step
        while len(self._dealt) > KEPT:
            del self._dealt[next(iter(self._dealt))]
        dealt = self.layout(step)[self.rank]
        examples = {
            i: (self.stores[step.task[i]].example(int(step.row[i])), int(step.task[i]))
            for rows in dealt
            for indices in rows
            for i in indices
        }
        return [collate([[examples[i] for i in indices] for indices in rows], self.pad_id) for rows in dealt]

    def content(self, s: int) -> StepContent:
        """What step s holds, told from the plan alone."""
        task, _, lengths = self._planned(s)
        examples_K = np.bincount(task, minlength=len(self.stores))
        tokens_K = np.array([int(lengths[task == k].sum()) for k in range(len(self.stores))])
        part_K = tokens_K if self.plan.unit == "tokens" else examples_K
        return StepContent(examples_K, tokens_K, part_K / max(part_K.sum(), 1))

    def names(self, s: int) -> list[dict[str, str]]:
        """Which examples step s holds, by task and id."""
        step = self._planned(s)
        stores = [self.stores[k] for k in step.task]
        return [{"task": store.task, "id": str(store.ids[int(i)])} for store, i in zip(stores, step.row, strict=True)]

    def _planned(self, s: int) -> PlannedStep:
        """A step as it was dealt out: what a mixture decides later never changes it."""
        dealt = self._dealt.get(s)
        return self.step(s) if dealt is None else dealt


class EvalBatch(NamedTuple):
    """A batch, and which examples of the store are in it, in (row, segment) order: int64 [n]."""

    batch: Batch
    examples: np.ndarray


def eval_batches(
    store: ExampleStore,
    task_index: int,
    *,
    micro_batch_tokens: int,
    max_length: int,
    packing: bool,
    pad_id: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[EvalBatch]:
    """Every example of a store exactly once over all ranks; the same number of batches on every rank."""
    _check_fits(store, micro_batch_tokens)
    capacity = min(max_length, micro_batch_tokens)
    for start in range(0, len(store.lengths), EVAL_WINDOW):
        lengths = np.asarray(store.lengths[start : start + EVAL_WINDOW])
        dealt = deal_micro_batches(lengths, _rows(lengths, capacity, packing), micro_batch_tokens, world)
        for rows in dealt[rank]:
            held = np.asarray([start + i for row in rows for i in row], dtype=np.int64)
            batch = collate([[(store.example(start + i), task_index) for i in row] for row in rows], pad_id)
            yield EvalBatch(batch, held)


def deal_micro_batches(
    lengths: np.ndarray, rows: list[list[int]], budget: int, world: int, kinds: Sequence[int] | None = None
) -> list[list[list[list[int]]]]:
    """Rows to micro-batches to ranks: [rank][micro-batch][row]. Rows of different `kinds` share no micro-batch.

    Rows of similar length share a micro-batch, which is as large as `budget` positions allow. If the micro-batches do
    not divide by the ranks, the largest are cut in two until they do; with fewer rows than that, empty ones fill up.
    Largest first, back and forth over the ranks, so that all ranks have about the same to do.
    """
    used = [int(lengths[row].sum()) for row in rows]
    kind = kinds if kinds is not None else [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda r: (kind[r], -used[r], rows[r][0]))
    groups: list[list[int]] = []
    for r in order:
        fits = groups and kind[groups[-1][0]] == kind[r] and (len(groups[-1]) + 1) * used[groups[-1][0]] <= budget
        if fits:
            groups[-1].append(r)
        else:
            groups.append([r])
    while len(groups) % world or not groups:
        widest = max(range(len(groups)), key=lambda g: (len(groups[g]), -g), default=None)
        if widest is None or len(groups[widest]) < 2:
            groups.append([])
            continue
        group = groups[widest]
        groups[widest : widest + 1] = [group[: (len(group) + 1) // 2], group[(len(group) + 1) // 2 :]]
    groups.sort(key=lambda group: -len(group) * used[group[0]] if group else 0)
    ranks: list[list[list[list[int]]]] = [[] for _ in range(world)]
    for position, group in enumerate(groups):
        turn, place = divmod(position, world)
        ranks[place if turn % 2 == 0 else world - 1 - place].append([rows[r] for r in group])
    return ranks


def collate(rows: Sequence[Sequence[tuple[Example, int]]], pad_id: int) -> Batch:
    """A Batch of rows of (example, task). Rows are as long as the longest needs; no row at all gives padding only.

    Padding behind the last example of a row goes on counting its positions: it then belongs to that example for the
    attention mask, which no real token can see, since attention is causal.
    """
    height = max(len(rows), 1)
    width = max((sum(len(example.input_ids) for example, _ in row) for row in rows), default=EMPTY_ROW)
    input_ids = np.full((height, width), pad_id, dtype=np.int64)
    positions = np.broadcast_to(np.arange(width, dtype=np.int64), (height, width)).copy()
    segments = np.full((height, width), PADDING, dtype=np.int32)
    tasks = np.full((height, width), PADDING, dtype=np.int32)
    labels = np.full((height, width), IGNORE, dtype=np.int64)
    for b, row in enumerate(rows):
        start = 0
        for segment, (example, task) in enumerate(row):
            ids, supervised = example
            end = start + len(ids)
            input_ids[b, start:end] = ids
            positions[b, start:] = np.arange(width - start)
            segments[b, start:end] = segment
            tasks[b, start:end] = task
            labels[b, start : end - 1] = np.where(supervised[1:], ids[1:], IGNORE)
            start = end
    token_weights, row_weights = _weights(rows, labels.shape)
    return Batch(
        *(torch.from_numpy(array) for array in (input_ids, positions, segments, tasks, labels)),
        token_weights_BT=None if token_weights is None else torch.from_numpy(token_weights),
        row_weights_BT=None if row_weights is None else torch.from_numpy(row_weights),
    )


def _weights(rows: Sequence[Sequence[tuple[Example, int]]], shape: tuple[int, int]) -> list[np.ndarray | None]:
    """float32 [B, T]: weights of the labels' tokens, and of the rows that the examples are of; None: all are 1."""
    examples = [example for row in rows for example, _ in row]
    of_tokens = np.zeros(shape, np.float32) if any(one.weights is not None for one in examples) else None
    of_rows = np.zeros(shape, np.float32) if any(one.row_weight != 1 for one in examples) else None
    for b, row in enumerate(rows if of_tokens is not None or of_rows is not None else ()):
        start = 0
        for example, _ in row:
            end = start + len(example.input_ids)
            if of_tokens is not None:
                own = example.supervised if example.weights is None else example.weights
                of_tokens[b, start : end - 1] = own[1:]
            if of_rows is not None:
                of_rows[b, start:end] = example.row_weight
            start = end
    return [of_tokens, of_rows]


def _rows(lengths: np.ndarray, capacity: int, packing: bool) -> list[list[int]]:
    return pack_evenly(lengths, capacity) if packing else [[i] for i in range(len(lengths))]


def _check_fits(store: ExampleStore, micro_batch_tokens: int) -> None:
    longest = int(np.max(store.lengths, initial=0))
    if longest > micro_batch_tokens:
        what = f"the longest example of task {store.task} has {longest} tokens, more than one micro-batch may hold"
        do = f"raise it to {longest} or more, or lower train.max_length to {micro_batch_tokens}"
        raise UserError(what, where="train.micro_batch_tokens", do=do)
