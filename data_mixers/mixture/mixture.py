"""A mixture: the share of each task, by name; and the usual priors.

    natural   p_k ~ N_k           (N_k = rows or tokens of task k)
    tempered  p_k ~ N_k ** a      (a = 1: natural, a = 0: uniform; others write the exponent as 1/T)
    uniform   p_k = 1/K

Which shares are allowed is in bounds.py; how a mixture is played exactly is in plan/.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from data_mixers.common.csv_tables import read_shares_csv, read_shares_yaml
from data_mixers.common.errors import MixError
from data_mixers.common.suggest import closest_match

SUM_TOLERANCE = 5e-3  # published tables are rounded: RegMix's rows add up to 0.997 ... 1.003

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Mixture:
    """Named shares [K], float64, >= 0, sum 1. A share of 0 is legal: the task is known and not drawn."""

    names: tuple[str, ...]
    shares: Floats

    def __post_init__(self) -> None:
        names, shares = tuple(self.names), check_shares(self.names, self.shares, where=None)
        shares.setflags(write=False)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "shares", shares)

    @classmethod
    def of(cls, shares: Mapping[str, float]) -> Mixture:
        """Mixture.of({"sql": 0.4, "sum": 0.6})."""
        return cls(tuple(shares), np.array(list(shares.values()), dtype=np.float64))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mixture) and self.names == other.names and np.array_equal(self.shares, other.shares)

    def __hash__(self) -> int:
        return hash((self.names, self.shares.tobytes()))

    def __getitem__(self, name: str) -> float:
        return float(self.shares[self.names.index(name)])

    def __len__(self) -> int:
        return len(self.names)

    def as_dict(self) -> dict[str, float]:
        return {name: float(share) for name, share in zip(self.names, self.shares, strict=True)}

    def over(self, names: Sequence[str], *, where: str | None = None) -> Mixture:
        """The same shares in the order of `names`. Error (with the nearest name) where the two sets differ."""
        check_names(self.names, names, where=where)
        return Mixture(tuple(names), np.array([self[name] for name in names]))

    def kl(self, other: Mixture) -> float:
        """KL(self || other) in nats; infinite where other has a share of 0 and self has not."""
        q_K = other.over(self.names).shares
        used_K = self.shares > 0
        if np.any(q_K[used_K] == 0):
            return math.inf
        return max(0.0, float(np.sum(self.shares[used_K] * np.log(self.shares[used_K] / q_K[used_K]))))

    def l1(self, other: Mixture) -> float:
        """Sum of |p - q|: between 0 (equal) and 2 (no task in common)."""
        return float(np.abs(self.shares - other.over(self.names).shares).sum())

    def epochs(self, sizes: Mapping[str, float] | ArrayLike, total: float) -> Floats:
        """Passes over each task [K] in a run of `total` (same unit as sizes). Inf: a share of an empty task."""
        size_K = size_array(self.names, sizes)
        asked_K = self.shares * float(total)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(asked_K > 0, asked_K / size_K, 0.0)

    def to_yaml(self, path: str | Path, *, comment: str = "") -> None:
        """Write `shares: {name: share}`; `comment` lines go on top. Floats are written in full (repr)."""
        lines = [f"# {line}" for line in comment.splitlines()] + ["shares:"]
        lines += [f"  {_yaml_key(name)}: {share!r}" for name, share in self.as_dict().items()]
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")  # whole or not at all
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(aside, path)

    @classmethod
    def from_yaml(cls, path: str | Path, names: Sequence[str] | None = None) -> Mixture:
        """Read `shares: {name: share}`, or the plain mapping (YAML, JSON). `names`: that order, no other."""
        return _from_pairs(read_shares_yaml(path), names, where=str(path))

    @classmethod
    def from_csv(cls, path: str | Path, names: Sequence[str] | None = None) -> Mixture:
        """Read a CSV: one row under a header of names, or two columns name,share."""
        return _from_pairs(read_shares_csv(path), names, where=str(path))


def _yaml_key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "").replace(".", "")
    if (
        plain.isalnum()
        and name[0].isalpha()
        and name.lower() not in {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
    ):
        return name
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _from_pairs(pairs: list[tuple[str, float]], order: Sequence[str] | None, where: str) -> Mixture:
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise MixError(f"task named twice: {', '.join(repeated)}", where=where, do="keep one share per task")
    mixture = Mixture(tuple(names), check_shares(names, [share for _, share in pairs], where=where))
    return mixture if order is None else mixture.over(order, where=where)


def check_shares(names: Sequence[str], shares: ArrayLike, *, where: str | None) -> Floats:
    """A copy of shares [K] with sum 1 exactly renormalised; MixError for anything that is not a mixture."""
    share_K = np.array(shares, dtype=np.float64)
    if share_K.ndim != 1 or len(share_K) != len(names) or not len(names):
        raise MixError(
            f"{len(names)} task names with shares of shape {share_K.shape}", where=where, do="one share per task"
        )
    if len(set(names)) != len(names):
        raise MixError(f"a task is named twice in {', '.join(names)}", where=where, do="use each name once")
    for name, share in zip(names, share_K, strict=True):
        if not math.isfinite(share) or share < 0:
            raise MixError(f"the share of {name} is {share}", where=where, do="shares are numbers >= 0")
    total = float(share_K.sum())
    if abs(total - 1) > SUM_TOLERANCE:
        raise MixError(f"the shares add up to {total:.6g}, not 1", where=where, do="make them add up to 1")
    if where is not None and abs(total - 1) > 1e-6:
        warnings.warn(f"{where}: the shares add up to {total:.6f}; renormalised", stacklevel=3)
    return share_K if abs(total - 1) < 1e-12 else share_K / total  # rounding errors are left: reading back is exact


def check_names(got: Sequence[str], wanted: Sequence[str], *, where: str | None = None, kind: str = "task") -> None:
    """MixError unless both hold the same names: says which is unknown (with the nearest known one) or missing.
    kind: what the names are of."""
    problems = []
    for name in got:
        if name not in wanted:
            near = closest_match(name, wanted)
            problems.append(f"unknown {kind} {name!r}" + (f" (did you mean {near!r}?)" if near else ""))
    problems += [f"no share for task {name!r}" for name in wanted if name not in got]
    if problems:
        raise MixError("; ".join(problems), where=where, do=f"the {kind}s are: {', '.join(wanted)}")


def check_known(names: Iterable[str], known: Sequence[str], *, where: str | None = None, kind: str = "task") -> None:
    """MixError for a name that is not among the known ones."""
    check_names([*known, *(name for name in names if name not in known)], known, where=where, kind=kind)


def size_array(names: Sequence[str], sizes: Mapping[str, float] | ArrayLike) -> Floats:
    """Sizes [K] in the order of names, from a mapping (names checked) or a sequence of K numbers >= 0."""
    if isinstance(sizes, Mapping):
        check_names(tuple(sizes), names)
        sizes = [sizes[name] for name in names]
    size_K = np.array(sizes, dtype=np.float64)
    if size_K.shape != (len(names),) or not np.all(np.isfinite(size_K)) or np.any(size_K < 0):
        raise MixError(
            f"sizes {size_K.tolist()} of tasks {', '.join(names)}",
            do="one finite size >= 0 per task; a streaming set needs a row limit or a token store",
        )
    return size_K


def limit_array(limit: Mapping[str, float] | float, names: Sequence[str]) -> Floats:
    """[K]: one number for every task, or those of a mapping (inf for a task that it does not name)."""
    return np.array([float(limit.get(name, np.inf) if isinstance(limit, Mapping) else limit) for name in names])


def tempered(sizes: Mapping[str, float], exponent: float) -> Mixture:
    """p_k ~ N_k ** exponent (1 = natural, 0 = uniform over non-empty tasks; others write 1/T)."""
    size_K = size_array(tuple(sizes), sizes)
    if not np.any(size_K > 0):
        raise MixError("all tasks are empty", do="give at least one task with rows")
    # Through the largest size, so that no power overflows.
    weight_K = np.where(size_K > 0, (size_K / size_K.max()) ** exponent, 0.0)
    return Mixture(tuple(sizes), weight_K / weight_K.sum())


def natural(sizes: Mapping[str, float]) -> Mixture:
    """p_k ~ N_k."""
    return tempered(sizes, 1.0)


def uniform(names: Sequence[str]) -> Mixture:
    """p_k = 1/K."""
    return Mixture(tuple(names), np.full(len(names), 1.0 / len(names)))
