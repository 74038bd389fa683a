"""Which tokens are learnt, for the templates of the main families (R11, R12).

Templates are our own short equivalents (toys.py); the stock ones are read from the installed trl when it is there.
The expected strings below were written by hand: learnt text stands between ⟦ and ⟧.
"""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtft.data.formats.messages import Conversation, RowError, as_messages
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import Example, draw, encode, runs
from mtft.data.tokenize.template import DEFAULT_TEMPLATE
from tests.data.tokenize.stock import stock
from tests.data.toy_examples import TEMPLATES, tokenizer


def conversation(*contents, system=None, roles=("user", "assistant")):
    turns = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return Conversation(tuple([{"role": "system", "content": system}] if system else []) + tuple(turns))


def learnt(made, talk):
    """What is learnt, one string per example."""
    renderer = ChatRenderer(made)
    examples = encode(made, renderer.render(talk))
    return renderer, examples, [draw(made, example) for example in examples]


SINGLE = {
    "chatml": "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n",
    "qwen2.5": "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n"
    "<|im_start|>assistant\n⟦A1<|im_end|>⟧\n",
    "qwen3": "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nA1<|im_end|>⟧\n",
    "llama3": "<bos><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A1<|eot_id|>⟧",
    "gemma": "<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n⟦A1<end_of_turn>⟧\n",
    "mistral": "<bos>[INST] Q1 [/INST]⟦ A1<eos>⟧",
    "phi3": "<|user|>\nQ1<|end|>\n<|assistant|>\n⟦A1<|end|>\n<eos>⟧",
    "harmony": "<|start|>user<|message|>Q1<|end|><|start|>assistant⟦<|channel|>final<|message|>A1<|return|>⟧",
    # the prompt opens a thought, so an answer without one closes it
    "r1": "<bos><|User|>Q1<|Assistant|><think>\n⟦\n</think>\n\nA1<eos>⟧",
}
TWO_TURNS = {
    "chatml": ["<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
               "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧\n"],
    "mistral": ["<bos>[INST] Q1 [/INST]⟦ A1<eos>⟧[INST] Q2 [/INST]⟦ A2<eos>⟧"],
    # one EOS behind everything: the turns before it are still the same
    "phi3": ["<|user|>\nQ1<|end|>\n<|assistant|>\n⟦A1<|end|>⟧\n<|user|>\nQ2<|end|>\n<|assistant|>\n⟦A2<|end|>\n<eos>⟧"],
    # earlier turns are rendered in another way: one example for each, with the context of its own moment
    "qwen3": [
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nA1<|im_end|>⟧\n",
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nQ2<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nA2<|im_end|>⟧\n",
    ],
    "harmony": [
        "<|start|>user<|message|>Q1<|end|><|start|>assistant⟦<|channel|>final<|message|>A1<|return|>⟧",
        "<|start|>user<|message|>Q1<|end|><|start|>assistant<|channel|>final<|message|>A1<|end|>"
        "<|start|>user<|message|>Q2<|end|><|start|>assistant⟦<|channel|>final<|message|>A2<|return|>⟧",
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", SINGLE)
def test_answer_and_end_of_turn_are_learnt(family):
    _, _, drawn = learnt(tokenizer(TEMPLATES[family]), conversation("Q1", "A1"))
    assert drawn == [SINGLE[family]]


@pytest.mark.parametrize("family", TWO_TURNS)
def test_every_turn_is_learnt_once(family):
    _, _, drawn = learnt(tokenizer(TEMPLATES[family]), conversation("Q1", "A1", "Q2", "A2"))
    assert drawn == TWO_TURNS[family]


def test_split_is_said_aloud():
    renderer, _, _ = learnt(tokenizer(TEMPLATES["qwen3"]), conversation("Q1", "A1", "Q2", "A2"))
    assert renderer.notes["split"] == 1


@pytest.mark.parametrize("family", TEMPLATES)
def test_ids_are_those_of_the_whole_rendering(family):
    made = tokenizer(TEMPLATES[family])
    talk = conversation("Q1 héllo 🙂", "the answer 🙂 to the question", "Q2", "日本 fox")
    last = encode(made, ChatRenderer(made).render(talk))[-1]
    whole = made.apply_chat_template(list(talk.messages), tokenize=True, return_dict=False)
    if family == "r1":  # our answer closes the thought that the prompt opens
        assert made.decode(last.input_ids).replace("<think>\n\n</think>\n\n", "") == made.decode(whole)
    else:
        assert last.input_ids.tolist() == whole
    assert last.input_ids.dtype == np.int32
    assert (last.input_ids == made.bos_token_id).sum() <= 1


@pytest.mark.parametrize("family", TEMPLATES)
@settings(max_examples=25, deadline=None)
@given(answer=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_any_answer_is_learnt_whole(family, answer):
    made = MADE[family]
    (example,) = encode(made, ChatRenderer(made).render(conversation("the question", answer)))
    text = "".join(part for part, learn in runs(made, example) if learn)
    assert answer.strip() in text
    assert "question" not in text


MADE = {family: tokenizer(template) for family, template in TEMPLATES.items()}


def test_default_template_is_said_aloud_and_has_one_bos():
    for adds_bos in (False, True):
        renderer, _, drawn = learnt(tokenizer(adds_bos=adds_bos), conversation("Q1", "A1", "Q2", "A2", system="S"))
        begin = "<bos>" if adds_bos else ""
        assert drawn == [f"{begin}S\n\nUser: Q1\n\nAssistant:⟦ A1<eos>⟧\n\nUser: Q2\n\nAssistant:⟦ A2<eos>⟧\n\n"]
        assert renderer.notes == {"default_template": 1}


def test_a_templates_own_bos_is_not_doubled():
    made = tokenizer(TEMPLATES["llama3"], adds_bos=True)
    _, (example,), _ = learnt(made, conversation("Q1", "A1"))
    assert (example.input_ids == made.bos_token_id).sum() == 1


def test_system_message_without_a_place_moves_into_the_first_turn():
    renderer, _, drawn = learnt(tokenizer(TEMPLATES["gemma"]), conversation("Q1", "A1", system="Be brief."))
    assert drawn == [SINGLE["gemma"].replace("Q1", "Be brief.\n\nQ1")]
    assert renderer.notes["system_folded"] == 1


def test_answers_without_the_thought_that_the_prompt_opens_close_it():
    """Everybody who renders the template opens it: vLLM, transformers, our own server."""
    renderer, _, drawn = learnt(tokenizer(TEMPLATES["r1"]), conversation("Q1", "<b>bold</b>"))
    assert drawn == ["<bos><|User|>Q1<|Assistant|><think>\n⟦\n</think>\n\n<b>bold</b><eos>⟧"]
    assert renderer.notes["thought_closed"] == 1
    assert renderer.prompt(conversation("Q1").messages) == "<bos><|User|>Q1<|Assistant|><think>\n"


def test_a_prompt_that_ends_with_something_else_than_a_thought():
    odd = TEMPLATES["r1"].replace("<think>\\n", "Sure: ")
    renderer, _, drawn = learnt(tokenizer(odd), conversation("Q1", "A1"))
    assert drawn == ["<bos><|User|>Q1<|Assistant|>⟦A1<eos>⟧"]
    assert renderer.notes["opened"] == 1


def test_a_template_without_end_token_gets_one():
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    renderer, _, drawn = learnt(tokenizer(bare), conversation("Q1", "A1"))
    assert drawn == ["user: Q1\nassistant: ⟦A1\n<eos>⟧"]
    assert renderer.notes["eos_appended"] == 1
    # every turn is learnt to its end (R12), not only the last one of the conversation
    _, _, drawn = learnt(tokenizer(bare), conversation("Q1", "A1", "Q2", "A2"))
    assert drawn == [
        "user: Q1\nassistant: ⟦A1\n<eos>⟧",
        "user: Q1\nassistant: A1\nuser: Q2\nassistant: ⟦A2\n<eos>⟧",
    ]


def test_text_that_was_rendered_before_is_said_aloud():
    rendered = "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n"
    renderer, _, _ = learnt(tokenizer(TEMPLATES["chatml"]), conversation(rendered, "A1"))
    assert renderer.notes == {"special_in_text": 1}


def test_trailing_space_of_an_answer_is_layout_only_behind_an_end_token():
    made = tokenizer(TEMPLATES["chatml"])
    _, _, drawn = learnt(made, conversation("Q1", "A1 \n"))
    assert drawn == [SINGLE["chatml"].replace("A1", "A1 \n")]


def test_refusals_of_the_template_are_row_errors():
    with pytest.raises(RowError, match="roles must alternate"):
        ChatRenderer(tokenizer(TEMPLATES["mistral"])).render(
            Conversation(({"role": "user", "content": "a"}, {"role": "user", "content": "b"},
                          {"role": "assistant", "content": "c"}))
        )  # fmt: skip


def test_a_template_that_rewrites_the_prompt_is_refused():
    numbered = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(RowError, match="changes what stands before"):
        ChatRenderer(tokenizer(numbered)).render(conversation("Q", "A"))


def test_plain_text_is_learnt_whole():
    for adds_bos in (False, True):
        made = tokenizer(adds_bos=adds_bos)
        _, (example,), _ = learnt(made, Conversation((), text="the quick brown fox"))
        assert made.decode(example.input_ids) == ("<bos>" if adds_bos else "") + "the quick brown fox<eos>"
        assert example.supervised[1:].all()
        assert not example.supervised[0]  # nothing stands before it to predict it from


def test_a_greeting_is_context():
    talk = Conversation(
        tuple({"role": r, "content": c} for r, c in (("assistant", "Hi"), ("user", "Q"), ("assistant", "A")))
    )
    _, _, drawn = learnt(tokenizer(TEMPLATES["chatml"]), talk)
    assert drawn == [
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
    ]


def test_tools_reach_the_template_or_are_missed_aloud():
    tools = ({"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}}},)
    talk = Conversation(conversation("Q1", "A1").messages, tools)
    renderer, _, drawn = learnt(tokenizer(DEFAULT_TEMPLATE), talk)
    assert '"lookup"' in drawn[0]
    assert not renderer.notes
    renderer, _, _ = learnt(tokenizer(TEMPLATES["chatml"]), talk)
    assert renderer.notes["tools_ignored"] == 1


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}


def with_call(call=CALL):
    turns = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "A1"},
    ]
    return Conversation(as_messages(turns, "messages"))


def test_calls_of_tools_are_learnt():
    _, _, drawn = learnt(tokenizer(), with_call())
    assert drawn == [
        'User: Q1\n\nAssistant:⟦ [{"type": "function", "function": {"name": "get_weather", "arguments": '
        '{"city": "Rome"}}}]<eos>⟧\n\nTool: sunny\n\nAssistant:⟦ A1<eos>⟧\n\n'
    ]


def test_arguments_as_text_are_the_same_call():
    """OpenAI's logs hold JSON text; a template with `| tojson` would quote it once more."""
    text = {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    assert with_call(text) == with_call()


def test_templates_that_take_arguments_as_text():
    made = tokenizer(
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name + ' ' + c.function.arguments }}"
        "{% endfor %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    _, _, drawn = learnt(made, with_call())
    assert drawn == ['Q1<|im_end|>⟦get_weather {"city": "Rome"}<|im_end|>⟧sunny<|im_end|>⟦A1<|im_end|>⟧']


def test_calls_that_the_template_drops_are_refused():
    """They would teach the model to answer with nothing."""
    with pytest.raises(RowError, match=r"shows nothing of tool call of message 2 \(assistant\): 'get_weather'"):
        ChatRenderer(tokenizer(TEMPLATES["chatml"])).render(with_call())


def test_reasoning_that_the_template_drops_is_refused():
    turns = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1", "reasoning_content": "hmm"}]
    with pytest.raises(RowError, match=r"nothing of thinking of message 2 \(assistant\): 'hmm'"):
        ChatRenderer(tokenizer(TEMPLATES["chatml"])).render(Conversation(tuple(turns)))


# --- the stock templates -------------------------------------------------------------------------------------------

# end of an assistant turn in each family; templates with pictures and the *_training variants are not among them
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<eos>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "lfm2_v2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "nemotron_3_nano": "<|im_end|>",
    "phi3": "<|end|>\n<eos>",
    "phi3_5": "<|end|>\n<eos>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}


@pytest.mark.parametrize("name", ENDS)
def test_stock_templates(name):
    made = stock(name)
    assert not re.search(r"{%-?\s*generation", made.chat_template), "a stock template has no generation block (R11)"
    _, examples, drawn = learnt(made, conversation("Q1", "A1", "Q2", "A2", system="Sys9"))
    parts = [part for example in examples for part, learn in runs(made, example) if learn]
    assert len(parts) == 2, drawn  # each turn once, whatever the template does to earlier ones
    assert parts[0].split("</think>")[-1].split("<|message|>")[-1].strip().startswith("A1")
    assert parts[0].endswith(ENDS[name].split("\n")[0])  # the end of every turn is learnt (R12)
    assert parts[1].split("A2")[1].endswith(ENDS[name])
    assert not any(word in part for part in parts for word in ("Q1", "Q2", "Sys9"))


# templates that TRL has marked by hand with `{% generation %}` blocks; gptoss differs on purpose: TRL teaches <|end|>
# where the model has to say <|return|>
MARKED = [name for name in ENDS if name not in ("gptoss", "gemma", "glm4moe", "gemma4", "llama3_1", "llama3_2")]


@pytest.mark.parametrize("name", MARKED)
def test_the_same_tokens_as_in_the_templates_that_trl_marks_by_hand(name):
    """Ours from the stock template, theirs from the marked copy: the same answers and ends of turn. Theirs may begin
    inside the generation prompt, and may end with the line break behind the end token.
    """
    made, marked = stock(name), stock(f"{name}_training")
    talk = conversation("Q1", "A1", "Q2", "A2", system="S")
    _, examples, _ = learnt(made, talk)
    ours = [part for example in examples for part, learn in runs(made, example) if learn]
    asked = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    found = marked.apply_chat_template(list(talk.messages), **asked)
    mask = np.array(found["assistant_masks"], dtype=bool)
    theirs = [part for part, learn in runs(marked, Example(np.array(found["input_ids"]), mask)) if learn]
    assert len(theirs) == len(ours) == 2
    for their, our in zip(theirs, ours):
        # what their copy of DeepSeek leaves out: the end of the thought that its generation prompt opens
        assert their.strip().endswith(our.removeprefix("\n</think>\n\n").strip())
        assert "A" in our


CALLS = {
    "deepseekv3": '{"city": "Rome"}',
    "gptoss": '<|message|>{"city": "Rome"}<|call|>',
    "llama3_1": '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>',
    "qwen2_5": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
}


@pytest.mark.parametrize("name", CALLS)
def test_stock_templates_with_tools(name):
    made = stock(name)
    _, examples, drawn = learnt(made, with_call())
    parts = [part for example in examples for part, learn in runs(made, example) if learn]
    assert sum(CALLS[name] in part for part in parts) == 1, drawn
    assert sum("A1" in part for part in parts) == 1, drawn
    assert not any("sunny" in part or "Q1" in part for part in parts)
