"""PEFT LoRA adapters as factors: D = scale * B A per module, read lazily, one module at a time.

Everything in the file is either a factor, a bias of B, a frozen copy of the base (ignored), or a full tensor that the
caller's policy decides on. What is none of these is refused: a merge must not drop weights in silence.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mtft.adapters.lora_config import LoraSettings, read_settings
from mtft.adapters.safetensors_io import TensorFile, open_tensors
from mtft.common.atomic_folder import restore_replaced
from mtft.common.errors import MergeError
from mtft.common.fingerprint import content_hash, file_hash

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_NAME = re.compile(r"[\w.\-]+")


@dataclass(frozen=True)
class LoraFactors:
    """One module of one adapter: D [m, n] = scale * B_MR @ A_RN, and the bias delta scale * bias_M.

    kind `embedding`: n = vocabulary, m = width, and the base weight changes by D^T.
    """

    A_RN: np.ndarray
    B_MR: np.ndarray
    scale: float
    bias_M: np.ndarray | None = None
    kind: str = "linear"

    @property
    def rank(self) -> int:
        return self.A_RN.shape[0]


@dataclass(frozen=True)
class AdapterLayout:
    """Shapes of one module as the header tells them."""

    m: int
    n: int
    r: int
    kind: str
    has_bias: bool


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter on disk. modules: name -> Layout, sorted; saved: keys of full tensors (saved modules, biases)."""

    path: Path
    name: str
    settings: LoraSettings
    files: dict[str, TensorFile] = field(repr=False)  # key -> the file that holds it
    modules: dict[str, AdapterLayout] = field(repr=False)
    saved: tuple[str, ...]
    base_copies: tuple[str, ...]
    sha256: str

    @property
    def dtypes(self) -> set[str]:
        return {file.entries[key].dtype for key, file in self.files.items() if key not in self.base_copies}

    def read(self, key: str, dtype: np.dtype | type = np.float64) -> np.ndarray:
        """One tensor by its full key."""
        return self.files[key].read(key, dtype)

    def factors(self, module: str, dtype: np.dtype | type = np.float64) -> LoraFactors | None:
        """The factors of `module`, or None if this adapter does not touch it."""
        layout = self.modules.get(module)
        if layout is None:
            return None
        key_A, key_B, key_bias = factor_keys(module, layout.kind)
        return LoraFactors(
            self.read(key_A, dtype),
            self.read(key_B, dtype),
            self.settings.scale_of(module),
            self.read(key_bias, dtype) if layout.has_bias else None,
            layout.kind,
        )


def factor_keys(module: str, kind: str) -> tuple[str, str, str]:
    stem = PREFIX + module
    if kind == "embedding":
        return f"{stem}.lora_embedding_A", f"{stem}.lora_embedding_B", ""
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", f"{stem}.lora_B.bias"


def read_adapter(path: str | Path, name: str | None = None) -> LoraAdapter:
    """Open a PEFT LoRA folder: config and headers now, tensors when asked for.

    `name` defaults to the folder's name (`adapter` and `checkpoint-N` say nothing: then the parent's too).
    Raises MergeError on anything that is not a plain, whole, linear LoRA.
    """
    folder = Path(path)
    restore_replaced(folder)
    if not os.path.isdir(folder):
        raise MergeError(f"no folder {str(path)!r}", where=str(path), do="give the folder of a PEFT LoRA adapter")
    settings = read_settings(folder)
    files = _open_files(folder)
    modules, saved, copies = _sort_keys(folder, settings, files)
    if not modules:
        raise MergeError("the file holds no LoRA factors", where=str(folder), do="give the folder of a LoRA adapter")
    return LoraAdapter(folder, name or _default_name(folder), settings, files, modules, saved, copies, _sha256(files))


def _default_name(folder: Path) -> str:
    parts = folder.resolve().parts
    stop = len(parts) - 1
    while stop > 1 and re.fullmatch(r"adapter|merge|train|checkpoint-\d+|final|last|best", parts[stop]):
        stop -= 1
    return "-".join(parts[stop:]) if not re.fullmatch(r"adapter", parts[-1]) else parts[stop]


def _open_files(folder: Path) -> dict[str, TensorFile]:
    files = open_tensors(folder, WEIGHTS, "save the adapter again")
    if files is not None:
        return files
    if (folder / "adapter_model.bin").exists():
        raise MergeError(
            "adapter_model.bin is a pickle, which can run code when it is read",
            where=str(folder),
            do="load it with PEFT where you trust it and save_pretrained(..., safe_serialization=True)",
        )
    raise MergeError(f"no {WEIGHTS}", where=str(folder), do="give the folder that save_pretrained wrote")


