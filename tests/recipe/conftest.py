"""A good recipe with its files, and the one error that a bad one gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtft.common.errors import UserError
from mtft.recipe.load import load_recipe

GOOD = """\
name: three-tasks
seed: 17
model: {path: org/small, dtype: bf16}
tasks:
  - name: sum
    data: data/sum.jsonl
    format: {prompt: article, response: summary}
    eval_data: data/sum.eval.jsonl
    max_epochs: 4
  - name: sql.v1
    data: [data/sql.jsonl, "hub:org/sql"]
    format: messages
    eval_data: data/sql.jsonl
mixture:
  shares: {sum: 0.4, sql.v1: 0.6}
  caps: {sql.v1: 0.7}
lora: {r: 8, targets: [q_proj, v_proj]}
loss: {balancer: {name: fixed}}
train:
  steps: 100
  learning_rate: 2e-4
output: {dir: runs/three}
sweep: {trials: 9, objective: {sum: 1, sql.v1: 2}}
merge: {method: ties, options: {density: 0.5}}
fuse: {strong: {path: ../strong}}
"""


class Folder:
    """A folder with a recipe and its data files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "data").mkdir(parents=True)
        for name in ("sum.jsonl", "sum.eval.jsonl", "sql.jsonl"):
            (root / "data" / name).write_text("{}\n", encoding="utf-8")
        self.recipe = root / "recipe.yaml"
        self.write(GOOD)

    def write(self, text: str) -> Path:
        self.recipe.write_text(text, encoding="utf-8")
        return self.recipe

    def load(self, *overrides: str, **options):
        return load_recipe(self.recipe, overrides, **options)

    def error(self, *overrides: str) -> UserError:
        with pytest.raises(UserError) as caught:
            self.load(*overrides)
        return caught.value

    def message(self, *overrides: str) -> str:
        """The error's text with this folder's path as DIR."""
        return str(self.error(*overrides)).replace(str(self.root), "DIR")


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path / "here")
