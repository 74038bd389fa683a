"""Optimizers by name. All come from kept libraries, most through transformers' `optim`; what is ours is the groups.

    name                               state of a trained parameter   needs           for
    adamw (= adamw_torch), ..._fused   8 bytes                        -               the default
    adamw_8bit, paged_adamw_8bit       2                              bitsandbytes    full fine-tuning on one GPU
    paged_adamw_32bit                  8, paged to the CPU            bitsandbytes    full fine-tuning, long batches
    lion (= lion_32bit), lion_8bit     4, 1                           bitsandbytes    a third to a tenth of AdamW's rate
    adafactor                          rows + columns                 -               full fine-tuning, little memory
    ademamix, ademamix_8bit            12, 3                          bitsandbytes    long runs
    muon                               4 (matrices), 8 (the rest)     -               full fine-tuning
    schedule_free (= ..._adamw)        8                              schedulefree    runs without a planned end
    sgd, rmsprop, adagrad, ...         0, 4, 4                        -               comparison

LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns `lora.plus` times as fast as A. In infinite width the two need
different rates for both to learn features; the paper's rule of thumb is a ratio of 16 with half of the usual rate.

Left out: optimizers that step inside the backward pass (LOMO, GaLore layer by layer), since a step here has several
backward passes; Sophia, which no library that we depend on has, and whose Hessian estimate needs passes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from data_mixers.common.suggest import closest_match
from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.optim.muon_adamw import MuonAdamW

if TYPE_CHECKING:
    from transformers import TrainingArguments

ALIASES = {
    "adamw": "adamw_torch",
    "lion": "lion_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "schedule_free": "schedule_free_adamw",
}
MUON = "muon"
# Names that transformers has (a test looks), so that its Trainer, PEFT and bitsandbytes aren't imported to look one up.
USUAL = frozenset({"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad", "adamw_8bit"})
USUAL |= {"paged_adamw_8bit", "paged_adamw_32bit", "lion_32bit", "lion_8bit", "ademamix", "ademamix_8bit"}
USUAL |= {"schedule_free_adamw", "schedule_free_sgd"}
_SMALL = 4096  # bitsandbytes keeps the state of smaller tensors in 32 bit
_STATE = {  # bytes of optimizer state for one trained parameter; longest match wins, Adam's 8 where nothing matches
    "sgd": 0.0,
    "adagrad": 4.0,
    "rmsprop": 4.0,
    "lion": 4.0,
    "ademamix": 12.0,
    "schedule_free_sgd": 4.0,
    "adamw_torch_4bit": 1.0,
    "adamw_torch_8bit": 2.0,
}
_EIGHT_BIT = {"adamw": 2.0, "ademamix": 3.0, "lion": 1.0, "rmsprop": 1.0}


def known_optimizers() -> list[str]:
    """Every name that `train.optimizer` takes."""
    from transformers.training_args import OptimizerNames

    names = {name.value for name in OptimizerNames} | ALIASES.keys() | {MUON}
    return sorted(name for name in names if _refusal(name) is None)


def optimizer_name(name: str) -> str:
    """The name that transformers knows (or `muon`). UserError for an unknown one, or one whose package is missing."""
    if ALIASES.get(name, name) not in USUAL | {MUON} and name not in (known := known_optimizers()):
        near = closest_match(name, known)
        reason = _refusal(name)
        raise UserError(
            f"optimizer {name} is not supported: {reason}" if reason else f"there is no optimizer {name!r}",
            where="train.optimizer",
            do=f"did you mean {near}?"
            if near and not reason
            else f"for example adamw, adamw_8bit, lion, adafactor, muon; all names: {', '.join(known)}",
        )
    name = ALIASES.get(name, name)
    package = _package(name)
    if package is not None and find_spec(package[0]) is None:
        what = f"train.optimizer: {name} needs the package {package[0]}"
        raise UserError(what, where="train.optimizer", do=package[1])
    return name


def _refusal(name: str) -> str | None:
    if name in ("lomo", "adalomo") or name.endswith("_layerwise"):
        return "it steps inside the backward pass, and a step here has several"
    if name.startswith(("galore", "apollo")):
        return "it projects the gradients of modules that would have to be named"
    if name in ("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"):
        return "its device or package is not one that this trainer runs on"
    if name == "sophia":
        return "no library that we depend on has it"
    return None


def _package(name: str) -> tuple[str, str] | None:
    """(module, command that installs it) of an optimizer that torch and transformers don't have themselves."""
    if name in ("adamw_torch_4bit", "adamw_torch_8bit"):
        return "torchao", "pip install torchao"
    if name.startswith("schedule_free"):
        return "schedulefree", 'pip install "mtft[schedulefree]"'
    if name == "grokadamw":
        return "grokadamw", "pip install grokadamw"
    if name == "stable_adamw":
        return "optimi", "pip install torch-optimi"
    if "8bit" in name or name.startswith(("lion", "paged", "ademamix", "rmsprop_bnb")):
        return "bitsandbytes", 'pip install "mtft[qlora]"'
    return None


