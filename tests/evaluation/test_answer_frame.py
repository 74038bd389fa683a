"""What is asked of a model with a stock chat template, and what its answers are compared by: their words alone."""

from types import SimpleNamespace

import numpy as np
import pytest

from mtft.common.errors import UserError
from mtft.data.formats.formats import FORMATS
from mtft.data.formats.messages import RowError
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.data.tokenize.encode import encode
from mtft.evaluation.answer_frame import AnswerFrame
from mtft.evaluation.metrics import METRICS
from mtft.evaluation.questions import AskedMetrics, Questions
from mtft.recipe.schema.task import TaskSection
from tests.data.tokenize.stock import STOCK, stock

HI, YES = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes sir"}
PLAIN = [HI, YES]
THOUGHT = [HI, YES | {"reasoning_content": "hmm, well"}]
INLINE = [HI, YES | {"content": "<think>\nhmm, well\n</think>\n\nyes sir"}]
TALKS = {"plain": PLAIN, "several": [*PLAIN, *PLAIN], "thought": THOUGHT, "inline": INLINE, "later": [*PLAIN, *THOUGHT]}


def questions(tokenizer, talks, metrics=(), **options):
    """Questions of held-out rows with these messages."""
    task = TaskSection(name="t", data="d", **options)
    renderer = ChatRenderer(tokenizer, thinking_weight=task.thinking_weight)
    read = [FORMATS["messages"].read({"messages": talk}) for talk in talks]
    rows = [encode(tokenizer, renderer.render(talk)) for talk in read]
    examples = [example for row in rows for example in row]
    numbers = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    store = SimpleNamespace(
        task="t",
        row_numbers=numbers,
        ids=numbers,
        example=lambda i: tuple(examples[i]),
        place=lambda i: f"rows.jsonl:{numbers[i] + 1}",
    )
    made = {name: METRICS[name]() for name in metrics}
    return Questions.of(store, AskedMetrics(tokenizer, {"t": task}, {"t": made}))


def asked_and_read(name, thinking_weight):
    """{talk: (what is asked, what a user of the template asks, the text of the reference)}; a refused row has none."""
    tokenizer, found = stock(name), {}
    template = ChatRenderer(tokenizer).template
    for kind, talk in TALKS.items():
        try:
            made = questions(tokenizer, [talk], thinking_weight=thinking_weight)
        except RowError:
            continue
        adapted, _ = template.adapt(talk[:-1])
        asked = tokenizer.decode(made.prompts[0].prompt.tolist())
        found[kind] = asked, template.apply(adapted, generate=True), made.references[0]
    return found


@pytest.mark.parametrize("thinking_weight", [1, 0])
@pytest.mark.parametrize("name", STOCK)
def test_the_prompt_is_the_templates_and_the_reference_is_what_the_row_says(name, thinking_weight):
    found = asked_and_read(name, thinking_weight)
    assert found.keys() >= {"plain", "several"}
    for kind, (asked, prompt, reference) in found.items():
        assert (kind, asked, reference) == (kind, prompt, "yes sir")


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("qwen3", ["<think>\nhm\n</think>\n\nyes sir", "<think>\n\n</think>\n\nyes sir", "yes sir"]),
        ("qwen3_5_think", ["hm\n</think>\n\nyes sir", "\n</think>\n\nyes sir", "yes sir"]),
        ("deepseek_r1_distill", ["hm\n</think>\n\nyes sir", "</think>yes sir", "yes sir"]),
        (
            "gptoss",
            [
                "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes sir<|return|>",
                "<|channel|>final<|message|>yes sir<|return|>",
                "yes sir<|return|>",
            ],
        ),
        ("gemma4_v5", ["<|channel>thought\nhm\n<channel|>yes sir<turn|>", "yes sir<turn|>"]),
        ("phi3", ["yes sir<|end|>", "yes sir<|end|><eos>", "yes sir"]),
        ("cohere2", ["yes sir<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "yes sir"]),
    ],
)
def test_what_a_model_writes_around_its_words_does_not_count(name, texts):
    tokenizer = stock(name)
    asked = questions(tokenizer, [PLAIN])
    assert [asked.text(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts] == ["yes sir"] * len(
        texts
    )


def test_a_thought_without_an_end_is_no_answer_of_another_kind():
    tokenizer = stock("gptoss")
    text = "<|channel|>analysis<|message|>yes sir"
    assert questions(tokenizer, [PLAIN]).text(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "gemma3"])
@pytest.mark.parametrize("thinking_weight", [1, 0])
def test_labels_behind_thoughts_are_refused(name, thinking_weight):
    talks = [PLAIN, INLINE, [HI, YES | {"content": "no"}]]
    metrics = ["label_accuracy"]
    with pytest.raises(UserError, match="begins with a thought") as caught:
        questions(stock(name), talks, metrics, thinking_weight=thinking_weight).check()
    assert caught.value.where == "rows.jsonl:2"
    questions(stock(name), talks[::2], metrics, thinking_weight=thinking_weight).check()


@pytest.mark.parametrize(
    ("name", "talk", "stop"),
    [
        ("qwen3", PLAIN, "\n\n"),  # between the tags of an empty thought
        ("qwen3_5_think", PLAIN, "\n\n"),
        ("llama3", INLINE, "well"),
        ("gptoss", THOUGHT, ","),
        ("gptoss", PLAIN, "final"),
    ],
)
def test_a_stop_text_in_front_of_the_answer_is_refused(name, talk, stop):
    with pytest.raises(UserError, match="would end before the answer begins") as caught:
        questions(stock(name), [talk], generate={"stop": ["nowhere", stop]})
    assert caught.value.where == "rows.jsonl:1"


@pytest.mark.parametrize(("name", "stop"), [("llama3", "\n\n"), ("qwen3", "sir"), ("gptoss", "sir")])
def test_a_stop_text_elsewhere_is_not(name, stop):
    assert questions(stock(name), [PLAIN], generate={"stop": [stop]}).references == ["yes sir"]


def test_an_end_token_that_the_tokenizer_does_not_have():
    """A model's generation_config.json may name one: vocabularies are padded, and configurations copied."""
    tokenizer = stock("qwen3")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert AnswerFrame.of(tokenizer, (end, 10**6)) == AnswerFrame.of(tokenizer, (end,))
