"""Tokenizers and models, read from disk or from the hub: the one loader of training, evaluation and fusion.

Weights are read from safetensors only, and code that ships with a model is never run. Every weight that the model needs
is in its files and every weight in the files is used, or the model is refused: transformers fills what is missing with
random numbers and leaves what it does not know aside. What it knows to be tied, made anew, or meant for another class
does not count: that stands in its loading report. Adapters: mtft.models.adapters.

    precision       weights                         forward
    fp32            fp32                            fp32
    bf16, LoRA      base bf16, adapter fp32         bf16 (autocast)
    bf16, full      fp32: small updates would vanish in bf16's 8 bits    bf16 (autocast)
    nf4 / int8      base quantized by bitsandbytes, adapter fp32 (QLoRA, Dettmers et al. 2023)    as dtype
"""

from __future__ import annotations

import os
import re
from logging import WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtft.common.atomic_folder import restore_replaced
from mtft.common.errors import UserError
from mtft.common.out_of_memory import is_out_of_memory
from mtft.common.own_files import irregular
from mtft.distributed.launch import LaunchConfig
from mtft.models.cpu_precision import cpu_dtype
from mtft.models.model_files import ReportFilter, blame, check_finite, check_loading_report, check_model_files
from mtft.models.quantization import bitsandbytes_config
from mtft.models.segment_attention import NAME as SEGMENTS
from mtft.models.segment_attention import register, use_segments
from mtft.recipe.schema.model import ModelSection

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

QUICKSTART = "quickstart:"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def expand_quickstart(path: str | Path) -> str:
    """`quickstart:weak` and `quickstart:strong` are the shipped models; any other path is left as it is."""
    name = str(path)
    if not name.startswith(QUICKSTART):
        return name
    from mtft.quickstart import model_path

    return str(model_path(name.removeprefix(QUICKSTART)))


def model_location(path: str | Path) -> str:
    """Where transformers reads a model from: an absolute folder, or a hub name. Checks a folder's content.

    Raises UserError for a folder that is missing, holds no config, or holds weights that are not safetensors.
    """
    path = expand_quickstart(path)
    folder = Path(path)
    restore_replaced(folder)
    if not os.path.isdir(folder):
        kind = irregular(folder) or "a file"
        if os.path.exists(folder) or folder.is_absolute() or path.count("/") != 1 or path.startswith("."):
            raise UserError(
                f"no model folder at {path}" if not os.path.exists(folder) else f"{path} is {kind}, not a folder",
                where=f"model path {path}",
                do="give a folder with config.json and *.safetensors, a hub name (org/name), or quickstart:weak",
            )
        return path
    for item in folder.iterdir():
        if (kind := irregular(item)) not in (None, "a folder"):
            what = f"the folder holds {kind}: {item.name}"
            raise UserError(what, where=f"model path {path}", do="remove it: a model is read from plain files")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise UserError(
            "the folder holds an adapter, not a model" if adapter else "the folder holds no config.json",
            where=f"model path {path}",
            do="give the base's folder (model.path)" + ("; an adapter is given with --adapter" if adapter else ""),
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        raise UserError(
            f"the weights are pickles ({', '.join(pickled[:3])}), which can run code when they are read"
            if pickled
            else "the folder holds no *.safetensors",
            where=f"model path {path}",
            do="convert them on a machine you trust: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            if pickled
            else "put the model's *.safetensors there",
        )
    return str(folder.resolve())


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with the chat template of `model.chat_template` if the recipe names one."""
    from transformers import AutoTokenizer

    tokenizer = from_pretrained(AutoTokenizer, section.path, section.revision, what="tokenizer")
    if section.chat_template is not None:
        if (kind := irregular(Path(section.chat_template))) is not None:  # never opened: a pipe would be waited for
            what = f"the chat template {section.chat_template} is {kind}"
            raise UserError(what, where="model.chat_template", do="name a file with a Jinja template")
        try:
            tokenizer.chat_template = Path(section.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = f"the chat template {section.chat_template} can't be read: {error}"
            raise UserError(what, where="model.chat_template", do="name a file with a Jinja template") from error
        _check_template(tokenizer.chat_template, section.chat_template)
    return tokenizer


def _check_template(text: str, path: str) -> None:
    """UserError with the line of a template that can't be parsed."""
    from jinja2 import Environment, TemplateSyntaxError

    marks = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", text)  # transformers' own tag: parts that the model wrote
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=True).parse(marks)
    except TemplateSyntaxError as error:
        what = f"{path}:{error.lineno}: the chat template can't be parsed: {error.message}"
        raise UserError(what, where="model.chat_template", do="mend the template") from error


