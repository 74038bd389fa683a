"""The files of a model's folder: values that can't be are named, with file and key, before anything is loaded.

What transformers finds by itself it says in its own words, often without the file: `blame` finds that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from logging import LogRecord
from pathlib import Path
from typing import Any

import torch

from mtft.adapters.safetensors_io import read_header
from mtft.common.errors import UserError
from mtft.common.foreign_json import read_foreign
from mtft.common.own_files import irregular

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer_config.json"
AGAIN = "copy or save the model again, whole"
MEND = "give the config.json that belongs to these weights"

_CLASS_NAME = re.compile(r"\b[A-Z]\w*(?:Error|Exception): ")  # means nothing to people
_CLASS = re.compile(r"<class '(?:\w+\.)*(\w+)'>")
SIZES = re.compile(
    r"(hidden|intermediate|vocab)_size|num_(attention|key_value)_heads|head_dim|d_model|n_(embd|head|positions)"
    r"|max_position_embeddings"
)
COUNTS = re.compile(r"num_(hidden_layers|layers|labels)|n_layers?|num_(local_)?experts")  # each costs time
OBJECTS = ("rope_parameters", "rope_scaling", "quantization_config", "auto_map", "id2label", "text_config")
ROPE_FACTORS = (("rope_parameters", "factor"), ("rope_scaling", "factor"))
LARGEST_SIZE, LARGEST_COUNT, LARGEST = 2**31 - 1, 10_000, 2**53


def check_model_files(folder: Path) -> dict[str, Any]:
    """The config of a model's folder. UserError for a damaged file, or a value that no model can have."""
    config = read_foreign(folder / CONFIG, do=AGAIN)
    for name in (GENERATION, TOKENIZER):
        if (folder / name).exists():
            read_foreign(folder / name, do=AGAIN)
    for path, value in _leaves(config, ()):
        if (problem := _impossible(path, value)) is not None:
            key = ".".join(map(str, path))
            raise UserError(f"the model's {key} {problem}", where=f"{folder / CONFIG}, key {key}", do=MEND)
    return config


def blame(folder: Path, error: Exception) -> tuple[str, str | None]:
    """(what is wrong, where) behind an error that transformers raised for a model's folder; no place: None."""
    for path in sorted(folder.glob("*.json")):
        try:
            read_foreign(path, do="", most=1 << 40)
        except UserError as damaged:
            return damaged.what, damaged.where
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file() and not isinstance(read_foreign(tokenizer, do="", most=1 << 40).get("model"), dict):
        return "tokenizer.json holds no tokenizer: there is no object under the key model", f"{tokenizer}, key model"
    for path in sorted(folder.glob("*.safetensors")):
        if (broken := broken_weights(path)) is not None:
            return f"{path.name} is not a whole safetensors file ({broken})", str(path)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    text = _CLASS.sub(r"\1", _CLASS_NAME.sub("", text)).replace("NoneType", "null")[:300]
    if isinstance(error, KeyError | IndexError):
        text = f"one of its files lacks {text}"
    elif isinstance(error, AttributeError | AssertionError | ArithmeticError | TypeError):
        text = f"one of its files holds a value of another kind than is meant ({text})"
    return text or type(error).__name__, _named(folder, str(error))


def check_finite(model: torch.nn.Module, folder: Path, where: str, *, only: str = "") -> None:
    """UserError when a parameter holds NaN or infinity. folder: of its files; only: a part of the names to look at.

    One pass of sums, at the speed of memory. Quantized weights are not looked at: of packed bytes that are held as
    floats any may read as NaN.
    """
    for name, parameter in model.named_parameters():
        if only not in name or parameter.is_meta or not parameter.is_floating_point() or parameter.itemsize < 2:
            continue
        if "quant_state" in vars(parameter):
            continue
        values = parameter.detach()
        if math.isfinite(values.sum()):  # in its own type: the fastest pass there is; it may overflow
            continue
        if all(map(math.isfinite, torch.aminmax(values))):
            continue
        bad = values.numel() - int(torch.isfinite(values).sum())
        raise UserError(
            f"{bad} of {values.numel()} values of {name} are NaN or infinite",
            where=_holder(folder, name) or where,
            do="copy it again, or take an earlier checkpoint of it",
        )


class ReportFilter:
    """Holds back the loading report of transformers, a line for each weight: it is refused in one sentence."""

    def __init__(self, level: int) -> None:
        self.level = level
        """Of the other messages that are to be seen."""
        self.mismatch: str | None = None
        """The first weight whose shape is not that of the config, and both shapes."""

    def filter(self, record: LogRecord) -> bool:
        text = record.getMessage()
        if "LOAD REPORT" not in text:
            return record.levelno >= self.level
        row = re.search(r"^(\S.*?)\s+\|\s*MISMATCH\s*\|.*?(\[[\d, ]*\]).*?(\[[\d, ]*\])", text, re.MULTILINE)
        if row is not None:
            self.mismatch = f"{row[1]} is {row[2]}, and {row[3]} by the config"
        return False


