"""Full tensors in adapters (modules_to_save, trained biases): refuse, average, or take one adapter's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mtft.adapters.lora_factors import LoraAdapter
from mtft.common.errors import MergeError


def merge_full_tensors(adapters: Sequence[LoraAdapter], weights_K: np.ndarray, policy: str) -> dict[str, np.ndarray]:
    """Saved tensors of the result by key, under `policy`.

    `error` (default): MergeError if there are any. `average`: sum w T / sum w over the adapters that have the tensor.
    `take: NAME`: that adapter's. `scale` does not apply: these are whole weights, not deltas.
    """
    keys = sorted({key for adapter in adapters for key in adapter.saved})
    choice, _, name = policy.partition(":")
    name = name.strip()
    if choice not in ("error", "average", "take") or (choice == "take") != bool(name):
        raise MergeError(f"saved is {policy!r}", where="saved", do="error, average, or 'take: NAME'")
    if choice == "take" and name not in {adapter.name for adapter in adapters}:
        known = ", ".join(adapter.name for adapter in adapters)
        raise MergeError(f"no adapter is named {name!r}", where="saved", do=f"known: {known}")
    if not keys:
        return {}
    if choice == "error":
        owner = next(adapter for adapter in adapters if keys[0] in adapter.saved)
        raise MergeError(
            f"{len(keys)} full tensors (modules_to_save or biases), first {keys[0]}, are no low-rank deltas",
            where=str(owner.path),
            do="choose a policy: saved: average, or saved: 'take: NAME'",
        )
    if choice == "take":
        owner = next(adapter for adapter in adapters if adapter.name == name)
        return {key: owner.read(key) for key in owner.saved}
    return {key: _average(key, adapters, weights_K) for key in keys}


def _average(key: str, adapters: Sequence[LoraAdapter], weights_K: np.ndarray) -> np.ndarray:
    owners = [(adapter, w) for adapter, w in zip(adapters, weights_K, strict=True) if key in adapter.saved]
    shapes = {adapter.files[key].entries[key].shape for adapter, _ in owners}
    total = sum(w for _, w in owners)
    if len(shapes) > 1 or total <= 0:
        why = f"shapes differ: {sorted(shapes)}" if len(shapes) > 1 else f"its weights add up to {total:g}"
        raise MergeError(f"{key} can't be averaged: {why}", where=str(owners[0][0].path), do="use saved: 'take: NAME'")
    return np.sum([w * adapter.read(key) for adapter, w in owners], axis=0) / total