def _sort_keys(
    folder: Path, settings: LoraSettings, files: dict[str, TensorFile]
) -> tuple[dict[str, AdapterLayout], tuple[str, ...], tuple[str, ...]]:
    """Every key into factors, saved tensors or base copies; MergeError for what is none of them."""

    def refuse(what: str, do: str) -> MergeError:
        return MergeError(what, where=str(folder), do=do)

    modules: dict[str, str] = {}  # name -> kind
    saved, copies = [], []
    for key in files:
        if not key.startswith(PREFIX) or not _NAME.fullmatch(key):
            raise refuse(
                f"unexpected key {key[:120]!r}", f"keys of a PEFT adapter are {PREFIX}<module>.lora_A.weight and so on"
            )
        stem = key[len(PREFIX) :]
        module = re.sub(r"\.(lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])$", "", stem)
        if module != stem:
            kind = "embedding" if ".lora_embedding_" in key else "linear"
            if modules.setdefault(module, kind) != kind:
                raise refuse(f"{module} has linear and embedding factors", "save the adapter again")
        elif stem.endswith(".base_layer.weight"):
            copies.append(key)
        elif "lora_magnitude_vector" in stem:
            raise refuse(f"{key} belongs to DoRA, which is not a linear delta", "train without DoRA")
        elif stem.endswith((".weight", ".bias")) and ".lora_" not in stem:
            _check_saved(stem, settings, refuse)
            saved.append(key)
        else:
            raise refuse(f"unknown tensor {key!r}", "only plain LoRA adapters can be merged")
    layouts = {module: _layout(module, kind, settings, files, refuse) for module, kind in sorted(modules.items())}
    return layouts, tuple(sorted(saved)), tuple(sorted(copies))


def _check_saved(stem: str, settings: LoraSettings, refuse) -> None:
    module = stem.rsplit(".", 1)[0]
    listed = any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", module) for name in settings.modules_to_save)
    if not listed and not (stem.endswith(".bias") and settings.bias != "none"):
        raise refuse(
            f"tensor {stem!r} is neither a LoRA factor nor in modules_to_save nor a trained bias",
            "save the adapter with PEFT's save_pretrained",
        )


def _layout(module: str, kind: str, settings: LoraSettings, files: dict[str, TensorFile], refuse) -> AdapterLayout:
    key_A, key_B, key_bias = factor_keys(module, kind)
    for key in (key_A, key_B):
        if key not in files:
            raise refuse(f"{key} is missing", "the adapter is not whole: copy or save it again")
    shape_A, shape_B = files[key_A].entries[key_A].shape, files[key_B].entries[key_B].shape
    if len(shape_A) != 2 or len(shape_B) != 2:
        raise refuse(
            f"{module} has factors {list(shape_A)} and {list(shape_B)}: only matrices can be merged", "leave it out"
        )
    if shape_A[0] != shape_B[1] or 0 in (*shape_A, *shape_B):
        raise refuse(f"{module}: A {list(shape_A)} and B {list(shape_B)} don't fit", "save the adapter again")
    if shape_A[0] != settings.rank_of(module):
        raise refuse(
            f"{module} has rank {shape_A[0]} but the config says {settings.rank_of(module)}, so alpha/r is unknown",
            "give the config that belongs to these weights",
        )
    has_bias = key_bias in files
    if has_bias and files[key_bias].entries[key_bias].shape != (shape_B[0],):
        raise refuse(f"{key_bias} has the wrong shape", "save the adapter again")
    return AdapterLayout(shape_B[0], shape_A[1], shape_A[0], kind, has_bias)


def _sha256(files: dict[str, TensorFile]) -> str:
    """Of the weights file; of the shards' hashes in order of their names, if there are several."""
    hashes = [file_hash(path) for path in sorted({file.path for file in files.values()})]
    return hashes[0] if len(hashes) == 1 else content_hash("".join(hashes))


def read_adapters(adapters: Sequence[str | Path | LoraAdapter]) -> list[LoraAdapter]:
    """Open all; equal names get a number. Raises MergeError if none is given."""
    if isinstance(adapters, str | Path | LoraAdapter):
        raise TypeError("adapters is one adapter: give a list")
    if not adapters:
        raise MergeError("no adapter given", do="give the folders of one or more LoRA adapters")
    counts: Counter[str] = Counter()
    opened = []
    for item in adapters:
        adapter = item if isinstance(item, LoraAdapter) else read_adapter(item)
        counts[adapter.name] += 1
        count = counts[adapter.name]
        opened.append(adapter if count == 1 else replace(adapter, name=f"{adapter.name}-{count}"))
    return opened
