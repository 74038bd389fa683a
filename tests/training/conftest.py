"""A model and tasks so small that a training step takes milliseconds. They are made here, in fp32, from fixed seeds."""

import json
import random
from pathlib import Path

import pytest
import torch

from tests.warm_python.fixture import cold_proofs, warm_proofs  # noqa: F401  (fixtures)

WORDS = ("red", "green", "blue", "cat", "dog", "bird", "sun", "moon", "star", "one", "two", "six")


def write_model(folder, *, hidden=32, layers=2, seed=0, tied=True):
    """A Llama of about 20 k parameters with a byte-level tokenizer of 259 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<bos>", "<eos>"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate((*specials, *alphabet))}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=512
    )
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_tasks(folder, *, rows=60, held_out=12, seed=0):
    """Three tasks: copy a word, repeat it twice, upper-case a phrase. Returns {task: (train file, eval file)}."""
    rules = {
        "copy": lambda word: word,
        "twice": lambda word: f"{word} {word}",
        "shout": lambda word: " ".join([word.upper()] * (1 + len(word) % 3)),
    }
    draw = random.Random(seed)
    files = {}
    for task, rule in rules.items():
        files[task] = []
        for which, count in (("train", rows), ("eval", held_out)):
            path = folder / f"{task}.{which}.jsonl"
            words = [" ".join(draw.sample(WORDS, draw.randint(1, 3))) for _ in range(count)]
            lines = [json.dumps({"prompt": f"{task}: {word}", "response": rule(word)}) for word in words]
            path.write_text("\n".join(lines) + "\n")
            files[task].append(str(path))
    return files


def write_weighted_tasks(folder, *, rows=60, seed=0):
    """Sections of the same three tasks, whose rows weigh turns, thoughts and themselves; `shout` has no weights."""
    draw = random.Random(seed)
    folder.mkdir(exist_ok=True)
    sections = []
    for task, (train, held_out) in write_tasks(folder, rows=rows, seed=seed).items():
        sections.append({"name": task, "data": train, "eval_data": held_out})
        if task == "shout":
            continue
        lines = []
        for row in map(json.loads, Path(train).read_text().splitlines()):
            first = {"role": "assistant", "content": "no", "weight": draw.choice([0, 1, 0.3])}
            thought = f"<think>{draw.choice(WORDS)}</think>" if draw.random() < 0.5 else ""
            last = {"role": "assistant", "content": thought + row["response"], "weight": draw.choice([1, 0.6, 2.5])}
            ask = {"role": "user", "content": row["prompt"]}
            turns = [{"role": "user", "content": "?"}, first, ask, last] if draw.random() < 0.3 else [ask, last]
            lines.append(json.dumps({"messages": turns, "worth": draw.choice([1, 0.4, 3])}))
        Path(train).write_text("\n".join(lines) + "\n")
        held = []
        for row in map(json.loads, Path(held_out).read_text().splitlines()):
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            held.append(json.dumps({"messages": turns, "worth": 2}))
        Path(held_out).write_text("\n".join(held) + "\n")
        sections[-1] |= {"row_weight": "worth", "thinking_weight": 0.25}
    return sections


def lines(folder, name="metrics.jsonl"):
    """What a run has logged."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def task_files(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def recipe(model_folder, task_files, tmp_path_factory):
    """A whole recipe as a dict, to be changed and then checked by `Recipe.model_validate`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield _recipe(model_folder, task_files, tmp_path_factory.mktemp("runs") / "run")


def _recipe(model_folder, task_files, run_dir):
    return {
        "name": "tiny",
        "model": {"path": str(model_folder), "dtype": "fp32"},
        "tasks": [
            {"name": task, "data": train, "eval_data": held_out} for task, (train, held_out) in task_files.items()
        ],
        "mixture": {"shares": {"copy": 0.5, "twice": 0.3, "shout": 0.2}},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "train": {
            "steps": 8,
            "batch_tokens": 320,
            "micro_batch_tokens": 128,
            "max_length": 64,
            "learning_rate": 5e-3,
            "warmup": 2,
        },
        "output": {"dir": str(run_dir)},
    }
