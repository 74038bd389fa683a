"""Elementwise rules on deltas that never exist as a whole: row blocks rebuilt from factors, pass after pass.

A rule sees the same rows of all D_k at once and returns those rows of the merged W. Order statistics (the k-th largest
|x| of a matrix, or of the whole model) come from a radix selection: one histogram per 16 bits, exact. The merged W has
full rank; the range finder of Halko, Martinsson & Tropp (2011) gives its leading triples without storing it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from mtft.adapters.lora_factors import LoraFactors
from mtft.common.fingerprint import hash_number
from mtft.merge.linalg.core_space import ExplicitBasis, HouseholderBasis, IdentityBasis, MergedCore, too_large

BLOCK_BYTES = 2 << 20
"""All deltas of one block: small enough for the caches (8 MB takes as long or longer, and 20 MB more memory)."""
OVERSAMPLE = 8
POWER = 3
"""Passes of subspace iteration; error / best = 1.007 at 3 on Gaussian factors (1.033 at 1)."""
HELD_BYTES = 16 << 20
"""What is smaller than this (a merged matrix, all values of a selection) is held instead of computed again."""
EXACT_SIDE = 128
"""Up to this smaller side the merged matrix is kept and decomposed exactly: that is cheaper than the passes."""

Rule = Callable[[int, list[np.ndarray]], np.ndarray]
"""(first row, [D_k rows]) -> merged rows."""


class DeltaStream:
    """Row blocks of the unweighted D_k = lefts[k] rights[k], or lefts[k] alone, [m, n].

    Block sizes hang on shapes only, so every pass sees equal bits.
    """

    def __init__(self, lefts: Sequence[np.ndarray], rights: Sequence[np.ndarray] | None = None) -> None:
        self._lefts, self._rights = list(lefts), rights
        self.K = len(self._lefts)
        self.m = self._lefts[0].shape[0]
        self.n = (self._lefts if rights is None else rights)[0].shape[1]
        self.dtype = self._lefts[0].dtype
        rows = BLOCK_BYTES // (4 * self.K * self.n)
        self.rows = max(16, 1 << (rows.bit_length() - 1)) if rows else 16

    @classmethod
    def of_factors(cls, factors: Sequence[LoraFactors], dtype: np.dtype, where: str = "") -> DeltaStream:
        lefts = [(f.scale * f.B_MR).astype(dtype, copy=False) for f in factors]
        for left, f in zip(lefts, factors):
            if not float(np.abs(left).max()) * float(np.abs(f.A_RN).max()) * f.rank < np.finfo(dtype).max:
                raise too_large(where)
        return cls(lefts, [f.A_RN.astype(dtype, copy=False) for f in factors])

    @property
    def size(self) -> int:
        return self.m * self.n

    def __iter__(self) -> Iterator[tuple[int, list[np.ndarray]]]:
        for start in range(0, self.m, self.rows):
            lefts = [left[start : start + self.rows] for left in self._lefts]
            rights = self._rights
            yield start, lefts if rights is None else [B @ A for B, A in zip(lefts, rights)]


def order_statistics(
    passes: Callable[[], Iterable[Sequence[np.ndarray]]], places: Sequence[Sequence[int]], size: int | None = None
) -> list[list[float]]:
    """Order statistics of several channels: values at the `places` (0 = smallest) of each channel's sorted values.

    passes() starts a pass over blocks; block[c] holds more values of channel c, of one float type throughout.
    Exact: 2 passes for float32, 4 for float64; one if `size`, the values in a channel, says that all fit in memory.
    """
    if size is not None and 8 * size * len(places) <= 2 * HELD_BYTES:
        held = _gather(passes(), size)
        for values, wanted in zip(held, places):
            values.partition(sorted(set(wanted)))
        return [[float(values[place]) for place in wanted] for values, wanted in zip(held, places)]
    known: list[list[int]] = [[0] * len(wanted) for wanted in places]  # leading digits found so far
    left = [list(wanted) for wanted in places]  # place among the values with these leading digits
    done, width = 0, 32
    dtype = np.dtype(np.float32)
    while done < width:
        counts: dict[tuple[int, int], np.ndarray] = {}
        for block in passes():
            dtype = block[0].dtype
            width = 8 * dtype.itemsize
            for c, values in enumerate(block):
                keys = _sortable(values)
                for prefix in set(known[c]):
                    chosen = keys if done == 0 else keys[(keys >> (width - done)) == prefix]
                    digits = ((chosen >> (width - done - 16)) & 0xFFFF).astype(np.int64)
                    counts[c, prefix] = counts.get((c, prefix), 0) + np.bincount(digits, minlength=1 << 16)
        for c, wanted in enumerate(left):
            for q, place in enumerate(wanted):
                running = np.cumsum(counts[c, known[c][q]])
                digit = int(np.searchsorted(running, place, side="right"))
                left[c][q] = place - (int(running[digit - 1]) if digit else 0)
                known[c][q] = (known[c][q] << 16) | digit
        done += 16
    return [[_value(key, width, dtype) for key in channel] for channel in known]


def _gather(blocks: Iterable[Sequence[np.ndarray]], size: int) -> list[np.ndarray]:
    """All values of each channel (at most `size`), copied once as the blocks come."""
    held: list[np.ndarray] = []
    filled: list[int] = []
    for block in blocks:
        if not held:
            held, filled = [np.empty(size, values.dtype) for values in block], [0] * len(block)
        for c, values in enumerate(block):
            held[c][filled[c] : filled[c] + values.size] = values.ravel()
            filled[c] += values.size
    return [values[:count] for values, count in zip(held, filled)]


def _sortable(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of the floats."""
    kind = np.uint32 if values.dtype == np.float32 else np.uint64
    raw = np.ascontiguousarray(values).ravel().view(kind)
    top = kind(1) << kind(8 * values.dtype.itemsize - 1)
    return np.where(raw & top, ~raw, raw | top)


