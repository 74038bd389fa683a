"""Recipes from file to frozen model: what a good one becomes, and the exact words about a bad one."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mtft.recipe.error_messages import _FAMILIAR, _sections
from mtft.recipe.load import dump_recipe, fingerprint, load_recipe
from mtft.recipe.schema.recipe import Recipe


def test_values_and_defaults(folder):
    recipe = folder.load()
    assert recipe.task_names == ("sum", "sql.v1")
    assert recipe.train.learning_rate == 2e-4
    assert recipe.train.batch_tokens == 32768
    assert recipe.mixture.shares == {"sum": 0.4, "sql.v1": 0.6}
    assert recipe.loss.balancer.name == "fixed"
    with pytest.raises(ValidationError):
        recipe.seed = 3  # frozen


def test_a_reference_run_is_relative_to_the_recipe_and_must_be_finished(folder):
    online = "mixture.online={name: group_dro, reference: runs/before}"
    error = folder.error(online)
    place = folder.root / "runs" / "before" / "scores"
    assert error.what == f"mixture.online.reference names no finished run: there is no {place}"
    place.mkdir(parents=True)
    assert folder.load(online).mixture.online.reference == str(place.parent)


def test_inputs_are_relative_to_the_recipe_and_outputs_to_the_working_directory(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder.root / "local").mkdir()
    recipe = folder.load("sweep.model.path=local", "merge.adapters=[a, ../b]", "merge.out=m", "fuse.base.path=./gone")
    at = str(folder.root)
    assert recipe.tasks[0].data == f"{at}/data/sum.jsonl"
    assert recipe.tasks[0].eval_data == f"{at}/data/sum.eval.jsonl"
    assert recipe.tasks[1].data == (f"{at}/data/sql.jsonl", "hub:org/sql")
    assert recipe.model.path == "org/small"  # no folder of that name: a hub name
    assert recipe.sweep.model.path == f"{at}/local"  # a folder beside the recipe
    assert recipe.fuse.base.path == f"{at}/gone"  # written as a path
    assert recipe.fuse.strong.path == str(tmp_path / "strong")
    assert recipe.merge.adapters == (f"{at}/a", str(tmp_path / "b"))
    assert recipe.merge.out == str(tmp_path / "m")
    start = folder.load("lora.start=a", "sweep.lora.start=b")
    assert (start.lora.start, start.sweep.lora.start) == (f"{at}/a", f"{at}/b")
    assert recipe.output.dir == str(tmp_path / "runs" / "three")


def test_quickstart_names_are_kept(folder):
    recipe = folder.load(
        "model.path=quickstart:weak", "tasks.sum.data=quickstart:naming", "fuse.strong.path=quickstart:strong"
    )
    assert (recipe.model.path, recipe.tasks[0].data) == ("quickstart:weak", "quickstart:naming")
    assert recipe.fuse.strong.path == "quickstart:strong"


def test_dump_and_load_give_the_same_recipe(folder, tmp_path):
    recipe = folder.load("lora=null", "tasks.sum.template=no", "name='1e-4'", "loss.balancer.options=[1, x]")
    again = tmp_path / "resolved.yaml"
    again.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(again) == recipe
    assert dump_recipe(load_recipe(again)) == dump_recipe(recipe)


def test_fingerprint_sees_every_key_but_those_left_out(folder):
    base = fingerprint(folder.load())
    assert fingerprint(folder.load("tasks.sum.weight=1.0")) == base  # the default, written out
    assert fingerprint(folder.load("tasks.sum.weight=1.5")) != base
    assert fingerprint(folder.load("loss.balancer.x=1")) != base
    other = folder.load("output.dir=elsewhere", "train.steps=7")
    assert fingerprint(other) != base
    without = ("output", "train.steps")
    assert fingerprint(other, without=without) == fingerprint(folder.load(), without=without)
    with pytest.raises(KeyError):
        fingerprint(other, without=("train.stps",))


def test_schema_describes_every_key():
    """Every key has words for `mtft schema` and docs/recipe.md, and no default is shared and mutable by accident."""
    schema = Recipe.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        open_ones = ("BalancerSection", "NamedMetricSection")
        assert section["additionalProperties"] is False or section["title"] in open_ones, section["title"]
    lost = [f"{s['title']}.{key}" for s in schema["$defs"].values() for key, field in s["properties"].items()
            if "description" not in field and "$ref" not in field]  # fmt: skip
    assert lost == []


# What a user reads for the common mistakes, word for word. DIR is the recipe's folder.
GOLDEN = {
    "misspelt key": (
        ["train.learning_rat=3"],
        """\
