"""Every YAML block of the README and the docs is a recipe, or part of one, that loads as it stands there.

A part is laid over a small whole recipe. `---` separates alternatives in one block.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from mtft.common.errors import UserError
from mtft.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TASKS = ("sql", "chat", "python")
WHOLE = {
    "name": "docs",
    "model": {"path": "org/model"},
    "tasks": [{"name": task, "data": f"{task}.jsonl", "eval_data": f"{task}.eval.jsonl"} for task in TASKS],
    "train": {"steps": 100, "batch_tokens": 4096, "max_length": 512, "learning_rate": 1e-4},
    "lora": {"r": 8},
    "output": {"dir": "runs/docs"},
}


def yaml_blocks(text: str) -> list[tuple[int, str]]:
    """(line, text) of each document of each fenced YAML block."""
    blocks = []
    for match in re.finditer(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start()].count("\n") + 2
        for part in re.split(r"^---\n", match[1], flags=re.MULTILINE):
            blocks.append((line, part))
            line += part.count("\n") + 1
    return blocks


def laid_over(part: str) -> str:
    """The part as a whole recipe, as text."""
    values = YAML(typ="safe").load(part)
    assert isinstance(values, dict), part
    whole = dict(values) if "tasks" in values else {**WHOLE, **values}
    if "tasks" not in values:
        for section in ("train", "output"):
            whole[section] = {**WHOLE[section], **values.get(section, {})}
    out = io.StringIO()
    YAML(typ="safe").dump(whole, out)
    return out.getvalue()


BLOCKS = [
    pytest.param(part, id=f"{page.name}:{line}")
    for page in PAGES
    for line, part in yaml_blocks(page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("part", BLOCKS)
def test_block_loads(part, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(laid_over(part), encoding="utf-8")
    load_recipe(recipe, files=False)


def test_blocks_are_found_and_a_wrong_one_is_refused(tmp_path):
    assert len(BLOCKS) >= 10
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(laid_over("sweep: {objective: {sql/rouge_l: 2}}\n"), encoding="utf-8")
    with pytest.raises(UserError, match="rouge_l"):
        load_recipe(recipe, files=False)
