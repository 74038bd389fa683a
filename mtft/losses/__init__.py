"""From per-token losses to the scalar that is differentiated.

    token_nll          loss of every supervised token of a batch
    task_reduction     counts, coefficients and sums: the same objective for any split of a step
    balancers/         task weights that move while training, one method a file
    sample_weights     weights of single samples inside a task
    orthogonality_penalty   a penalty on the adapter
    moe_router_loss    the load-balancing loss of experts, which is none of it

Letters in names (`nll_BT` is [B, T]): B rows of a micro-batch, T positions, N supervised tokens (or points of a curve),
S samples (slots of examples in a row), V vocabulary, K tasks, P tasks that are present, G groups of tasks or samples.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.losses.balancers import make_balancer

_MODULES = {
    "make_balancer": "mtft.losses.balancers",
}

__all__ = ["make_balancer"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
