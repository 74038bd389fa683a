"""The stages of `mtft run`: what each reads and writes, fingerprints, skip what stands, continue what broke."""

from mtft.pipeline.run_stages import run_recipe
from mtft.pipeline.stages.mix import mix_design, mix_propose, mix_sweep

__all__ = ["mix_design", "mix_propose", "mix_sweep", "run_recipe"]
