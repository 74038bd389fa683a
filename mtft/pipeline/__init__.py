"""The stages of `mtft run`: what each reads and writes, fingerprints, skip what stands, continue what broke.

The public names are imported when they are first used (PEP 562): `mtft check` needs none of the stages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from mtft.pipeline.run_stages import run_recipe
    from mtft.pipeline.stages.mix import mix_design, mix_propose, mix_sweep

__all__ = ["mix_design", "mix_propose", "mix_sweep", "run_recipe"]

_MIX = "mtft.pipeline.stages.mix"

__getattr__, __dir__ = lazy_names(
    __name__,
    {"mix_design": _MIX, "mix_propose": _MIX, "mix_sweep": _MIX, "run_recipe": "mtft.pipeline.run_stages"},
)
