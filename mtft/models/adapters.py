"""Saved adapters on a model: the one loader of training (lora.start), evaluation, merging and fusion.

Every weight of the adapter is found in its file, every weight in the file is used, and the base is the one that it was
trained on; else the adapter is refused. PEFT leaves what is missing as it was initialised, which is the base itself,
and what it can't place aside.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from data_mixers.common.suggest import did_you_mean
from mtft.adapters.base_identity import BASE, BaseIdentity, fingerprint, recorded_base
from mtft.adapters.lora_config import CONFIG, MAX_BYTES, LoraSettings, lora_settings
from mtft.adapters.lora_factors import PREFIX, WEIGHTS, LoraAdapter
from mtft.adapters.module_patterns import refuse_endless
from mtft.adapters.safetensors_io import read_header
from mtft.common.atomic_folder import restore_replaced
from mtft.common.errors import MergeError, UserError
from mtft.common.foreign_json import read_foreign
from mtft.common.out_of_memory import is_out_of_memory
from mtft.common.run_folders import refuse_run_as_adapter
from mtft.models.bitsandbytes_aside import bitsandbytes_aside
from mtft.models.loading import cached_folder
from mtft.models.model_files import broken_weights, check_finite, some

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

_BASES: WeakKeyDictionary[nn.Module, BaseIdentity] = WeakKeyDictionary()
USE_ITS_BASE = "use the base model that its adapter_config.json names (base_model_name_or_path)"


def read_peft_config(folder: str | Path, *, where: str | None = None) -> PeftConfig:
    """The config of a saved adapter. UserError when the folder holds none, or no weights in safetensors."""
    from peft import PeftConfig

    folder = Path(folder)
    where = where or str(folder)
    restore_replaced(folder)
    refuse_run_as_adapter(folder, where=where)
    if not (folder / CONFIG).is_file():
        do = "give the `adapter` folder of a run, or any PEFT adapter"
        if not folder.exists():
            others = (other.name for other in folder.parent.iterdir()) if folder.parent.is_dir() else ()
            raise UserError(
                f"there is no adapter folder {folder}{did_you_mean(folder.name, others)}", where=where, do=do
            )
        raise UserError(f"the folder holds no {CONFIG}", where=where, do=do)
    if not (folder / WEIGHTS).is_file():
        what = f"the folder holds no {WEIGHTS}: the adapter's weights are missing, or are a pickle"
        raise UserError(what, where=where, do="save it as safetensors")
    _check_config(folder)
    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{CONFIG} can't be used: {_first_line(error)}", where=where, do="save it again") from error


def _check_config(folder: Path) -> None:
    """UserError for a config that is damaged, has values that can't be, or could keep PEFT busy for ever."""
    path = folder / CONFIG
    config = read_foreign(path, do="save the adapter again", most=MAX_BYTES)
    if config.get("peft_type") != "LORA":
        return
    settings = lora_settings(config, path)
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        if isinstance(config.get(key), str):
            try:
                refuse_endless(config[key], repeats=8)
            except ValueError as error:
                do = "list the modules by their names"
                raise UserError(f"{key}: {error}", where=f"{path}, key {key}", do=do) from None
    _check_ranks(settings, folder)


def _check_ranks(settings: LoraSettings, folder: Path) -> None:
    """UserError for a rank that the file has not: PEFT would make room for it before it looks."""
    try:
        shapes = {key: entry.shape for key, entry in read_header(folder / WEIGHTS).items() if entry.shape}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # PEFT says what is wrong with the file
    most = max((shape[0] for key, shape in shapes.items() if "lora_A" in key or "lora_embedding_A" in key), default=0)
    ranks = {f"rank_pattern.{name}": rank for name, rank in settings.rank_pattern.items()}
    for key, rank in {"r": settings.r, **ranks}.items():
        # Where every module has a rank of its own, r is that of none.
        if rank > (max(map(max, shapes.values()), default=0) if key == "r" and ranks else most):
            what, do = f"{key} is {rank}, and no tensor has that rank", "give the config that belongs to these weights"
            raise UserError(what, where=f"{folder / CONFIG}, key {key}", do=do)


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    config: PeftConfig | None = None,
    trainable: bool = False,
    any_base: bool = False,
    where: str | None = None,
) -> PeftModel:
    """`model` with a saved adapter on it, which is all there and was trained on this base.

    Args:
        model: from mtft.models.loading: its config says where it is from. It is changed.
        folder: of the adapter.
        config: in place of the folder's own, as `read_peft_config` gives it.
        trainable: to be trained on.
        any_base: names and shapes decide, whatever the base's weights are.
        where: how messages call the adapter; None: by its folder.

    Raises:
        UserError: no adapter, another base, or weights that are missing, unknown or of another shape.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    where = where or str(folder)
    if config is None:
        config = read_peft_config(folder, where=where)
    if not any_base:
        check_base(folder, model, where=where)
    weights = Path(folder) / WEIGHTS
    if os.path.lexists(weights) and (why := broken_weights(weights)) is not None:
        do = "copy or save the adapter again"
        raise UserError(f"not a whole safetensors file ({why})", where=str(weights), do=do)
    config.inference_mode = not trainable
    config.base_model_name_or_path = model.name_or_path  # wherever it was when the adapter was trained
    try:
        with bitsandbytes_aside():
            adapted: Any = get_peft_model(model, config)
        report = adapted.load_adapter(str(folder), "default", is_trainable=trainable)
    except KeyError as error:  # a module that was trained as a whole (modules_to_save)
        raise UserError(
            f"the adapter's file lacks {str(error.args[0]).removeprefix(PREFIX)}",
            where=where,
            do="copy or save the adapter again, whole",
        ) from error
    except (RuntimeError, ValueError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise does_not_fit(error, where) from error
    missing = {name.replace(".default", "") for name in report.missing_keys}
    if getattr(config, "bias", "none") != "none":  # of which PEFT's report says nothing
        missing |= get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() - _stored(folder)
    _check_names(sorted(missing), sorted(report.unexpected_keys), where)
    check_finite(adapted, Path(folder), where, only=".default.")
    return adapted


def does_not_fit(error: Exception, where: str) -> UserError:
    """The refusal of an adapter that PEFT can't put on the model."""
    return UserError(f"the adapter does not fit the model: {_first_line(error)}", where=where, do=USE_ITS_BASE)


