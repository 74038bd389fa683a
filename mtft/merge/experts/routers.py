"""Routers: which expert a request belongs to.

Router   nearest centroid of the experts' own inputs (h = a last-token state), in units of the spread inside the tasks:
         p = softmax(-|| (h - c_k) / sigma ||^2 / (2 temperature))
arrow    no data: the top right singular vector v_k of each D_k is the direction on which expert k acts most;
         score |x . v_k| per module and token. Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library
         of LoRAs" (ICML 2024, arXiv 2405.11157). With general adapters, their mean delta is taken off first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mtft.adapters.lora_factors import LoraAdapter, read_adapters
from mtft.common.errors import MergeError
from mtft.merge.engine.merge_plan import check_together
from mtft.merge.linalg.core_space import one_thread, svd, to_core


@dataclass(frozen=True)
class Router:
    """Nearest-centroid router over K experts and states of d dimensions."""

    names: tuple[str, ...]
    centroids_KD: np.ndarray
    sigma_D: np.ndarray
    temperature: float

    @classmethod
    def fit(cls, states: Mapping[str, np.ndarray], temperature: float | None = None) -> Router:
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
    def load(cls, path: str | Path) -> Router:
        with safe_open(path, framework="np") as file:
            names = tuple(json.loads(file.metadata()["names"]))
            values = {key: file.get_tensor(key) for key in ("centroids", "sigma", "temperature")}
        return cls(names, values["centroids"], values["sigma"], float(values["temperature"][0]))


@dataclass(frozen=True)
class Arrow:
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
    def load(cls, path: str | Path) -> Arrow:
        with safe_open(path, framework="np") as file:
            return cls(tuple(json.loads(file.metadata()["names"])), dict(file.get_tensors()))


def arrow(adapters: Sequence[str | Path | LoraAdapter], general: Sequence[str | Path | LoraAdapter] = ()) -> Arrow:
    """The experts' prototypes, from their factors. general: adapters whose mean delta is subtracted from every D_k.

    PEFT's Arrow subtracts A and B apart, which is another matrix; here it is the delta, in core space.
    """
    experts = read_adapters(adapters)
    common = read_adapters(general) if general else []
    check_together([*experts, *common])
    prototypes = {}
    for module in sorted({name for adapter in experts for name in adapter.modules}):
        layout = next(adapter.modules[module] for adapter in experts if module in adapter.modules)
        table = np.zeros((len(experts), layout.n))
        factors = [adapter.factors(module) for adapter in (*experts, *common)]
        with one_thread():
            core = to_core(factors, np.ones(len(factors)))
            cores = iter(core.cores)
            deltas = [next(cores) if f is not None else None for f in factors]
            known = [M for M in deltas[len(experts) :] if M is not None]
            mean = sum(known) / len(common) if known else 0.0
            for k, M in enumerate(deltas[: len(experts)]):
                top = svd(M - mean).Vt[:1] if M is not None else np.zeros((0, 0))
                if len(top):
                    v = core.cols.apply(top.T)[:, 0]
                    table[k] = v * np.sign(v[np.abs(v).argmax()])
        prototypes[module] = table
    return Arrow(tuple(adapter.name for adapter in experts), prototypes)


def check_states(states: Mapping[str, np.ndarray]) -> None:
    """MergeError unless every expert has two states at least."""
    if any(np.ndim(x) != 2 or len(x) < 2 for x in states.values()) or not states:
        raise MergeError("states must be [2 or more, d] for every expert", where="states", do="score more examples")


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