def _value(key: int, bits: int, dtype: np.dtype) -> float:
    top = 1 << (bits - 1)
    raw = key ^ top if key & top else key ^ ((1 << bits) - 1)
    return float(np.array([raw], np.uint32 if bits == 32 else np.uint64).view(dtype)[0])


def compress(stream: DeltaStream, rule: Rule, rank: int, label: str = "") -> MergedCore:
    """The merged W = rule(blocks) as its leading `rank` triples and its true squared norm.

    Small matrices are decomposed exactly. `label` seeds the range finder.
    """
    if min(stream.m, stream.n) <= max(EXACT_SIDE, rank + OVERSAMPLE):
        W = np.vstack([rule(start, blocks) for start, blocks in stream])
        return MergedCore(W, IdentityBasis(stream.m), IdentityBasis(stream.n))
    random = np.random.Generator(np.random.Philox(key=hash_number(f"range finder|{label}", "little")))
    V = _orthonormal(random.standard_normal((stream.n, rank + OVERSAMPLE)).astype(stream.dtype))
    rows = _merged_rows(stream, rule)
    for _ in range(POWER):
        Z = np.zeros_like(V)
        for _, W in rows():
            Z += W.T @ (W @ V)
        V = _orthonormal(Z)
    Y, square = np.empty((stream.m, V.shape[1]), stream.dtype), 0.0
    for start, W in rows():
        Y[start : start + len(W)] = W @ V
        square += float(np.einsum("ij,ij->", W, W, dtype=np.float64))
    return MergedCore(Y, IdentityBasis(stream.m), ExplicitBasis(V), total=square)


def _merged_rows(stream: DeltaStream, rule: Rule) -> Callable[[], Iterable[tuple[int, np.ndarray]]]:
    """Passes over the blocks of the merged matrix: held if it is small, else computed in each pass."""
    if stream.size * stream.dtype.itemsize <= HELD_BYTES:
        held = [(start, rule(start, blocks)) for start, blocks in stream]
        return lambda: held
    return lambda: ((start, rule(start, blocks)) for start, blocks in stream)


def _orthonormal(X: np.ndarray) -> np.ndarray:
    return HouseholderBasis(X).apply(np.eye(X.shape[1], dtype=X.dtype))


class BernoulliMask:
    """Bernoulli draws for a matrix of n columns, the same for any split into row blocks.

    Keyed by seed, adapter and module, so the order of the adapters does not matter and no global state is touched.
    """

    def __init__(self, seed: int, name: str, module: str, n: int, key: int | None = None) -> None:
        self._key = hash_number(f"{seed}|{name}|{module}", "little") if key is None else key
        self._n, self._width = n, -(-n // 4) * 4  # Philox makes 4 numbers at a time

    def uniform(self, start: int, rows: int) -> np.ndarray:
        """Uniform numbers in [0, 1) [rows, n] for the rows from `start`."""
        bits = np.random.Philox(key=self._key)
        bits.advance(start * self._width // 4)
        raw = bits.random_raw(rows * self._width).reshape(rows, self._width)[:, : self._n]
        return (raw >> np.uint64(11)) * 2.0**-53
