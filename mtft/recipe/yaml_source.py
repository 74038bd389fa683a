"""A recipe's text as plain values that remember their line: YAML 1.2 in, `Source` out, overrides applied.

YAML 1.2 means that `1e-4` is a number and `no` is a string, which YAML 1.1 readers (PyYAML) get wrong. Keys and dates
stay the text that was written, so a task may be called `2024`. Nothing here knows what a recipe's keys mean.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from mtft.common.errors import UserError
from mtft.common.listing import clipped, listed
from mtft.common.own_files import irregular

KeyPath = tuple[str | int, ...]

_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # a zero byte, half of a surrogate pair
_TAG = "tag:yaml.org,2002:"
_MAX_BYTES = 1 << 23
_MAX_VALUES = 60_000  # keys and values: reading them takes seconds; aliases of aliases write a billion in ten lines


@dataclass
class YamlProblem:
    """One thing that is wrong: at which key, what, and what to do about it."""

    path: KeyPath
    what: str
    do: str = ""


@dataclass
class YamlSource:
    """Values of a recipe before validation, where each came from, and what is wrong with the text itself."""

    file: Path
    values: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)  # "line 12", or "override 'train.steps=5'"
    problems: list[YamlProblem] = field(default_factory=list)

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path` was written, or the nearest section around it."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.origins:
                return self.origins[path[:end]]
        return "line 1"

    def value(self, path: KeyPath) -> Any:
        """The value at `path`, or None where there is none."""
        value: Any = self.values
        for key in path:
            value = child(value, key)
        return value

    def show(self, path: KeyPath) -> str:
        """`("tasks", 0, "data")` -> `tasks.sql.data`, as an override writes it: items by their name."""
        value: Any = self.values
        shown = []
        for key in path:
            value = child(value, key)
            name = child(value, "name") if isinstance(key, int) else None
            shown.append(name if isinstance(name, str) and name else str(key))
        return ".".join(shown)


def child(value: Any, key: str | int) -> Any:
    """`value[key]`, or None where there is no such thing."""
    if isinstance(value, dict):
        return value.get(key)
    if isinstance(value, list) and isinstance(key, int) and 0 <= key < len(value):
        return value[key]
    return None


def read_yaml(file: Path) -> YamlSource:
    """Read one YAML file whose top level is a mapping.

    Raises UserError if the file is missing, empty, not UTF-8, not YAML, or not a mapping.
    """
    kind = irregular(file)
    if kind not in (None, "a folder"):  # never opened: a pipe would be waited for
        raise UserError(f"{file} is {kind}, not a recipe", do="name the YAML file")
    try:
        if os.path.getsize(file) > _MAX_BYTES:
            raise UserError(f"{file} has {os.path.getsize(file):,} bytes: no recipe", do="name the YAML file")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(path.name for path in file.parent.glob("*.y*ml")) if file.parent.is_dir() else []
        do = f"recipes in that folder: {listed(near, 8)}" if near else "check the path"
        raise UserError(f"there is no recipe {file}", do=do) from None
    except IsADirectoryError:
        raise UserError(f"{file} is a folder, not a recipe", do="name the YAML file") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}", do="check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.name} is not UTF-8 text", where=f"{file}, byte {error.start}", do="save it as UTF-8"
        ) from None
    source = YamlSource(file, {})
    values = _parse(text, source, (), where=str(file))
    if values is None:
        raise UserError(f"{file.name} is empty", where=str(file), do="start from one of the files in recipes/")
    if not isinstance(values, dict):
        what = f"{file.name} holds {kind_of(values)}, not a mapping of sections"
        do = "a recipe starts with lines such as `name: my-run` and `tasks:`"
        raise UserError(what, where=f"{file}, line 1", do=do)
    source.values = values
    return source


def plain_value(text: str, *, where: str) -> Any:
    """A value from the command line, read like one in a recipe: `0.5` is a number, `no` is text. Raises UserError."""
    scratch = YamlSource(Path(where), {})
    value = _parse(text, scratch, (), where=where)
    if scratch.problems:
        raise UserError(f"the value {scratch.problems[0].what}", where=where, do=scratch.problems[0].do)
    return value


def _parse(text: str, source: YamlSource, path: KeyPath, where: str, origin: str | None = None) -> Any:
    """Parse `text` as one YAML value at `path` of the recipe. `origin` names the text if it is not the file."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Composer = _BoundedComposer
    try:
        node = yaml.compose(text)
        return None if node is None else _Builder(yaml, source, origin).build(node, path)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        do = "look for a missing quote, colon or bracket, a tab, or wrong indentation, there or on the line before"
        raise UserError(f"not readable as YAML: {reason}", where=where + line, do=do) from None
    except _TooMany as error:
        what = f"more than {_MAX_VALUES:,} keys and values: no recipe, or aliases of aliases"
        raise UserError(what, where=f"{where}, line {error.args[0]}", do="name the YAML file of a recipe") from None
    except RecursionError:
        raise UserError("the YAML is nested too deep", where=where, do="recipes have four levels") from None


