"""A LoRA out of a whole fine-tuned model: the best low-rank part of W_k - W_0, matrix by matrix.

    D = W_k - W_0 ~ U_r S_r V_r^T,   B = U_r sqrt(S_r),   A = sqrt(S_r) V_r^T

Differences are read in row blocks, and the range finder of streamed_delta.py finds the leading triples, so memory is
some MB whatever the model's size. What is no matrix inside a block (norms, embeddings, the head) can't be in the
adapter: its share of the squared difference is reported. With it Twin-Merging (Lu et al., arXiv 2406.15479) works on
whole models as in the paper: a merged model, and for each expert the low-rank rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mtft.adapters.adapter_writer import AdapterWriter, disk_dtype, plain_config, servable_rank
from mtft.adapters.base_identity import BASE, BaseIdentity, fingerprint, write_base
from mtft.adapters.lora_config import CONFIG
from mtft.adapters.lora_factors import AdapterLayout
from mtft.common.atomic_folder import atomic_folder
from mtft.common.atomic_io import write_json
from mtft.common.errors import MergeError
from mtft.common.own_files import read_own, write_own
from mtft.merge.full_models.merge_checkpoints import (
    CheckpointDelta,
    FullCheckpoint,
    check_same_tensors,
    merge_checkpoints,
    read_checkpoint,
)
from mtft.merge.linalg.core_space import balanced_factors, one_thread, svd
from mtft.merge.linalg.streamed_delta import DeltaStream, compress
from mtft.merge.methods.lines import layer_of


@dataclass(frozen=True)
class ExtractedLora:
    """energy: share of the matrices' squared difference that the rank holds; left_out: of all, what is no matrix."""

    out: Path
    rank: int
    energy: float
    left_out: float

    def text(self) -> str:
        rest = f"; {self.left_out:.2%} lies outside of the blocks' matrices and is left out" if self.left_out else ""
        return f"rank {self.rank} holds {self.energy:.2%} of what sets the model apart{rest}: {self.out}"


def extract_adapter(
    base: str | Path,
    model: str | Path,
    out: str | Path,
    rank: int = 16,
    *,
    dtype: str = "fp32",
    overwrite: bool = False,
) -> ExtractedLora:
    """Write the difference of two whole models as a PEFT adapter of `base`.

    rank: of the factors; the file's rank is the next that servers take. Raises MergeError if the models don't match, or
    no matrix differs.
    """
    if not isinstance(rank, int) or rank < 1:
        raise MergeError(f"rank is {rank!r}", where="rank", do="a whole number > 0, as 16")
    root, tuned = read_checkpoint(base), read_checkpoint(model)
    check_same_tensors(root, [tuned])
    matrices = [key for key in root.files if _is_block_matrix(root, key)]
    wide = servable_rank(rank)
    layouts = {}
    for key in matrices:
        rows, columns = root.shape(key)
        layouts[key.removesuffix(".weight")] = AdapterLayout(rows, columns, wide, "linear", False)
    held = squares = other = 0.0
    with atomic_folder(Path(out), overwrite=overwrite, inputs=[root.path, tuned.path]) as scratch:
        with AdapterWriter(scratch, (), layouts, wide, disk_dtype((), dtype), {}) as writer:
            for key, module in zip(matrices, layouts, strict=True):
                with one_thread():
                    B, A, square = _leading(root, tuned, key, rank)
                writer.add(module, B, A, None)
                held, squares = held + float(np.sum((B**2).sum(axis=0) ** 2)), squares + square  # sigma = |b|^2
        for key in root.files:
            if key not in matrices:
                other += sum(float(np.sum(x[0].astype(np.float64) ** 2)) for _, x in _stream(root, tuned, key))
        if not squares:
            raise MergeError(
                "no matrix inside a block differs", where=str(model), do="give a model tuned from this base"
            )
        facts = {"base": str(root.path), "model": str(tuned.path), "rank": rank}
        facts |= {"energy": min(1.0, held / squares), "left_out": other / (other + squares)}
        write_own(scratch / "merge.json", facts, indent=2)
        write_base(scratch, BaseIdentity(str(root.path), None, fingerprint(root.path)))
        write_json(scratch / CONFIG, plain_config(wide, list(layouts), str(root.path)), indent=2)
    return ExtractedLora(Path(out), rank, min(1.0, held / squares), other / (other + squares))


def twin_models(
    base: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    method: str = "linear",
    rank: int = 16,
    *,
    options: Mapping[str, object] | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    overwrite: bool = False,
) -> dict[str, ExtractedLora]:
    """Twin-Merging of whole models: `out`/shared is the merged model, `out`/expert_NAME a LoRA on it for each model.

    routing.load_routed serves the folder on the shared model once a router lies in it. Returns what each LoRA holds.
    """
    out, paths = Path(out), [Path(path) for path in models]
    folders = {path.name: f"expert_{path.name}" for path in paths}
    if len(folders) < len(paths):
        raise MergeError("two of the models' folders have one name", where="models", do="rename one of them")
    with atomic_folder(out, overwrite=overwrite, inputs=[Path(base), *paths]) as scratch:
        merge_checkpoints(base, paths, scratch / "shared", method, options, weights, scale)
        extracted = {}
        for path in paths:
            held = extract_adapter(scratch / "shared", path, scratch / folders[path.name], rank)
            _name_base(scratch / folders[path.name], out / "shared")
            extracted[path.name] = replace(held, out=out / folders[path.name])
        energies = {name: held.energy for name, held in extracted.items()}
        facts = {"experts": folders, "expert_rank": rank, "expert_energy": energies, "with_shared": True}
        write_own(scratch / "twin.json", facts, indent=2)
    return extracted


def _name_base(adapter: Path, base: Path) -> None:
    """Its base is where the shared model will stand."""
    for name, key in ((CONFIG, "base_model_name_or_path"), (BASE, "model"), ("merge.json", "base")):
        facts = read_own(adapter / name, do="merge again")
        write_json(adapter / name, {**facts, key: str(base)}, indent=2)


def _is_block_matrix(root: FullCheckpoint, key: str) -> bool:
    """The weight of a linear module inside a numbered block: what a LoRA can carry."""
    shape = root.shape(key)
    inside = key.endswith(".weight") and layer_of(key) is not None and "embed" not in key
    return inside and len(shape) == 2 and min(shape) > 1


def _stream(root: FullCheckpoint, tuned: FullCheckpoint, key: str) -> DeltaStream:
    return DeltaStream([CheckpointDelta(tuned, root, key)])  # type: ignore[list-item]


def _leading(root: FullCheckpoint, tuned: FullCheckpoint, key: str, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(B, A, ||D||^2) of the leading `rank` triples."""
    merged = compress(_stream(root, tuned, key), lambda start, blocks: blocks[0], rank, key)
    B, A = balanced_factors(svd(merged.X).cut(rank), merged.rows, merged.cols)
    return B, A, merged.square
