"""Rows of four tasks with one right answer each, from the signatures and the expressions of a module.

| task | prompt | response |
|---|---|---|
| call | a signature | the call that passes each parameter under its own name, without `self` |
| defaults | a signature | its defaults as JSON |
| pytest | an assertion of unittest | the same as an `assert` statement |
| type | an expression | the built-in type that its form says it has |

Signatures and expressions are the module's own, on one line of at most 60 characters; the assertions of `pytest` are
written from the conditions in its `if`, `while` and `assert` statements.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator

from mtft.quickstart.parsed_module import Definition, ParsedModule, TaskRow, parameters

MOST_CHARACTERS = 60
METHODS = {
    ast.Eq: "assertEqual",
    ast.NotEq: "assertNotEqual",
    ast.In: "assertIn",
    ast.NotIn: "assertNotIn",
    ast.Is: "assertIs",
    ast.IsNot: "assertIsNot",
    ast.Gt: "assertGreater",
    ast.GtE: "assertGreaterEqual",
    ast.Lt: "assertLess",
    ast.LtE: "assertLessEqual",
}
# What a built-in of this name gives, and a method of this name of the built-in types.
BY_FUNCTION = {"len": "int", "repr": "str", "sorted": "list", "isinstance": "bool", "hasattr": "bool"} | {
    name: name for name in ("bool", "bytes", "dict", "float", "int", "list", "set", "str", "tuple")
}
BY_METHOD = {
    "endswith": "bool",
    "join": "str",
    "lower": "str",
    "rstrip": "str",
    "split": "list",
    "splitlines": "list",
    "startswith": "bool",
    "strip": "str",
    "upper": "str",
}
BY_FORM: dict[type[ast.expr], str] = {
    ast.Compare: "bool",
    ast.Dict: "dict",
    ast.DictComp: "dict",
    ast.JoinedStr: "str",
    ast.List: "list",
    ast.ListComp: "list",
    ast.Set: "set",
    ast.SetComp: "set",
    ast.Tuple: "tuple",
}


def call(module: ParsedModule) -> Iterator[TaskRow]:
    """Of two parameters or more, none of them starred."""
    for row_id, signature, node in _signatures(module):
        names = [argument.arg for argument in parameters(node.args)]
        names = names[1:] if names[0] in ("self", "cls") else names
        if len(names) >= 2 and node.args.vararg is None and node.args.kwarg is None:
            yield TaskRow(f"Call: {signature}", f"{node.name}({', '.join(names)})", row_id)


def defaults(module: ParsedModule) -> Iterator[TaskRow]:
    """Of one default or more, all of them constants that JSON has."""
    for row_id, signature, node in _signatures(module):
        values = _defaults(node.args)
        if values and all(_is_json(value) for value in values.values()):
            found = {name: value.value for name, value in values.items() if isinstance(value, ast.Constant)}
            yield TaskRow(f"Defaults as JSON: {signature}", json.dumps(found), row_id)


def pytest(module: ParsedModule) -> Iterator[TaskRow]:
    for node in module.nodes:
        if isinstance(node, ast.If | ast.While | ast.Assert):
            for test in node.test.values if isinstance(node.test, ast.BoolOp) else [node.test]:
                assertion = _assertion(test) if _is_short(test) else None
                if assertion is not None:
                    yield TaskRow(f"pytest: self.{assertion}", f"assert {ast.unparse(test)}", _place(module, test))


def type_(module: ParsedModule) -> Iterator[TaskRow]:
    for node in module.nodes:
        if not isinstance(node, ast.expr) or not _is_short(node) or not _is_drawn(node):
            continue
        name = _type_name(node)
        if name is not None:
            yield TaskRow(f"Type: {ast.unparse(node)}", name, _place(module, node))


def _signatures(module: ParsedModule) -> Iterator[tuple[str, str, Definition]]:
    """(id of the row, text, node) of the functions that have parameters."""
    for text, node in module.signatures:
        if len(text) <= MOST_CHARACTERS + len("def "):
            yield f"{module.name}:{node.lineno}", text, node


def _defaults(arguments: ast.arguments) -> dict[str, ast.expr]:
    by_place = [*arguments.posonlyargs, *arguments.args]
    last = by_place[len(by_place) - len(arguments.defaults) :]
    found = {argument.arg: value for argument, value in zip(last, arguments.defaults, strict=True)}
    by_name = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return found | {argument.arg: value for argument, value in by_name if value is not None}


def _is_json(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and isinstance(value.value, str | int | None)


def _assertion(test: ast.expr) -> str | None:
    """The condition as unittest would assert it; None: it has no method for that, or not one alone."""
    match test:
        case ast.Compare(left, [ast.Is() | ast.IsNot() as operator], [ast.Constant(None)]):
            return f"assertIs{'Not' * isinstance(operator, ast.IsNot)}None({ast.unparse(left)})"
        case ast.Compare(left, [operator], [right]):
            return f"{METHODS[type(operator)]}({ast.unparse(left)}, {ast.unparse(right)})"
        case ast.Call(ast.Name("isinstance"), [value, kind], []):
            return f"assertIsInstance({ast.unparse(value)}, {ast.unparse(kind)})"
        case ast.UnaryOp(ast.Not(), operand):
            return f"assertFalse({ast.unparse(operand)})"
        case ast.Call() | ast.Attribute():
            return f"assertTrue({ast.unparse(test)})"
    return None


def _type_name(node: ast.expr) -> str | None:
    match node:
        case ast.Tuple(ctx=ast.Store() | ast.Del()) | ast.List(ctx=ast.Store() | ast.Del()):
            return None
        case ast.UnaryOp(ast.Not()):
            return "bool"
        case ast.Call(ast.Name(name)):
            return BY_FUNCTION.get(name)
        case ast.Call(ast.Attribute(attr="split", value=owner)) if ast.unparse(owner).endswith("path"):
            return None  # os.path.split gives a tuple
        case ast.Call(ast.Attribute(attr=name)):
            return BY_METHOD.get(name)
    return BY_FORM.get(type(node))


def _is_short(node: ast.expr) -> bool:
    return node.end_lineno == node.lineno and (node.end_col_offset or 0) - node.col_offset <= MOST_CHARACTERS


def _is_drawn(node: ast.expr) -> bool:
    """One in four: there are far more than are needed, and writing them out takes time."""
    return (node.lineno + node.col_offset) % 4 == 0


def _place(module: ParsedModule, node: ast.expr) -> str:
    return f"{module.name}:{node.lineno}:{node.col_offset}-{node.end_col_offset}"


REWRITES: dict[str, Callable[[ParsedModule], Iterator[TaskRow]]] = {
    "call": call,
    "defaults": defaults,
    "pytest": pytest,
    "type": type_,
}
