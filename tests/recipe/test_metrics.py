"""`tasks.*.metrics`: names, sections with options, functions of the user's own; what a bad one is told."""

from __future__ import annotations

from typing import get_args

import pytest

from mtft.evaluation.metrics import METRICS
from mtft.recipe.input_paths import input_paths
from mtft.recipe.load import dump_recipe, fingerprint, load_recipe
from mtft.recipe.schema.metric import MetricName, metric_key


def keys(recipe):
    return [metric_key(metric) for metric in recipe.tasks[0].metrics]


def test_the_recipe_knows_every_metric():
    assert set(get_args(MetricName)) == set(METRICS)


def test_the_three_ways_to_name_one(folder):
    (folder.root / "mine").mkdir()
    (folder.root / "mine" / "score.py").write_text("def brevity(prompt, reference, answer, row): return 1.0\n")
    assert keys(folder.load()) == ["loss", "token_accuracy", "exact_match"]
    recipe = folder.load(
        "tasks.sum.metrics=[rouge_l, {name: regex, pattern: 'a(b)', key: found}, {python: mine/score.py:brevity}]"
    )
    assert keys(recipe) == ["rouge_l", "found", "brevity"]
    name, regex, python = recipe.tasks[0].metrics
    assert (name, regex.model_extra) == ("rouge_l", {"pattern": "a(b)"})
    assert (python.python, python.folder) == (f"{folder.root}/mine/score.py:brevity", str(folder.root))
    assert folder.root / "mine" / "score.py" in set(input_paths(recipe))


def test_a_resolved_recipe_is_the_same_one_wherever_it_lies(folder, tmp_path):
    (folder.root / "score.py").write_text("def brevity(prompt, reference, answer, row): return 1.0\n")
    (folder.root / "check.py").write_text("")
    recipe = folder.load(
        "tasks.sum.metrics=[{python: score.py:brevity}, {name: contains, ignore_case: true},"
        " {name: pass_at_k, command: [python, check.py, '{answer}']}]"
    )
    assert recipe.tasks[0].metrics[2].model_extra["command"] == ["python", f"{folder.root}/check.py", "{answer}"]
    assert folder.root / "check.py" in set(input_paths(recipe))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_recipe(tmp_path / "run" / "recipe.yaml", files=False)
    assert again == recipe
    assert fingerprint(again) == fingerprint(recipe)


def test_a_program_is_looked_up_as_a_shell_does(folder):
    for name in ("python", "run.sh"):
        (folder.root / name).write_text("")
    words = folder.load("tasks.sum.metrics=[{name: pass_at_k, command: [python, python, gone.py, '{answer}']}]")
    assert words.tasks[0].metrics[0].model_extra["command"] == [
        "python",
        f"{folder.root}/python",
        "gone.py",
        "{answer}",
    ]
    words = folder.load("tasks.sum.metrics=[{name: pass_at_k, command: [./run.sh, '{answer}']}]")
    assert words.tasks[0].metrics[0].model_extra["command"][0] == f"{folder.root}/run.sh"


@pytest.mark.parametrize(
    ("metrics", "what", "do"),
    [
        ("[rouge_k]", "tasks.sum.metrics.0 is the text 'rouge_k', and must be one of", "did you mean rouge_l?"),
        ("[{name: regexp}]", "tasks.sum.metrics.regexp.name is the text 'regexp'", "did you mean regex?"),
        ("[loss, loss]", "tasks.sum.metrics.1 has the key 'loss'", "{key: loss-2, ...}"),
        ("[f1, {python: score.py:f1}]", "tasks.sum.metrics.1 has the key 'f1'", "{key: f1-2, ...}"),
        ("[{name: loss, key: nll}]", "key is 'nll', and loss is always called loss", "leave it out"),
        (
            "[{name: f1, key: exact_match}]",
            "has the key 'exact_match', the name of another metric",
            "give it another key",
        ),
        ("[{python: score.py:tokens}]", "has the key 'tokens', which results use for something else", "{key: tokens-2"),
        ("[{python: score.py}]", "is 'score.py', not a file and a function", "write my_metrics.py:function"),
        ("[{python: gone.py:f}]", "names a file that is not there: DIR/gone.py", "check the path"),
        ("[{python: ../out.py:f}]", "lies outside of DIR:", "copy the file beside the recipe"),
        ("[{python: link.py:f}]", "lies outside of DIR:", "copy the file beside the recipe"),
        ("[{python: linked/out.py:f}]", "lies outside of DIR:", "copy the file beside the recipe"),
        ("[{python: score.py:f, folder: ..}]", "folder is no absolute path", "leave it out"),
        ("[{python: score.py:f, timout: 3}]", "'timout' is not a key", "did you mean timeout?"),
        ("[{name: regex, key: a/b}]", "is the text 'a/b', and must be a name", ""),
    ],
)
def test_what_is_wrong_is_said_with_its_line(folder, tmp_path, metrics, what, do):
    (folder.root / "score.py").write_text("")
    (tmp_path / "out.py").write_text("")
    (folder.root / "link.py").symlink_to(tmp_path / "out.py")
    (folder.root / "linked").symlink_to(tmp_path)
    text = folder.recipe.read_text().replace("    max_epochs: 4", f"    metrics: {metrics}")
    folder.write(text)
    line = 1 + text[: text.index("metrics:")].count("\n")
    message = folder.message()
    assert what in message
    assert do in message
    assert f"line {line}" in message


def test_a_file_elsewhere_is_refused_although_no_file_is_looked_for(folder):
    with pytest.raises(Exception, match="lies outside of"):
        folder.load("tasks.sum.metrics=[{python: ../out.py:f}]", files=False)
