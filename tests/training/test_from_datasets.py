"""A trainer from Python objects is the trainer of the recipe that names files with the same rows."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig

from mtft.common.errors import UserError
from mtft.recipe.schema.recipe import Recipe
from mtft.training.build_model import load_for_training
from mtft.training.from_datasets import recipe_of_datasets
from mtft.training.trainer import MultiTaskTrainer
from tests.training.conftest import lines


def lines_of(run_dir):
    return [(line["loss"], line["grad_norm"], line["tasks"]) for line in lines(run_dir)]


@pytest.fixture
def rows(task_files):
    return {
        task: [json.loads(line) for line in Path(train).read_text().splitlines()]
        for task, (train, _) in task_files.items()
    }


def settings(recipe, folder):
    given = {**recipe["train"], "max_steps": 4, "output_dir": str(folder), "seed": 17}
    given.pop("steps")
    return given


@pytest.fixture
def from_files(recipe, task_files, tmp_path):
    """Lines of the recipe's own run, on files with the same rows."""
    tasks = [{"name": task, "data": train} for task, (train, _) in task_files.items()]
    train = {**recipe["train"], "steps": 4}
    whole = {**recipe, "tasks": tasks, "train": train, "output": {"dir": str(tmp_path / "files")}}
    MultiTaskTrainer.from_recipe(Recipe.model_validate(whole)).train()
    return lines_of(tmp_path / "files")


@pytest.mark.parametrize("kind", ["dicts", "Dataset"])
def test_same_losses_as_the_recipe(recipe, rows, from_files, tmp_path, kind):
    if kind == "Dataset":
        rows = {task: Dataset.from_list(of_task) for task, of_task in rows.items()}
    trainer = MultiTaskTrainer.from_datasets(
        recipe["model"],
        rows,
        shares=recipe["mixture"]["shares"],
        args=settings(recipe, tmp_path / "objects"),
        lora=recipe["lora"],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= saved
    assert not any(name.endswith((".bin", ".pt")) for name in saved)  # no pickles
    assert lines_of(tmp_path / "objects") == from_files
    assert len(from_files) == 4


def test_loaded_models(recipe, rows, from_files, tmp_path):
    """An adapter of PEFT is trained as ours from the same start; a bare model is trained whole (`lora: null`)."""
    path, shares = recipe["model"]["path"], recipe["mixture"]["shares"]
    ours = load_for_training(Recipe.model_validate({**recipe, "model": {"path": path, "dtype": "fp32"}}))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), config)
    theirs.load_state_dict(ours.state_dict())
    args = settings(recipe, tmp_path / "peft")
    trainer = MultiTaskTrainer.from_datasets(theirs, rows, shares=shares, args=args)
    trainer.train()
    assert lines_of(tmp_path / "peft") == from_files
    bare = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    args = settings(recipe, tmp_path / "bare")
    MultiTaskTrainer.from_datasets(bare, rows, shares=shares, args=args).train()
    assert all(not torch.equal(value, before[name]) for name, value in bare.state_dict().items())


def test_a_model_made_in_memory(recipe, rows, tmp_path):
    """It has no folder to read a tokenizer from, and says so."""
    path = recipe["model"]["path"]
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    model.config._name_or_path = ""
    args = settings(recipe, tmp_path / "memory")
    with pytest.raises(UserError, match="tokenizer"):
        MultiTaskTrainer.from_datasets(model, rows, args=args)
    MultiTaskTrainer.from_datasets(model, rows, args=args, tokenizer=AutoTokenizer.from_pretrained(path)).train()
    assert len(lines_of(tmp_path / "memory")) == 4


def test_examples_of_transformers_arguments(recipe, rows, tmp_path):
    """A step has batch size * accumulation examples; the number of steps follows from the epochs."""
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_train_epochs=0.5,
        use_cpu=True,
    )
    trainer = MultiTaskTrainer.from_datasets(recipe["model"]["path"], rows, args=args)
    assert trainer.args.max_steps == round(0.5 * 180 / 12)
    trainer.train()
    assert {sum(task["examples"] for task in line["tasks"].values()) for line in lines(tmp_path)} == {12}


ROWS = [{"prompt": "a", "response": "b"}]