def state_bytes(name: str, shapes: Iterable[tuple[int, ...]], *, embedding: bool = False) -> int:
    """Bytes that optimizer `name` keeps for parameters of these shapes.

    embedding  they are embeddings, whose state Trainer keeps in 32 bit, and which Muon leaves to AdamW
    """
    name = ALIASES.get(name, name).removeprefix("paged_")
    if embedding:
        name = "adamw" if name == MUON else name.replace("_bnb_8bit", "").replace("_8bit", "")
    total = 0.0
    for shape in shapes:
        numel = math.prod(shape)
        if name == "adafactor":
            total += 4.0 * (numel if len(shape) < 2 else numel // shape[-1] + numel // shape[-2])
        elif name == MUON:
            total += numel * (4.0 if len(shape) == 2 else 8.0)
        else:
            total += numel * _per_parameter(name, numel)
    return round(total)


def _per_parameter(name: str, numel: int) -> float:
    kinds = [kind for kind in _STATE if name.startswith(kind)]
    wide = _STATE[max(kinds, key=len)] if kinds else 8.0
    if "8bit" in name and "torch" not in name and numel >= _SMALL:
        return _EIGHT_BIT.get(name.split("_")[0], 2.0)
    return wide


def own_optimizer(recipe: Recipe, args: TrainingArguments) -> tuple[Any, dict[str, Any]] | None:
    """What Trainer's `optimizer_cls_and_kwargs` wants for Muon and LoRA+; None: Trainer makes it from its arguments."""
    if recipe.train.optimizer == MUON:
        return (lambda: _muon), {"args": args}
    if recipe.lora is not None and recipe.lora.plus != 1:
        return (lambda: _lora_plus), {"args": args, "ratio": recipe.lora.plus}
    return None


def _lora_plus(model: nn.Module, *, args: TrainingArguments, ratio: float) -> Optimizer:
    """The recipe's optimizer, with all B in a group of their own whose rate is `ratio` times as high."""
    from transformers import Trainer

    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # pyright: ignore[reportArgumentType]
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    fast = [parameter for name, parameter in trained if "lora_B" in name or "lora_embedding_B" in name]
    chosen = {id(parameter) for parameter in fast}
    slow = [parameter for _, parameter in trained if id(parameter) not in chosen]
    groups = [
        {"params": slow, "weight_decay": args.weight_decay},
        {"params": fast, "weight_decay": args.weight_decay, "lr": args.learning_rate * ratio},
    ]
    return kind([group for group in groups if group["params"]], **options)


def _muon(model: nn.Module, *, args: TrainingArguments) -> Optimizer:
    """Muon for the hidden matrices; AdamW for embeddings, head, norms and biases, as its authors do."""
    ends: Any = (model.get_input_embeddings(), model.get_output_embeddings())  # pyright: ignore[reportCallIssue]
    outside = {id(part.weight) for part in ends if part is not None}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() == 2 and id(parameter) not in outside]
    chosen = {id(parameter) for parameter in matrices}
    return MuonAdamW(
        matrices,
        [parameter for parameter in trained if id(parameter) not in chosen],
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
    )