def reload_own(adapted: PeftModel, folder: str | Path) -> None:
    """Reads a saved adapter back into the model that it was saved from, where it changes nothing.

    UserError when the file is not what PEFT would load: then nobody could.
    """
    trained = {name: parameter.requires_grad for name, parameter in adapted.named_parameters()}
    report = adapted.load_adapter(str(folder), "default", is_trainable=True)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(trained[name])
    _check_names(sorted(report.missing_keys), sorted(report.unexpected_keys), str(folder))


def check_fits(adapter: LoraAdapter, model: nn.Module) -> None:
    """UserError when an adapter whose factors are put on `model` one by one was trained on another, or is not whole."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        check_base(adapter.path, model)
    parts, where = dict(model.named_modules()), str(adapter.path)
    for name, layout in adapter.modules.items():
        if name not in parts:
            raise MergeError(f"the model has no module {name!r}", where=where, do=USE_ITS_BASE)
        part: Any = parts[name]
        linear = isinstance(part, nn.Linear)  # a quantised one packs its weight
        shape = (part.out_features, part.in_features) if linear else tuple(part.weight.shape)
        if sorted(shape) != sorted((layout.m, layout.n)):
            what = f"{name} is {shape[0]} x {shape[1]}, and {layout.m} x {layout.n} in the adapter"
            raise UserError(f"the adapter does not fit the model: {what}", where=where, do=USE_ITS_BASE)
    saved = {key.removeprefix(PREFIX).rsplit(".", 1)[0] for key in adapter.saved}
    check_covers(adapter.path, {*adapter.modules, *saved}, model)


def check_covers(folder: str | Path, modules: set[str], model: nn.Module) -> None:
    """UserError when the config of an adapter targets modules of `model` that are not among those in its file."""
    from peft.tuners.tuners_utils import check_target_module_exists

    config: Any = read_peft_config(folder)
    if config.target_modules is None:  # PEFT's own choice for this architecture
        return
    targeted = {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name)}
    _check_names(sorted(targeted - modules), [], str(folder))


def check_base(folder: str | Path, model: PreTrainedModel, *, where: str | None = None) -> None:
    """UserError when the adapter was trained on other weights than those in the files of `model`."""
    recorded = recorded_base(Path(folder))
    if recorded is None or recorded.fingerprint is None:
        return
    here = base_of(model)
    if recorded.differs(here):
        named = f"remove {BASE} from its folder" if (Path(folder) / BASE).is_file() else f"change its {CONFIG}"
        raise UserError(
            f"the adapter does not fit the model: it was trained on {recorded.model}"
            + (f" (revision {recorded.revision})" if recorded.revision else "")
            + f", and {here.model} holds other weights",
            where=where or str(folder),
            do=f"give the base that it was trained on; if it is meant for this one, {named}",
        )


def base_of(model: PreTrainedModel | PeftModel) -> BaseIdentity:
    """Which weights a loaded model was read from. Remembered: the files may move while it is trained."""
    known: BaseIdentity | None = _BASES.get(model)
    if known is None or known.fingerprint is None:
        known = _BASES[model] = _find_base(model)
    return known


def _find_base(model: PreTrainedModel | PeftModel) -> BaseIdentity:
    path, commit = str(model.name_or_path or ""), vars(model.config).get("_commit_hash")  # only of a hub model
    if path and Path(path).is_dir():
        place: Path | None = Path(path)
    else:
        place = None if commit is None else cached_folder(path, commit)
    return BaseIdentity(path, commit, None if place is None else fingerprint(place))


def _stored(folder: str | Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(Path(folder) / WEIGHTS, framework="np") as file:
        return set(file.keys())


def _check_names(missing: list[str], unused: list[str], where: str) -> None:
    missing, unused = ([name.removeprefix(PREFIX) for name in names] for names in (missing, unused))
    if missing:
        raise UserError(
            f"the adapter's file lacks {some(missing)} that its config has on this model: there the base would answer",
            where=where,
            do=f"copy or save the adapter again, whole; or {USE_ITS_BASE}",
        )
    if unused:
        raise UserError(
            f"the adapter's file holds {some(unused)} for which this model has no place: they would be ignored",
            where=where,
            do=USE_ITS_BASE,
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
