"""Routers: which expert a request belongs to. On numpy, with or without a model.

CentroidRouter  nearest centroid of the experts' own inputs (h: a last-token state), in units of the spread inside the
                tasks: p = softmax(-|| (h - c_k) / sigma ||^2 / (2 temperature))
ArrowRouter     no data: the top right singular vector v_k of each D_k is the direction on which expert k acts most;
                score |x . v_k| per module and token. Ostapenko et al., "Towards Modular LLMs by Building and Reusing a
                Library of LoRAs" (ICML 2024, arXiv 2405.11157). mtft/merge/experts/arrow_prototypes.py makes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mtft.common.errors import MergeError


@dataclass(frozen=True)
class CentroidRouter:
    """Nearest-centroid router over K experts and states of d dimensions."""

    names: tuple[str, ...]
    centroids_KD: np.ndarray
    sigma_D: np.ndarray
    temperature: float

    @classmethod
    def fit(cls, states: Mapping[str, np.ndarray], temperature: float | None = None) -> CentroidRouter:
        """states: expert -> [examples, d] of its own task, 2 examples at least. temperature: default d, so that
        confidence does not grow with the width."""
        check_states(states)
        arrays = [np.asarray(x, np.float64) for x in states.values()]
        centroids = np.stack([x.mean(axis=0) for x in arrays])
        inside = np.concatenate([x - c for x, c in zip(arrays, centroids)])
        sigma = np.sqrt(np.mean(inside**2, axis=0))
        floor = 1e-6 * max(1e-300, float(sigma.max()))
        return cls(tuple(states), centroids, np.maximum(sigma, floor), float(temperature or centroids.shape[1]))

    def probabilities(self, states_ND: np.ndarray) -> np.ndarray:
        """p [N, K]."""
        away = (np.asarray(states_ND, np.float64)[:, None] - self.centroids_KD) / self.sigma_D
        return softmax(-np.sum(away**2, axis=2) / (2 * self.temperature))

    def save(self, path: str | Path) -> None:
        values = {"centroids": self.centroids_KD, "sigma": self.sigma_D, "temperature": np.array([self.temperature])}
        save_file(values, path, {"names": json.dumps(self.names), "kind": "centroid"})

    @classmethod
    def load(cls, path: str | Path) -> CentroidRouter:
        with safe_open(path, framework="np") as file:
            names = tuple(json.loads(file.metadata()["names"]))
            values = {key: file.get_tensor(key) for key in ("centroids", "sigma", "temperature")}
        return cls(names, values["centroids"], values["sigma"], float(values["temperature"][0]))


@dataclass(frozen=True)
class ArrowRouter:
    """Prototypes [K, n] per module; rows of adapters without the module are zero."""

    names: tuple[str, ...]
    prototypes: dict[str, np.ndarray]

    def probabilities(
        self, module: str, x_TN: np.ndarray, top: int | None = None, temperature: float = 1.0
    ) -> np.ndarray:
        """p [T, K] for inputs of `module`: softmax of |x . v_k| over the `top` experts, 0 for the others."""
        scores = np.abs(np.asarray(x_TN, np.float64) @ self.prototypes[module].T)
        if top is not None and top < len(self.names):
            least = np.partition(scores, -top, axis=1)[:, -top, None]
            scores = np.where(scores >= least, scores, -np.inf)
        return softmax(scores / temperature)

    def save(self, path: str | Path) -> None:
        save_file(self.prototypes, path, {"names": json.dumps(self.names), "kind": "arrow"})

    @classmethod
    def load(cls, path: str | Path) -> ArrowRouter:
        with safe_open(path, framework="np") as file:
            return cls(tuple(json.loads(file.metadata()["names"])), dict(file.get_tensors()))


def check_states(states: Mapping[str, np.ndarray]) -> None:
    """MergeError unless every expert has two states at least."""
    if any(np.ndim(x) != 2 or len(x) < 2 for x in states.values()) or not states:
        raise MergeError("states must be [2 or more, d] for every expert", where="states", do="score more examples")


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
