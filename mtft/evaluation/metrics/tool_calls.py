"""Calls of tools in texts, as the chat templates of open models write them.

    Hermes, Qwen     <tool_call>{"name": ..., "arguments": {...}}</tool_call>, several in a row
    Qwen3-Coder      <function=NAME><parameter=KEY>value</parameter></function>, in <tool_call> or alone
    Mistral          [TOOL_CALLS] [{"name": ..., "arguments": ...}], or [TOOL_CALLS]NAME[ARGS]{...}, several in a row
    Llama 3          {"name": ..., "parameters": {...}}, several between `;`, with or without <|python_tag|>
    Llama 3.2, 4     [f(a=1), g(b="x")]: Python's calls with literals
    GLM 4.5          <tool_call>NAME<arg_key>KEY</arg_key><arg_value>value</arg_value></tool_call>
    others           gpt-oss, DeepSeek V3 and V3.1, Gemma 4: marked_calls.py
    any              a list of such objects, as OpenAI's too: {"type": "function", "function": {...}}

Text around calls is allowed where marks enclose them; the others are the whole text, but for what a model thought.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtft.evaluation.metrics import marked_calls as marked
from mtft.evaluation.metrics.json_answers import NO_JSON, json_in, json_row, parse_json

_THOUGHT = re.compile(r"\A\s*(?:<think>.*?</think>|<\|channel>thought\n.*?<channel\|>)", re.DOTALL)
_SPECIAL = re.compile(r"\A(?:\s*<\|[^|<>]*\|>)+|(?:<\|[^|<>]*\|>\s*)+\Z")
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_XML = re.compile(r"<function=([^<>\n]*)>(.*?)(?:</function>|\Z)", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([^<>\n]*)>\n?(.*?)\n?(?:</parameter>|\Z|(?=<parameter=))", re.DOTALL)
_MISTRAL = "[TOOL_CALLS]"
_MISTRAL_ARGS = re.compile(r"\s*([^\[\]{}\s]+)\s*(?:\[CALL_ID\][^\[\]]*)?(?:\[ARGS\])?\s*(\{.*)\Z", re.DOTALL)
_MARKED = {
    marked.GPT_OSS: marked.gpt_oss_calls,
    marked.DEEPSEEK: marked.deepseek_calls,
    marked.GEMMA: marked.gemma_calls,
}
_LONGEST = 100_000  # signs of a text that is read as Python


@dataclass(frozen=True)
class ToolCall:
    """name    of the tool; None where a mark announces a call that can't be read: `arguments` is then its text"""

    name: str | None
    arguments: Any


def tool_calls(text: str) -> list[ToolCall]:
    """The calls in a text, in their order."""
    text = _SPECIAL.sub("", _THOUGHT.sub("", text)).strip()
    if _MISTRAL in text:
        return [call for part in text.split(_MISTRAL)[1:] for call in _mistral(part.strip())]
    for mark, calls in _MARKED.items():
        if mark in text:
            return [ToolCall(name, arguments) for name, arguments in calls(text)]
    if "<tool_call>" in text:
        return [call for found in _TAGGED.finditer(text) for call in _tagged(found[1].strip())]
    if "<function=" in text:
        return list(_xml(text))
    whole = json_in(text)
    if whole is not NO_JSON:
        return _plain(whole)
    values = json_row(text)
    if values and all(map(_is_call, values)):
        return [_call(value) for value in values]
    return _pythonic(text)


def _is_call(value: Any) -> bool:
    """Whether an object without marks is meant as a call: the model may have been asked for JSON."""
    value = _function_of(value)
    return isinstance(value, dict) and isinstance(value.get("name"), str) and bool(value.keys() & _ARGUMENTS.keys())


_ARGUMENTS = dict.fromkeys(("arguments", "parameters"))


def _function_of(value: Any) -> Any:
    return value["function"] if isinstance(value, dict) and isinstance(value.get("function"), dict) else value


def _plain(value: Any) -> list[ToolCall]:
    items = value if isinstance(value, list) else [value]
    return [_call(item) for item in items] if items and all(map(_is_call, items)) else []


def _call(value: Any, text: str = "") -> ToolCall:
    function = _function_of(value)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return ToolCall(None, text)
    given = next((function[key] for key in _ARGUMENTS if key in function), None)
    if isinstance(given, str):  # OpenAI's arguments are a text
        parsed = parse_json(given)
        given = given if parsed is NO_JSON else parsed
    return ToolCall(function["name"], {} if given is None else given)


def _tagged(text: str) -> Iterator[ToolCall]:
    if "<function=" in text:
        yield from _xml(text)
        return
    value = parse_json(text)
    if value is NO_JSON and (call := marked.glm_call(text)) is not None:
        yield ToolCall(*call)
        return
    for item in value if isinstance(value, list) else [value]:
        yield _call(item, text)


def _xml(text: str) -> Iterator[ToolCall]:
    for name, body in _XML.findall(text):
        arguments = {}
        for key, value in _XML_ARGUMENT.findall(body):
            parsed = parse_json(value)
            arguments[key.strip()] = value if parsed is NO_JSON else parsed
        yield ToolCall(name.strip(), arguments)


def _mistral(text: str) -> Iterator[ToolCall]:
    if (named := _MISTRAL_ARGS.match(text)) is not None:
        arguments = parse_json(named[2])
        yield ToolCall(None, text) if arguments is NO_JSON else ToolCall(named[1], arguments)
        return
    value = parse_json(text)
    for item in value if isinstance(value, list) else [value]:
        yield _call(item, text)


def _pythonic(text: str) -> list[ToolCall]:
    if not (text.startswith("[") and text.endswith("]") and "(" in text and len(text) <= _LONGEST):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the model's texts
            tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    nodes = tree.elts if isinstance(tree, ast.List) else []
    if not nodes or not all(isinstance(node, ast.Call) for node in nodes):
        return []
    return [_python_call(node) for node in nodes if isinstance(node, ast.Call)]


def _python_call(node: ast.Call) -> ToolCall:
    try:
        arguments = {str(place): _literal(value) for place, value in enumerate(node.args)}
        arguments |= {str(word.arg): _literal(word.value) for word in node.keywords}
    except (ValueError, TypeError, RecursionError, MemoryError):
        return ToolCall(None, ast.dump(node)[:_LONGEST])
    return ToolCall(ast.unparse(node.func), arguments)


def _literal(node: ast.expr) -> Any:
    return _as_json(ast.literal_eval(node))


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_json(item) for item in value]
    return {str(key): _as_json(item) for key, item in value.items()} if isinstance(value, dict) else value
