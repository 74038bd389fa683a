"""A router that is trained: a network of two layers on last-token states, as Twin-Merging has it.

    p = softmax(W2 relu(W1 z + b1) + b2),   z = (h - mean) / sigma of the training states

Lu et al., "Twin-Merging" (NeurIPS 2024, arXiv 2406.15479). Trained on a few hundred states in seconds; the nearest
centroid (routers.py) needs no training and is the default. Training is on torch, use on numpy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mtft.adapters.routers import ArrowRouter, CentroidRouter, check_states, softmax
from mtft.common.errors import MergeError

HIDDEN = 1024
_ARRAYS = ("mean_D", "sigma_D", "W1_HD", "b1_H", "W2_KH", "b2_K")


@dataclass(frozen=True)
class MlpRouter:
    """Router over K experts: d -> hidden -> K."""

    names: tuple[str, ...]
    mean_D: np.ndarray
    sigma_D: np.ndarray
    W1_HD: np.ndarray
    b1_H: np.ndarray
    W2_KH: np.ndarray
    b2_K: np.ndarray

    @classmethod
    def fit(
        cls,
        states: Mapping[str, np.ndarray],
        hidden: int = HIDDEN,
        steps: int = 200,
        decay: float = 1e-2,
        seed: int = 0,
    ) -> MlpRouter:
        """states: expert -> [examples, d] of its own task. AdamW on the whole set; each expert counts the same."""
        import torch
        import torch.nn.functional as F

        check_states(states)
        arrays = [np.asarray(x, np.float64) for x in states.values()]
        stacked = np.concatenate(arrays)
        mean, sigma = stacked.mean(axis=0), stacked.std(axis=0)
        sigma = np.maximum(sigma, 1e-6 * max(1e-300, float(sigma.max())))
        z = torch.tensor((stacked - mean) / sigma, dtype=torch.float32)
        labels = torch.tensor(np.repeat(np.arange(len(arrays)), [len(x) for x in arrays]))
        share_K = torch.tensor([1 / len(x) for x in arrays], dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)

        def fresh(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator) / columns**0.5).requires_grad_()

        W1, W2 = fresh(hidden, z.shape[1]), fresh(len(arrays), hidden)
        b1, b2 = torch.zeros(hidden, requires_grad=True), torch.zeros(len(arrays), requires_grad=True)
        optimizer = torch.optim.AdamW([W1, b1, W2, b2], lr=1e-3, weight_decay=decay)
        for _ in range(steps):
            optimizer.zero_grad()
            logits = torch.relu(z @ W1.T + b1) @ W2.T + b2
            F.cross_entropy(logits, labels, weight=share_K).backward()
            optimizer.step()
        W1_HD, b1_H, W2_KH, b2_K = (x.detach().double().numpy() for x in (W1, b1, W2, b2))
        return cls(tuple(states), mean, sigma, W1_HD, b1_H, W2_KH, b2_K)

    def probabilities(self, states_ND: np.ndarray) -> np.ndarray:
        """p [N, K]."""
        z = (np.asarray(states_ND, np.float64) - self.mean_D) / self.sigma_D
        return softmax(np.maximum(z @ self.W1_HD.T + self.b1_H, 0) @ self.W2_KH.T + self.b2_K)

    def save(self, path: str | Path) -> None:
        values = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        save_file(values, path, {"names": json.dumps(self.names), "kind": "mlp"})

    @classmethod
    def load(cls, path: str | Path) -> MlpRouter:
        with safe_open(path, framework="np") as file:
            names = tuple(json.loads(file.metadata()["names"]))
            return cls(names, *(file.get_tensor(name) for name in _ARRAYS))


def load_router(path: str | Path) -> CentroidRouter | MlpRouter | ArrowRouter:
    """The router in a file, of whichever kind it is. MergeError if it is none."""
    kinds = {"centroid": CentroidRouter, "mlp": MlpRouter, "arrow": ArrowRouter}
    try:
        with safe_open(path, framework="np") as file:
            kind = (file.metadata() or {}).get("kind")
    except (SafetensorError, OSError) as error:
        raise MergeError(f"no router: {error}", where=str(path), do="give the file that `mtft merge` wrote") from None
    if kind not in kinds:
        raise MergeError(f"a router of kind {kind!r}", where=str(path), do="give the file that `mtft merge` wrote")
    return kinds[kind].load(path)
