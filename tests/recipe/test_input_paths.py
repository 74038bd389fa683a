"""What a recipe reads is never where a command writes."""

import pytest

from mtft.common.errors import UserError
from mtft.recipe.input_paths import check_output, input_paths
from mtft.recipe.load import load_recipe

RECIPE = """\
name: small
model: {path: model, chat_template: chat.jinja}
tasks:
  - {name: a, data: "rows/*.jsonl", eval_data: [held.jsonl, "hub:org/name"]}
  - {name: b, data: "quickstart:add"}
train: {steps: 4}
output: {dir: out}
"""


def test_every_input_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("rows/1.jsonl", "rows/2.jsonl", "held.jsonl", "chat.jinja", "model/config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "recipe.yaml", [])
    found = {str(path.relative_to(tmp_path)) for path in input_paths(recipe)}
    assert found >= {"rows/1.jsonl", "rows/2.jsonl", "held.jsonl", "chat.jinja", "model"}
    assert not any(name in str(found) for name in ("out", "hub:", "quickstart:"))
    for name in ("rows/2.jsonl", "held.jsonl", "chat.jinja", "model/config.json", "recipe.yaml"):
        with pytest.raises(UserError, match="is an input"):
            check_output(tmp_path / name, recipe, tmp_path / "recipe.yaml", overwrite=True)
    check_output(tmp_path / "scores.json", recipe, None, overwrite=False)
