"""Which trained parameters can be captured (mtft.gradients.capture.task_gradients), and why the others can't.

Covered is the weight of a plain linear layer, y = x W^T, whose rows are the tokens in their order: its gradient is a
sum over tokens, and the layer's forward is the only place where W is used. PEFT's lora_A and lora_B are such layers,
also on a quantised base.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class GradientCoverage(NamedTuple):
    """By name of the parameter (`model.named_parameters()`; a shared parameter stands under its first name).

    linears   the linear layers that multiply with it: several if they share it
    left_out  why it can't be captured
    """

    linears: dict[str, list[nn.Linear]]
    left_out: dict[str, str]


def gradient_coverage(model: nn.Module, *, fused_head: bool = False) -> GradientCoverage:
    """Sorts the trained parameters of `model` into those that can be captured and those that can't.

    fused_head: the loss multiplies with the output head's weight itself (mtft.losses.token_nll: `fused`, `chunked`).
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    linears: dict[str, list[nn.Linear]] = {name: [] for name in name_of.values()}
    left_out: dict[str, str] = {}
    special = _used_by_their_layer(model)
    head = model.get_output_embeddings() if fused_head else None  # pyright: ignore[reportCallIssue]
    for path, module in model.named_modules():
        for which, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = name_of.get(id(parameter))
            if name is None:
                continue
            reason = special.get(path) or _refusal(path, module, which)
            if head is not None and parameter is head.weight:
                reason = reason or "the output head, whose layer the loss goes past: loss.path is fused or chunked"
            if reason is not None:
                left_out.setdefault(name, reason)
            elif isinstance(module, nn.Linear):
                linears[name].append(module)
    return GradientCoverage({name: layers for name, layers in linears.items() if name not in left_out}, left_out)


def in_words(left_out: dict[str, str]) -> list[str]:
    """A line for each reason, with the parameters it holds for."""
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return [
        f"{', '.join(parameters[:3])}{f' and {len(parameters) - 3} more' if len(parameters) > 3 else ''}: {reason}"
        for reason, parameters in names.items()
    ]


def _refusal(path: str, module: nn.Module, which: str) -> str | None:
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        return f"a parameter of {type(module).__name__}, not the weight of a plain linear layer"
    if which != "weight":
        return "the bias of a linear layer"
    if "experts" in path.split("."):
        return "the weight of an expert: its rows are routed, so their tasks are not known"
    return None


def _used_by_their_layer(model: nn.Module) -> dict[str, str]:
    """Paths of the modules inside LoRA layers that multiply with the weights themselves, with the reason."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    reasons: dict[str, str] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        inside: list[str] = [inner for inner, _ in nn.Module.named_modules(layer)]  # type: ignore[arg-type]
        reason = None
        if isinstance(layer, ParamWrapper | MultiheadAttention):
            what = "ParamWrapper (fused experts, routers)" if isinstance(layer, ParamWrapper) else "MultiheadAttention"
            reason = f"LoRA of a {what}, which multiplies A and B instead of tokens with them"
        variants = {adapter: type(variant).__name__ for adapter, variant in layer.lora_variant.items()}
        for inner in inside:
            parts = inner.split(".")
            if parts[0] not in layer.adapter_layer_names:
                continue
            variant = variants.get(parts[-1] if len(parts) == 2 else "")
            why = reason or (variant and f"LoRA of the variant {variant}, which uses the weights itself")
            if why:
                reasons[f"{path}.{inner}" if path else inner] = why
    return reasons
