"""Real models (scripts/real_models.py), read once, and a recipe with two tasks of a dozen short chats."""

import json

import pytest
import torch

from mtft.common.cache_folder import default_cache
from mtft.common.errors import UserError
from scripts.real_models import MODELS, installed, make_model

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima",
    "Cuba": "Havana", "Norway": "Oslo", "Austria": "Vienna", "Spain": "Madrid", "Greece": "Athens", "Chile": "Santiago",
}  # fmt: skip
HELD_OUT = 4
CACHE = default_cache()  # before any test has set MTFT_CACHE


def model_folder(name):
    """The folder of a real model; skips where its wheel is not installed."""
    try:
        installed(MODELS[name])
    except UserError as error:
        pytest.skip(f"{error.what}; {error.do}")
    return make_model(name, CACHE)


def load(folder):
    """As a user without MTFT reads a model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def smollm2():
    return model_folder("smollm2")


@pytest.fixture(scope="session")
def gemma3():
    return model_folder("gemma3")


@pytest.fixture(scope="session")
def chats():
    """{task: rows}: questions with short answers, each answer the only one."""
    return {
        "capital": [
            {"prompt": f"What is the capital of {country}?", "response": f"{city}."}
            for country, city in CAPITALS.items()
        ],
        "sum": [{"prompt": f"What is {n} + {3 * n}?", "response": f"{n} + {3 * n} = {4 * n}"} for n in range(7, 19)],
    }


@pytest.fixture(scope="session")
def recipe(smollm2, chats, tmp_path_factory):
    """A whole recipe as a dict: four steps of LoRA, a few hundred tokens each."""
    folder = tmp_path_factory.mktemp("real")
    tasks = []
    for task, rows in chats.items():
        tasks.append({"name": task, "data": f"{folder}/{task}.jsonl", "eval_data": f"{folder}/{task}.eval.jsonl"})
        for key, part in (("data", rows[HELD_OUT:]), ("eval_data", rows[:HELD_OUT])):
            with open(tasks[-1][key], "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {
            "name": "real",
            "model": {"path": str(smollm2), "dtype": "fp32"},
            "tasks": tasks,
            "lora": {"r": 4, "alpha": 8},
            "train": {
                "steps": 4,
                "batch_tokens": 256,
                "micro_batch_tokens": 256,
                "max_length": 128,
                "learning_rate": 1e-3,
                "warmup": 1,
            },
            "output": {"dir": str(folder / "run"), "save_every": 2},
        }
