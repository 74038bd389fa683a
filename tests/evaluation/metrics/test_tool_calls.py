"""Calls of tools, in every way that open models write them."""

from __future__ import annotations

import json
import time

import pytest

from mtft.common.errors import UserError
from mtft.data.formats.messages import Conversation, RowError
from mtft.data.tokenize.chat_template import ChatRenderer
from mtft.evaluation.metrics import METRICS, Answer
from mtft.evaluation.metrics.tool_calls import tool_calls
from tests.data.tokenize.stock import STOCK, stock

TWO = [("weather", {"city": "Rome", "days": 3}), ("stop", {})]
FORMATS = {
    "hermes": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call>\n'
        '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    ),
    "hermes, cut off": (
        'I will look.\n<tool_call>{"arguments": {"days": 3.0, "city": "Rome"}, "name": "weather"}</tool_call>'
        '<tool_call>{"name": "stop"}'
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=stop>\n</function>\n</tool_call>"
    ),
    "qwen3-coder, bare": (
        "<function=weather>\n<parameter=city>Rome</parameter>\n<parameter=days>3</parameter></function>"
        "<function=stop></function>"
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome", "days": 3}, "id": "abc"},'
        ' {"name": "stop", "arguments": {}, "id": "def"}]'
    ),
    "mistral, named": '[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 3}[TOOL_CALLS]stop[CALL_ID]9[ARGS]{}',
    "llama 3": (
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome", "days": 3}};'
        ' {"name": "stop", "parameters": {}}<|eom_id|>'
    ),
    "pythonic": '[weather(city="Rome", days=3), stop()]',
    "llama 4": "<|python_start|>[weather(city='Rome', days=3), stop()]<|python_end|>",
    "gpt-oss": (
        "<|channel|>analysis<|message|>Rome, then.<|end|><|start|>assistant to=functions.weather<|channel|>commentary"
        ' json<|message|>{"city": "Rome", "days": 3}<|call|><|start|>assistant<|channel|>commentary to=functions.stop'
        " <|constrain|>json<|message|>{}"
    ),
    "deepseek v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
        '{"city": "Rome", "days": 3}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>stop\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "deepseek v3.1": (
        "Yes.<｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rome", "days": 3}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>stop<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "gemma 4": (
        '<|channel>thought\n<|tool_call>call:no{}<tool_call|>\n<channel|><|tool_call>call:weather{city:<|"|>Rome<|"|>,'
        "days:3}<tool_call|><|tool_call>call:stop{}<tool_call|>"
    ),
    "glm 4.5": (
        "I will look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>stop\n</tool_call>"
    ),
    "openai": json.dumps(
        [
            {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 3}'}},
            {"type": "function", "function": {"name": "stop", "arguments": "{}"}},
        ]
    ),
    "after a thought": (
        '<think>\n[maybe()] <tool_call>{"name": "no"}</tool_call>\n</think>\n\n[weather(city="Rome", days=3), stop()]'
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read(name):
    assert [(call.name, call.arguments) for call in tool_calls(FORMATS[name])] == TWO


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No call.",
        '{"name": "Bob", "age": 3}',
        "[1, 2]",
        "[]",
        "[x for x in y()]",
        "[f(1)] and more",
        "f(a=1)",
        "[" * 5000 + "(" + "]" * 5000,
        "[f(" + "-" * 50_000 + "1)]",
        "<think>[f()]</think>",
    ],
)
def test_texts_without_calls(text):
    assert tool_calls(text) == []


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{name: f}</tool_call>",
        '<tool_call>["f"]</tool_call>',
        "[TOOL_CALLS] nothing",
        "<|channel|>commentary to=functions.f<|message|>{broken}",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{broken}<｜tool▁call▁end｜>",
        "<｜tool▁call▁begin｜>f",
        "<|tool_call>call:f{a:}<tool_call|>",
        "<|tool_call>f<tool_call|>",
        "<tool_call>f <arg_key>a</arg_key></tool_call>",
        "[TOOL_CALLS]f[ARGS]{broken}",
        "[f(a=g())]",
        "[f(**x)]",
    ],
)
def test_a_call_that_cannot_be_read_is_one_of_no_tool(text):
    assert [call.name for call in tool_calls(text)] == [None]
    assert score(text, text) == 1
    assert score(text, "no call") == 0
    assert score(text, text.replace("f", "g")) == 0 or "f" not in text


def test_marks_inside_of_arguments_are_text():
    arguments = {"q": "to=functions.f, <arg_key>"}
    text = json.dumps({"name": "f", "arguments": arguments})
    assert [call.arguments for call in tool_calls(f"<tool_call>{text}</tool_call>")] == [arguments]


