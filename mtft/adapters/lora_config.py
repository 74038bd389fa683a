"""adapter_config.json of a LoRA: what is understood, and what is refused by name.

An allow-list: a field that this file does not know and that is not at its default means that the adapter is more than
scale * B A, and a merge that ignored it would be silently wrong.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

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

from mtft.common.errors import MergeError

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


Number = TypeVar("Number", int, float)


def _regex(pattern: str) -> str:
    """A key of rank_pattern or alpha_pattern."""
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


ModulePattern = Annotated[str, AfterValidator(_regex)]
Whole = Annotated[PositiveInt, BeforeValidator(lambda x: int(x) if isinstance(x, float) and x.is_integer() else x)]
Positive = Annotated[FiniteFloat, Field(gt=0)]


class LoraSettings(BaseModel):
    """What a merge needs from adapter_config.json."""

    model_config = ConfigDict(frozen=True, strict=True)

    r: Whole = 8
    alpha: Positive = Field(8.0, alias="lora_alpha")
    rslora: bool = Field(False, alias="use_rslora")
    rank_pattern: dict[ModulePattern, Whole] = {}
    alpha_pattern: dict[ModulePattern, Positive] = {}
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: list[str] = []
    base: str | None = Field(None, alias="base_model_name_or_path")
    revision: str | None = None
    task_type: str | None = None
    auto_mapping: dict[str, Any] | None = None

    def rank_of(self, module: str) -> int:
        return _first_match(self.rank_pattern, module, self.r)

    def scale_of(self, module: str) -> float:
        """s = alpha/r, or alpha/sqrt(r) under rsLoRA; both after the patterns."""
        r, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return float(alpha / (math.sqrt(r) if self.rslora else r))


def _first_match(pattern: dict[str, Number], module: str, default: Number) -> Number:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):  # PEFT's rule: the first key that matches the end of the name
            return value
    return default


def _is_default(value: object) -> bool:
    return value is None or value is False or value == {} or value == []


def read_settings(folder: Path) -> LoraSettings:
    """Read and check `folder`/adapter_config.json; MergeError names the field that can't be merged."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES >> 20} MB")
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise MergeError(f"no {CONFIG}", where=str(folder), do="give the folder of a PEFT LoRA adapter") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(f"{CONFIG} can't be read: {error}", where=str(path), do="save the adapter again") from None

    def refuse(what: str, do: str) -> MergeError:
        return MergeError(what, where=str(path), do=do)

    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise refuse(f"peft_type is {kind!r}", "only LoRA adapters can be merged")
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
    try:  # null: not set
        return LoraSettings.model_validate({key: value for key, value in config.items() if value is not None})
    except ValidationError as invalid:
        error = invalid.errors()[0]
        place = ".".join(map(str, error["loc"]))
        raise refuse(f"{place} is {error['input']!r}: {error['msg'].lower()}", "save the adapter again") from None
