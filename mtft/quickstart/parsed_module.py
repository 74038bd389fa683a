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


@dataclass(frozen=True)
class ParsedModule:
    """name: as the file's, relative to the library. lines: as the parser counts them."""

    name: str
    is_eval: bool
    tree: ast.Module
    lines: list[str]

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """Of the whole tree, walked once."""
        return list(ast.walk(self.tree))

    @classmethod
    def of(cls, file: SourceFile) -> ParsedModule:
        text = file.text()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            tree = ast.parse(text)
        # Not splitlines: it also breaks at form feeds, which the parser does not count as lines.
        return cls(file.name, file.is_eval, tree, text.split("\n"))