error: 'learning_rat' is not a key of train
  where: command line, override 'train.learning_rat=3', key train.learning_rat
  do:    did you mean learning_rate?""",
    ),
    "key of another section": (
        ["learning_rate=3"],
        """\
error: 'learning_rate' is not a key of the recipe
  where: command line, override 'learning_rate=3', key learning_rate
  do:    it belongs under train""",
    ),
    "key of a task": (
        ["generate={max_new_tokens: 9}"],
        """\
error: 'generate' is not a key of the recipe
  where: command line, override 'generate={max_new_tokens: 9}', key generate
  do:    it belongs under tasks.*""",
    ),
    "name that transformers has for it": (
        ["train.per_device_train_batch_size=4"],
        """\
error: 'per_device_train_batch_size' is not a key of train
  where: command line, override 'train.per_device_train_batch_size=4', key train.per_device_train_batch_size
  do:    did you mean batch_tokens?""",
    ),
    "metric of a task, with a dot": (
        ["sweep.objective={sum.f1: 1}"],
        """\
error: sweep.objective.sum.f1 names a task that is not there: 'sum.f1'
  where: command line, override 'sweep.objective={sum.f1: 1}', key sweep.objective.sum.f1
  do:    did you mean sum/f1? A task and its metric are joined by a slash""",
    ),
    "quoted number": (
        ["train.learning_rate='2e-4'"],
        """\
error: train.learning_rate is the text '2e-4', and must be a number > 0 and <= 1000
  where: command line, override "train.learning_rate='2e-4'", key train.learning_rate
  do:    remove the quotes""",
    ),
    "misspelt choice": (
        ["model.dtype=bfloat16"],
        """\
error: model.dtype is the text 'bfloat16', and must be one of auto, fp32, bf16, fp16
  where: command line, override 'model.dtype=bfloat16', key model.dtype
  do:    did you mean bf16?""",
    ),
    "fraction where a whole number is due": (
        ["lora.r=8.5"],
        """\
error: lora.r is 8.5, and must be a whole number > 0 and <= 65536
  where: command line, override 'lora.r=8.5', key lora.r""",
    ),
    "yes is no boolean": (
        ["lora.dora=yes"],
        """\
error: lora.dora is the text 'yes', and must be true or false
  where: command line, override 'lora.dora=yes', key lora.dora""",
    ),
    "shares with a sum of 0": (
        ["mixture.shares={sum: 0, sql.v1: 0}"],
        """\
error: mixture.shares adds up to 0
  where: command line, override 'mixture.shares={sum: 0, sql.v1: 0}', key mixture.shares
  do:    give at least one task a share above 0; together they make 1""",
    ),
    "shares that do not add up": (
        ["mixture.shares.sum=0.5"],
        """\
error: mixture.shares adds up to 1.1, not 1
  where: DIR/recipe.yaml, line 15, key mixture.shares
  do:    in these proportions: {sum: 0.4545, sql.v1: 0.5455}""",
    ),
    "share of an unknown task": (
        ["mixture.shares={sun: 0.4, sql.v1: 0.6}"],
        """\
error: mixture.shares.sun names a task that is not there: 'sun'
  where: command line, override 'mixture.shares={sun: 0.4, sql.v1: 0.6}', key mixture.shares.sun
  do:    did you mean sum?""",
    ),
    "task without a share": (
        ["mixture.shares={sum: 1}"],
        """\
error: mixture.shares has no share for sql.v1
  where: command line, override 'mixture.shares={sum: 1}', key mixture.shares
  do:    add the task with its share; 0 leaves it out of the training""",
    ),
    "misspelt rule": (
        ["mixture.shares={temprature: 0.7}"],
        """\
error: mixture.shares.temprature names a task that is not there: 'temprature'
  where: command line, override 'mixture.shares={temprature: 0.7}', key mixture.shares.temprature
  do:    did you mean temperature?""",
    ),
    "misspelt task in a stop": (
        ["mixture.shares={schedule: [{at: 0, shares: {sun: 1, sql.v1: 0}}]}"],
        """\
error: mixture.shares.schedule.0.shares.sun names a task that is not there: 'sun'
  where: command line, override 'mixture.shares={schedule: [{at: 0, shares: {sun: 1, sql.v...', \
