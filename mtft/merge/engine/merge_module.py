"""One module, start to end: read the factors, merge, cut to the rank, lift. What a worker process runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from data_mixers.common.spawn_context import spawn_context
from mtft.merge.engine.merge_plan import MergePlan, ModulePlan
from mtft.merge.linalg.core_space import MergedCore, Spectrum, balanced_factors, one_thread, svd, too_large
from mtft.merge.methods.base import ModuleInputs


@dataclass(frozen=True)
class ModuleResult:
    """S: all singular values of the merged delta (of a streamed method: the leading ones); square: its ||.||^2.

    B_MR, A_RN: cut to the rank asked for, empty if only the spectrum was asked for.
    """

    name: str
    S: np.ndarray
    square: float
    B_MR: np.ndarray
    A_RN: np.ndarray
    bias_M: np.ndarray | None
    warnings: tuple[str, ...]


def read_inputs(
    plan: MergePlan, module: ModulePlan, rank_cap: int
) -> tuple[ModuleInputs, np.ndarray | None, list[str]]:
    """The adapters that count in this module, the merged bias, and warnings."""
    dtype = plan.dtype_of(module)
    names, weights, factors, warnings = [], [], [], []
    bias_M = np.zeros(module.layout.m)
    for adapter, weight in zip(plan.adapters, module.weights_K, strict=True):
        own_factors = adapter.factors(module.name, dtype) if weight != 0 else None
        if own_factors is None:
            continue
        if own_factors.bias_M is not None:
            bias_M += (plan.scale * weight * own_factors.scale) * own_factors.bias_M
        if not own_factors.B_MR.any() or not own_factors.A_RN.any():
            warnings.append(f"{adapter.name}: {module.name} is all zero (untrained?)")
            continue
        names.append(adapter.name)
        weights.append(weight)
        factors.append(own_factors)
    labels = (module.name, tuple(names), np.array(weights), tuple(factors))
    return ModuleInputs(*labels, dtype, plan.seed, rank_cap), bias_M if module.layout.has_bias else None, warnings


def merge_module(plan: MergePlan, module: ModulePlan, seen: object, rank: int | None, cap: int) -> ModuleResult:
    """Merge one module. rank: how many triples to lift (None: none, 0: all); cap: what a streamed method computes."""
    limit = module.rank if module.rank is not None else cap
    parts, bias_M, warnings = read_inputs(plan, module, min(limit, cap))
    spectrum, square = Spectrum(np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0))), 0.0
    B, A = np.zeros((module.layout.m, 0)), np.zeros((0, module.layout.n))
    if parts.factors:
        merged = plan.methods[module.method].merge(parts, seen)
        spectrum, square = final_spectrum(merged, parts, plan.scale)
        if rank is not None:
            keep = min(x for x in (rank or len(spectrum.S), module.rank, len(spectrum.S)) if x is not None)
            B, A = balanced_factors(spectrum.cut(keep), merged.rows, merged.cols)
    return ModuleResult(module.name, spectrum.S, square, B, A, bias_M, tuple(warnings))


def final_spectrum(merged: MergedCore, parts: ModuleInputs, scale: float) -> tuple[Spectrum, float]:
    """SVD of scale * X and its squared norm; what is only rounding of the inputs (as in +D - D) counts as zero."""
    if not np.isfinite(merged.X).all() or not np.isfinite(merged.square):
        raise too_large(parts.module)
    spectrum = svd(merged.X)
    size = sum(
        abs(w) * f.scale * np.linalg.norm(f.B_MR) * np.linalg.norm(f.A_RN)
        for w, f in zip(parts.weights_K, parts.factors, strict=True)
    )
    real = int(np.count_nonzero(16 * np.finfo(parts.dtype).eps * size < spectrum.S))
    if real == 0:
        return spectrum.cut(0), 0.0
    U, S, Vt = spectrum.cut(real)
    return Spectrum(np.sign(scale) * U, abs(scale) * S, Vt), merged.square * scale**2


def survey(plan: MergePlan, cap: int) -> list[object]:
    """Each method's look at all of its modules."""

    def passes(index: int):
        def one_pass() -> Iterator[ModuleInputs]:
            for module in plan.modules:
                if module.method == index:
                    parts = read_inputs(plan, module, cap)[0]
                    if parts.factors:
                        yield parts

        return one_pass

    return [method.survey(passes(index)) for index, method in enumerate(plan.methods)]


def merge_modules(
    plan: MergePlan, seen: list[object], rank: int | None, cap: int, workers: int
) -> Iterator[ModuleResult]:
    """All modules in order. Each process keeps LAPACK to one thread: on shared cores its threads spin for nothing."""
    if workers <= 1:
        for module in plan.modules:
            with one_thread():
                result = merge_module(plan, module, seen[module.method], rank, cap)
            yield result
        return
    job = (plan, seen, rank, cap)
    with ProcessPoolExecutor(workers, spawn_context(job), _start, job) as pool:
        yield from pool.map(_work, range(len(plan.modules)), chunksize=4)


_job: tuple[MergePlan, list[object], int | None, int]


def _start(*job) -> None:
    global _job
    _job = job
    threadpool_limits(1)


def _work(index: int) -> ModuleResult:
    plan, seen, rank, cap = _job
    module = plan.modules[index]
    return merge_module(plan, module, seen[module.method], rank, cap)
