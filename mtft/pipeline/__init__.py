"""The stages of `mtft run`: what each reads and writes, fingerprints, skip what stands, continue what broke."""

from mtft.pipeline.mix import mix_design, mix_propose, mix_sweep
from mtft.pipeline.run import run

__all__ = ["mix_design", "mix_propose", "mix_sweep", "run"]
