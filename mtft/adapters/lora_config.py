"""adapter_config.json of a LoRA: what is understood, and what is refused by name.

An allow-list: a field that this file does not know and that is not at its default means that the adapter is more than
scale * B A, and a merge that ignored it would be silently wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    PositiveInt,
    ValidationError,
)

from mtft.adapters.module_patterns import ModulePatterns, Number
from mtft.common.errors import MergeError
from mtft.common.foreign_json import read_foreign

CONFIG = "adapter_config.json"
MAX_BYTES = 32 << 20  # full module names of a large mixture of experts reach a few MB

# Fields that don't change what scale * B A means (or that are read below).
ALLOWED = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out"),
    *("bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern", "lora_bias", "eva_config", "runtime_config", "qalora_group_size"),
    *("megatron_core", "base_model_class", "parent_library"),
}
INITS = (True, False, "gaussian", "eva", "orthogonal")
REASONS = {
    "use_dora": ("DoRA rescales the whole weight: not a linear delta", "train without DoRA"),
    "alora_invocation_tokens": ("an activated LoRA is not always on", "train an ordinary LoRA"),
    "trainable_token_indices": ("trained token rows are not a low-rank delta", "train the embedding with LoRA instead"),
    "target_parameters": ("adapters on bare parameters are not read", "target modules instead of parameters"),
}


MAX_RANK = 65_536


def _plain(value: object) -> object:
    """5.0 as 5; a number that no float holds is refused here: pydantic would print all its digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        raise ValueError("too large")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _bounded(patterns: dict[str, Number]) -> dict[str, Number]:
    ModulePatterns(patterns)
    return patterns


Rank = Annotated[PositiveInt, Field(le=MAX_RANK), BeforeValidator(_plain)]
Positive = Annotated[FiniteFloat, Field(gt=0), BeforeValidator(_plain)]


class LoraSettings(BaseModel):
    """What a merge needs from adapter_config.json."""

    model_config = ConfigDict(frozen=True, strict=True)

    r: Rank = 8
    alpha: Positive = Field(8.0, alias="lora_alpha")
    rslora: bool = Field(False, alias="use_rslora")
    rank_pattern: Annotated[dict[str, Rank], AfterValidator(_bounded)] = {}
    alpha_pattern: Annotated[dict[str, Positive], AfterValidator(_bounded)] = {}
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: list[str] = []
    base: str | None = Field(None, alias="base_model_name_or_path")
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None

    @cached_property
    def _ranks(self) -> ModulePatterns[int]:
        return ModulePatterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> ModulePatterns[float]:
        return ModulePatterns(self.alpha_pattern)

    def rank_of(self, module: str) -> int:
        return self._ranks.first(module, self.r)

    def scale_of(self, module: str) -> float:
        """s = alpha/r, or alpha/sqrt(r) under rsLoRA; both after the patterns."""
        r, alpha = self.rank_of(module), self._alphas.first(module, self.alpha)
        return float(alpha / (math.sqrt(r) if self.rslora else r))


def _is_default(value: object) -> bool:
    return value is None or value is False or value == {} or value == []


def read_settings(folder: Path) -> LoraSettings:
    """Read and check `folder`/adapter_config.json; MergeError names the field that can't be merged."""
    path = folder / CONFIG
    if not path.exists():
        raise MergeError(f"no {CONFIG}", where=str(folder), do="give the folder of a PEFT LoRA adapter")
    config = read_foreign(path, do="save the adapter again", error=MergeError, most=MAX_BYTES)

    def refuse(what: str, do: str) -> MergeError:
        return MergeError(what, where=str(path), do=do)

    if config.get("peft_type") != "LORA":
        raise refuse(f"peft_type is {str(config.get('peft_type'))[:80]!r}", "only LoRA adapters can be merged")
    for key, value in config.items():
        if key not in ALLOWED and not _is_default(value):
            why, do = REASONS.get(
                key, ("it may change what the factors mean", "train without it, or remove it if unused")
            )
            raise refuse(f"{key} = {json.dumps(value)[:80]} can't be merged: {why}", do)
    init = config.get("init_lora_weights", True)
    if init not in INITS:
        raise refuse(
            f"init_lora_weights = {init!r} changed the base weights, so the factors are no delta of the plain base",
            "re-save it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    return lora_settings(config, path)


def lora_settings(config: Mapping[str, object], path: Path) -> LoraSettings:
    """The settings in the content of an adapter_config.json. MergeError names the key of a value that can't be."""
    try:  # null: not set
        return LoraSettings.model_validate({key: value for key, value in config.items() if value is not None})
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
        place = ".".join(str(part)[:80] for part in error["loc"])
        shown = _shown(error["input"])
        what = f"{place} is {shown}: {error['msg'].lower().removeprefix('value error, ')}"
        raise MergeError(what, where=f"{path}, key {place}", do="save the adapter again") from None


def _shown(value: object) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # Python prints no number of more than 4300 digits
        return "a number of thousands of digits"
