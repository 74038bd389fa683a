"""From the recipe's `model` and `lora` to a model that is ready to train: tokenizer, base weights, adapter.

Weights are read from safetensors only, and code that ships with a model runs only if the recipe says so by name.

    precision       weights                         forward
    fp32            fp32                            fp32
    bf16, LoRA      base bf16, adapter fp32         bf16 (autocast)
    bf16, full      fp32: small updates would vanish in bf16's 8 bits    bf16 (autocast)
    nf4 / int8      base quantised by bitsandbytes, adapter fp32 (QLoRA, Dettmers et al. 2023)    as dtype
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtft.common.errors import UserError
from mtft.losses.token_nll import add_fused_head, resolve_path
from mtft.recipe.schema.lora import LoraSection
from mtft.recipe.schema.model import ModelSection
from mtft.recipe.schema.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUICKSTART = "quickstart:"

# peft 0.21 reads a property that transformers 5.23 has renamed; nothing that a user could do about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def model_location(section: ModelSection) -> str:
    """Where transformers reads the model from: an absolute folder, or a hub name. Checks a folder's content.

    Raises UserError for a folder that is missing, holds no config, or holds weights that are not safetensors.
    """
    if section.path.startswith(QUICKSTART):
        from mtft.quickstart import model_path

        return str(model_path(section.path.removeprefix(QUICKSTART)))
    folder = Path(section.path)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or section.path.count("/") != 1 or section.path.startswith("."):
            raise UserError(
                f"no model folder at {section.path}"
                if not folder.exists()
                else f"{section.path} is a file, not a folder",
                where="model.path",
                do="give a folder with config.json and *.safetensors, a hub name (org/name), or quickstart:weak",
            )
        return section.path
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        raise UserError(
            "the folder holds an adapter, not a model" if adapter else "the folder holds no config.json",
            where=f"model.path: {section.path}",
            do="give the base model's folder" + ("; an adapter is given with --adapter" if adapter else ""),
        )
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        raise UserError(
            f"the weights are pickles ({', '.join(pickled[:3])}), which can run code when they are read"
            if pickled
            else "the folder holds no *.safetensors",
            where=f"model.path: {section.path}",
            do="convert them on a machine you trust: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            if pickled
            else "put the model's *.safetensors there",
        )
    return str(folder.resolve())


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return _from_hub(section, AutoTokenizer.from_pretrained, what="tokenizer")


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that fills padding. Padding is outside of every segment, so which id it is never matters.

    Not one that was added to the tokenizer: the model may have no row for it.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None and candidate < tokenizer.vocab_size:  # pyright: ignore[reportOperatorIssue]
            return int(candidate)  # pyright: ignore[reportArgumentType]  (typed as if it could be text)
    return 0


def compute_dtype(section: ModelSection) -> torch.dtype:
    """Precision of the forward pass. `auto`: bf16 on a GPU that has it, else fp32."""
    if section.dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[section.dtype]


def load_base(section: ModelSection, *, full: bool = False) -> PreTrainedModel:
    """The base model on the CPU (quantised: on its device). `full`: its weights will be trained, so they stay fp32."""
    from transformers import AutoModelForCausalLM

    if full and section.quantise != "none":
        raise UserError(
            f"quantised weights ({section.quantise}) can't be trained themselves",
            where="model.quantise",
            do="give a `lora` section, or set model.quantise: none",
        )
    dtype = compute_dtype(section)
    options: dict[str, Any] = {"dtype": torch.float32 if full else dtype, "use_safetensors": True}
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    if section.quantise != "none":
        options |= _quantised(section.quantise, dtype)
    model = _from_hub(section, AutoModelForCausalLM.from_pretrained, what="model", **options)
    model.config.use_cache = False
    return model


def add_lora(model: PreTrainedModel, section: LoraSection, *, seed: int) -> PeftModel:
    """Freezes `model` and puts a fresh adapter on it, initialised from `seed`. The adapter's weights are fp32.

    With `freeze_a` only B is trained: A is the same in every run with this seed, and is exported like any other.

    Raises UserError when `lora.targets` fits no module.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]  (PEFT divides by it: any number does)
        lora_dropout=section.dropout,
        target_modules=section.targets if isinstance(section.targets, str) else list(section.targets),
        use_rslora=section.rslora,
        use_dora=section.dora,
        init_lora_weights=True if section.init == "default" else section.init,
    )
    torch.manual_seed(seed)
    try:
        adapted: PeftModel = get_peft_model(model, config)  # pyright: ignore[reportAssignmentType]
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        linears = {name.rsplit(".", 1)[-1] for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
        raise UserError(
            f"no module of the model is called {', '.join(map(repr, section.targets))}",
            where="lora.targets",
            do=f"use all-linear, or some of: {', '.join(sorted(linears))}",
        ) from error
    return _freeze_a(adapted) if section.freeze_a else adapted


def continue_lora(model: PreTrainedModel, section: LoraSection) -> PeftModel:
    """Freezes `model` and puts the adapter of `section.start` on it, to be trained on.

    Raises UserError when there is none, it does not fit the model, or its rank or scale are not the section's.
    """
    from peft import LoraConfig, PeftConfig, PeftModel

    start, where = str(section.start), f"lora.start: {section.start}"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (Path(start) / name).is_file():
            raise UserError(f"the folder holds no {name}", where=where, do="give the `adapter` folder of a run")
    config = PeftConfig.from_pretrained(start)
    if not isinstance(config, LoraConfig):
        raise UserError(f"a {config.peft_type} adapter is not LoRA", where=where, do="start from a LoRA adapter")
    has, wants = (config.r, config.lora_alpha, config.use_rslora), (section.r, section.alpha, section.rslora)
    if has != wants:
        told = [f"r: {r}, alpha: {alpha}, rslora: {str(rslora).lower()}" for r, alpha, rslora in (has, wants)]
        raise UserError(f"the adapter has {told[0]}; the recipe has {told[1]}", where=where, do=f"lora: {{{told[0]}}}")
    config.lora_dropout, config.inference_mode = section.dropout, False
    try:
        adapted = PeftModel.from_pretrained(model, start, config=config, is_trainable=True, use_safetensors=True)
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(
            f"the adapter does not fit the model: {str(error).strip().splitlines()[0]}",
            where=where,
            do="use the base model that its adapter_config.json names (base_model_name_or_path)",
        ) from error
    return _freeze_a(adapted) if section.freeze_a else adapted


def _freeze_a(adapted: PeftModel) -> PeftModel:
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            parameter.requires_grad_(False)
    return adapted


def load_for_training(recipe: Recipe, base: PreTrainedModel | None = None) -> PreTrainedModel | PeftModel:
    """Base and adapter of a recipe (or the whole base for full fine-tuning). A given `base` is used up."""
    full = recipe.lora is None
    model = load_base(recipe.model, full=full) if base is None else base
    if resolve_path(recipe.loss.path) == "fused":
        add_fused_head(model)  # before PEFT wraps the model
    if recipe.lora is None:
        return model
    if recipe.lora.start is not None:
        return continue_lora(model, recipe.lora)
    return add_lora(model, recipe.lora, seed=recipe.seed)


def _quantised(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    """bitsandbytes as in QLoRA: 4-bit NormalFloat with double quantisation, or LLM.int8()."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.quantise: {kind} needs bitsandbytes", where="model.quantise", do='pip install "mtft[qlora]"'
        )
    if kind == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": device}}


def _from_hub(section: ModelSection, load: Any, *, what: str, **options: Any) -> Any:
    location = model_location(section)
    hub = {} if Path(location).is_dir() else {"revision": section.revision}
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return load(location, trust_remote_code=section.trust_remote_code, **hub, **options)
    except (OSError, ValueError) as error:
        # ValueError: unknown architecture, or one that needs remote code. Both are for the user to mend.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the {what} can't be loaded: {reason}",
            where=f"model.path: {section.path}" + (f" (revision {section.revision})" if hub else ""),
            do="check the name and that the hub can be reached (HF_ENDPOINT, login for gated models), or give a folder"
            if hub
            else f"check that the folder is a whole model for transformers ({what} files included)",
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
