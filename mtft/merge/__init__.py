"""Merge: several LoRA adapters into one plain PEFT adapter, exactly, in seconds, without the base model.

    linalg/        core_space.py turns one module of all adapters into small matrices; streamed_delta.py goes over dense
                   deltas in row blocks; module_factors.py has the factors of adapters beside a running model's modules
    methods/       one merge method a file; METHODS names them
    engine/        plan, merge module by module, write, report
    search/        weights found on held-out rows, and what the merged adapter kept of each task
    learned/       weights trained by gradients        experts/       adapters kept apart behind a router
    full_models/   whole fine-tuned models instead of adapters

mtft/adapters reads D_k = s_k B_k A_k and writes what PEFT and vLLM load.

Letters: K adapters, R rank, M outputs and N inputs of a module (`B_MR` is [m, r], `A_RN` [r, n]); D_k the delta of
adapter k, U S V^T its singular value decomposition, w_k its weight; `rows` and `cols` are orthonormal bases of the
output and the input side, X a matrix in their coordinates.

`merge_adapters` is imported on first use (PEP 562), so that `import mtft.merge` loads no merge method.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.merge.engine.merge import merge_adapters

_MODULES = {
    "merge_adapters": "mtft.merge.engine.merge",
}

__all__ = ["merge_adapters"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
