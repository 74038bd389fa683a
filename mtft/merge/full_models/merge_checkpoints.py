"""Merge whole fine-tuned models of one base: W = W_0 + scale * f(w_1 (W_1 - W_0), .., w_K (W_K - W_0)) per tensor.

The same methods as for adapters, on task vectors as the papers have them. Elementwise methods and `linear` read, merge
and write row blocks, so memory is some MB however large the models are; spectral methods hold one tensor of all models
and pay full SVDs. Files may be sharded, in and out. No model code runs and nothing is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mtft.adapters.safetensors_io import TensorFile, TensorWriter, as_matrix, open_tensors
from mtft.common.atomic_folder import CONTENTS, atomic_folder, restore_replaced
from mtft.common.atomic_io import write_json
from mtft.common.errors import MergeError
from mtft.common.own_files import write_own
from mtft.merge.engine.merge_plan import check_weights
from mtft.merge.linalg.core_space import CoreSpace, IdentityBasis, one_thread
from mtft.merge.linalg.streamed_delta import DeltaStream, Rule
from mtft.merge.methods import make_method
from mtft.merge.methods.base import CoreSpaceMethod
from mtft.merge.methods.elementwise_base import ElementwiseMethod, TaskDelta
from mtft.merge.methods.linear import LinearMerge

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
KEPT = (".json", ".txt", ".model", ".jinja")
"""Files of the base that go along (configuration and tokenizer)."""


@dataclass(frozen=True)
class FullCheckpoint:
    """A model folder: each tensor's file."""

    path: Path
    name: str
    files: dict[str, TensorFile]

    def shape(self, key: str) -> tuple[int, ...]:
        return self.files[key].entries[key].shape

    def dtype(self, key: str) -> str:
        return self.files[key].entries[key].dtype


@dataclass(frozen=True)
class CheckpointDelta:
    """W_k - W_0 of one tensor, read by rows when sliced."""

    model: FullCheckpoint
    base: FullCheckpoint
    key: str

    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        return as_matrix(self.base.shape(self.key))

    def __getitem__(self, rows: slice) -> np.ndarray:
        tuned, base = (
            x.files[self.key].rows(self.key, rows.start, rows.stop, np.float32) for x in (self.model, self.base)
        )
        return tuned - base


def read_checkpoint(path: str | Path) -> FullCheckpoint:
    """Open a folder with model.safetensors or its shards. MergeError if it is none, or holds more than floats."""
    folder = Path(path)
    restore_replaced(folder)
    files = open_tensors(folder, WEIGHTS, "save the model again")
    if files is None:
        raise MergeError(f"no {WEIGHTS}", where=str(folder), do="give the folder of a model in safetensors")
    return FullCheckpoint(folder, folder.name, files)


def merge_checkpoints(
    base: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    method: str = "linear",
    options: Mapping[str, object] | None = None,
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    *,
    seed: int = 0,
    shard_bytes: int = 5 << 30,
    overwrite: bool = False,
) -> dict[str, object]:
    """Merge full models into the folder `out`, in the base's precision; returns what merge.json holds.

    method: linear, an elementwise one (ties per tensor, dare, della, breadcrumbs, sce, pcb, consensus), or a spectral
    one (tsv, iso_c, iso_cts, wudi, svc, ctm, knots_*), which merges matrices and averages vectors.
    """
    rule = make_method(method, options)
    spectral = isinstance(rule, CoreSpaceMethod) and not isinstance(rule, LinearMerge)
    if not isinstance(rule, CoreSpaceMethod | ElementwiseMethod) or getattr(rule, "scope", "module") != "module":
        do = "choose linear, ties (scope: module), dare, della, breadcrumbs, sce, pcb, consensus, tsv, iso_c, ..."
        raise MergeError(f"{method} as asked does not merge whole checkpoints", where="method", do=do)
    root = read_checkpoint(base)
    tuned = [read_checkpoint(path) for path in models]
    if not tuned:
        raise MergeError("no models given", where="models", do="give the folders of one or more fine-tuned models")
    check_same_tensors(root, tuned)
    weights_K = check_weights(weights, tuned)  # type: ignore[arg-type]
    used = [(model, w) for model, w in zip(tuned, weights_K) if w != 0]
    shards = _shards(root, shard_bytes)
    norms = {}
    inputs = [root.path, *(model.path for model in tuned)]
    with atomic_folder(Path(out), overwrite=overwrite, inputs=inputs) as scratch:
        for shard, keys in shards.items():
            entries = [(key, root.dtype(key), root.shape(key)) for key in keys]
            try:
                with TensorWriter(scratch / shard, entries) as writer, one_thread():
                    for key in keys:
                        square: list[float] = []
                        merged = _merged(rule, root, used, key, seed, spectral)
                        writer.write_rows(key, _added(root, key, merged, scale, square))
                        norms[key] = float(np.sqrt(sum(square)))
            except OverflowError as error:
                raise MergeError(str(error), where=shard, do="lower scale") from None
        if len(shards) > 1:
            total = sum(root.files[k].entries[k].end - root.files[k].entries[k].start for k in root.files)
            weight_map = {key: shard for shard, keys in shards.items() for key in keys}
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(scratch / INDEX, content, indent=2)
        for path in _companions(root.path):
            shutil.copyfile(path, scratch / path.name)
        facts = {"method": method, "options": rule.describe(), "scale": scale, "seed": seed, "base": str(root.path)}
        facts["models"] = [{"path": str(m.path), "weight": float(w)} for m, w in zip(tuned, weights_K)]
        facts["delta_norms"] = norms
        write_own(scratch / "merge.json", facts, indent=2)
    return facts