def read_config(section: ModelSection) -> PretrainedConfig:
    """The config of a recipe's model. UserError when it can't be read or transformers does not know the model.

    Sizes stand in `.get_text_config()`: a model that also sees or hears has one config for each part.
    """
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, section.path, section.revision, what="model's config")


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that fills padding. Padding is outside of every segment, so which id it is never matters.

    Not one that was added to the tokenizer: the model may have no row for it.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < tokenizer.vocab_size:  # pyright: ignore[reportOperatorIssue]
            return int(candidate)  # pyright: ignore[reportArgumentType]  (typed as if it could be text)
    return 0


def resolve_dtype(dtype: str) -> torch.dtype:
    """A precision by its name in recipes. `auto`: bf16 where the device is fast in it (CPUs are measured), or fp32."""
    if dtype == "auto" and torch.cuda.is_available():
        # Not where it is emulated (T4, V100): that is many times slower than fp32.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return cpu_dtype() if dtype == "auto" else DTYPES[dtype]


def compute_dtype(section: ModelSection) -> torch.dtype:
    """Precision of the forward pass."""
    return resolve_dtype(section.dtype)


def refuse_precision(section: ModelSection) -> None:
    """UserError for training in fp16 without a GPU."""
    if compute_dtype(section) == torch.float16 and not torch.cuda.is_available():
        raise UserError("fp16 needs a GPU: its loss scaling does", where="model.dtype", do="use fp32 or bf16 on a CPU")


def load_causal_lm(
    path: str | Path,
    *,
    dtype: torch.dtype,
    revision: str = "main",
    quantise: str = "none",
    attention: str = "auto",
    device: str | torch.device | None = None,
    sharded: bool = False,
) -> PreTrainedModel:
    """A causal language model from safetensors: the one loader of training and of fusion.

    Args:
        path: folder, hub name, or `quickstart:NAME`.
        dtype: of the weights; of the forward pass where they are quantized.
        revision: branch, tag or commit of a hub model.
        quantise: none, nf4 or int8.
        attention: implementation of transformers, or ours, `segments`; auto: transformers' own choice.
        device: where the model goes. None: the CPU; the GPU, if there is one, for quantized weights.
        sharded: FSDP2 will cut the weights, quantized ones too.

    Raises:
        UserError: no such model, pickled weights, weights that are missing or that the model has no place for, or a
            model that needs code of its own.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    if attention == SEGMENTS:
        register()
    if attention != "auto":
        options["attn_implementation"] = attention
    if quantise != "none":  # placed while it is read: it can't be moved afterwards
        if device is None:
            device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        options |= {"quantization_config": bitsandbytes_config(quantise, dtype, sharded=sharded)}
        options["device_map"] = {"": device}
    model = from_pretrained(AutoModelForCausalLM, path, revision, what="model", **options)
    return model if quantise != "none" or device is None else model.to(device)


def load_without_weights(section: ModelSection, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model on torch's meta device: shapes and no data.

    Of a folder the headers of its files are read, so that weights that are missing or unused are refused here too; of a
    hub model the config alone, and of a checkpoint that is quantized already.
    """
    from transformers import AutoModelForCausalLM

    config: Any = read_config(section)
    options: dict[str, Any] = {"dtype": dtype}
    if section.attention == "eager":
        options["attn_implementation"] = "eager"
    if Path(model_location(section.path)).is_dir() and not config.to_dict().get("quantization_config"):
        options["device_map"] = {"": "meta"}
        model = from_pretrained(AutoModelForCausalLM, section.path, what="model", **options)
    else:
        model = without_data(config, **options)
    model.config.use_cache = False
    return model