class _TooMany(Exception):
    """More keys and values than any recipe has, and the line where the count is full."""


class _BoundedComposer(Composer):
    """Stops in the middle of a text with too many values."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise _TooMany(self.parser.peek_event().start_mark.line + 1)
        return super().compose_node(parent, index)


class _Builder:
    """Turns composed nodes into plain values and notes the line of each."""

    def __init__(self, yaml: YAML, source: YamlSource, origin: str | None) -> None:
        self._construct = yaml.constructor
        self._source, self._fixed_origin = source, origin
        self._open: set[int] = set()
        self._values = 0

    def build(self, node: Node, path: KeyPath) -> Any:
        self._values += 1
        if self._values > _MAX_VALUES:
            raise _TooMany(node.start_mark.line + 1)
        if id(node) in self._open:
            self._problem(path, node, "is an alias that contains itself", "write the value out")
            return None
        self._source.origins.setdefault(path, self._origin(node))
        self._open.add(id(node))
        try:
            if isinstance(node, ScalarNode):
                return self._scalar(node, path)
            if str(node.tag) not in (_TAG + "map", _TAG + "seq"):
                return self._foreign_tag(path, node)
            if isinstance(node, MappingNode):
                return self._mapping(node, path)
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        finally:
            self._open.discard(id(node))

    def _origin(self, node: Node) -> str:
        return self._fixed_origin or f"line {node.start_mark.line + 1}"

    def _problem(self, path: KeyPath, node: Node, what: str, do: str) -> None:
        self._source.origins.setdefault(path, self._origin(node))
        self._source.problems.append(YamlProblem(path, what, do))

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: Node | None = None
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._problem((*path, "?"), key_node, "is a list or a mapping as a key", "keys are plain words")
                continue
            if key_node.tag == _TAG + "merge":  # `<<: *anchor`
                if merged is not None:
                    self._problem((*path, "<<"), key_node, "is given twice", "give one: <<: [*first, *second]")
                merged = value_node
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                self._problem(here, key_node, f"is given twice (first on line {lines[key]})", "keep one of them")
                self._source.origins[here] = self._origin(key_node)
                continue
            lines[key] = key_node.start_mark.line + 1
            self._source.origins[here] = self._origin(key_node)
            values[key] = self.build(value_node, here)
        if merged is not None:
            inherited = self.build(merged, path)
            for part in inherited if isinstance(inherited, list) else [inherited]:
                if isinstance(part, dict):
                    values = part | values
                else:
                    what = f"is {kind_of(part)}, and must be a mapping"
                    self._problem((*path, "<<"), merged, what, "give an alias of one: <<: *name")
        return values

    def _scalar(self, node: ScalarNode, path: KeyPath) -> Any:
        kind = str(node.tag).removeprefix(_TAG)
        if kind == "null":
            return None
        try:
            if kind in ("bool", "int", "float"):
                return getattr(self._construct, f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError, IndexError):
            what = f"is {clipped(str(node.value), 60)!r}, which is no valid {kind}"
            self._problem(path, node, what, "write a number or true/false")
            return None
        if kind in ("str", "timestamp", "value"):
            if _NO_TEXT.search(node.value):
                self._problem(path, node, f"holds a sign that no text has: {node.value!a}", "remove it")
            return str(node.value)
        return self._foreign_tag(path, node)

    def _foreign_tag(self, path: KeyPath, node: Node) -> None:
        tag = str(node.tag).replace(_TAG, "!!")
        self._problem(path, node, f"has the tag {tag}", "remove the tag: a recipe holds plain values only")


def kind_of(value: Any) -> str:
    """A value's kind and the value, cut short, in words that a user of YAML knows."""
    if value is None:
        return "empty (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 40 else value[:37] + '...'!r}"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, int):  # Python writes out no number of more than 4,300 digits
        return (
            str(value) if value.bit_length() < 128 else f"a number of about {int(value.bit_length() * 0.30103)} digits"
        )
    return "a list" if isinstance(value, list) else "a mapping"


