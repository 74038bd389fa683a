"""What stands beside an export's weights, so that others can talk to it as it was trained."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.recipe.schema.task import TaskSection
from mtft.training.export.chat_files import EXAMPLE, end_ids, how_to_prompt, save_chat_files
from tests.data.tokenize.stock import STOCK, stock
from tests.data.toy_examples import tokenizer


@pytest.mark.parametrize("name", [None, "adds_bos", *STOCK])
def test_whoever_loads_the_export_prompts_as_training_did(tmp_path, name):
    made = stock(name) if name in STOCK else tokenizer(adds_bos=name == "adds_bos")
    save_chat_files(tmp_path, made, GenerationConfig(eos_token_id=made.eos_token_id))
    assert (made.chat_template is None) == (name not in STOCK), "the tokenizer itself is not changed"
    again = AutoTokenizer.from_pretrained(tmp_path)
    ours = ChatRenderer(made).prompt(EXAMPLE)
    message = EXAMPLE[0]
    if ChatRenderer(made).template._parts:
        message = message | {"content": [{"type": "text", "text": message["content"]}]}
    assert again.apply_chat_template([message], tokenize=False, add_generation_prompt=True) == ours
    ends = GenerationConfig.from_pretrained(tmp_path).eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    assert made.eos_token_id in ends
    assert set(made.convert_tokens_to_ids(list(ChatRenderer(made).end_tokens))) <= set(ends)
    assert ours in "\n".join(how_to_prompt(made))


def test_ends_of_the_base_are_kept():
    made = stock("qwen3")
    stop, end = made.convert_tokens_to_ids(["<|im_end|>"])[0], made.eos_token_id
    renderer = ChatRenderer(made)
    assert end_ids(renderer, GenerationConfig(eos_token_id=None)) == [stop]
    assert end_ids(renderer, GenerationConfig(eos_token_id=end)) == [end, stop]
    assert end_ids(renderer, GenerationConfig(eos_token_id=[stop, end])) == [stop, end]


def test_the_card_says_what_stood_in_front_of_a_tasks_questions():
    plain = TaskSection(name="plain", data="x", template="{{ q }}")
    keys = {
        "system": "be\nbrief",
        "chat_template_kwargs": {"enable_thinking": False},
        "shots": {"n": 3, "from": "plain"},
    }
    own = TaskSection(name="own", data="x", template=("{{ q }}", "Q: {{ q }}"), **keys)
    made = stock("qwen3")
    assert how_to_prompt(made, [plain]) == how_to_prompt(made)
    (line,) = [line for line in how_to_prompt(made, [plain, own]) if line.startswith('{"own"')]
    said = json.loads(line)["own"]
    assert said == keys | {
        "template": ["{{ q }}", "Q: {{ q }}"],
        "shots": {"n": 3, "from": "plain", "retrieve": "random"},
    }
