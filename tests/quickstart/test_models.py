"""The shipped base models load offline, are small, and know the Python that they were trained for."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mtft.quickstart import MODELS, model_path, stdlib_corpus

# Measured on the slice of 12,000 characters below, in Python 3.11; other versions have other text, hence the margin.
BITS_PER_BYTE = {"weak": 1.30, "strong": 1.28}
PARAMETERS = {"weak": (1e6, 2e6), "strong": (5e6, 10e6)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_path("weak"), local_files_only=True)


def test_unknown_size() -> None:
    with pytest.raises(ValueError, match="weak or strong"):
        model_path("medium")


def test_files_are_few_and_small() -> None:
    files = [path for path in model_path("weak").parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    assert {path.suffix for path in files} <= {".json", ".jinja", ".safetensors", ".md"}


@pytest.mark.parametrize("size", MODELS)
def test_model_predicts_held_out_code(size: str, tokenizer: PreTrainedTokenizerBase) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path(size), local_files_only=True, dtype=torch.float32).eval()
    low, high = PARAMETERS[size]
    assert low < model.num_parameters() < high
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id

    files = {file.name: file for file in stdlib_corpus.library_files()}
    nats = bytes_ = 0.0
    for name in ("argparse.py", "heapq.py", "urllib/parse.py", "zoneinfo/_zoneinfo.py"):
        text = files[name].text()[5000:8000]
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])[:, :1024]
        with torch.inference_mode():
            logits = model(ids[:, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        bytes_ += len(tokenizer.decode(ids[0, 1:]).encode())
    assert nats / math.log(2) / bytes_ < BITS_PER_BYTE[size] + 0.15


def test_one_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (model_path("weak") / name).read_bytes() == (model_path("strong") / name).read_bytes()
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert not tokenizer("def f():\n    return 1").input_ids.count(tokenizer.eos_token_id)


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn x  # ü, 漢字, 🐍\r\n\n", "  a , b . c 's", "", "\n\n    x = 1\n"]
)
def test_tokenizer_round_trip(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("answer", ["get_value", "(x, y)", "# note\nreturn 1", "42", "'text'"])
def test_chat_prompt_is_a_prefix(answer: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """What the supervised mask rests on, for text and for tokens, also in a later turn."""
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name it."},
        {"role": "assistant", "content": "f"},
        {"role": "user", "content": "def f():\n    return 1"},
        {"role": "assistant", "content": answer},
    ]
    for end in (3, 5):
        prompt = tokenizer.apply_chat_template(turns[: end - 1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns[:end], tokenize=False)
        assert whole.startswith(prompt)
        assert whole[len(prompt) :] == turns[end - 1]["content"] + tokenizer.eos_token
        prompt_ids, whole_ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (prompt, whole))
        assert whole_ids[: len(prompt_ids)] == prompt_ids
        assert whole_ids[-1] == tokenizer.eos_token_id
