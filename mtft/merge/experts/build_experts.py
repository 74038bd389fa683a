"""One shared adapter and small experts on top, for serving with a router.

twin:  S = any merge, E_k = D_k - S cut to a small rank; serve S + sum_k p_k E_k with p from a router.
       Lu et al., "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging" (NeurIPS 2024,
       arXiv 2406.15479). The residual is taken from S as it stands on disk, so truncating S loses nothing.
arrow: the experts as they are, one uniform rank, and prototypes that tell which of them a token is for
       (arrow_prototypes.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mtft.adapters.adapter_writer import AdapterWriter, disk_dtype, servable_rank
from mtft.adapters.lora_factors import LoraAdapter, read_adapter, read_adapters
from mtft.adapters.mlp_router import MlpRouter
from mtft.adapters.routers import CentroidRouter
from mtft.common.atomic_folder import atomic_folder
from mtft.common.errors import MergeError
from mtft.common.own_files import write_own
from mtft.merge.engine.merge import merge_adapters
from mtft.merge.engine.merge_plan import MergePlan, make_merge_plan
from mtft.merge.engine.report import MergeReport
from mtft.merge.experts.arrow_prototypes import arrow_router as prototypes_of
from mtft.merge.linalg.core_space import balanced_factors, one_thread, svd, to_core

FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def build_twin(
    adapters: Sequence[str | Path | LoraAdapter],
    out: str | Path,
    shared: str = "linear",
    expert_rank: int = 8,
    *,
    options: Mapping[str, object] | None = None,
    weights: Sequence[float] | None = None,
    average: bool = True,
    rank: int | str = "auto",
    with_shared: bool = False,
    router: CentroidRouter | MlpRouter | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    **more,
) -> MergeReport:
    """Write `out`/shared, `out`/expert_NAME for each adapter, and router.safetensors if a router is given.

    shared, options, weights, average, rank, more: the shared merge, as in merge(); by default the mean of the experts.
    with_shared: each expert_NAME holds S + E_k, one plain adapter per request. Returns the report of the shared merge;
    its settings hold `expert_energy`: the share of each ||E_k||^2 that expert_rank keeps.
    """
    out = Path(out)
    if not isinstance(expert_rank, int) or expert_rank < 1:
        raise MergeError(f"expert_rank is {expert_rank!r}", where="expert_rank", do="a whole number > 0, as 8")
    opened = read_adapters(adapters)
    folders = _folders(opened)
    plan = make_merge_plan(opened, "linear", None, None, 1.0, False, (), "fp64", 0)
    with atomic_folder(out, overwrite=overwrite, inputs=[adapter.path for adapter in opened]) as scratch:
        policy = {"average": average, "rank": rank, "dtype": dtype, **more}
        report = merge_adapters(opened, scratch / "shared", shared, options, weights, **policy)
        common = read_adapter(scratch / "shared", "shared")
        total = servable_rank(expert_rank + (report.rank if with_shared else 0))  # servers take no other
        energies = _write_experts(
            plan, common, scratch, folders, expert_rank, total, disk_dtype(opened, dtype), with_shared
        )
        if router is not None:
            if set(router.names) != {adapter.name for adapter in opened}:
                raise MergeError("the router knows other experts", where="router", do="fit it on these adapters' names")
            router.save(scratch / "router.safetensors")
        facts = {"experts": dict(zip((a.name for a in opened), folders)), "expert_energy": energies}
        facts |= {"expert_rank": expert_rank, "with_shared": with_shared}
        write_own(scratch / "twin.json", facts, indent=2)
    report.out = out
    report.settings |= facts
    return report


def export_arrow(
    adapters: Sequence[str | Path | LoraAdapter],
    out: str | Path,
    *,
    top: int | None = None,
    temperature: float = 1.0,
    general: Sequence[str | Path | LoraAdapter] = (),
    dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `out`/expert_NAME for each adapter, all of one rank that servers take, router.safetensors and arrow.json.

    top: experts that serve one token (None: all). general: adapters whose mean delta is taken off every expert first,
    as a delta: PEFT takes the means of A and B off apart, which is another matrix.
    Returns `out`. Raises MergeError as twin() does.
    """
    out, opened = Path(out), read_adapters(adapters)
    if top is not None and not 1 <= top <= len(opened):
        raise MergeError(f"top is {top}", where="top", do=f"1 to {len(opened)}, the number of experts")
    common = read_adapters(general) if general else []
    folders = _folders(opened)
    router = prototypes_of(opened, common)
    modules = {name for adapter in opened for name in adapter.modules}
    widest = [max(x.r if name in modules else 0 for name, x in a.modules.items()) for a in (*opened, *common)]
    rank = servable_rank(max(widest[: len(opened)]) + sum(widest[len(opened) :]))
    weights = [1.0, *(-1 / len(common) for _ in common)]
    inputs = [adapter.path for adapter in (*opened, *common)]
    with atomic_folder(out, overwrite=overwrite, inputs=inputs) as scratch:
        for adapter, folder in zip(opened, folders, strict=True):
            merge_adapters([adapter, *common], scratch / folder, weights=weights, rank=rank, dtype=dtype, vllm=True)
        router.save(scratch / "router.safetensors")
        facts = {"experts": dict(zip(router.names, folders)), "rank": rank, "top": top, "temperature": temperature}
        write_own(scratch / "arrow.json", facts, indent=2)
    return out