key mixture.shares.schedule.0.shares.sun
  do:    did you mean sum?""",
    ),
    "misspelt schedule": (
        ["mixture.shares={shedule: [{at: 0, shares: natural}]}"],
        """\
error: mixture.shares.shedule names a task that is not there: 'shedule'
  where: command line, override 'mixture.shares={shedule: [{at: 0, shares: natural}]}', key mixture.shares.shedule
  do:    did you mean schedule?""",
    ),
    "misspelt online method": (
        ["mixture.online.name=group_dr"],
        """\
error: mixture.online.name is the text 'group_dr', and must be one of bandit, group_dro, linear_law
  where: command line, override 'mixture.online.name=group_dr', key mixture.online.name
  do:    did you mean group_dro?""",
    ),
    "misspelt online option": (
        ["mixture.online={name: linear_law, probe_step: 4}"],
        """\
error: 'probe_step' is not a key of mixture.online
  where: command line, override 'mixture.online={name: linear_law, probe_step: 4}', key mixture.online.probe_step
  do:    did you mean probe_steps?""",
    ),
    "reference of a task that is not there": (
        ["mixture.online={name: group_dro, reference: {sun: 1.2, sql.v1: 1}}"],
        """\
error: mixture.online.reference.sun names a task that is not there: 'sun'
  where: command line, override 'mixture.online={name: group_dro, reference: {sun: 1.2, sq...', \
key mixture.online.reference.sun
  do:    did you mean sum?""",
    ),
    "reference without a task": (
        ["mixture.online={name: group_dro, reference: {sum: 1.2}}"],
        """\
error: mixture.online.reference has no loss for sql.v1
  where: command line, override 'mixture.online={name: group_dro, reference: {sum: 1.2}}', key mixture.online.reference
  do:    give every task one""",
    ),
    "stops out of order": (
        ["mixture.shares={schedule: [{at: 0.5, shares: natural}, {at: 0, shares: uniform}]}"],
        """\
error: mixture.shares.schedule.1.at is 0, behind a stop at 0.5
  where: command line, override 'mixture.shares={schedule: [{at: 0.5, shares: natural}, {a...', \
key mixture.shares.schedule.1.at
  do:    put the stops in their order""",
    ),
    "stop beyond the end": (
        ["mixture.shares={schedule: [{at: 100, shares: natural}]}"],
        """\
error: mixture.shares.schedule.0.at is 100, and must be a number >= 0 and <= 1
  where: command line, override 'mixture.shares={schedule: [{at: 100, shares: natural}]}', \
key mixture.shares.schedule.0.at""",
    ),
    "misspelt rule in a stop": (
        ["mixture.shares={schedule: [{at: 0, shares: naturall}]}"],
        """\
error: mixture.shares.schedule.0.shares is the text 'naturall', and must be one of natural, uniform, or \
{temperature: a number >= -20 and <= 20}, or {file: text}, or a mapping from names to a number >= 0 and <= 1000000000
  where: command line, override 'mixture.shares={schedule: [{at: 0, shares: naturall}]}', \
key mixture.shares.schedule.0.shares
  do:    did you mean natural?""",
    ),
    "unknown task in a group": (
        ["mixture.groups={text: {tasks: [sum, sql], cap: 0.5}}"],
        """\
error: mixture.groups.text.tasks names a task that is not there: 'sql'
  where: command line, override 'mixture.groups={text: {tasks: [sum, sql], cap: 0.5}}', key mixture.groups.text.tasks
  do:    did you mean sql.v1?""",
    ),
    "unknown cap": (
        ["mixture.caps={sql: 0.7}"],
        """\
error: mixture.caps.sql names a task that is not there: 'sql'
  where: command line, override 'mixture.caps={sql: 0.7}', key mixture.caps.sql
  do:    did you mean sql.v1?""",
    ),
    "caps too low": (
        ["mixture.caps={sum: 0.2, sql.v1: 0.6}"],
        """\
error: mixture.caps adds up to 0.8: no mixture of all tasks can reach 1
  where: command line, override 'mixture.caps={sum: 0.2, sql.v1: 0.6}', key mixture.caps
  do:    raise some, or leave a task without a cap""",
    ),
    "steps and epochs": (
        ["train.epochs=2"],
        """\
