"""Which modules of a model get an adapter, what is refused there, and what is worth saying about it.

    lora.targets     what it means
    all-linear       every linear of the language model but its head; where PEFT knows the architecture, the experts
                     and routers of a mixture of experts too, whose weights are parameters and no modules
    names            as PEFT matches them: the end of a module's name. Each must match something

Parts that see or hear get none: rows are text, so nothing would reach an adapter there. A router that gives more than
its logits is no plain linear and gets none either.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from data_mixers.common.suggest import closest_match
from mtft.common.errors import UserError
from mtft.recipe.schema.lora import LoraSection

if TYPE_CHECKING:
    from peft import LoraConfig

FUSED_INITS = ("default", "gaussian")  # the others want a weight matrix for each module
_ROUTER = re.compile(r"(^|\.)(router|gate)$")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.")


def excluded_modules(model: nn.Module) -> str | None:
    """What no target may match, as a regular expression of PEFT's `exclude_modules`; None: nothing."""
    names = [*outside_of_text(model), *own_forward(model)]
    return rf"({'|'.join(map(re.escape, names))})(\..*)?" if names else None


def outside_of_text(model: Any) -> list[str]:
    """The parts of a model that are neither its language model nor its head: they see, hear, or project."""
    if model.config.get_text_config() is model.config:
        return []
    decoder = model.get_decoder()
    place = next((name for name, part in model.named_modules() if part is decoder), "")
    if not place:
        return []
    head, outside = model.get_output_embeddings(), []
    parents = ["", *(place[: match.start()] for match in re.finditer(r"\.", place))]
    for parent in parents:
        for name, part in model.get_submodule(parent).named_children():
            full = f"{parent}.{name}" if parent else name
            if part is not head and full != place and not place.startswith(f"{full}."):
                outside.append(full)
    return outside


def own_forward(model: nn.Module) -> list[str]:
    """Linears of an architecture's own, whose forward gives something else than x W^T + b (Llama 4's router)."""
    return [
        name
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear)
        and type(part).__module__.startswith("transformers.models.")
        and type(part).forward is not nn.Linear.forward
    ]


def unmatched_targets(model: nn.Module, section: LoraSection) -> list[str]:
    """The names in lora.targets that match no module of `model`, which has no adapter yet."""
    if isinstance(section.targets, str):
        return []
    exclude = excluded_modules(model)
    names = [name for name, _ in model.named_modules() if not (exclude and re.fullmatch(exclude, name))]
    return [
        target for target in section.targets if not any(name == target or name.endswith(f".{target}") for name in names)
    ]


def no_such_targets(model: nn.Module, unmatched: list[str]) -> UserError:
    """The refusal of names that match nothing: with those that exist, and the nearest."""
    outside = outside_of_text(model)
    names = {
        name.rsplit(".", 1)[-1]
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"
        if not any(name.startswith(f"{part}.") for part in outside)
    }
    near = {target: closest_match(target.rsplit(".", 1)[-1], sorted(names)) for target in unmatched}
    guesses = [f"{target}: did you mean {guess}?" for target, guess in near.items() if guess]
    return UserError(
        f"no module of the model is called {', '.join(map(repr, unmatched))}",
        where="lora.targets",
        do=" ".join([*guesses, f"use all-linear, or some of: {', '.join(sorted(names))}"]),
    )


def refused_by_peft(config: LoraConfig, section: LoraSection, error: Exception) -> UserError:
    """Why PEFT could not put this adapter on the model."""
    wrong = {
        f"lora.dropout: {section.dropout:g}": section.dropout > 0,
        "lora.dora": section.dora,
        f"lora.init: {section.init}": section.init not in FUSED_INITS,
    }
    if config.target_parameters and any(wrong.values()):
        keys = " and ".join(key for key, is_wrong in wrong.items() if is_wrong)
        return UserError(
            f"the experts of this model are fused (one tensor holds all of a layer), and {keys} "
            "can't be had for fused experts",
            where=keys.partition(":")[0],
            do="leave it out (lora: {dropout: 0, dora: false, init: default}), or name lora.targets outside of the "
            f"experts: {', '.join(sorted(config.target_modules or ()))}",
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"the adapter can't be put on this model: {lines[0]}",
        where="lora.targets",
        do="use all-linear, or the names of linear modules",
    )


def check_init(adapted: Any, section: LoraSection) -> None:
    """UserError when lora.init can't be had for this adapter, which was put on the model with the default one."""
    config = adapted.peft_config["default"]
    if config.target_parameters and section.init not in FUSED_INITS:
        raise refused_by_peft(config, section, ValueError("fused experts"))


def describe_adapter(adapted: Any) -> list[str]:
    """What is worth knowing of an adapter before it is trained: experts, routers, what it leaves out, no merging.

    Nothing for an ordinary one.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    base = adapted.get_base_model()
    experts: dict[str, int] = {}  # where they are -> how many
    routers, adapted_names, plain, there = set[str](), set[str](), set[str](), {}
    head = base.get_output_embeddings()
    modules: dict[str, Any] = dict(base.named_modules())
    for name, part in modules.items():
        name = name.replace(".base_layer", "")
        if isinstance(part, ParamWrapper):
            shape = part.get_param().shape
            if len(shape) > 2:
                experts[name] = shape[0]
            else:
                routers.add(name)
        elif isinstance(part, LoraLayer):
            adapted_names.add(name)
            if match := _EXPERT.match(name):
                experts[match[1]] = max(experts.get(match[1], 0), int(match[2]) + 1)
            elif _ROUTER.search(name):
                routers.add(name)
        elif isinstance(part, nn.Linear) and part is not head and ".lora_" not in name:
            plain.add(name)
        if name.endswith(".experts"):
            fused: Any = part
            there[name] = max([len(p) for p in fused.parameters(recurse=False) if p.dim() > 2], default=0)
    notes = []
    if experts:
        of_layers = f"in {len(experts)} layer{'s' if len(experts) > 1 else ''}"
        notes.append(f"the adapter trains {sum(experts.values())} experts {of_layers} and {len(routers)} routers")
    elif any(there.values()):
        notes.append(
            f"the adapter leaves the {sum(there.values())} experts of {len(there)} layers as they are"
            + (f", and trains {len(routers)} routers" if routers else ", and their routers")
        )
    outside = outside_of_text(base)
    left = sorted(plain - adapted_names - {n for n in plain if n.startswith(tuple(f"{part}." for part in outside))})
    if experts and left:
        ends = sorted({".".join(name.rsplit(".", 2)[-2:]) for name in left})
        told = f"PEFT can't tell them apart ({', '.join(ends)})"
        notes.append(f"{len(left)} linears beside the experts get no adapter: {told}")
    if outside:
        notes.append(f"{', '.join(outside)} get no adapter: rows are text")
    if not mergeable(adapted):
        notes.append(
            "an adapter of fused experts can't be merged by `mtft merge`: it adapts parameters, which are no modules; "
            "name lora.targets without the experts and routers if it is to be merged"
        )
    return notes


def mergeable(adapted: Any) -> bool:
    """Whether `mtft merge` reads such an adapter (mtft.adapters.lora_config says what it refuses)."""
    return not adapted.peft_config["default"].target_parameters