def test_another_run_in_the_folder_is_left_alone(recipe, rows, tmp_path):
    """Other settings or other rows are refused before anything is written; the same run goes on."""
    args = {**settings(recipe, tmp_path / "run"), "learning_rate": 1e-3}
    build = partial(MultiTaskTrainer.from_datasets, recipe["model"], output={"save_every": 2})
    build(rows, args=args).train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.jsonl")}
    with pytest.raises(UserError, match="another recipe"):
        build(rows, args={**args, "learning_rate": 2e-3})
    with pytest.raises(UserError, match="other rows"):
        build({**rows, "copy": rows["copy"][:-1]}, args=args)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.jsonl")} == before
    whole = lines_of(tmp_path / "run")
    build(rows, args=args).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert lines_of(tmp_path / "run") == whole


def test_held_out_losses_decide(recipe, rows, tmp_path, capfd):
    """patience ends the run, and the model has the weights of the best evaluation; long rows are told."""
    long = {"prompt": "copy: " + "red " * 40, "response": "red"}
    trainer = MultiTaskTrainer.from_datasets(
        recipe["model"],
        {**rows, "copy": [*rows["copy"], long]},
        args={**settings(recipe, tmp_path), "max_steps": 8, "eval_every": 1, "patience": 2, "learning_rate": 3.0},
        eval_datasets={task: of_task[:8] for task, of_task in rows.items()},
        output={"export": "best"},
    )
    trainer.train()
    evaluated = [json.loads(line) for line in (tmp_path / "eval.jsonl").read_text().splitlines()]
    assert evaluated[0]["step"] == 0
    assert trainer.state.global_step < 8
    best = min(evaluated, key=lambda line: sum(task["loss"] for task in line["tasks"].values()))
    scores = trainer._score(trainer.model)
    assert {task: of_task.summary()["loss"] for task, of_task in scores.items()} == pytest.approx(
        {task: values["loss"] for task, values in best["tasks"].items()}, rel=1e-5
    )
    assert "of 61 rows" in capfd.readouterr().err


def test_labels_are_learnt_by_their_names(tmp_path):
    features = Features({"prompt": Value("string"), "response": ClassLabel(names=["neg", "pos"])})
    data = Dataset.from_dict({"prompt": ["good", "bad"], "response": [1, 0]}, features=features)
    recipe, _ = recipe_of_datasets("model", {"mood": data}, args={"max_steps": 1, "output_dir": str(tmp_path)})
    written = [json.loads(line) for line in Path(recipe.tasks[0].data).read_text().splitlines()]
    assert [row["response"] for row in written] == ["pos", "neg"]


def test_nulls_that_arrow_puts_into_objects_are_no_arguments(tmp_path):
    """`Dataset.from_list` gives every call the arguments of all others, as null."""
    cases = Path(__file__).parents[1] / "data" / "cases" / "two-tools-other-arguments.jsonl"
    rows = [json.loads(line) for line in cases.read_text().splitlines()]
    data = {"calls": Dataset.from_list(rows)}
    recipe, _ = recipe_of_datasets("model", data, args={"max_steps": 1, "output_dir": str(tmp_path)})
    written = [json.loads(line) for line in Path(recipe.tasks[0].data).read_text().splitlines()]
    assert written == [{**row, "messages": [_whole(m) for m in row["messages"]]} for row in rows]


