"""The tables of docs/quickstart.md from hand-made runs."""

import json

import pytest

from scripts.quickstart_table import BEGIN, END, STAGES, main

RECIPE = "name: x\nseed: {seed}\nmodel: {{path: nowhere}}\ntasks: [{{name: a, data: a.jsonl}}]\n"
RECIPE += "train: {{steps: 1}}\noutput: {{dir: out}}\n"


@pytest.fixture
def runs(tmp_path):
    folders = []
    for seed, matches in ((1, 0.5), (2, 0.7)):
        folder = tmp_path / f"run-{seed}"
        (folder / "mix").mkdir(parents=True)
        (folder / "recipe.yaml").write_text(RECIPE.format(seed=seed))
        scores = {stage: {task: {"exact_match": matches, "loss": 1.0} for task in ("a", "b")} for stage in STAGES}
        scores["base"] = {task: {"exact_match": 0.0, "loss": 3.0} for task in ("a", "b")}
        scores["merged"]["a"] = {"exact_match": matches / 2, "loss": 2.0}
        (folder / "results.json").write_text(json.dumps(scores))
        proposal = {"mixture": {"a": 0.9, "b": 0.1}, "verdict": "better", "probability": 0.987}
        (folder / "mix" / "proposal.json").write_text(json.dumps(proposal))
        folders.append(str(folder))
    return folders


def test_what_the_tables_say(runs, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    main([*runs, "--docs", str(page)])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 2 | better (probability 98.7 %) | 90 % | 10 % |" in text
    assert "| `a` | .00 | .60 (.50 to .70) |" in text
    assert "| `b` | 3.00 | 1.00 |" in text
    assert "| 1 | 75 % | 75 % |" in text  # a keeps half, b all
    page.write_text("no marks\n")
    with pytest.raises(SystemExit):
        main([*runs, "--docs", str(page)])
    assert "lacks the marks" in capsys.readouterr().err
    assert page.read_text() == "no marks\n"
