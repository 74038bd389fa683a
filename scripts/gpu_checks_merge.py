"""Gates, routed experts and RegMean's matrices beside a model on a device. Checks of scripts/check_gpu.py.

The reference of each is the CPU in fp32, on the weights that the device has: those of a quantised base as they are
read back. What is compared is what the adapters change, so that adapters that do nothing (factors that were rounded to
0) are as far off as can be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from gpu_checks import TASKS, Bench, Check, Lines, at_most, skip, write_adapters
from gpu_checks_train import package

Work = Callable[[Any, list[Path], str, Path], Any]
# bf16 keeps 8 bits, and a difference of two logits fewer; trained gates go their own way besides
BARS = {"gates": 0.2, "arrow": 0.1, "twin": 0.1, "RegMean": 0.03}


def merging(bench: Bench) -> Lines:
    """Each in bf16, and on nf4."""
    base = bench.model(seed=5, std=0.1)
    adapters = write_adapters(base, bench.folder("adapters"))
    for precision in ("bf16", "nf4"):
        if precision == "nf4" and package("bitsandbytes") is None:
            yield skip("gates, arrow, twin, RegMean on nf4", "bitsandbytes is not installed")
            continue
        for name, work in WORKS.items():
            what = f"{name}, {precision}: what the adapters change, against fp32 on the CPU"
            compared = partial(compare, work, base, adapters, precision, bench)
            yield bench.guarded(
                what, lambda what=what, bar=BARS[name], compared=compared: at_most(what, compared(), bar)
            )


def compare(work: Work, base: Path, adapters: list[Path], precision: str, bench: Bench) -> float:
    """How far the device's is off, by the size of the reference."""
    sides = []
    for reference in (True, False):
        model = load(base, precision, bench, reference=reference)
        sides.append(work(model, adapters, "cpu" if reference else bench.device, bench.folder("merge")))
        del model
        bench.free()
    expected, found = sides
    return float((found - expected).norm() / expected.norm())


def load(base: Path, precision: str, bench: Bench, *, reference: bool) -> Any:
    """The base as it is worked on, or the CPU's reference of it."""
    import torch
    from transformers import LlamaForCausalLM

    from mtft.models.loading import load_causal_lm

    if not reference:
        quantise = "nf4" if precision == "nf4" else "none"
        return load_causal_lm(base, dtype=torch.bfloat16, quantise=quantise, device=bench.device).eval()
    model: Any = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    if precision == "nf4":
        read_back(model, load_causal_lm(base, dtype=torch.bfloat16, quantise="nf4", device=bench.device))
    return model.eval()


def read_back(model: Any, quantised: Any) -> None:
    """The quantised linears' weights into the fp32 model."""
    import torch
    from bitsandbytes.functional import dequantize_4bit

    with torch.no_grad():
        for name, module in quantised.named_modules():
            weight: Any = getattr(module, "weight", None)
            if getattr(weight, "quant_state", None) is not None:
                back = dequantize_4bit(weight.data, weight.quant_state)
                model.get_submodule(name).weight.copy_(back.float().cpu())


def prompts(place: str) -> Any:
    import torch

    return torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(3)).to(place)


def logits(model: Any, ids: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double().cpu()


def gates(model: Any, adapters: list[Path], place: str, out: Path) -> Any:
    """A few steps on labels; what the trained gates then change."""
    import torch

    from mtft.merge.learned.train_gates import GateBatch, train_gates

    ids = prompts(place)
    batches = [GateBatch({"input_ids": ids + k, "use_cache": False}, ids + k, TASKS[k]) for k in range(len(adapters))]
    plain = logits(model, ids)
    trained = train_gates(model, adapters, batches, "cat_gates", steps=4)
    trained.gates.attach(model)
    changed = logits(model, ids) - plain
    trained.gates.remove()
    return torch.cat([changed.flatten(), torch.tensor(trained.history, dtype=torch.float64)])


def arrow(model: Any, adapters: list[Path], place: str, out: Path) -> Any:
    """Experts by token. Their softmax is smooth: the best one alone would flip where two are alike."""
    from mtft.merge.experts.build_experts import export_arrow

    export_arrow(adapters, out / "arrow")
    return routed_change(model, out / "arrow", place)


def twin(model: Any, adapters: list[Path], place: str, out: Path) -> Any:
    """The mean of the adapters and a small expert each, by the prompt's last state."""
    from mtft.adapters.routers import CentroidRouter
    from mtft.merge.experts.build_experts import build_twin
    from mtft.models.hidden_states import last_token_states

    states = {}
    for number, folder in enumerate(adapters):
        found = last_token_states(model, prompts(place) + number)
        states[folder.name] = found.double().cpu().numpy()
    build_twin(adapters, out / "twin", expert_rank=4, router=CentroidRouter.fit(states))
    return routed_change(model, out / "twin", place)


def routed_change(model: Any, folder: Path, place: str) -> Any:
    from mtft.merge.experts.routed_model import load_routed

    ids = prompts(place)
    plain = logits(model, ids)
    routed = load_routed(model, folder)
    try:
        routed.route(ids)
        return logits(model, ids) - plain
    finally:
        routed.remove()


def regmean(model: Any, adapters: list[Path], place: str, out: Path) -> Any:
    """The inputs' second moments with an adapter on the model."""
    import torch

    from mtft.merge.engine.input_grams import collect_grams
    from mtft.models.adapters import load_adapter

    network: Any = load_adapter(model, adapters[0])
    ids = prompts(place)
    wanted = ("q_proj", "o_proj", "gate_proj", "down_proj")
    modules = {n: m for n, m in network.get_base_model().named_modules() if n.rpartition(".")[2] in wanted}
    forward: Callable[[], object] = lambda: network(input_ids=ids, use_cache=False)  # noqa: E731
    grams = collect_grams(modules, [(forward, torch.ones_like(ids, dtype=torch.bool))])
    network.unload()
    # each by its own size: a late layer's would hide the others
    parts = [G.double().cpu() for _, G in sorted(grams.items())]
    return torch.cat([(G / G.diagonal().mean().clamp(min=1e-30)).flatten() for G in parts])


WORKS: dict[str, Work] = {
    "gates": gates,
    "arrow": arrow,
    "twin": twin,
    "RegMean": regmean,
}
MERGE = (Check("merge", "gates, arrow, twin, RegMean in bf16 and nf4 against the CPU", merging, (10, 10)),)
