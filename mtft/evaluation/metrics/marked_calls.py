"""Calls of tools between marks of their own, as gpt-oss, DeepSeek, Gemma 4 and GLM write them: (name, arguments).

A call that can't be read is (None, its text).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from mtft.evaluation.metrics.json_answers import NO_JSON, json_in, parse_json

Call = tuple[str | None, Any]

GPT_OSS, DEEPSEEK, GEMMA = "<|message|>", "<｜tool▁call▁begin｜>", "<|tool_call>"
_TO = "to=functions."
_NAME = re.compile(r"[^\s<>{}]+")
_MESSAGE_END = re.compile(r"<\|(?:call|end|return|start)\|>")
_GEMMA_CALL = re.compile(r"\s*call:([^\s{}]+?)(\{.*)", re.DOTALL)
_GEMMA_QUOTE = '<|"|>'
_GEMMA_KEY = re.compile(r"(?<=[{,])\s*([^\s{}\[\]:,\"]+)\s*:")
_GLM_ARGUMENT = re.compile(r"<arg_key>([^<>]*)</arg_key>\s*<arg_value>((?:(?!<arg_key>).)*?)</arg_value>", re.DOTALL)


def gpt_oss_calls(text: str) -> Iterator[Call]:
    """`to=functions.NAME<|channel|>commentary json<|message|>{...}`, the recipient before the channel or behind."""
    for before, after in pairwise(text.split(GPT_OSS)):
        _, mark, to = before.rpartition("<|start|>")[2].rpartition(_TO)
        if mark and (name := _NAME.match(to)) is not None:
            yield _call(name[0], parse_json(_MESSAGE_END.split(after, maxsplit=1)[0]), after)


def deepseek_calls(text: str) -> Iterator[Call]:
    """`<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}` (V3.1), or with the name in front of a fence (V3, R1)."""
    for part in text.split(DEEPSEEK)[1:]:
        inner = part.partition("<｜tool▁call▁end｜>")[0]
        name, _, arguments = inner.partition("<｜tool▁sep｜>")
        if "```" in arguments:
            name, _, arguments = arguments.partition("\n")
        yield _call(name.strip(), json_in(arguments.strip()), inner)


def gemma_calls(text: str) -> Iterator[Call]:
    """`<|tool_call>call:NAME{key:<|"|>text<|"|>,other:1}<tool_call|>`."""
    for part in text.split(GEMMA)[1:]:
        inner = part.partition("<tool_call|>")[0]
        found = _GEMMA_CALL.fullmatch(inner.strip())
        pieces = [] if found is None else found[2].split(_GEMMA_QUOTE)
        pieces = [json.dumps(piece) if n % 2 else _GEMMA_KEY.sub(r'"\1":', piece) for n, piece in enumerate(pieces)]
        yield _call(found[1] if found else "", parse_json("".join(pieces)), inner)


def glm_call(text: str) -> Call | None:
    """`NAME<arg_key>KEY</arg_key><arg_value>value</arg_value>`; None if the text is none, as a name alone is one."""
    name, mark, rest = text.partition("<arg_key>")
    arguments = {}
    for key, value in _GLM_ARGUMENT.findall(mark + rest):
        parsed = parse_json(value)
        arguments[key.strip()] = value if parsed is NO_JSON else parsed
    whole = _NAME.fullmatch(name.strip()) is not None and (not mark or len(arguments) == text.count("<arg_key>"))
    return (name.strip(), arguments) if whole else None


def _call(name: str, arguments: Any, text: str) -> Call:
    return (None, text) if not name or not isinstance(arguments, dict) else (name, arguments)
