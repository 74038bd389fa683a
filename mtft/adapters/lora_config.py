"""adapter_config.json of a LoRA: what is understood, and what is refused by name.

An allow-list: a field that this file does not know and that is not at its default means that the adapter is more than
scale * B A, and a merge that ignored it would be silently wrong.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class LoraSettings:
    """What a merge needs from adapter_config.json."""

    r: int
    alpha: float
    rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    fan_in_fan_out: bool
    bias: str
    lora_bias: bool
    modules_to_save: tuple[str, ...]
    base: str | None
    revision: str | None
    task_type: str | None
    auto_mapping: dict | None

    def rank_of(self, module: str) -> int:
        return int(_first_match(self.rank_pattern, module, self.r))

    def scale_of(self, module: str) -> float:
        """s = alpha/r, or alpha/sqrt(r) under rsLoRA; both after the patterns."""
        r, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return float(alpha / (math.sqrt(r) if self.rslora else r))


def _first_match(pattern: dict, module: str, default: float) -> float:
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
    return _typed(config, refuse)


def _typed(config: dict, refuse) -> LoraSettings:
    def number(key: str, value: Any, kind: str = "a number > 0") -> float:
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
        if not good or (kind != "a number > 0" and int(value) != value):
            raise refuse(f"{key} is {value!r}: must be {kind}", "save the adapter again")
        return value

    def pattern(key: str, kind: str) -> dict:
        found = config.get(key) or {}
        if not isinstance(found, dict):
            raise refuse(f"{key} must be an object, is {type(found).__name__}", "save the adapter again")
        for name, value in found.items():
            number(f"{key}[{name!r}]", value, kind)
            try:
                re.compile(rf"(.*\.)?({name})$")
            except re.error as error:
                raise refuse(
                    f"{key} has {name!r}, not a regular expression: {error}", "save the adapter again"
                ) from None
        return found

    def typed(key: str, types: type | tuple, default: object = None):
        value = config.get(key, default)
        if value is not None and not isinstance(value, types):
            raise refuse(f"{key} is {value!r} ({type(value).__name__})", "save the adapter again")
        return value

    saved = typed("modules_to_save", list, []) or []
    if not all(isinstance(name, str) for name in saved):
        raise refuse("modules_to_save must be a list of names", "save the adapter again")
    return LoraSettings(
        r=int(number("r", config.get("r", 8), "a whole number > 0")),
        alpha=float(number("lora_alpha", config.get("lora_alpha", 8))),
        rslora=bool(typed("use_rslora", bool, False)),
        rank_pattern=pattern("rank_pattern", "a whole number > 0"),
        alpha_pattern=pattern("alpha_pattern", "a number > 0"),
        fan_in_fan_out=bool(typed("fan_in_fan_out", bool, False)),
        bias=typed("bias", str, "none") or "none",
        lora_bias=bool(typed("lora_bias", bool, False)),
        modules_to_save=tuple(saved),
        base=typed("base_model_name_or_path", str),
        revision=typed("revision", str),
        task_type=typed("task_type", str),
        auto_mapping=typed("auto_mapping", dict),
    )
