"""`train.deterministic`: only kernels that give the same bits every time, or an error that names the one without."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mtft.common.errors import UserError

# What torch says of an operation without such a kernel, and of a cuBLAS that was set up otherwise.
_SAID = ("does not have a deterministic implementation", "CUBLAS_WORKSPACE_CONFIG")


def fix_workspace() -> None:
    """cuBLAS with a workspace of its own for each stream. Before the first matrix product on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_kernels(asked: bool) -> Iterator[None]:
    """Inside, torch has only deterministic algorithms, if `asked`; afterwards as before.

    Not `warn_only`: flash attention's backward would then stay as it is.

    Raises:
        UserError: an operation has no deterministic kernel.
    """
    if not asked:
        yield
        return
    fix_workspace()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    cudnn: Any = torch.backends.cudnn
    was = memory.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # it costs time, and nothing here reads such memory
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _SAID):
            raise
        what = str(error).partition(", but you set")[0].partition(". To ")[0].splitlines()[0]
        raise UserError(
            f"not everything can be deterministic here: {what}",
            where="train.deterministic",
            do="set train.deterministic: false, or leave out what needs this operation",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory, cudnn.deterministic, cudnn.benchmark = was