def _whole(message):
    return {key: value for key, value in message.items() if value is not None}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"shares": {"sql": 1.0}}, "chat"),
        ({"shares": {"sql": 0.5, "chatt": 0.5}}, "did you mean chat"),
        ({"shares": {"sql": 0.5, "chat": 0.6}}, "1.1"),
        ({"shares": "unifrom"}, "uniform"),
        ({"mixture": {"shares": "uniform"}}, "said twice"),
        ({"lorra": {"r": 8}}, "did you mean lora"),
        ({"lora": {"rank": 8}}, "not a key of lora"),
        ({"eval_datasets": [ROWS]}, "eval_datasets must be"),
        ({"args": "runs/x"}, "args is a str"),
        ({"model": None}, "model is a NoneType"),
    ],
)
def test_mistakes_are_named(changed, says, tmp_path):
    given = {"model": "model", "args": {"max_steps": 1, "output_dir": str(tmp_path)}, **changed}
    with pytest.raises(UserError, match=says):
        MultiTaskTrainer.from_datasets(given.pop("model"), {"sql": ROWS, "chat": ROWS}, **given)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_model_in_which_nothing_is_trained(recipe, rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(recipe["model"]["path"]).requires_grad_(False)
    with pytest.raises(UserError, match="requires gradients"):
        MultiTaskTrainer.from_datasets(model, rows, args=settings(recipe, tmp_path))
    with pytest.raises(UserError, match="loaded already"):
        MultiTaskTrainer.from_datasets(model, rows, args=settings(recipe, tmp_path), lora={"r": 4})


@pytest.mark.parametrize("packing", [True, False])
def test_sft_config(packing, tmp_path):
    """Every setting that was changed arrives."""
    config = SFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        packing=packing,
        max_length=64,
        max_steps=7,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        max_grad_norm=0.3,
        optim="lion_32bit",
        activation_checkpointing=False,
        neftune_noise_alpha=5,
        label_smoothing_factor=0.1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=5,
        save_total_limit=1,
        bf16=False,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        seed=3,
        logging_steps=1,
    )
    rows = {"a": [{"prompt": "x", "response": "y"}]}
    recipe, examples = recipe_of_datasets("model", rows, args=config, eval_datasets=rows)
    assert examples == (None if packing else 8)
    train = recipe.train
    assert train.batch_tokens == 512
    assert (train.steps, train.learning_rate, train.schedule, train.warmup) == (7, 3e-4, "cosine", 2)
    assert (train.weight_decay, train.beta1, train.beta2, train.max_grad_norm) == (0.1, 0.8, 0.95, 0.3)
    assert (train.optimizer, train.gradient_checkpointing, train.neftune) == ("lion_32bit", False, 5)
    assert (train.eval_every, train.micro_batch_tokens, train.packing, train.too_long) == (
        3,
        128,
        packing,
        "truncate_right",
    )
    assert (recipe.output.save_every, recipe.output.keep, recipe.loss.label_smoothing) == (5, 1, 0.1)
    assert (recipe.model.dtype, recipe.seed) == ("fp32", 3)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"adam_epsilon": 1e-6}, "adam_epsilon"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 500}, "load_best_model_at_end"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type"),
        ({"save_strategy": "epoch"}, "save_strategy"),
    ],
)
def test_settings_that_a_run_does_not_have(changed, name, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changed)
    with pytest.raises(UserError) as caught:
        MultiTaskTrainer.from_datasets("model", {"a": [{"prompt": "x", "response": "y"}]}, args=args)
    assert caught.value.where == f"args.{name}"


def test_the_example_of_the_readme(recipe, rows, tmp_path, monkeypatch):
    """As it is printed, but for the model and the number of steps."""
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, flags=re.S) if "from_datasets" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/sql.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows["copy"]))
    small = example.replace("Qwen/Qwen3-0.6B", recipe["model"]["path"]).replace('"max_steps": 200', '"max_steps": 2')
    assert small != example
    exec(compile(small, "README.md", "exec"), {})
    assert Path("runs/python/adapter/adapter_model.safetensors").is_file()
    assert len(lines_of(Path("runs/python"))) == 2


@pytest.mark.parametrize(
    ("rows", "args", "says"),
    [
        ({}, {"max_steps": 1}, "datasets must be"),
        ({"sql": []}, {"max_steps": 1}, "no rows"),
        ({"sql": ["text"]}, {"max_steps": 1}, "not a dict"),
        ({"sql": [{"prompt": object()}]}, {"max_steps": 1}, "JSON"),
        ({"sql": [{"prompt": "a", "response": "b"}]}, {}, "how long"),
        (
            {"sql": [{"prompt": "a", "response": "b"}]},
            {"max_steps": 1, "learning_rat": 1.0},
            "did you mean learning_rate",
        ),
        ({"sql": ROWS}, {"max_steps": 1, "steps": 1}, "said twice"),
        ({"sql": ROWS}, {"max_steps": 1, "eval_every": 1}, "no held-out rows"),
        ({"sql": {"prompt": ["a"]}}, {"max_steps": 1}, "are a dict"),
        ({"sql": None}, {"max_steps": 1}, "are a NoneType"),
    ],
)
def test_errors_for_people(rows, args, says, tmp_path):
    with pytest.raises(UserError, match=says):
        MultiTaskTrainer.from_datasets("model", rows, args={**args, "output_dir": str(tmp_path)})
