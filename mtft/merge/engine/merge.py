"""merge(): several LoRA adapters in, one plain PEFT adapter out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mtft import __version__
from mtft.adapters.adapter_writer import AdapterWriter, disk_dtype, servable_rank
from mtft.adapters.lora_factors import WEIGHTS, LoraAdapter, read_adapters
from mtft.common.atomic_folder import atomic_folder
from mtft.common.errors import MergeError
from mtft.common.fingerprint import file_hash
from mtft.merge.engine.full_tensors import merge_full_tensors
from mtft.merge.engine.interference import diagnose
from mtft.merge.engine.merge_module import ModuleResult, merge_modules, survey
from mtft.merge.engine.merge_plan import MergePlan, check_together, make_merge_plan
from mtft.merge.engine.report import MergeReport, write_merge_card
from mtft.merge.methods import method_name
from mtft.merge.methods.base import MergeMethod

KEEP_BYTES = 256 << 20
"""Up to this size all uncut factors stay in memory until the rank is known; beyond it they are computed twice."""
ENOUGH = 0.5
"""Share of the squared norm below which a merge has lost most of its inputs."""


def merge_adapters(
    adapters: Sequence[str | Path | LoraAdapter],
    out: str | Path,
    method: str | MergeMethod = "linear",
    options: Mapping[str, object] | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    average: bool = False,
    rank: int | str = "auto",
    energy: float = 0.99,
    min_energy: float | None = None,
    saved: str = "error",
    per_module: Sequence[tuple[str, Mapping[str, object]]] = (),
    dtype: str | None = None,
    precision: str = "auto",
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
    vllm: bool = False,
    allow_base_mismatch: bool = False,
    diagnostics: bool = False,
    command: str | None = None,
) -> MergeReport:
    """Merge PEFT LoRA adapters of one base into one adapter in the folder `out`. Needs no base model.

    method, options: a name of METHODS and its fields. weights: one per adapter, multiply its delta (default 1 each:
    a sum; `average` divides by their sum). scale multiplies the result.
    rank: a number; `lossless`; or `auto`, the smallest usual rank (8, 16, 32, ...) that keeps the share `energy` of the
    squared norm over all modules. Below `min_energy` nothing is written (None: 0.5; of a rank that is given as a
    number a warning says what it keeps). saved: what to do with full tensors in the
    adapters (`error`, `average`, `take: NAME`). per_module: (regex, {method, options, weights, rank}), first wins.
    dtype: fp32, bf16, fp16 on disk (default: the inputs'); precision of the maths: fp64, fp32, or auto
    (fp64, but fp32 for the dense passes of elementwise methods).
    workers: processes over modules.
    vllm: refuse what vLLM can't load. diagnostics: also norms, overlaps and interference of the adapters.
    Raises UserError (MergeError for the adapters and the merge); the output folder is then as it was before.
    """
    started = time.perf_counter()
    out = Path(out)
    opened = read_adapters(adapters)
    warnings = check_together(opened, allow_base_mismatch=allow_base_mismatch)
    plan = make_merge_plan(opened, method, options, weights, scale, average, per_module, precision, seed)
    least = (0.0 if isinstance(rank, int) else ENOUGH) if min_energy is None else min_energy
    rank = _check_policy(rank, energy, least, plan)
    full = merge_full_tensors(opened, plan.weights_K, saved)
    if vllm:
        _check_vllm(plan, full)
    with atomic_folder(out, overwrite=overwrite, inputs=[adapter.path for adapter in opened]) as scratch:
        results, final_rank = _spectra_and_rank(plan, rank, energy, workers)
        spectra = {}
        with AdapterWriter(scratch, opened, plan.layouts, final_rank, disk_dtype(opened, dtype), full) as writer:
            for result in results:
                spectra[result.name] = (result.S, result.square)
                warnings += result.warnings
                writer.add(result.name, result.B_MR[:, :final_rank], result.A_RN[:final_rank], result.bias_M)
        limits = {module.name: min(module.rank or final_rank, final_rank) for module in plan.modules}
        table, total = _energies(spectra, limits)
        if total < least:
            raise _too_little(total, least, final_rank, spectra)
        if min_energy is None and total < ENOUGH:
            warnings.append(
                f"rank {final_rank} keeps only {total:.1%} of the merged deltas; `rank auto` keeps {energy:.0%}"
            )
        if not any(square for _, square in spectra.values()):
            warnings.append("the merged delta is zero in all modules")
        warnings += writer.write_config()
        report = MergeReport(
            out=out,
            method=method if isinstance(method, str) else method_name(method),
            options=plan.methods[0].describe(),
            scale=float(scale),
            rank=final_rank,
            energy=total,
            worst=min(((name, row["energy"]) for name, row in table.items()), key=lambda item: item[1]),
            modules=table,
            inputs=[_input(adapter, weight) for adapter, weight in zip(opened, plan.weights_K, strict=True)],
            settings={
                "average": average,
                "rank": rank,
                "energy": energy,
                "min_energy": least,
                "saved": saved,
                "per_module": [[pattern, dict(change)] for pattern, change in per_module],
                "dtype": disk_dtype(opened, dtype),
                "precision": precision,
                "seed": seed,
                "vllm": vllm,
                "command": command,
                "output_sha256": file_hash(scratch / WEIGHTS),
                "versions": {"mtft": __version__, "numpy": np.__version__},
            },
            warnings=_short(warnings),
            seconds=0.0,
        )
        if diagnostics:
            report.diagnostics = diagnose(opened, scratch)
        report.seconds = time.perf_counter() - started
        write_merge_card(scratch, report)
    return report


def _check_policy(rank: int | str, energy: float, min_energy: float, plan: MergePlan) -> int | str:
    if rank == "auto" and plan.methods[0].default_rank:
        rank = plan.methods[0].default_rank
    is_number = isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank <= 65536
    if not is_number and rank not in ("auto", "lossless"):
        raise MergeError(f"rank is {rank!r}", where="rank", do="a whole number > 0, auto, or lossless")
    for name, value in (("energy", energy), ("min_energy", min_energy)):
        if not 0 <= value <= 1:
            raise MergeError(f"{name} is {value}", where=name, do="a share between 0 and 1")
    return rank


def _check_vllm(plan: MergePlan, full: Mapping[str, np.ndarray]) -> None:
    """What vLLM refuses at load time, refused before the work."""
    if full:
        what = f"vLLM loads no full tensors, here {next(iter(full))}"
        raise MergeError(what, where="vllm", do="use PEFT, or drop them")
    if any(module.layout.has_bias for module in plan.modules):
        raise MergeError("vLLM loads no LoRA biases", where="vllm", do="use PEFT, or train without lora_bias")


def _spectra_and_rank(plan: MergePlan, rank: int | str, energy: float, workers: int):
    """The modules' results and the uniform rank; results may be a stream, or held if the rank hung on all of them."""
    if isinstance(rank, int):
        return merge_modules(plan, survey(plan, rank), rank, rank, workers), rank
    full = {module.name: min(module.layout.r, module.layout.m, module.layout.n) for module in plan.modules}
    cap = max(full.values())
    seen = survey(plan, cap)
    size = sum((m.layout.m + m.layout.n) * full[m.name] for m in plan.modules) * 8
    keep = size <= KEEP_BYTES
    results: list[ModuleResult] = list(merge_modules(plan, seen, 0 if keep else None, cap, workers))
    limits = {m.name: m.rank for m in plan.modules if m.rank is not None}
    spectra = {r.name: (r.S[: limits.get(r.name)], r.square) for r in results}
    longest = max((len(S) for S, _ in spectra.values()), default=0) or 1
    chosen = longest if rank == "lossless" else servable_rank(_smallest_rank(spectra, energy) or longest)
    return (iter(results) if keep else merge_modules(plan, seen, chosen, cap, workers)), chosen


def _smallest_rank(spectra: Mapping[str, tuple[np.ndarray, float]], share: float) -> int | None:
    """The smallest uniform rank that keeps `share` of the squared norm over all modules, None if none does."""
    longest = max((len(S) for S, _ in spectra.values()), default=0)
    square_R = np.zeros(longest)
    for S, _ in spectra.values():
        square_R[: len(S)] += S.astype(np.float64) ** 2
    total = sum(square for _, square in spectra.values())
    enough = np.nonzero(np.cumsum(square_R) >= share * total * (1 - 1e-12))[0]
    return int(enough[0]) + 1 if len(enough) else None


def _energies(spectra: Mapping[str, tuple[np.ndarray, float]], limits: Mapping[str, int]):
    table, held_all, total_all = {}, 0.0, 0.0
    for name, (S, square) in spectra.items():
        held = float(np.sum(S[: limits[name]].astype(np.float64) ** 2))
        rank = min(len(S), limits[name])
        table[name] = {"rank": rank, "energy": min(1.0, held / square) if square else 1.0, "norm": math.sqrt(square)}
        held_all, total_all = held_all + held, total_all + square
    return table, min(1.0, held_all / total_all) if total_all else 1.0


def _too_little(total: float, least: float, rank: int, spectra) -> MergeError:
    enough = _smallest_rank(spectra, least)
    do = f"rank {enough} would keep {least:.0%}" if enough else "this method's result has full rank: lower min_energy"
    return MergeError(f"rank {rank} keeps only {total:.1%} of the merged deltas", where="rank", do=do)


def _input(adapter: LoraAdapter, weight: float) -> dict[str, object]:
    settings = {key: getattr(adapter.settings, key) for key in ("base", "revision", "r", "alpha", "rslora")}
    about = {"path": str(adapter.path), "name": adapter.name, "sha256": adapter.sha256}
    return {**about, **settings, "weight": float(weight)}


def _short(warnings: Sequence[str]) -> list[str]:
    """Equal warnings once; of many all-zero modules of one adapter, the first and the count."""
    alike: dict[str, list[str]] = {}
    for text in dict.fromkeys(warnings):
        alike.setdefault(text.split(":")[0] if "all zero" in text else text, []).append(text)
    return [first + (f", and {len(others)} more modules" if others else "") for first, *others in alike.values()]
