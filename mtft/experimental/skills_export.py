"""Skill LoRAs mixed per task and split of the features, as one plain adapter per task.

    A = sum_i c_i A_i,  B = sum_i c_i B_i   per split of A's columns and of B's rows, c = normalized sigmoid(logits)

MHR / Polytropon (arXiv 2211.03831, 2202.13914). Experimental: no command trains such routing yet, so the logits have to
come from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mtft.adapters.adapter_writer import AdapterWriter, disk_dtype
from mtft.adapters.lora_factors import LoraAdapter, read_adapters
from mtft.common.atomic_folder import atomic_folder
from mtft.common.errors import MergeError
from mtft.merge.engine.merge_plan import check_together, make_merge_plan
from mtft.merge.experts.build_experts import FOLDER_NAME


def export_skills(
    adapters: Sequence[str | Path | LoraAdapter],
    logits: Mapping[str, np.ndarray],
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write one adapter per task from skill LoRAs of equal rank: `out`/TASK.

    logits[task] [splits, K]: trained routing; c = sigmoid(logits), made to add up to 1 over the skills. Split s of the
    input columns of A and of the output rows of B is mixed by c[s].
    """
    out, opened = Path(out), read_adapters(adapters)
    check_together(opened)
    for task, table in logits.items():
        if not FOLDER_NAME.fullmatch(task) or np.ndim(table) != 2 or np.shape(table)[1] != len(opened):
            do = "tasks are named by letters, digits, _ . -; logits are [splits, skills]"
            raise MergeError(f"routing of {task!r} has shape {np.shape(table)}", where="logits", do=do)
    if any(adapter.modules.keys() != opened[0].modules.keys() for adapter in opened):
        raise MergeError(
            "the skills touch different modules", where="adapters", do="train them on the same target_modules"
        )
    if len({layout.r for adapter in opened for layout in adapter.modules.values()}) > 1:
        raise MergeError("the skills differ in rank", where="adapters", do="train them with one rank")
    plan = make_merge_plan(opened, "linear", None, None, 1.0, False, (), "fp64", 0)
    rank = next(iter(opened[0].modules.values())).r
    with atomic_folder(out, overwrite=overwrite, inputs=[a.path for a in opened]) as scratch:
        for task, table in logits.items():
            gates = 1 / (1 + np.exp(-np.asarray(table, np.float64)))
            gates /= gates.sum(axis=1, keepdims=True)
            (scratch / task).mkdir()
            with AdapterWriter(scratch / task, opened, plan.layouts, rank, disk_dtype(opened, dtype), {}) as writer:
                for module in plan.modules:
                    factors = [f for adapter in opened if (f := adapter.factors(module.name)) is not None]
                    A = _mixed([f.A_RN.T for f in factors], gates).T
                    B = _mixed([f.scale * f.B_MR for f in factors], gates)
                    writer.add(module.name, B, A, None)
            writer.write_config()
    return [out / task for task in logits]


def _mixed(matrices: list[np.ndarray], gates: np.ndarray) -> np.ndarray:
    """sum_i c_si X_i for each block s of rows."""
    blocks = [np.array_split(X, len(gates)) for X in matrices]
    return np.vstack([sum(c * block[s] for c, block in zip(row, blocks)) for s, row in enumerate(gates)])
