"""A module of the library, parsed once for all tasks, and the row that they make."""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass
from functools import cached_property

from mtft.quickstart.stdlib_corpus import SourceFile


@dataclass(frozen=True)
class TaskRow:
    prompt: str
    response: str
    id: str  # "json/decoder.py:..." : begins with the file's name


Definition = ast.FunctionDef | ast.AsyncFunctionDef


def parameters(arguments: ast.arguments) -> list[ast.arg]:
    """Those with a name of their own: neither *args nor **kwargs."""
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]


@dataclass(frozen=True)
class ParsedModule:
    """name: as the file's, relative to the library. lines: as the parser counts them."""

    name: str
    is_eval: bool
    tree: ast.Module
    lines: list[str]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Of the whole tree, walked once, in the order of ast.walk."""
        found: list[ast.AST] = [self.tree]
        for node in found:
            for field in node._fields:
                value = getattr(node, field, None)
                if isinstance(value, ast.AST):
                    found.append(value)
                elif isinstance(value, list):
                    found.extend(item for item in value if isinstance(item, ast.AST))
        return found

    @cached_property
    def signatures(self) -> list[tuple[str, Definition]]:
        """(text, node) of the functions that have parameters."""
        functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        return [(f"def {node.name}({ast.unparse(node.args)})", node) for node in functions if parameters(node.args)]

    @classmethod
    def of(cls, file: SourceFile) -> ParsedModule:
        text = file.text()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(text)
        # Not splitlines: it also breaks at form feeds, which the parser does not count as lines.
        return cls(file.name, file.is_eval, tree, text.split("\n"))
