"""The recipe: what a run does, in one strict YAML file.

schema/ declares it, load.py reads it (yaml_source.py: text and lines), error_messages.py and cross_checks.py say what
is wrong with one, compatibility.py (rules/) what can't go together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_mixers.common.lazy_names import lazy_names

if TYPE_CHECKING:
    from mtft.recipe.load import load_recipe
    from mtft.recipe.schema.recipe import Recipe

__all__ = ["Recipe", "load_recipe"]

__getattr__, __dir__ = lazy_names(__name__, {"load_recipe": "mtft.recipe.load", "Recipe": "mtft.recipe.schema.recipe"})