def _folders(adapters: Sequence[LoraAdapter]) -> list[str]:
    for adapter in adapters:
        if not FOLDER_NAME.fullmatch(adapter.name):
            do = "open it with read_adapter(path, name=...): letters, digits, _ . -"
            raise MergeError(f"{adapter.name!r} can't name a folder", where=str(adapter.path), do=do)
    return [f"expert_{adapter.name}" for adapter in adapters]


def _write_experts(
    plan: MergePlan,
    common: LoraAdapter,
    scratch: Path,
    folders: list[str],
    expert_rank: int,
    rank: int,
    dtype: str,
    with_shared: bool,
) -> dict[str, float]:
    """All experts at once, module by module; returns the share of ||E_k||^2 that is kept."""
    held, squares = np.zeros(len(folders)), np.zeros(len(folders))
    with ExitStack() as stack:
        writers = []
        for folder in folders:
            (scratch / folder).mkdir()
            writer = AdapterWriter(scratch / folder, plan.adapters, plan.layouts, rank, dtype, {})
            writers.append(stack.enter_context(writer))
        for module in plan.modules:
            factors = [adapter.factors(module.name) for adapter in plan.adapters]
            base = common.factors(module.name)
            with one_thread():
                core = to_core([*factors, base], np.ones(len(factors) + 1))
                S = core.cores[-1]
                deltas = iter(core.cores[:-1])
                for k, (factor, writer) in enumerate(zip(factors, writers)):
                    E = (next(deltas) if factor is not None else np.zeros_like(S)) - S
                    spectrum = svd(E)
                    cut = spectrum.cut(expert_rank)
                    held[k] += np.sum(cut.S**2)
                    squares[k] += np.sum(spectrum.S**2)
                    if with_shared:
                        cut = svd((cut.U * cut.S) @ cut.Vt + S)
                    B, A = balanced_factors(cut.cut(rank), core.rows, core.cols)
                    bias = _bias(factor, base, with_shared) if module.layout.has_bias else None
                    writer.add(module.name, B, A, bias)
    for writer in writers:
        writer.write_config()
    return {a.name: float(x / s) if s else 1.0 for a, x, s in zip(plan.adapters, held, squares)}


def _bias(factor, base, with_shared: bool) -> np.ndarray:
    bias = 0.0 if factor is None or factor.bias_M is None else factor.scale * factor.bias_M
    return bias + np.zeros_like(base.bias_M) if with_shared else bias - base.bias_M
