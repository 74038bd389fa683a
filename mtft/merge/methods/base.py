"""What a merge method gets and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass, field, fields
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from mtft.adapters.lora_factors import LoraFactors
from mtft.common.errors import MergeError
from mtft.merge.linalg.core_space import CoreSpace, MergedCore, to_core
from mtft.recipe.method_options import check_options

Share = Annotated[float, Field(gt=0, le=1)]
Scope = Literal["module", "global"]


@dataclass(frozen=True)
class ModuleInputs:
    """One module of the adapters that have it (weight != 0, B != 0), ready for any kind of method."""

    module: str
    names: tuple[str, ...]
    weights_K: np.ndarray
    factors: tuple[LoraFactors, ...]
    dtype: np.dtype
    seed: int = 0
    rank_cap: int = 0
    """The largest rank that the export may ask for; a streamed method computes no more."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[0].B_MR.shape[0], self.factors[0].A_RN.shape[1]

    @cached_property
    def core(self) -> CoreSpace:
        """The weighted deltas w_k D_k in core space."""
        labels = {"names": self.names, "module": self.module, "seed": self.seed}
        return to_core(self.factors, self.weights_K, self.dtype, **labels)


ModulePass = Callable[[], Iterator[ModuleInputs]]
"""A fresh pass over all modules that this method merges."""


@dataclass(frozen=True)
class MergeMethod:
    """A rule that merges one module. A subclass declares its options as fields, checked by their annotations.

    `space`: `core` (exact on cores), `dense` (elementwise, streamed), `factors` (needs A and B themselves).
    `where`: the key that the options stand under, for error messages.
    """

    where: InitVar[str] = field(default="options", kw_only=True)
    space: ClassVar[str]
    default_rank: ClassVar[str | None] = None
    """Rank policy that the name stands for, used when the caller leaves rank at `auto`."""
    label: ClassVar[str | None] = None
    """What merge.json calls a method that has no name in METHODS."""

    def __post_init__(self, where: str) -> None:
        check_options(self, where, error=MergeError)

    def describe(self) -> dict[str, object]:
        """The options, for merge.json."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def survey(self, modules: ModulePass) -> object:
        """Facts about all modules together that `merge` needs (picklable). Most methods need none."""
        return None

    def merge(self, parts: ModuleInputs, seen: object = None) -> MergedCore:
        raise NotImplementedError


class CoreSpaceMethod(MergeMethod):
    """A method that sees only cores."""

    space = "core"

    def merge(self, parts: ModuleInputs, seen: object = None) -> MergedCore:
        return self.merge_core(parts.core, seen)

    def merge_core(self, core: CoreSpace, seen: object = None) -> MergedCore:
        return MergedCore(self.rule(core), core.rows, core.cols)

    def rule(self, core: CoreSpace) -> np.ndarray:
        """The merged core from core.cores."""
        raise NotImplementedError
