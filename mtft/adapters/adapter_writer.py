"""The merged adapter on disk: a folder that PEFT and vLLM load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from mtft.adapters.base_identity import common_base, write_base
from mtft.adapters.companion_files import copy_companions
from mtft.adapters.lora_config import CONFIG
from mtft.adapters.lora_factors import PREFIX, WEIGHTS, AdapterLayout, LoraAdapter, factor_keys
from mtft.adapters.safetensors_io import TensorWriter
from mtft.common.atomic_io import write_json
from mtft.common.errors import MergeError

DTYPES = {"fp64": "F64", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def disk_dtype(adapters: Sequence[LoraAdapter], dtype: str | None) -> str:
    """The type to write: the one asked for, else the inputs'; mixed half precisions become float32."""
    if dtype is not None:
        if dtype not in DTYPES:
            raise MergeError(f"dtype is {dtype!r}", where="dtype", do=f"one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    dtypes = set().union(*(adapter.dtypes for adapter in adapters))
    if len(dtypes) == 1:
        return dtypes.pop()
    return "F64" if "F64" in dtypes else "F32"


def servable_rank(rank: int) -> int:
    """The next rank that servers take: 8, or a power of two."""
    return max(8, 1 << (rank - 1).bit_length())


class AdapterWriter:
    """Streams modules into `folder`/adapter_model.safetensors at a uniform rank; a context: whole at the block's end.

    Args:
        folder: There already; empty.
        adapters: What the result is made from: what their configs agree on goes into its config.
        layouts: {module: its layout}, in the order in which they will be added.
        rank: Of every module in the file.
        dtype: On-disk type (F32, BF16, ...).
        saved: {key: full tensor} that go along.
    """

    def __init__(
        self,
        folder: Path,
        adapters: Sequence[LoraAdapter],
        layouts: Mapping[str, AdapterLayout],
        rank: int,
        dtype: str,
        saved: dict[str, np.ndarray],
    ) -> None:
        self.folder, self.adapters, self.layouts, self.rank, self.saved = folder, adapters, layouts, rank, saved
        self.with_bias = any(layout.has_bias for layout in layouts.values())
        entries = []
        for name, layout in layouts.items():
            key_A, key_B, key_bias = factor_keys(name, layout.kind)
            entries += [(key_A, dtype, (rank, layout.n)), (key_B, dtype, (layout.m, rank))]
            if self.with_bias and layout.kind == "linear":
                entries.append((key_bias, dtype, (layout.m,)))
        entries += [(key, dtype, values.shape) for key, values in saved.items()]
        self._writer = TensorWriter(folder / WEIGHTS, entries)

    def add(self, name: str, B_MR: np.ndarray, A_RN: np.ndarray, bias_M: np.ndarray | None) -> None:
        """Write one module; factors of lower rank get zero rows and columns."""
        kind = self.layouts[name].kind
        key_A, key_B, key_bias = factor_keys(name, kind)
        short = self.rank - A_RN.shape[0]
        self._write(key_A, np.pad(A_RN, ((0, short), (0, 0))))
        self._write(key_B, np.pad(B_MR, ((0, 0), (0, short))))
        if self.with_bias and kind == "linear":
            self._write(key_bias, np.zeros(B_MR.shape[0]) if bias_M is None else bias_M)

    def _write(self, key: str, values: np.ndarray) -> None:
        try:
            self._writer.write(key, values)
        except OverflowError as error:
            raise MergeError(str(error), where=key, do="write bf16 or fp32 (dtype)") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._writer.__exit__(kind, *rest)
            return
        with self._writer:
            for key, values in self.saved.items():
                self._write(key, values)

    def write_config(self) -> list[str]:
        """Comes last: a folder without its config is no adapter. Returns warnings."""
        if (base := common_base([adapter.path for adapter in self.adapters])) is not None:
            write_base(self.folder, base)
        alike = copy_companions([adapter.path for adapter in self.adapters], self.folder)
        write_json(self.folder / CONFIG, self._config(), indent=2)
        return [] if alike else ["the adapters' tokenizers or chat templates differ: none stands beside the merged one"]

    def _config(self) -> dict[str, object]:
        """The adapter_config.json: no patterns, alpha = r, every module by its full name so nothing else matches."""

        def common(name: str) -> object:
            values = [getattr(adapter.settings, name) for adapter in self.adapters]
            return values[0] if all(value == values[0] for value in values) else None

        tensors = [key for key in self.saved if not _is_base_bias(key, self.adapters)]
        modules = sorted({key[len(PREFIX) :].rsplit(".", 1)[0] for key in tensors})
        settings = self.adapters[0].settings
        return {
            **plain_config(self.rank, list(self.layouts), settings.base),
            "task_type": common("task_type"),
            "auto_mapping": common("auto_mapping"),
            "revision": common("revision"),
            "lora_bias": self.with_bias,
            "fan_in_fan_out": settings.fan_in_fan_out,
            "modules_to_save": modules or None,
        }


def plain_config(rank: int, modules: Sequence[str], base: str | None) -> dict[str, object]:
    """A LoRA config that leaves nothing to guess: one rank, alpha = rank, modules by their full names."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "target_modules": list(modules),
    }


def _is_base_bias(key: str, adapters: Sequence[LoraAdapter]) -> bool:
    """A trained bias of the base (bias != none), not part of a module in modules_to_save."""
    stem = key[len(PREFIX) :].rsplit(".", 1)[0]
    names = {name for adapter in adapters for name in adapter.settings.modules_to_save}
    return key.endswith(".bias") and not any(stem == name or stem.endswith("." + name) for name in names)
