"""The prototypes of Arrow: the direction of each expert's input on which it acts most, module by module.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs" (ICML 2024, arXiv 2405.11157).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mtft.adapters.lora_factors import LoraAdapter, read_adapters
from mtft.adapters.routers import ArrowRouter
from mtft.merge.engine.merge_plan import check_together
from mtft.merge.linalg.core_space import one_thread, svd, to_core


def arrow_router(
    adapters: Sequence[str | Path | LoraAdapter], general: Sequence[str | Path | LoraAdapter] = ()
) -> ArrowRouter:
    """The experts' prototypes, from their factors. general: adapters whose mean delta is subtracted from every D_k.

    PEFT's Arrow subtracts A and B apart, which is another matrix; here it is the delta, in core space.
    """
    experts = read_adapters(adapters)
    common = read_adapters(general) if general else []
    check_together([*experts, *common])
    prototypes = {}
    for module in sorted({name for adapter in experts for name in adapter.modules}):
        layout = next(adapter.modules[module] for adapter in experts if module in adapter.modules)
        table = np.zeros((len(experts), layout.n))
        factors = [adapter.factors(module) for adapter in (*experts, *common)]
        with one_thread():
            core = to_core(factors, np.ones(len(factors)))
            cores = iter(core.cores)
            deltas = [next(cores) if f is not None else None for f in factors]
            known = [M for M in deltas[len(experts) :] if M is not None]
            mean = sum(known) / len(common) if known else 0.0
            for k, M in enumerate(deltas[: len(experts)]):
                top = svd(M - mean).Vt[:1] if M is not None else np.zeros((0, 0))
                if len(top):
                    v = core.cols.apply(top.T)[:, 0]
                    table[k] = v * np.sign(v[np.abs(v).argmax()])
        prototypes[module] = table
    return ArrowRouter(tuple(adapter.name for adapter in experts), prototypes)
