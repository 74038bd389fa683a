"""Nested state (dicts, lists, tensors, numbers) <-> one JSON file and one safetensors file. No pickle anywhere.

A tensor becomes `{"$tensor": key}` in the JSON and lies under that key in the safetensors; a tuple `{"$tuple": [...]}`;
a dict whose keys are not all strings `{"$items": [[key, value], ...]}`. Everything comes back bit for bit
(Python writes floats so that they read back equal).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MARKS = ("$tensor", "$tuple", "$items")


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """(JSON-ready tree, tensors by key). Tensors go to the CPU. TypeError names what can't be kept."""
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            # A clone: safetensors refuses tensors that share memory.
            tensors[path] = node.detach().to("cpu", copy=True).contiguous()
            return {"$tensor": path}
        if isinstance(node, dict):
            if all(isinstance(key, str) and key not in _MARKS for key in node):
                return {key: visit(value, f"{path}.{key}") for key, value in node.items()}
            return {"$items": [[visit(key, ""), visit(value, f"{path}.{key}")] for key, value in node.items()]}
        if isinstance(node, tuple):
            return {"$tuple": [visit(value, f"{path}.{index}") for index, value in enumerate(node)]}
        if isinstance(node, list):
            return [visit(value, f"{path}.{index}") for index, value in enumerate(node)]
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"{path}: a {type(node).__name__} can't be saved")

    return visit(tree, "state"), tensors


def unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(tree, list):
        return [unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(unflatten(value, tensors) for value in tree["$tuple"])
    if "$items" in tree:
        return {unflatten(key, tensors): unflatten(value, tensors) for key, value in tree["$items"]}
    return {key: unflatten(value, tensors) for key, value in tree.items()}


def random_state() -> dict[str, Any]:
    """State of every generator that training draws from: Python, NumPy (legacy), torch CPU and this process' GPU."""
    import random

    import numpy as np

    legacy: Any = np.random.get_state(legacy=True)
    name, keys, *rest = legacy
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), *map(float, rest[2:]), *map(int, rest[:2])),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    import random

    import numpy as np

    random.setstate(state["python"])
    name, keys, cached, position, has_gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
