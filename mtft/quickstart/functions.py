"""Functions of the standard library as the tasks need them: header, docstring, body, and a key that tells copies."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from mtft.common.fingerprint import content_hash
from mtft.quickstart.parsed_module import ParsedModule


@dataclass(frozen=True)
class Function:
    """One function or method. Lines are dedented: the `def` starts at column 0, the body is indented as in the file."""

    id: str  # "json/decoder.py:JSONDecoder.decode"
    name: str
    header: tuple[str, ...]  # "def f(" ... up to the line before the body; decorators are not in it
    docstring: str | None  # cleaned as inspect.cleandoc does
    docstring_lines: tuple[str, ...]  # as they stand in the source
    body: tuple[str, ...]  # without the docstring
    starts: tuple[int, ...]  # indices into `body` where a statement starts
    key: str  # equal for two functions whose code differs only in name, docstring, comments and layout

    @property
    def code(self) -> str:
        """Header and body without the docstring."""
        return "\n".join((*self.header, *self.body))


def functions_of(module: ParsedModule) -> Iterator[Function]:
    """All functions of a module that have a body on lines of their own, in the order of the source.

    Where a name is defined more than once (overloads, property setters), the id of a later one ends in "@line".
    """
    seen: set[str] = set()
    for qualified, node in _walk(module.tree, ()):
        function = _function(f"{module.name}:{'.'.join(qualified)}", node, module.lines)
        if function is None:
            continue
        if function.id in seen:
            function = Function(**{**vars(function), "id": f"{function.id}@{node.lineno}"})
        seen.add(function.id)
        yield function


_Def = ast.FunctionDef | ast.AsyncFunctionDef


def _walk(node: ast.AST, outer: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], _Def]]:
    for child in _blocks(node):
        if isinstance(child, _Def):
            yield (*outer, child.name), child
        inner = (*outer, child.name) if isinstance(child, _Def | ast.ClassDef) else outer
        yield from _walk(child, inner)


def _blocks(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of a node's blocks, and the parts between (handlers, cases), in order; expressions hold none."""
    for field in node._fields:
        value = getattr(node, field, None)
        if isinstance(value, list) and value and isinstance(value[0], ast.stmt | ast.excepthandler | ast.match_case):
            yield from value


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statement and all that it holds."""
    if isinstance(node, ast.stmt):
        yield node
    for child in _blocks(node):
        yield from _statements(child)


def _key(node: ast.AST, out: list[object]) -> None:
    """Appends what tells a tree's code from another's, without places: faster than ast.dump."""
    out.append(type(node))
    for field in node._fields:
        value = getattr(node, field, None)
        if isinstance(value, ast.AST):
            _key(value, out)
        elif isinstance(value, list):
            out.append(len(value))
            for item in value:
                if isinstance(item, ast.AST):
                    _key(item, out)
                else:
                    out.append(item)
        else:
            out.append((type(value), value))  # True is 1, and 1.0 too


def _function(id: str, node: _Def, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node)
    statements = node.body[1:] if docstring is not None else node.body
    first = node.body[0].lineno
    if not statements or first == node.lineno or lines[first - 1][: node.body[0].col_offset].strip():
        return None
    assert node.end_lineno is not None
    assert node.body[0].end_lineno is not None
    body_start = node.body[0].end_lineno + 1 if docstring is not None else first
    if statements[0].lineno < body_start:  # something follows the docstring on its line
        return None
    block = [_dedent(line, node.col_offset) for line in lines[node.lineno - 1 : node.end_lineno]]
    header = block[: first - node.lineno]
    docstring_lines = block[first - node.lineno : body_start - node.lineno]
    body = block[body_start - node.lineno :]
    while not body[0].strip():  # blank lines between docstring and code
        body, body_start = body[1:], body_start + 1
    statement_lines = {n.lineno for s in statements for n in _statements(s)}
    code: list[object] = []
    for part in (node.args, *statements):
        _key(part, code)
    return Function(
        id=id,
        name=node.name,
        header=tuple(header),
        docstring=docstring,
        docstring_lines=tuple(docstring_lines),
        body=tuple(body),
        starts=tuple(sorted(line - body_start for line in statement_lines)),
        key=content_hash(repr(code).encode("utf-8", "surrogatepass")),
    )


def _dedent(line: str, columns: int) -> str:
    """Lines inside a string may stand further left than the code: they lose only the blanks that they have."""
    return line[columns:] if not line[:columns].strip() else line.lstrip()
