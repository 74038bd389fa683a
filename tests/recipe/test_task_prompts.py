"""What a recipe may say about prompts: mistakes are named with their line, and what is right comes back as it was."""

import pytest

from mtft.common.errors import UserError
from mtft.recipe.compatibility import check_compatibility
from mtft.recipe.input_paths import input_paths
from mtft.recipe.load import dump_recipe, load_recipe


@pytest.mark.parametrize("override, what, do", [
    ("tasks.sum.shots={n: 2, from: sqlv1}", "names a task that is not there: 'sqlv1'", "did you mean sql.v1?"),
    ("tasks.sum.shots={n: 2, form: sql.v1}", "'form' is not a key", "did you mean from?"),
    ("tasks.sum.shots={n: 0}", "n is 0", ""),
    ("tasks.sum.shots={n: 2, retrieve: bm52}", "is the text 'bm52'", "did you mean bm25?"),
    ("tasks.sum.shots={from: sql.v1}", "is missing", "Demonstrations of a row"),
    ("tasks.sum.shots={n: 2, from: {data: data/sql.json}}", "a file that is not there", "did you mean sql.jsonl?"),
    ("tasks.sum.system=\" \"", "says nothing", "leave the key out"),
    ("tasks.sum.chat_template_kwargs={messages: 1}", "is not for the recipe to set", "leave it out"),
    ("tasks.sum.chat_template_kwargs={add_generation_prompt: true}", "is not for the recipe to set", "leave it out"),
    ("tasks.sum.template=[]", "template", ""),
])  # fmt: skip
def test_mistakes(folder, override, what, do):
    error = folder.error(override)
    assert what in error.what
    assert do in (error.do or "")
    assert "tasks.sum" in f"{error.what} {error.where}"


def test_what_is_right_comes_back(folder):
    keys = [
        "tasks.sum.shots={n: 3, retrieve: bm25, from: {data: [data/sql.jsonl], format: messages, limit: 10}}",
        "tasks.sum.template=['{{ article }}', 'Read: {{ article }}']", "tasks.sum.format={response: summary}",
        "tasks.sum.system=be brief", "tasks.sum.chat_template_kwargs={enable_thinking: false, date_string: 1 May}",
        "tasks.sql.v1.auxiliary=true",
    ]  # fmt: skip
    recipe = folder.load(*keys)
    check_compatibility(recipe, stage="check")
    shots = recipe.tasks[0].shots
    assert shots is not None
    assert shots.source.data == (str(folder.root / "data/sql.jsonl"),)
    assert folder.root / "data/sql.jsonl" in set(input_paths(recipe.tasks[0].shots)), "no command may write over it"
    again = folder.root / "again.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert recipe.counted_tasks == ("sum",)
    assert recipe.auxiliary_tasks == ("sql.v1",)


@pytest.mark.parametrize("shots", ["{n: 1}", "{n: 1, from: sum}", "{n: 1, from: {data: data/sql.jsonl, format: text}}"])
@pytest.mark.parametrize("form", ["text", "{text: article}"])
def test_nothing_can_be_demonstrated_with_plain_text(folder, shots, form):
    text = "sql.v1" if "from: sum" not in shots else "sum"
    recipe = folder.load(f"tasks.sql.v1.shots={shots}", f"tasks.{text}.format={form}")
    with pytest.raises(UserError, match="nothing to demonstrate"):
        check_compatibility(recipe, stage="check")
