"""What a merge will do, checked before any tensor is read: adapters that fit, weights, one method per module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mtft.adapters.base_identity import recorded_base
from mtft.adapters.lora_factors import AdapterLayout, LoraAdapter
from mtft.common.errors import MergeError
from mtft.common.fingerprint import content_hash
from mtft.merge.methods import make_method
from mtft.merge.methods.base import MergeMethod

_QUANTISED = re.compile(r"[-_](unsloth[-_])?(bnb[-_])?(4bit|8bit|nf4|int4|int8|gptq|awq)([-_].*)?$", re.IGNORECASE)


@dataclass(frozen=True)
class ModulePlan:
    """How one module is merged. `method`: index into Plan.methods; `rank`: a per-module limit, or None."""

    name: str
    layout: AdapterLayout  # r is the sum of the ranks
    method: int
    weights_K: np.ndarray
    rank: int | None


@dataclass(frozen=True)
class MergePlan:
    """The whole merge. Plain data: it travels to worker processes."""

    adapters: list[LoraAdapter]
    methods: list[MergeMethod]
    modules: list[ModulePlan]
    weights_K: np.ndarray  # where no per-module rule changes them
    scale: float
    precision: str  # of the maths
    seed: int

    @property
    def layouts(self) -> dict[str, AdapterLayout]:
        """{module: its layout}, in the order in which the modules are merged."""
        return {module.name: module.layout for module in self.modules}

    def dtype_of(self, module: ModulePlan) -> np.dtype:
        """auto: fp64 in core space, where it costs nothing; fp32 for dense passes, the peers' precision."""
        dense = self.methods[module.method].space == "dense"
        return np.dtype(np.float32 if self.precision == "fp32" or (self.precision == "auto" and dense) else np.float64)


def check_together(adapters: Sequence[LoraAdapter], *, allow_base_mismatch: bool = False) -> list[str]:
    """Do these adapters belong to one base? Returns warnings; MergeError if they can't be added up."""
    _check_modules(adapters)
    first, warnings = adapters[0], []
    for other in adapters[1:]:
        warnings += _base_warnings(first, other, f"{first.path} and {other.path}", allow_base_mismatch)
    _check_base_copies(adapters)
    hashes: dict[str, str] = {}
    for adapter in adapters:
        if adapter.sha256 in hashes:
            warnings.append(f"{adapter.name} and {hashes[adapter.sha256]} hold the same weights")
        hashes.setdefault(adapter.sha256, adapter.name)
    if len(adapters) > 1 and not set.intersection(*(set(adapter.modules) for adapter in adapters)):
        warnings.append("no module is common to all adapters")
    return warnings


def _check_modules(adapters: Sequence[LoraAdapter]) -> None:
    """A module has one shape and kind in all adapters that have it, and all store it the same way round."""
    seen: dict[str, tuple[AdapterLayout, LoraAdapter]] = {}
    for adapter in adapters:
        if adapter.settings.fan_in_fan_out != adapters[0].settings.fan_in_fan_out:
            raise _other_base("fan_in_fan_out differs", adapters[0], adapter)
        for module, b in adapter.modules.items():
            a, owner = seen.setdefault(module, (b, adapter))
            if (a.m, a.n, a.kind) != (b.m, b.n, b.kind):
                what = f"{module} is {a.m} x {a.n} ({a.kind}) in one and {b.m} x {b.n} ({b.kind}) in the other"
                raise _other_base(what, owner, adapter)


def _other_base(what: str, one: LoraAdapter, other: LoraAdapter) -> MergeError:
    return MergeError(what, where=f"{one.path} and {other.path}", do="merge adapters of the same base")


def _base_warnings(first: LoraAdapter, other: LoraAdapter, where: str, allow: bool) -> list[str]:
    def identity(adapter: LoraAdapter) -> tuple[str | None, str]:
        base = adapter.settings.base
        return base.rstrip("/") if base else None, adapter.settings.revision or "main"

    (base_a, revision_a), (base_b, revision_b) = identity(first), identity(other)
    one, two = recorded_base(first.path), recorded_base(other.path)
    differ = one.differs(two) if one is not None and two is not None else None
    if differ is False:  # the same weights, wherever they lay when the adapters were trained
        return []
    if base_a is None or base_b is None:
        return [] if base_a == base_b else [f"{where}: one of them does not name its base"]
    if (base_a, revision_a) == (base_b, revision_b) and not differ:
        return []
    if base_a != base_b and _QUANTISED.sub("", base_a) == _QUANTISED.sub("", base_b):
        return [f"bases {base_a} and {base_b} differ in precision"]
    how = "differ in their weights" if differ else "differ"
    what = f"the bases {how}: {base_a!r} ({revision_a}) and {base_b!r} ({revision_b})"
    if allow:
        return [what]
    raise MergeError(
        what,
        where=where,
        do="merge adapters of one base; if it is the same model by two names: merge.allow_base_mismatch: true in a "
        "recipe, or allow_base_mismatch=True of merge_adapters",
    )