def _leaves(node: Any, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every value of a config with the keys that lead to it; containers too."""
    if path:
        yield path, node
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, (*path, key))


def _impossible(path: tuple[str | int, ...], value: Any) -> str | None:
    """What is wrong with a value of a config, as the end of a sentence."""
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    if isinstance(value, float) and math.isnan(value):
        return "is NaN"
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"is a number of {len(str(abs(value)))} digits" if abs(value) < 10**4000 else "is too large"
    if key in OBJECTS and len(path) == 1 and not isinstance(value, dict | None):
        return f"is {str(value)[:80]!r}, not an object"
    if value is None or isinstance(value, dict | list):
        return None
    if SIZES.fullmatch(key) or COUNTS.fullmatch(key):
        most = LARGEST_SIZE if SIZES.fullmatch(key) else LARGEST_COUNT
        least = 0 if key in ("intermediate_size", "num_experts", "num_local_experts", "num_labels") else 1
        whole = isinstance(value, int) and not isinstance(value, bool)
        return None if whole and least <= value <= most else f"is {value!r}, no whole number from {least} to {most}"
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key.endswith(("_eps", "_epsilon")) and not (number and 0 <= value < 1):
        return f"is {value!r}, no number from 0 to 1"
    if (key == "rope_theta" or path[-2:] in ROPE_FACTORS) and not (number and 0 < value < math.inf):
        return f"is {value!r}, no number above 0"
    if key.endswith(("dropout", "pdrop")) and number and not 0 <= value <= 1:
        return f"is {value!r}, no share from 0 to 1"
    return _unknown(key, value)


def _unknown(key: str, value: Any) -> str | None:
    """The same for what must be one of a few names."""
    if key in ("dtype", "torch_dtype"):
        known = isinstance(value, str) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
        return None if known or value == "auto" else f"is {value!r}, no type of numbers (bfloat16, float16, float32)"
    if key in ("hidden_act", "hidden_activation", "activation_function"):
        from transformers.activations import ACT2FN

        return None if value in ACT2FN else f"is {value!r}, an activation that transformers does not know"
    return None


def _named(folder: Path, text: str) -> str | None:
    """The key of config.json that an error speaks of: its name, or a text that it holds, stands quoted in it."""
    quoted = set(re.findall(r"['\"`]([^'\"`]+)['\"`]", text))
    try:
        leaves = list(_leaves(read_foreign(folder / CONFIG, do=""), ()))
    except UserError:
        return None
    for path, value in leaves:
        if path[-1] in quoted or (isinstance(value, str) and value in quoted):
            return f"{folder / CONFIG}, key {'.'.join(map(str, path))}"
    return None


def _holder(folder: Path, name: str) -> str | None:
    """The file of a folder that holds a parameter, which may have a prefix in one of the two."""
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(OSError, ValueError, KeyError):
            if any(key == name or name.endswith(f".{key}") or key.endswith(f".{name}") for key in read_header(path)):
                return f"{path}, {name}"
    return None


def broken_weights(path: Path) -> str | None:
    """Why a file holds no whole safetensors; None if it does."""
    from safetensors import SafetensorError, safe_open

    if (kind := irregular(path)) is not None:
        return f"it is {kind}"
    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError, ValueError) as error:
        return str(error)


def check_loading_report(kind: str, report: Mapping[str, Any], what: str, where: str) -> None:
    """UserError when the loading report of transformers says that the weights are not those of the model."""
    missing, unused = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    wrong = sorted(str(item[0]) for item in report["mismatched_keys"]) + list(report["error_msgs"])
    if wrong:
        raise UserError(
            f"{some(wrong)} of the {what} do not have the shape that its config says",
            where=where,
            do="give the config.json that belongs to these weights",
        )
    if missing:
        raise UserError(
            f"the {what}'s files lack {some(missing)}, which {kind} needs: random numbers would stand there",
            where=where,
            do="copy or save the model again, whole; a model of another kind (a classifier, an encoder) can't be used",
        )
    if unused:
        raise UserError(
            f"the {what}'s files hold {some(unused)}, for which {kind} has no place: they would be ignored",
            where=where,
            do=f"if {kind} alone is meant: {kind}.from_pretrained(...).save_pretrained(NEW_FOLDER), once, and name "
            "that folder (an adapter is merged into its base before, by merge_and_unload())",
        )


def some(names: Sequence[str], most: int = 3) -> str:
    """`3 weights (a, b, ...)`: how many, and the first of them."""
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"{len(names)} weight{'s' if len(names) != 1 else ''} ({shown})"