# Below these keys stand names chosen by the user, which may contain dots.
_NAMED_BY_USER: tuple[KeyPath, ...] = (
    ("mixture", "shares"),
    ("mixture", "floors"),
    ("mixture", "caps"),
    ("sweep", "objective"),
)


def apply_override(source: YamlSource, text: str) -> None:
    """Apply one `key=value`: dotted path, list items by index or by their name, value read as YAML (empty = null).

    Sections on the way that do not exist are made; whether their keys are right is judged later, with everything else.
    """
    dotted, equals, value_text = text.partition("=")
    dotted = dotted.strip()
    if not equals or not dotted or ".." in f".{dotted}.":
        do = "write the path of a key and its value, for example train.steps=100 or tasks.sql.weight=2"
        raise UserError(f"the override {text!r} is not key=value", where="command line", do=do)
    origin = f"override {text if len(text) <= 60 else text[:57] + '...'!r}"
    parent: Any = source.values
    path: KeyPath = ()
    rest = dotted
    while True:
        key, rest = _next_key(parent, path, rest, origin)
        path = (*path, key)
        if not rest:
            break
        section = child(parent, key)
        if not isinstance(section, dict | list):
            section = parent[key] = {}
            source.origins[path] = origin
        parent = section
    for old in [known for known in source.origins if known[: len(path)] == path]:
        del source.origins[old]
    source.problems = [problem for problem in source.problems if problem.path[: len(path)] != path]
    parent[key] = _parse(value_text, source, path, where="command line, " + origin, origin=origin)
    source.origins[path] = origin


def _next_key(parent: Any, path: KeyPath, rest: str, origin: str) -> tuple[str | int, str]:
    """Split the next key off a dotted path: an existing key or item name, even with dots in it, wins over a cut."""
    if isinstance(parent, dict):
        if path in _NAMED_BY_USER:
            return rest, ""
        known: list[tuple[str | int, str]] = [(key, key) for key in parent]
    else:
        known = [(index, str(index)) for index in range(len(parent))]
        known += [(i, item["name"]) for i, item in enumerate(parent) if isinstance(item, dict) and "name" in item]
    for key, name in sorted(known, key=lambda entry: -len(str(entry[1]))):
        if rest == name:
            return key, ""
        if rest.startswith(f"{name}."):
            return key, rest[len(str(name)) + 1 :]
    head, _, tail = rest.partition(".")
    if isinstance(parent, dict):
        return head, tail
    names = [str(item["name"]) for item in parent if isinstance(item, dict) and "name" in item]
    items = f"its items are {listed(names)}" if names else f"it has {len(parent)} items, counted from 0"
    shown = ".".join(map(str, path))
    raise UserError(f"{shown} has no item {head!r}", where=f"command line, {origin}", do=items)