def check_same_tensors(root: FullCheckpoint, tuned: Sequence[FullCheckpoint]) -> None:
    for model in tuned:
        if unshared := sorted(model.files.keys() ^ root.files.keys()):
            what = f"{len(unshared)} tensors are in one only, first {unshared[0]!r}"
            do = "merge models of this base, saved the same way"
            raise MergeError(what, where=f"{root.path}, {model.path}", do=do)
        for key in root.files:
            if model.shape(key) != root.shape(key):
                what = f"{key} is {list(root.shape(key))} in the base and {list(model.shape(key))}"
                raise MergeError(what, where=str(model.path), do="merge models of this base")


def _shards(root: FullCheckpoint, limit: int) -> dict[str, list[str]]:
    """Tensors in the base's order, cut into files of at most `limit` bytes (a larger tensor has its own)."""
    groups: list[list[str]] = [[]]
    size = 0
    for key in root.files:
        entry = root.files[key].entries[key]
        if groups[-1] and size + entry.end - entry.start > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += entry.end - entry.start
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": keys for i, keys in enumerate(groups, 1)}


def _companions(folder: Path) -> list[Path]:
    skip = {INDEX, "merge.json", CONTENTS}
    return sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in KEPT and p.name not in skip)


def _merged(
    rule, root: FullCheckpoint, used: Sequence[tuple[FullCheckpoint, float]], key: str, seed: int, spectral: bool
) -> Iterator[np.ndarray]:
    """Row blocks of the merged delta."""
    weights_K = np.array([w for _, w in used])
    stream = DeltaStream([CheckpointDelta(model, root, key) for model, _ in used])  # type: ignore[misc]
    names = tuple(model.name for model, _ in used)
    if isinstance(rule, ElementwiseMethod):
        compute: Rule = rule.rule(TaskDelta(stream, weights_K, names, key, seed))
        return (compute(start, blocks) for start, blocks in stream)
    if not spectral or len(root.shape(key)) != 2:
        share = 1 / len(used) if spectral else 1.0
        return (np.sum([np.float32(share * w) * x for w, x in zip(weights_K, blocks)], axis=0) for _, blocks in stream)
    height, width = as_matrix(root.shape(key))
    cores = [np.float32(w) * CheckpointDelta(model, root, key)[0:height] for model, w in used]
    merged = rule.merge_core(CoreSpace(cores, IdentityBasis(height), IdentityBasis(width), weights_K, names, key, seed))
    W = merged.rows.apply(merged.cols.apply(merged.X.T).T)
    return (W[i : i + stream.rows] for i in range(0, height, stream.rows))


def _added(root: FullCheckpoint, key: str, merged: Iterator[np.ndarray], scale: float, square: list[float]):
    """W_0 + scale * block, block by block; the squared norms are left in `square`."""
    start = 0
    for block in merged:
        scaled = np.float32(scale) * block.astype(np.float32, copy=False)
        square.append(float(np.sum(scaled.astype(np.float64) ** 2)))
        yield root.files[key].rows(key, start, start + len(block), np.float32) + scaled
        start += len(block)
