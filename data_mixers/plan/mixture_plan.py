"""MixturePlan: which row of which task comes i-th. A pure function of an index.

No state but one integer (the step); the same for any number of ranks, workers and restarts, and for any order in which
the tasks are named (ties go by name). Per step every task has
exactly floor or ceil of its even share (quota.py), spread evenly inside the step, so that any contiguous micro-batch is
near the mixture too; each epoch of a task has a fresh order (feistel.py). With unit="tokens" the streams of the tasks
are merged by tokens instead (token_merge.py). The shares may change over the run (schedule.py, varying.py), and a step
may hold one task only (style="alternating").

Compare `datasets.interleave_datasets`: shares realised only in the mean, no caps on repeats, resume in O(rows).
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
from data_mixers.plan.permutation import half_bits, permute, round_keys, task_word
from data_mixers.plan.quota import Ints, StepQuota, capped_shares, interleave, largest_remainder
from data_mixers.plan.schedule import MixtureSchedule
from data_mixers.plan.token_order import TokenBalancedOrder
from data_mixers.plan.varying_quota import VaryingQuota, capped_over_time

VERSION = 2  # of this algorithm; part of the fingerprint
BLOCK_ROWS = 65536  # rows whose order is computed together
Rows = tuple[Ints, Ints, Ints]  # task, epoch, row: int64, one entry per slot


class MixturePlan:
    """The order of a whole run.

    mixture: shares asked, or a schedule of them (`.mixture` is then its mean). sizes: rows of each task ({name: N_k},
    or [K] in the mixture's order).
    steps S; batch G: examples in an optimizer step over all ranks (unit="examples") or tokens (unit="tokens", which
    needs lengths: {name: tokens of each row [N_k]}).
    max_epochs: how often a row may be seen ({name: x} or one number); on_cap: "error" or "redistribute".
    style: "mixed", or "alternating": one task a step, as many steps of each as its share says.
    start: visits already made of each task [K] (a plan that follows another one goes on in its epochs); carry: rows, or
    tokens, that the other plan still owes each task [K], sum 0.
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
        on_cap: Literal["error", "redistribute"] = "error",
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
        for name, size, share in zip(self.names, self.size_K, self.mixture.shares, strict=True):
            if size == 0 and share > 0:
                raise MixError(
                    f"task {name} has no rows and a share of {share:.6g}", do="give it rows, or a share of 0"
                )
        self._words = np.array([task_word(name) for name in self.names], dtype=np.uint64)
        self._half = half_bits(np.maximum(self.size_K, 1))
        self._max_rows_K = self._caps(max_epochs)
        self._blocks: OrderedDict[int, Rows] = OrderedDict()
        self._merge: TokenBalancedOrder | None = None
        self.carry = None if carry is None else [float(owed) for owed in carry]
        if unit == "examples":
            self._quota = self._count(on_cap)
            self._block_steps = min(max(1, BLOCK_ROWS // self.batch), StepQuota.BLOCK)
        else:
            if lengths is None:
                raise MixError(
                    'unit "tokens" needs the lengths of all rows', do="pass lengths={task: tokens of each row}"
                )
            if isinstance(lengths, Mapping):
                check_names(tuple(lengths), self.names)
                lengths = [lengths[name] for name in self.names]
            self._merge = TokenBalancedOrder(self, [np.asarray(length, dtype=np.int64) for length in lengths], on_cap)

    def _count(self, on_cap: Literal["error", "redistribute"]) -> StepQuota | VaryingQuota:
        """Exact counts of every step: of rows, or of steps (`_seat` rows each) when tasks alternate."""
        self._seat = self.batch if self.style == "alternating" else 1
        seats = self.batch // self._seat
        limit_K = np.where(np.isinf(self._max_rows_K), np.inf, np.floor((self._max_rows_K - self.start_K) / self._seat))
        # In the order of the names: ties then do not depend on the order in which the tasks were given.
        self._order = np.argsort(np.array(self.names))
        limit_K = limit_K[self._order]
        total = self.steps * seats
        options = {
            "on_cap": on_cap,
            "names": [self.names[k] for k in self._order],
            "describe": "rows" if self._seat == 1 else f"steps of {self._seat} rows",
        }
        if self.schedule is None and self.carry is None:
            share_K = capped_shares(self.mixture.shares[self._order], limit_K, total, **options)
            return StepQuota(largest_remainder(share_K * total, total), self.steps)
        share_SK = (
            np.tile(self.mixture.shares, (self.steps, 1)) if self.schedule is None else self.schedule.shares(self.steps)
        )[:, self._order]
        owed_K = None if self.carry is None else np.array(self.carry)[self._order] / self._seat
        free_K = limit_K if owed_K is None else limit_K - np.maximum(owed_K, 0)
        return VaryingQuota(capped_over_time(share_SK, free_K, total, **options), seats, owed_K)

    def _as_given(self, of_K: NDArray[Any]) -> NDArray[Any]:
        """What the quota says of the tasks in the order of their names, in the order in which they were given."""
        out = np.empty_like(of_K)
        out[self._order] = of_K
        return out

    def _caps(self, max_epochs: Mapping[str, float] | float | None) -> NDArray[np.float64]:
        if max_epochs is None:
            return np.full(len(self.names), np.inf)
        if isinstance(max_epochs, Mapping):
            unknown = [name for name in max_epochs if name not in self.names]
            if unknown:
                check_names([*self.names, *unknown], self.names, where="max_epochs")
            epochs_K = np.array([float(max_epochs.get(name, np.inf)) for name in self.names])
        else:
            epochs_K = np.full(len(self.names), float(max_epochs))
        with np.errstate(invalid="ignore"):
            return np.nan_to_num(np.floor(epochs_K * self.size_K + 1e-9), nan=0.0, posinf=np.inf)

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
        if self._merge is not None:
            return int(self._merge.bounds[s]), int(self._merge.bounds[s + 1])
        return s * self.batch, (s + 1) * self.batch

    def locate(self, i: ArrayLike) -> Rows:
        """(task, epoch, row) of indices i (any order, any shape flattened); each int64 of the same length."""
        index = np.asarray(i, dtype=np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"indices {index.min()} to {index.max()} of a plan with {len(self)} rows")
        size = self._block_rows()
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

    def rows_of(self, task: Ints, visit: Ints) -> Rows:
        """(task, epoch, row) of the visit-th row drawn from each task."""
        if not len(task):
            return task, visit, visit.copy()
        size = self.size_K[task]
        epoch, position = np.divmod(visit, size)
        pairs, which = np.unique(task * (int(epoch.max()) + 1) + epoch, return_inverse=True)
        pair_task, pair_epoch = np.divmod(pairs, int(epoch.max()) + 1)
        keys = round_keys(self.seed, self._words[pair_task], pair_epoch)[:, which]
        return task, epoch, permute(position, size, self._half[task], keys)

    def _block_rows(self) -> int:
        return TokenBalancedOrder.BLOCK if self._merge is not None else self._block_steps * self.batch

    def _block(self, number: int) -> Rows:
        """The rows of a block of steps; the last few blocks are kept."""
        if number in self._blocks:
            self._blocks.move_to_end(number)
            return self._blocks[number]
        if self._merge is not None:
            block = self.rows_of(*self._merge.block(number))
        else:
            first = number * self._block_steps
            last = min(first + self._block_steps, self.steps)
            n_SK = self._seat * self._quota.rows(first, last)
            task, visit = interleave(n_SK, (self.start_K + self.counts(first))[self._order])
            block = self.rows_of(self._order[task], visit)
        self._blocks[number] = block
        if len(self._blocks) > 8:
            self._blocks.popitem(last=False)
        return block

    # ---- what it amounts to

    def counts(self, s: int) -> Ints:
        """Rows of each task [K] in the steps before s (without `start`)."""
        return self._merge.counts(s) if self._merge is not None else self._seat * self._as_given(self._quota.counts(s))

    def amounts(self, s: int) -> Ints:
        """Rows, or with unit="tokens" tokens, of each task [K] in the steps before s."""
        return self._merge.tokens(s) if self._merge is not None else self.counts(s)

    def owed(self, s: int) -> NDArray[np.float64]:
        """Rows, or with unit="tokens" tokens, [K] that each task is behind (or ahead: < 0) of its exact share after s
        steps. ValueError by tokens where the shares change or tasks alternate."""
        if self._merge is not None:
            return self._merge.owed(s)
        return self._seat * self._as_given(self._quota.exact(s) - self._quota.counts(s))

    def table(self) -> list[dict[str, Any]]:
        """One dict per task: asked and realised share (in `unit`), rows, tokens (unit tokens only), size, epochs."""
        amount_K = self.amounts(self.steps)
        realised_K = amount_K / amount_K.sum()
        rows = []
        for k, name in enumerate(self.names):
            rows.append(
                {
                    "task": name,
                    "asked": float(self.mixture.shares[k]),
                    "realised": float(realised_K[k]),
                    "unit": self.unit,
                    "rows": int(self.rows_K[k]),
                    "tokens": int(amount_K[k]) if self._merge is not None else None,
                    "size": int(self.size_K[k]),
                    "epochs": float(self.rows_K[k] / self.size_K[k]) if self.size_K[k] else 0.0,
                }
            )
        return rows

    # ---- resume

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this plan this plan: resume compares it field by field."""
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
            "lengths": self._merge.digest if self._merge is not None else None,
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

    def state(self, step: int) -> dict[str, Any]:
        """All there is to save: JSON-serialisable."""
        return {"step": int(step), "fingerprint": self.fingerprint, "plan": self.identity}

    def resume(self, state: Mapping[str, Any]) -> int:
        """The step to go on with; MixError naming the fields that differ where the state is another plan's."""
        if state["fingerprint"] != self.fingerprint:
            then, now = state["plan"], self.identity
            differs = [
                f"{key}: {_short(then.get(key))} then, {_short(now[key])} now"
                for key in now
                if then.get(key) != now[key]
            ]
            hint = (
                "; another number of steps is another order of rows"
                if any(d.startswith("steps") for d in differs)
                else ""
            )
            raise MixError(
                f"the checkpoint was made with another plan ({'; '.join(differs)}){hint}",
                do="use the same tasks, mixture, steps, batch and seed; or start over",
            )
        return int(state["step"])


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
