"""Names and docstrings, from what Python's compiler makes of the module (the rows are cut from its syntax tree)."""

import inspect
import re
import types
import warnings
from functools import cache

from mtft.quickstart.stdlib_corpus import library_root


@cache
def compiled(file):
    """{qualified name: code objects} of a file of the standard library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        todo = [compile((library_root() / file).read_text("utf-8"), file, "exec", dont_inherit=True)]
    found = {}
    while todo:
        code = todo.pop()
        found.setdefault(code.co_qualname.replace(".<locals>", ""), []).append(code)
        todo += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return found


def codes_of(row):
    file, name = row["id"].split("|")[0].split(":")
    return compiled(file)[name.split("@")[0]]


def function_name(row):
    assert {code.co_name for code in codes_of(row)} == {row["response"]}
    code = row["prompt"]
    assert re.search(r"def\s+____", code)
    assert not re.search(rf"\b{re.escape(row['response'])}\b", code)


def function_docstring(row):
    texts = [code.co_consts[0] for code in codes_of(row)]
    lines = [inspect.cleandoc(text).strip().split("\n")[0].strip() for text in texts if isinstance(text, str)]
    assert row["response"] in lines


ORACLES = {"function_name": function_name, "function_docstring": function_docstring}