def score(reference, text, row=None, **options):
    metric = METRICS["tool_call_match"](**options)
    return metric.statistics([Answer("0", "", reference, (text,), row or {}, "rows.jsonl:4")]).item()


def test_a_semicolon_in_an_argument_parts_no_calls():
    text = '{"name": "f", "parameters": {"q": "a; b"}}; {"name": "f", "parameters": {"q": ";"}}\n'
    assert [call.arguments for call in tool_calls(text)] == [{"q": "a; b"}, {"q": ";"}]
    assert tool_calls(text + "and more") == []


@pytest.mark.parametrize(
    "part",
    [
        "<function=a",
        "<arg_key>",
        "<|tool_call>call:f{",
        "<｜tool▁call▁begin｜>",
        "to=functions.f",
        "<|message|>",
        "<parameter=a",
        "<tool_call>",
        "<think>",
        "<|a|>",
        "[TOOL_CALLS]",
        "```json\n",
        "{",
        ";",
        "[f(",
    ],
)
def test_what_a_model_repeats_without_end_is_read_in_its_length(part):
    """Eight times the text takes less than 24 times as long (64 would be quadratic); the best of some tries."""

    def seconds(text):
        start = time.process_time()
        tool_calls(text)
        return time.process_time() - start

    short, long = part * (20_000 // len(part)), part * (160_000 // len(part))
    assert min(seconds(long) for _ in range(5)) < 0.02 + 24 * min(seconds(short) for _ in range(5))


def test_the_format_does_not_matter():
    assert all(score(a, b) == 1 for a in FORMATS.values() for b in FORMATS.values())


@pytest.mark.parametrize(
    ("text", "options", "right"),
    [
        ("[stop(), weather(days=3, city='Rome')]", {}, True),
        ("[stop(), weather(days=3, city='Rome')]", {"ordered": True}, False),
        ("[weather(city='Rome', days=3), stop()]", {"ordered": True}, True),
        ("[weather(city='Oslo', days=3), stop()]", {}, False),
        ("[weather(city='Oslo'), stop()]", {"arguments": False}, True),
        ("[weather(city='Rome', days='3'), stop()]", {}, False),
        ("[weather(city='Rome', days=3)]", {}, False),
        ("[weather(city='Rome', days=3), stop(), stop()]", {}, False),
        ("[weather(city='Rome', days=3), weather(city='Rome', days=3)]", {}, False),
        ("It rains.", {}, False),
    ],
)
def test_what_is_right(text, options, right):
    assert score(FORMATS["hermes"], text, **options) == right


def test_no_call_is_right_where_none_is_asked_for():
    assert score("It rains.", "I can't tell.") == 1
    assert score("It rains.", "[stop()]") == 0


@pytest.mark.parametrize("as_text", [False, True])
def test_a_row_with_calls_that_its_text_does_not_show_is_named(as_text):
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    row = {"messages": json.dumps(messages) if as_text else messages}
    with pytest.raises(
        UserError, match="last turn has tool_calls, and in its text none can be read: 'call f'"
    ) as caught:
        score("call f", "call f", row)
    assert caught.value.where == "rows.jsonl:4"
    assert score("[f()]", "[f()]", row) == 1
    assert score("call f", "call f", {"messages": messages[:1]}) == 1


def test_what_gemma_4_writes_inside_of_arguments():
    arguments = {"q": 'a, b: {"c"}', "deep": {"x": [True, None, 1.5, "<b>"], "no": {}}, "empty": ""}
    written = 'q:<|"|>a, b: {"c"}<|"|>,deep:{x:[true,null,1.5,<|"|><b><|"|>],no:{}},empty:<|"|><|"|>'
    assert [call.arguments for call in tool_calls(f"<|tool_call>call:f{{{written}}}<tool_call|>")] == [arguments]


TOOLS = [{"type": "function", "function": {"name": "weather", "description": "d", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_calls_are_read_as_stock_templates_write_them(name):
    function = {"name": "weather", "arguments": {"city": 'Ro"m"e, x: {1}', "days": 3}}
    call = {"type": "function", "id": "call00001", "function": function}
    asked = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    try:
        (example,) = ChatRenderer(stock(name)).render(Conversation(asked, tuple(TOOLS)))
    except RowError:
        return  # the template writes no calls
    found = tool_calls(example.text[slice(*example.spans[-1])])
    if name == "muse_glimmer":  # not among the formats: such a row is refused with its line
        assert found == []
    else:
        assert [(one.name, one.arguments) for one in found] == [("weather", function["arguments"])]
