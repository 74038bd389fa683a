"""A LoRA adapter on a base model: a fresh one, or a saved one that is trained on."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mtft.common.errors import UserError
from mtft.models.adapters import does_not_fit, load_adapter, read_peft_config
from mtft.models.bitsandbytes_aside import bitsandbytes_aside
from mtft.models.lora_targets import excluded_modules, no_such_targets, refused_by_peft, unmatched_targets
from mtft.recipe.schema.lora import LoraSection

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

# peft 0.21 reads a property that transformers 5.23 has renamed; nothing that a user could do about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
# peft 0.21 looks for the rank of fused experts among modules only, and then gives it to their parameter all the same.
warnings.filterwarnings(
    "ignore", message=r"The following \w+ keys did not match .*gate_up_proj", category=RuntimeWarning
)


def add_lora(model: PreTrainedModel, section: LoraSection, *, seed: int) -> PeftModel:
    """Freezes `model` and puts a fresh adapter on it, initialised from `seed`. The adapter's weights are fp32.

    With `freeze_a` only B is trained: A is the same in every run with this seed, and is exported like any other.

    Raises UserError when a name in `lora.targets` fits no module, or the modules can't have such an adapter.
    """
    from peft import LoraConfig, get_peft_model

    unmatched = unmatched_targets(model, section)
    refusal = no_such_targets(model, unmatched)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]  (PEFT divides by it: any number does)
        lora_dropout=section.dropout,
        target_modules=section.targets if isinstance(section.targets, str) else list(section.targets),
        exclude_modules=excluded_modules(model),
        use_rslora=section.rslora,
        use_dora=section.dora,
        init_lora_weights=True if section.init == "default" else section.init,
    )
    torch.manual_seed(seed)
    try:
        with bitsandbytes_aside():
            adapted: PeftModel = get_peft_model(model, config)  # pyright: ignore[reportAssignmentType]
    except (ValueError, AttributeError, TypeError, NotImplementedError) as error:
        if unmatched and "fused" not in str(error):  # "gate_proj without also targeting up_proj": fused in this model
            raise refusal from error
        raise refused_by_peft(config, section, error) from error
    # names of expert weights that PEFT turned into parameters matched no module either
    if any(target in (config.target_modules or ()) for target in unmatched):
        raise refusal
    share_inputs(adapted)
    return _freeze_a(adapted) if section.freeze_a else adapted


def continue_lora(model: PreTrainedModel, section: LoraSection) -> PeftModel:
    """Freezes `model` and puts the adapter of `section.start` on it, to be trained on.

    Raises UserError when there is none, it does not fit the model, or its rank or scale are not the section's.
    """
    config = read_start(section)
    config.lora_dropout = section.dropout
    start, where = str(section.start), f"lora.start: {section.start}"
    adapted = load_adapter(model, start, config=config, trainable=True, where=where)
    share_inputs(adapted)
    return _freeze_a(adapted) if section.freeze_a else adapted


def lora_like_start(model: PreTrainedModel, section: LoraSection) -> PeftModel:
    """`continue_lora` for a model without weights: the same modules and ranks, and nothing is read into them."""
    from peft import get_peft_model

    config = read_start(section)
    config.lora_dropout, config.init_lora_weights, config.inference_mode = section.dropout, True, False
    try:
        with bitsandbytes_aside():
            adapted: PeftModel = get_peft_model(model, config)  # pyright: ignore[reportAssignmentType]
    except (ValueError, AttributeError) as error:
        raise does_not_fit(error, f"lora.start: {section.start}") from error
    share_inputs(adapted)
    return _freeze_a(adapted) if section.freeze_a else adapted


def read_start(section: LoraSection) -> LoraConfig:
    """The config of the adapter in `section.start`. UserError as in `continue_lora`, as far as its config tells."""
    from peft import LoraConfig

    start, where = str(section.start), f"lora.start: {section.start}"
    config = read_peft_config(start, where=where)
    if not isinstance(config, LoraConfig):
        raise UserError(f"a {config.peft_type} adapter is not LoRA", where=where, do="start from a LoRA adapter")
    has, wants = (config.r, config.lora_alpha, config.use_rslora), (section.r, section.alpha, section.rslora)
    if has != wants:
        told = [f"r: {r}, alpha: {alpha}, rslora: {str(rslora).lower()}" for r, alpha, rslora in (has, wants)]
        raise UserError(f"the adapter has {told[0]}; the recipe has {told[1]}", where=where, do=f"lora: {{{told[0]}}}")
    return config


def share_inputs(adapted: nn.Module) -> None:
    """Under autocast the adapted layers take their input as it is, so that q, k and v (gate and up) keep one tensor.

    PEFT casts it to the adapter's fp32, which autocast casts back for `lora_A`: each layer keeps a copy of its own for
    the backward pass, of the same numbers. Outside of autocast the cast is needed. With dropout there is a copy for
    each layer anyway, and DoRA takes its norms in the precision of the input: both are left alone. A base in fp32 is
    computed without autocast.
    """
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if not isinstance(module, LoraLayer) or module.lora_variant:
            continue
        if all(parameter.dtype == torch.float32 for parameter in module.get_base_layer().parameters()):
            continue
        if all(isinstance(dropout, nn.Identity) for dropout in module.lora_dropout.values()):
            module.register_forward_pre_hook(_cast_unless_autocast)


def _cast_unless_autocast(module: Any, inputs: tuple[Any, ...]) -> None:
    module.cast_input_dtype_enabled = not torch.is_autocast_enabled(inputs[0].device.type)


def _freeze_a(adapted: PeftModel) -> PeftModel:
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_embedding_A" in name:
            parameter.requires_grad_(False)
    return adapted