def _check_base_copies(adapters: Sequence[LoraAdapter]) -> None:
    """PEFT stores the frozen base weight beside embedding factors: equal in all adapters of one base."""
    seen: dict[str, tuple[str, LoraAdapter]] = {}
    for adapter in adapters:
        for key in adapter.base_copies:
            digest = content_hash(np.ascontiguousarray(adapter.read(key, np.float32)).data)
            known, owner = seen.setdefault(key, (digest, adapter))
            if known != digest:
                what = f"the copies of the base in {key} differ: these adapters were trained on different weights"
                raise _other_base(what, owner, adapter)


def check_weights(
    weights: Sequence[float] | None, adapters: Sequence[LoraAdapter], where: str = "weights"
) -> np.ndarray:
    """One finite weight per adapter, not all zero; default 1 each."""
    if weights is None:
        return np.ones(len(adapters))
    if len(weights) != len(adapters):
        names = ", ".join(adapter.name for adapter in adapters)
        raise MergeError(
            f"{len(weights)} weights for {len(adapters)} adapters",
            where=where,
            do=f"give one weight for each of: {names}",
        )
    values = np.array([float(w) for w in weights])
    if not np.isfinite(values).all() or not values.any():
        raise MergeError(f"weights {values.tolist()} are not finite or all zero", where=where, do="give finite weights")
    return values


class _Rule(NamedTuple):
    """What per_module changes for the modules whose name `regex` finds."""

    where: str
    regex: re.Pattern[str]
    method: int
    weights_K: np.ndarray
    rank: int | None


def make_merge_plan(
    adapters: Sequence[LoraAdapter],
    method: str | MergeMethod,
    options: Mapping[str, object] | None,
    weights: Sequence[float] | None,
    scale: float,
    average: bool,
    per_module: Sequence[tuple[str, Mapping[str, Any]]],
    precision: str,
    seed: int,
) -> MergePlan:
    """Match every module with its method and weights; MergeError for a rule that matches nothing."""
    default_K = check_weights(weights, adapters)
    if average:
        if abs(default_K.sum()) < 1e-12:
            raise MergeError("the weights add up to 0: no average", where="weights", do="turn average off")
        scale = scale / default_K.sum()
    if not math.isfinite(scale) or scale == 0:
        raise MergeError(
            f"scale is {scale}: must be finite and not 0", where="scale", do="1.0 leaves the result as it is"
        )
    methods = [method if isinstance(method, MergeMethod) else make_method(method, options)]
    rules = []
    for index, (pattern, change) in enumerate(per_module):
        where = f"per_module[{index}] {pattern!r}"
        if unknown := sorted(set(change) - {"method", "options", "weights", "rank"}):
            raise MergeError(f"unknown key {unknown[0]!r}", where=where, do="keys: method, options, weights, rank")
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise MergeError(f"not a regular expression: {error}", where=where, do="mend the pattern") from None
        number = 0
        if "method" in change or "options" in change:
            inherited = method if isinstance(method, str) else ""  # a trained method has no name to inherit
            methods.append(make_method(change.get("method", inherited), change.get("options")))
            number = len(methods) - 1
        weights_K = check_weights(change["weights"], adapters, where) if change.get("weights") else default_K
        rank = change.get("rank")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise MergeError(f"rank is {rank!r}", where=where, do="give a whole number > 0")
        rules.append(_Rule(where, regex, number, weights_K, rank))
    otherwise = _Rule("", re.compile(""), 0, default_K, None)
    modules, used = [], set()
    for name in sorted({name for adapter in adapters for name in adapter.modules}):
        layouts = [adapter.modules[name] for adapter in adapters if name in adapter.modules]
        layout = replace(layouts[0], r=sum(x.r for x in layouts), has_bias=any(x.has_bias for x in layouts))
        rule = next(rule for rule in (*rules, otherwise) if rule.regex.search(name))
        used.add(rule.where)
        modules.append(ModulePlan(name, layout, rule.method, rule.weights_K, rule.rank))
    for rule in rules:
        if rule.where not in used:
            do = "mend the pattern, or the order of the rules"
            raise MergeError("no module is merged by this rule", where=rule.where, do=do)
    if precision not in ("auto", "fp64", "fp32"):
        do = "auto, fp64 or fp32: sums in 16 bits lose the merge"
        raise MergeError(f"precision is {precision!r}", where="precision", do=do)
    return MergePlan(list(adapters), methods, modules, default_K, float(scale), precision, seed)
