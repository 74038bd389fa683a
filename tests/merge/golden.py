"""The three adapters behind the golden values, and small helpers. Drawn from numpy's Philox bits: the same anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mtft.adapters.lora_factors import LoraFactors, read_adapters
from mtft.merge.engine.merge_module import final_spectrum, read_inputs, survey
from mtft.merge.engine.merge_plan import make_merge_plan
from mtft.merge.linalg.core_space import CoreSpace, balanced_factors, to_core
from mtft.merge.methods.base import ModuleInputs

M, N, RANKS, SCALES = 12, 10, (2, 3, 1), (1.0, 2.0, 0.5)
W = (0.5, 0.3, 0.2)
NAMES = ("one", "two", "three")


def draw(bits: np.random.Philox, *shape: int) -> np.ndarray:
    return ((bits.random_raw(int(np.prod(shape))) >> 11) * 2.0**-53 - 0.5).reshape(shape)


def factors() -> list[LoraFactors]:
    bits = np.random.Philox(key=7)
    made = []
    for r, s in zip(RANKS, SCALES, strict=True):
        A = draw(bits, r, N)
        made.append(LoraFactors(A, draw(bits, M, r), s))
    return made


def delta(f: LoraFactors) -> np.ndarray:
    return f.scale * f.B_MR @ f.A_RN


def core(weights=(1.0, 1.0, 1.0), of=None) -> CoreSpace:
    return to_core(of or factors(), weights, names=NAMES)


def parts(
    weights=(1.0, 1.0, 1.0), of=None, names=NAMES, dtype=np.float64, seed=0, rank_cap=10, module="m"
) -> ModuleInputs:
    return ModuleInputs(
        module, tuple(names), np.array(weights), tuple(of or factors()), np.dtype(dtype), seed, rank_cap
    )


def full(merged) -> np.ndarray:
    """The matrix that a method's result stands for."""
    return merged.rows.apply(merged.cols.apply(merged.X.T).T)


def write(folder: Path, modules: dict[str, LoraFactors], extra: dict[str, np.ndarray] | None = None, **config) -> Path:
    """A PEFT adapter folder from factors; ranks and alphas that differ go into the patterns."""
    folder.mkdir(parents=True)
    first = next(iter(modules.values()))
    tensors = dict(extra or {})
    for name, f in modules.items():
        stem = f"base_model.model.{name}"
        keys = (
            (".lora_embedding_A", ".lora_embedding_B")
            if f.kind == "embedding"
            else (".lora_A.weight", ".lora_B.weight")
        )
        tensors[stem + keys[0]], tensors[stem + keys[1]] = f.A_RN.astype(np.float32), f.B_MR.astype(np.float32)
        if f.bias_M is not None:
            tensors[stem + ".lora_B.bias"] = f.bias_M.astype(np.float32)
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "r": first.rank,
        "lora_alpha": first.scale * first.rank,
        "rank_pattern": {name: f.rank for name, f in modules.items() if f.rank != first.rank},
        "alpha_pattern": {
            name: f.scale * f.rank for name, f in modules.items() if f.scale * f.rank != first.scale * first.rank
        },
        **config,
    }
    save_file(
        {key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_golden(root: Path) -> list[Path]:
    """The three golden adapters as folders with one module, `layers.0.q`."""
    return [write(root / name, {"layers.0.q": f}) for name, f in zip(NAMES, factors(), strict=True)]


def near(value: float, expected: float, atol: float = 1.5e-9) -> bool:
    return abs(value - expected) <= atol + 1e-9 * abs(expected)


def merge_delta(adapters, module, method="linear", options=None, weights=None, scale=1.0, rank=None, seed=0):
    """One merged module in memory: (B [m, r], A [r, n], share of the squared norm kept). rank None: nothing cut."""
    plan = make_merge_plan(read_adapters(adapters), method, options, weights, scale, False, (), "auto", seed)
    index = next(m for m in plan.modules if m.name == module)
    cap = rank or min(index.layout.r, index.layout.m, index.layout.n)
    seen = survey(plan, cap)
    inputs, _, _ = read_inputs(plan, index, cap)
    if not inputs.factors:
        return np.zeros((index.layout.m, 0)), np.zeros((0, index.layout.n)), 1.0
    merged = plan.methods[0].merge(inputs, seen[0])
    spectrum, square = final_spectrum(merged, inputs, scale)
    cut = spectrum.cut(rank)
    B, A = balanced_factors(cut, merged.rows, merged.cols)
    return B, A, float(np.sum(cut.S**2) / square) if square else 1.0
