"""The gradient of every task from one backward pass, and what is made of them.

    capture/       task gradients of linear layers by hooks, checked against autograd, in halves without noise
    aggregators/   one direction out of K task gradients, one method a file
    gramian        inner products G = J J^T and combinations J^T alpha, over ranks
    affinity       which tasks pull together: cosines, conflicts, groups
    forgetting     which modules made a task forget

Letters in names (`gram_KK` is [K, K]): K tasks, P tasks that are present, D numbers of a parameter, C a block of its
columns, N tokens, B rows of a micro-batch, T positions, H halves of the tasks' examples (two a task).
J is the Jacobian {parameter: [K, *shape]}, alpha_K the weights of a combination, p_K the user's preference.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.gradients.capture.task_gradients import TaskGradients

_MODULES = {
    "TaskGradients": "mtft.gradients.capture.task_gradients",
}

__all__ = ["TaskGradients"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