error: train.epochs is given, and train.steps too
  where: command line, override 'train.epochs=2', key train.epochs
  do:    remove one of the two (an override `train.steps=` empties it)""",
    ),
    "neither steps nor epochs": (
        ["train.steps="],
        """\
error: train says neither steps nor epochs
  where: DIR/recipe.yaml, line 19, key train
  do:    give one: steps: 1000, or epochs: 2""",
    ),
    "missing file": (
        ["tasks.sum.data=data/sun.jsonl"],
        """\
error: tasks.sum.data names a file that is not there: DIR/data/sun.jsonl
  where: command line, override 'tasks.sum.data=data/sun.jsonl', key tasks.sum.data
  do:    did you mean sum.jsonl?""",
    ),
    "pattern without files": (
        ["tasks.sum.data=data/*.csv"],
        """\
error: tasks.sum.data matches no file: DIR/data/*.csv
  where: command line, override 'tasks.sum.data=data/*.csv', key tasks.sum.data
  do:    check the pattern""",
    ),
    "missing mixture file": (
        ["mixture.shares={file: mixture.yaml}"],
        """\
error: mixture.shares.file names a file that is not there: DIR/mixture.yaml
  where: command line, override 'mixture.shares={file: mixture.yaml}', key mixture.shares.file
  do:    `mtft mix propose RECIPE` writes it; or give shares by a rule (natural, uniform)""",
    ),
    "rule as a task's name": (
        ["tasks.sum.name=temperature", "mixture.shares=natural", "sweep=null"],
        """\
error: tasks.temperature.name is 'temperature', which is a rule of mixture.shares
  where: command line, override 'tasks.sum.name=temperature', key tasks.temperature.name
  do:    call the task something else, for example temperature-task""",
    ),
    "empty section": (
        ["output={}"],
        """\
error: output.dir is missing
  where: command line, override 'output={}', key output.dir
  do:    add it: Run directory. Relative to the working directory, as for every other tool's output.""",
    ),
    "weights of a merge": (
        ["merge.adapters=[a, b]", "merge.weights=[1]"],
        """\
error: merge.weights has 1 weights for 2 adapters
  where: command line, override 'merge.weights=[1]', key merge.weights
  do:    one weight each, in the order of merge.adapters""",
    ),
    "all weights zero": (
        ["tasks.sum.weight=0", "tasks.sql.v1.weight=0"],
        """\
error: tasks all have weight 0: nothing would be learnt
  where: DIR/recipe.yaml, line 4, key tasks
  do:    give at least one a weight above 0""",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_words_for_one_mistake(folder, case):
    overrides, text = GOLDEN[case]
    assert folder.message(*overrides) == text


def test_all_mistakes_of_a_file_come_at_once_with_their_lines(folder):
    folder.write("""\
name: 2024
sed: 17
model: {path: org/small, dtype: bf8}
tasks:
  - name: sum
    data: data/no.jsonl
    wieght: 2
  - name: sum
    data: 5
mixture: {shares: {sum: 0.5, sum: 0.5}}
train:
  steps: ten
  epochs: -1
  packing: yes
otput: {dir: runs/x}
""")
    assert (
        folder.message()
        == """\
error: 13 problems in the recipe
  line 1: name is 2024, and must be text; put it in quotes
  line 2: 'sed' is not a key of the recipe; did you mean seed?
  line 3: model.dtype is the text 'bf8', and must be one of auto, fp32, bf16, fp16; did you mean bf16?
  line 6: tasks.sum.data names a file that is not there: DIR/data/no.jsonl; did you mean sum.jsonl?
  line 7: 'wieght' is not a key of tasks.sum; did you mean weight?
  line 8: tasks.sum.name is 'sum', the name of another task already (line 5); give each task its own name
  line 9: tasks.sum.data is 5, and must be text, or a list of at least one item, each text; put it in quotes
  line 10: mixture.shares.sum is given twice (first on line 10); keep one of them
  line 10: mixture.shares adds up to 0.5, not 1; in these proportions: {sum: 1}
  line 12: train.steps is the text 'ten', and must be a whole number > 0 and <= 10000000, or null
  line 13: train.epochs is -1, and must be a number > 0 and <= 100000, or null
  line 14: train.packing is the text 'yes', and must be true or false
  line 15: 'otput' is not a key of the recipe; did you mean output?
  where: DIR/recipe.yaml
  do:    mend these, then run `mtft check` on it"""
    )


def test_files_are_not_looked_for_when_not_needed(folder):
    assert folder.load("tasks.sum.data=gone.jsonl", files=False).tasks[0].data.endswith("gone.jsonl")


def test_mixture_file_is_read_and_checked(folder):
    (folder.root / "mixture.yaml").write_text("shares:\n  sum: 0.3\n  sql.v1: 0.7\n")
    recipe = folder.load("mixture.shares={file: mixture.yaml}")
    assert recipe.mixture.shares.file == str(folder.root / "mixture.yaml")
    (folder.root / "mixture.yaml").write_text("shares:\n  sum: 0.3\n  sql: 0.7\n")
    message = folder.message("mixture.shares={file: mixture.yaml}")
    assert "mixture.shares.file cannot be used: unknown task 'sql' (did you mean 'sql.v1'?)" in message


def test_null_sections_and_full_fine_tuning(folder):
    assert folder.load("lora=null").lora is None
    assert folder.load("lora=").lora is None
    assert "lora is 5, and must be a mapping with the keys r, alpha" in folder.message("lora=5")
    assert folder.load("sweep.lora=full").sweep.lora == "full"
    assert "sweep.lora.r is 0, and must be a whole number > 0 and <= 65536" in folder.message("sweep.lora={r: 0}")
    assert "'rank' is not a key of sweep.lora" in folder.message("sweep.lora={rank: 4}")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_not_a_number_is_never_a_number(folder, value):
    assert "train.warmup is" in folder.message(f"train.warmup={value}")
    assert "mixture.shares.sum is" in folder.message(f"mixture.shares.sum={value}")
    assert "merge.options.density is" in folder.message(f"merge.options.density={value}")


@pytest.mark.parametrize("model", ["model", "fuse.strong"])
def test_code_that_ships_with_a_model_is_never_run(folder, model):
    assert f"{model}.trust_remote_code is true, and must be false" in folder.message(f"{model}.trust_remote_code=true")


def test_familiar_names_lead_to_keys():
    known = {key for field in Recipe.model_fields.values() for section in _sections(field.annotation)
             for key in section.model_fields}  # fmt: skip
    assert set(_FAMILIAR.values()) <= known


def test_a_metric_that_a_task_lacks_is_told_with_those_it_has_once_each(folder):
    error = folder.error("tasks.sum.metrics=[loss, chrf]", "sweep.objective={sum/spearman: 1}")
    assert error.do == "sum has loss, token_accuracy, exact_match, chrf; add it to its metrics"


@pytest.mark.parametrize(
    ("watch", "what", "do"),
    [
        ("summ", "names a task that is not there: 'summ'", "did you mean sum?"),
        ("wurst", "names a task that is not there: 'wurst'", "did you mean worst?"),
        ("summ/chrf", "names a task that is not there: 'summ'", "did you mean sum/chrf?"),
        ("sum/chrff", "names a metric that sum does not have: 'chrff'", "did you mean sum/chrf?"),
        ("mean/chrff", "names a metric that no task has: 'chrff'", "did you mean mean/chrf?"),
        ("mean/spearman", "names a metric that no task has: 'spearman'",
         "measured are loss, token_accuracy, exact_match, chrf; add it to tasks.*.metrics"),
        ("sql.v1/chrf", "names a metric that sql.v1 does not have: 'chrf'",
         "measured are loss, token_accuracy, exact_match; add it to tasks.*.metrics"),
    ],
)  # fmt: skip
def test_what_is_watched_and_not_there(folder, watch, what, do):
    error = folder.error("tasks.sum.metrics=[loss, chrf]", f"train.watch={watch}")
    assert (error.what, error.do) == (f"train.watch {what}", do)


@pytest.mark.parametrize("watch", ["mean", "worst/chrf", "sum", "sum/loss", "mean/exact_match"])
def test_what_is_watched(folder, watch):
    assert folder.load("tasks.sum.metrics=[loss, chrf]", f"train.watch={watch}").train.watch == watch


def test_a_number_or_a_mapping_in_the_wrong_place_is_shown_how_to_write_it(folder):
    assert folder.error("tasks.sum.shots=2").do == "did you mean shots: {n: 2}?"
    assert not folder.error("lora=8").do  # r or alpha
    error = folder.error("sweep.objective={sum: {chrf: 1}}")
    assert error.do == "a task and its metric are joined by a slash: sum/chrf"
