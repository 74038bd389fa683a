"""Four steps of LoRA on a real model, from the check to plain PEFT. What is compared is written out here with
transformers and PEFT alone."""

import json
import signal

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mtft.cli.main import app
from mtft.fuse.decoding.prompts import render_prompt
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train
from tests.real.conftest import HELD_OUT, load
from tests.training.conftest import lines
from tests.training.test_run_training import kill_at_step, picture, run

pytestmark = [pytest.mark.real, pytest.mark.slow]


def ids_and_start(tokenizer, row):
    """(ids of a row by the chat template, where the answer begins). The line end behind the turn isn't learnt."""
    chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(chat, tokenize=False).removesuffix("\n")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    assert tokenizer.decode(ids[start:]) == row["response"] + "<|im_end|>"
    return ids, start


@torch.no_grad()
def answer_nll(model, tokenizer, row):
    """-log p of the answer and its end of turn, one row at a time, in the precision of transformers' own loss."""
    ids, start = ids_and_start(tokenizer, row)
    logits = model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="none").double().sum())


def held_out_losses(model, tokenizer, chats):
    """{task: nats a token}, over all held-out tokens of a task."""
    losses = {}
    for task, rows in chats.items():
        tokens = sum(len(ids) - start for ids, start in (ids_and_start(tokenizer, row) for row in rows[:HELD_OUT]))
        losses[task] = sum(answer_nll(model, tokenizer, row) for row in rows[:HELD_OUT]) / tokens
    return losses


@pytest.fixture(scope="module")
def trained(recipe):
    """The unbroken run; its export is proved in a fresh process."""
    return train(Recipe.model_validate(recipe), quiet=True)


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def base(smollm2):
    return load(smollm2)


@pytest.fixture(scope="module")
def tuned(smollm2, trained):
    return peft.PeftModel.from_pretrained(load(smollm2), trained.adapter_dir).eval()


def evaluated(trained):
    return {
        line["step"]: {task: at["loss"] for task, at in line["tasks"].items()}
        for line in lines(trained.out_dir, "eval.jsonl")
    }


@pytest.fixture(scope="module")
def checked(recipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("check") / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    done = CliRunner().invoke(app, ["check", str(path), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_check_counts_tokens_and_parameters(checked, base, tokenizer, chats):
    for task in checked["tasks"]:
        encoded = [ids_and_start(tokenizer, row) for row in chats[task["name"]][HELD_OUT:]]
        assert task["supervised_tokens"] == sum(len(ids) - start for ids, start in encoded)
        assert task["tokens"] == sum(len(ids) + 1 for ids, _ in encoded)  # and the line end behind the turn
    linears = [
        module for name, module in base.named_modules() if isinstance(module, torch.nn.Linear) and "layers" in name
    ]
    lora = sum(4 * (linear.in_features + linear.out_features) for linear in linears)
    memory = checked["memory"]
    assert (memory["trainable"], memory["parameters"]) == (lora, base.num_parameters() + lora)


def test_inference_renders_as_training_and_as_transformers(checked, trained, tokenizer, chats):
    """`check` shows what is learnt, fusion and the server render what is answered; an export holds the template."""
    exported = AutoTokenizer.from_pretrained(trained.adapter_dir)
    for task in checked["tasks"]:
        (asked, _), (answered, learnt), (rest, _) = task["sample"]
        row = next(row for row in chats[task["name"]] if row["prompt"] in asked)
        chat = [{"role": "user", "content": row["prompt"]}]
        assert (answered, learnt, rest) == (row["response"] + "<|im_end|>", True, "\n")
        for one in (exported, tokenizer):
            assert render_prompt(one, chat) == asked
            assert one.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) == asked


def test_losses_of_the_base_are_those_of_transformers(trained, base, tokenizer, chats):
    assert evaluated(trained)[0] == pytest.approx(held_out_losses(base, tokenizer, chats), rel=1e-6)


def test_losses_after_training_are_those_of_plain_peft(trained, tuned, tokenizer, chats):
    losses = evaluated(trained)
    assert losses[4] == pytest.approx(held_out_losses(tuned, tokenizer, chats), rel=1e-5)
    assert all(losses[4][task] < losses[0][task] for task in chats)


def test_the_export_was_proved(trained):
    assert trained.steps == 4
    assert trained.not_proved is None


def test_a_killed_run_goes_on_to_the_same_bits(trained, recipe, tmp_path):
    """Killed in the third step, after the checkpoint of the second."""
    broken = Recipe.model_validate({**recipe, "output": {**recipe["output"], "dir": str(tmp_path / "broken")}})
    assert run(broken, kill_at_step(3)) == -signal.SIGKILL
    assert (tmp_path / "broken" / "checkpoint-2").is_dir()
    assert not (tmp_path / "broken" / "result.json").exists()
    train(broken, quiet=True, prove=False)
    assert picture(tmp_path / "broken") == picture(trained.out_dir)


def test_merged_by_peft_the_model_is_plain_and_says_the_same(trained, tuned, tokenizer, chats, smollm2, tmp_path):
    """Last of the tests that read `tuned`: merge_and_unload takes it apart."""
    before = held_out_losses(tuned, tokenizer, chats)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(smollm2 / "model.safetensors").keys()
    assert held_out_losses(load(tmp_path), tokenizer, chats) == pytest.approx(before, abs=1e-4)
