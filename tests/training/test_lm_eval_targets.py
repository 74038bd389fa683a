"""lm-eval's tasks at the end of a run, in trials and in `mtft eval`, from local files."""

import json

import pytest
from typer.testing import CliRunner

from data_mixers.mixture.mixture import Mixture
from data_mixers.sweep.trial import Trial
from mtft.cli.main import app
from mtft.common.errors import UserError
from mtft.evaluation.lm_eval_tasks import LmEvalTasks
from mtft.models.adapters import load_adapter
from mtft.models.loading import load_base, load_tokenizer
from mtft.pipeline.stages.sweep_targets import fitted_targets, sweep_goals
from mtft.recipe.load import dump_recipe, fingerprint, load_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from mtft.training.sweep_trial import run_trial

CHOICE = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "copy: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("harness")
    rows = [{"question": word, "choices": [word, "zebra"], "answer": 0} for word in ("red", "green", "blue", "cat")]
    (home / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "tasks").mkdir()
    (home / "tasks" / "choice.yaml").write_text(CHOICE.format(data=home / "choice.jsonl"))
    return home / "tasks"


@pytest.fixture
def harnessed(recipe, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def make(**sections):
        section = {"tasks": ["toy_choice"], "include_path": str(folder)}
        given = {**recipe, "eval": {"lm_eval": section}, "output": {"dir": str(tmp_path / "run")}}
        given["train"] = {**recipe["train"], "steps": 2}
        return Recipe.model_validate({**given, **sections})

    return make


def test_a_run_ends_with_the_harness_scores_of_what_it_exports(harnessed, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    recipe = harnessed()
    result = train(recipe, quiet=True, prove=False)
    told = json.loads((result.out_dir / "result.json").read_text())["lm_eval"]["toy_choice"]
    model = load_adapter(load_base(recipe.model), result.adapter_dir)
    expected = simple_evaluate(
        model=HFLM(pretrained=model.eval(), tokenizer=load_tokenizer(recipe.model), backend="causal", batch_size=2),
        tasks=["toy_choice"],
        task_manager=TaskManager(include_path=recipe.eval.lm_eval.include_path, include_defaults=False),
        log_samples=False,
    )["results"]["toy_choice"]
    assert told["acc"] == expected["acc,none"]
    assert told["acc_stderr"] == pytest.approx(expected["acc_stderr,none"])
    assert "| toy_choice | acc |" in (result.adapter_dir / "README.md").read_text()

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    run = CliRunner().invoke(app, ["eval", str(tmp_path / "recipe.yaml"), "--adapter", str(result.adapter_dir)])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["lm_eval"]["toy_choice"]["acc"] == told["acc"]


@pytest.mark.slow
def test_training_is_what_it_is_without_the_harness(harnessed, recipe, tmp_path):
    """It seeds the random states of Python, NumPy and torch, here at the start and at the end."""
    from safetensors.torch import load_file

    dropout = {"r": 4, "alpha": 8, "dropout": 0.2}
    exports = []
    for name, section in (("with", {}), ("without", {"eval": {}})):
        made = harnessed(lora=dropout, output={"dir": str(tmp_path / name)}, **section)
        exports.append(load_file(train(made, quiet=True, prove=False).adapter_dir / "adapter_model.safetensors"))
    assert all((exports[0][name] == value).all() for name, value in exports[1].items())


@pytest.mark.slow
def test_an_objective_of_the_harness(harnessed):
    recipe = harnessed(sweep={"trials": 4, "steps": 2, "objective": {"lm_eval/toy_choice/acc": 1}})
    assert sweep_goals(recipe) == {"lm_eval/toy_choice/acc": "max"}
    assert fitted_targets(recipe)["lm_eval/toy_choice/acc"].bounds == (0.0, 1.0)
    trial = Trial(Mixture.of({"copy": 0.4, "twice": 0.3, "shout": 0.3}), seed=17)
    ((_, scores),) = run_trial(trial, recipe, targets=["lm_eval/toy_choice/acc"])
    assert 0 <= scores["lm_eval/toy_choice/acc"] <= 1
    ((_, scores),) = run_trial(trial, recipe)
    assert "lm_eval/toy_choice/acc" not in scores
    wrong = harnessed(sweep={"trials": 4, "steps": 2, "objective": {"lm_eval/toy_choice/f1": 1}})
    with pytest.raises(UserError, match="no metric 'f1'"):
        sweep_goals(wrong)


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"tasks": ["toy_choise"]}, "did you mean 'toy_choice'"),
        ({"tasks": ["broken"]}, "can't load broken"),
    ],
)
def test_tasks_that_can_not_be_loaded_end_a_run_before_it_begins(harnessed, folder, section, what):
    (folder / "broken.yaml").write_text(CHOICE.format(data="/nowhere.jsonl").replace("toy_choice", "broken"))
    recipe = harnessed()
    section = recipe.eval.lm_eval.model_copy(update={key: tuple(value) for key, value in section.items()})
    with pytest.raises(UserError, match=what):
        LmEvalTasks.load(section)


def test_names_in_an_objective(harnessed, tmp_path):
    plain = harnessed(eval={})
    assert fingerprint(plain) != fingerprint(harnessed())
    (tmp_path / "recipe.yaml").write_text(dump_recipe(plain))
    with pytest.raises(UserError, match="toy_choice") as refused:
        load_recipe(tmp_path / "recipe.yaml", ["sweep={objective: {lm_eval/toy_choice/acc: 1}}"])
    assert "eval.lm_eval.tasks" in str(refused.value)
