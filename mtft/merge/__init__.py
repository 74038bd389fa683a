"""Merge: several LoRA adapters into one plain PEFT adapter, exactly, in seconds, without the base model.

mtft/adapters reads adapters as D_k = s_k B_k A_k; linalg/core_space.py turns one module of all of them into small
matrices; a method (methods/, one a file) merges those; adapters/adapter_writer.py writes what PEFT and vLLM load.

The names below are imported on first use (PEP 562): `import mtft.merge.experts.routers` imports no merge method.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.adapters.lora_factors import LoraAdapter, LoraFactors, read_adapter
    from mtft.common.errors import MergeError
    from mtft.merge.engine.merge import merge_adapters, merge_delta
    from mtft.merge.engine.report import MergeReport
    from mtft.merge.linalg.core_space import CoreSpace, to_core
    from mtft.merge.methods import METHODS

_MODULES = {
    "METHODS": "mtft.merge.methods",
    "CoreSpace": "mtft.merge.linalg.core_space",
    "LoraAdapter": "mtft.adapters.lora_factors",
    "LoraFactors": "mtft.adapters.lora_factors",
    "MergeError": "mtft.common.errors",
    "MergeReport": "mtft.merge.engine.report",
    "merge_adapters": "mtft.merge.engine.merge",
    "merge_delta": "mtft.merge.engine.merge",
    "read_adapter": "mtft.adapters.lora_factors",
    "to_core": "mtft.merge.linalg.core_space",
}

__all__ = [
    "METHODS",
    "CoreSpace",
    "LoraAdapter",
    "LoraFactors",
    "MergeError",
    "MergeReport",
    "merge_adapters",
    "merge_delta",
    "read_adapter",
    "to_core",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