def without_data(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The model of a config on the meta device. ValueError for what transformers can't make of it, such as an attention
    that the model has not.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)


def load_base(section: ModelSection, *, full: bool = False) -> PreTrainedModel:
    """The base model on the CPU (quantised: on its device). `full`: its weights will be trained, so they stay fp32."""
    if full and section.quantise != "none":
        raise UserError(
            f"quantised weights ({section.quantise}) can't be trained themselves",
            where="model.quantise",
            do="give a `lora` section, or set model.quantise: none",
        )
    model = load_causal_lm(
        section.path,
        revision=section.revision,
        dtype=torch.float32 if full else compute_dtype(section),
        quantise=section.quantise,
        attention=section.attention,
        sharded=LaunchConfig.from_environment().fsdp > 0,
    )
    if section.attention == "auto":
        use_segments(model)
    model.config.use_cache = False
    return model


def from_pretrained(auto: Any, path: str | Path, revision: str = "main", *, what: str, **options: Any) -> Any:
    """`auto.from_pretrained` of transformers, and the only place that calls it. auto: AutoTokenizer, AutoModelFor...

    what: how messages call it ("model"). Raises UserError for what can't be loaded, or only in parts.
    """
    from transformers.utils import logging

    location = model_location(path)
    hub = {} if Path(location).is_dir() else {"revision": revision}
    if not hub:
        check_model_files(Path(location))
    where = f"model path {path}" + (f" (revision {revision})" if hub else "")
    weights = _has_weights(auto)
    if weights:
        options |= {"use_safetensors": True, "output_loading_info": True}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    told: Any = logging.get_logger("transformers.modeling_utils")
    report_filter, level = ReportFilter(told.getEffectiveLevel()), told.level
    told.addFilter(report_filter)
    # Below that of the report, which is a warning; not at it: there transformers warns of layers that aren't sharded.
    told.setLevel(min(WARNING - 1, told.getEffectiveLevel()))
    try:
        loaded = auto.from_pretrained(location, trust_remote_code=False, **hub, **options)
    except ImportError:
        raise
    except Exception as error:  # what damaged files raise inside transformers has no end
        if is_out_of_memory(error):
            raise
        reason, place = blame(Path(location), error)
        if report_filter.mismatch is not None:
            reason, place = f"config.json says other shapes than its weights have: {report_filter.mismatch}", None
        raise UserError(
            f"the {what} can't be loaded: {reason}",
            where=place or where,
            do="check the name and that the hub can be reached (HF_ENDPOINT, login for gated models), or give a folder"
            if hub
            else f"check that it is a whole model for transformers ({what} files included); its code is never run",
        ) from error
    finally:
        told.removeFilter(report_filter)
        told.setLevel(level)
        if bars:
            logging.enable_progress_bar()
    if not weights:
        return loaded
    model, report = loaded
    check_loading_report(type(model).__name__, report, what, where)
    check_finite(model, Path(location), where)
    if hub and (cached := cached_folder(location, revision)) is not None:
        model.config._commit_hash = cached.name  # as transformers did before 5.24; it is never saved
    return model


def cached_folder(name: str, revision: str) -> Path | None:
    """The folder in the hub's cache that holds a model; None: it is not there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def _has_weights(auto: Any) -> bool:
    """Whether a class of transformers loads a model (and not a tokenizer or a config)."""
    return auto.__name__.startswith("AutoModel")
