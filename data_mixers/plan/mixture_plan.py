"""MixturePlan: which row of which task comes i-th. A pure function of an index.

No state but one integer (the step); the same for any number of ranks, workers and restarts, and for any order in which
the tasks are named (ties go by name). With unit="examples" every task has in each step exactly floor or ceil of its
even share, spread evenly inside the step, so that any contiguous micro-batch is near the mixture too
(example_order.py); with unit="tokens" the streams of the tasks are merged by tokens (token_order.py). Each epoch of a
task has a fresh order (permutation.py). The shares may change over the run (schedule.py), and a step may hold one task
only (style="alternating").

Compare `datasets.interleave_datasets`: shares realized only in the mean, no caps on repeats, resume in O(rows).
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_mixers.common.errors import MixError
from data_mixers.mixture.mixture import Mixture, check_names, size_array
from data_mixers.plan.epoch_caps import OnCap
from data_mixers.plan.example_order import ExampleOrder
from data_mixers.plan.plan_spec import PlanSpec, Rows, max_visits
from data_mixers.plan.quota import Ints
from data_mixers.plan.realized import realized_table
from data_mixers.plan.schedule import MixtureSchedule
from data_mixers.plan.token_order import TokenBalancedOrder

VERSION = 2  # of this algorithm; part of the fingerprint
CACHED_BLOCKS = 8


class MixturePlan:
    """The order of a whole run of K tasks in S steps.

    Args:
        mixture: shares asked, or a schedule of them (`.mixture` is then its mean).
        sizes: rows of each task ({name: N_k}, or [K] in the mixture's order).
        steps: S.
        batch: G, examples in an optimizer step over all ranks (unit="examples"), or tokens (unit="tokens").
        seed: of the tasks' orders.
        max_epochs: how often a row may be seen ({name: x} or one number).
        on_cap: what happens to shares beyond max_epochs: "error", or "redistribute" the excess to the other tasks.
        unit: what the shares count.
        lengths: with unit="tokens", tokens of each row ({name: [N_k]}).
        style: "mixed", or "alternating": one task a step, as many steps of each as its share says.
        start: visits already made of each task [K] (a plan that follows another one goes on in its epochs).
        carry: rows, or tokens, that the other plan still owes each task [K], sum 0.

    Raises:
        MixError: an unknown option, a share without rows, a cap that the shares exceed (on_cap="error").
    """

    def __init__(
        self,
        mixture: Mixture | MixtureSchedule,
        sizes: Mapping[str, int] | Sequence[int],
        *,
        steps: int,
        batch: int,
        seed: int,
        max_epochs: Mapping[str, float] | float | None = None,
        on_cap: OnCap = "error",
        unit: Literal["examples", "tokens"] = "examples",
        lengths: Mapping[str, ArrayLike] | Sequence[ArrayLike] | None = None,
        style: Literal["mixed", "alternating"] = "mixed",
        start: Sequence[int] | None = None,
        carry: Sequence[float] | None = None,
    ) -> None:
        if steps < 1 or batch < 1:
            raise MixError(f"steps {steps} and batch {batch}", do="both at least 1")
        for key, value, known in (
            ("on_cap", on_cap, ("error", "redistribute")),
            ("unit", unit, ("examples", "tokens")),
            ("style", style, ("mixed", "alternating")),
        ):
            if value not in known:
                raise MixError(f"{key} {value!r}", do=f"use {' or '.join(known)}")
        self.schedule = mixture if isinstance(mixture, MixtureSchedule) else None
        self.mixture = mixture.mean(steps) if isinstance(mixture, MixtureSchedule) else mixture
        self.names, self.style = mixture.names, style
        self.steps, self.batch, self.seed, self.unit = int(steps), int(batch), int(seed), unit
        self.size_K = size_array(self.names, sizes).astype(np.int64)
        self.start_K = np.zeros(len(self.names), dtype=np.int64) if start is None else np.asarray(start, dtype=np.int64)
        self.carry = None if carry is None else [float(owed) for owed in carry]
        for name, size, share in zip(self.names, self.size_K, self.mixture.shares, strict=True):
            if size == 0 and share > 0:
                raise MixError(
                    f"task {name} has no rows and a share of {share:.6g}", do="give it rows, or a share of 0"
                )
        self.max_visits_K = max_visits(max_epochs, self.names, self.size_K)
        self._spec = PlanSpec(
            self.names, self.mixture, self.schedule, self.steps, self.batch, self.seed, style,
            self.size_K, self.start_K, self.carry, self.max_visits_K,
        )  # fmt: skip
        self._blocks: OrderedDict[int, Rows] = OrderedDict()
        self._order: ExampleOrder | TokenBalancedOrder
        if unit == "examples":
            self._order = ExampleOrder(self._spec, on_cap)
            return
        if lengths is None:
            raise MixError('unit "tokens" needs the lengths of all rows', do="pass lengths={task: tokens of each row}")
        if isinstance(lengths, Mapping):
            check_names(tuple(lengths), self.names)
            lengths = [lengths[name] for name in self.names]
        token_counts = [np.asarray(length, dtype=np.int64) for length in lengths]
        self._order = TokenBalancedOrder(self._spec, token_counts, on_cap)

    # ---- index -> row

    def __len__(self) -> int:
        """Rows in the whole run."""
        return self.step_range(self.steps - 1)[1]

    @cached_property
    def rows_K(self) -> Ints:
        """Rows of each task [K] in the whole run."""
        return self.counts(self.steps)

    def step(self, s: int, rank: int = 0, world: int = 1) -> Rows:
        """(task, epoch, row), int64, for the slots rank, rank + world, ... of step s (0 <= s < S)."""
        if not 0 <= s < self.steps or not 0 <= rank < world:
            raise IndexError(f"step {s} of {self.steps}, rank {rank} of {world}")
        first, last = self.step_range(s)
        return self.locate(np.arange(first + rank, last, world))

    def step_range(self, s: int) -> tuple[int, int]:
        """Indices [first, last) of step s."""
        if isinstance(self._order, TokenBalancedOrder):
            return self._order.step_range(s)
        return s * self.batch, (s + 1) * self.batch

    def locate(self, i: ArrayLike) -> Rows:
        """(task, epoch, row) of indices i (any order, any shape flattened); each int64 of the same length."""
        index = np.asarray(i, dtype=np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"indices {index.min()} to {index.max()} of a plan with {len(self)} rows")
        size = self._order.block_rows
        block = index // size
        if len(index) and np.all(block == block[0]):
            task, epoch, row = self._block(int(block[0]))
            inside = index - int(block[0]) * size
            return task[inside], epoch[inside], row[inside]
        out = np.empty((3, len(index)), dtype=np.int64)
        order = np.argsort(block, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(block[order])) + 1):
            if len(part):
                number = int(block[part[0]])
                out[:, part] = np.stack(self._block(number))[:, index[part] - number * size]
        return out[0], out[1], out[2]

    def _block(self, number: int) -> Rows:
        """The rows of a block; the last few blocks are cached."""
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        block = self._blocks[number] = self._spec.rows_of(*self._order.block(number))
        if len(self._blocks) > CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return block

    # ---- what it amounts to

    def counts(self, s: int) -> Ints:
        """Rows of each task [K] in the steps before s (without `start`)."""
        return self._order.counts(s)

    def amounts(self, s: int) -> Ints:
        """Rows, or with unit="tokens" tokens, of each task [K] in the steps before s."""
        return self._order.amounts(s)

    def owed(self, s: int) -> NDArray[np.float64]:
        """Rows, or with unit="tokens" tokens, [K] that each task is behind (or ahead: < 0) of its exact share after s
        steps. ValueError by tokens where the shares change or tasks alternate."""
        return self._order.owed(s)

    def table(self) -> list[dict[str, Any]]:
        """One dict per task: asked and realized share (in `unit`), rows, tokens (unit tokens only), size, epochs."""
        return realized_table(self)

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this plan this plan."""
        return {
            "version": VERSION,
            "names": list(self.names),
            "sizes": self.size_K.tolist(),
            "shares": [repr(float(share)) for share in self.mixture.shares],
            "rows": self.rows_K.tolist(),
            "steps": self.steps,
            "batch": self.batch,
            "seed": self.seed,
            "unit": self.unit,
            "lengths": self._order.digest,
            "start": self.start_K.tolist(),
            "schedule": None
            if self.schedule is None
            else [[at, *map(repr, m.shares.tolist())] for at, m in self.schedule.stops],
            "style": self.style,
            "carry": self.carry,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of `identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
