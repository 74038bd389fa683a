"""Writes docs/api.md from the public names of `mtft` and `data_mixers`: their signatures and docstrings.

python scripts/make_api_docs.py            # write it
python scripts/make_api_docs.py --check    # exit 1 if it is not what the code says
"""

from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
sys.path.insert(0, str(ROOT))

HEAD = """# Python API

The public names, made from the code by `scripts/make_api_docs.py`. They are lazy: `import mtft` loads neither torch nor
transformers until a name is used. The same names can be imported from their packages, such as
`from mtft.fuse import fuse_logits`. Everything else in the packages may change without notice.
"""


def signature(name: str, value: Any) -> str:
    """`name(parameters) -> type`, one parameter a line where it would be long."""
    try:
        text = inspect.signature(value, eval_str=False)
    except (TypeError, ValueError):
        return name
    line = f"{name}{text}"
    if len(line) <= 100:
        return line
    parameters = ",\n    ".join(_with_markers(text))
    returns = "" if text.return_annotation is inspect.Signature.empty else f" -> {text.return_annotation}"
    return f"{name}(\n    {parameters},\n){returns}"


def _with_markers(text: inspect.Signature) -> list[str]:
    """The parameters, with the `*` that starts the keyword-only ones."""
    shown, starred = [], False
    for parameter in text.parameters.values():
        starred |= parameter.kind is inspect.Parameter.VAR_POSITIONAL
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not starred:
            shown.append("*")
            starred = True
        shown.append(str(parameter))
    return shown


def entry(package: str, name: str) -> str:
    """One name: heading, signature, docstring, and of a class its constructors and public methods."""
    value = getattr(sys.modules[package], name)
    lines = [f"### `{package}.{name}`", "", "```python", signature(name, value), "```", ""]
    doc = inspect.getdoc(value)
    if not doc:
        raise SystemExit(f"error: {package}.{name} has no docstring\n  do:    write one, then run this again")
    lines += ["```text", doc, "```", ""]
    if inspect.isclass(value):
        methods = _methods(value)
        for method, function in methods.items():
            if inspect.ismethod(function):  # a classmethod: another way to make one
                shown = signature(f"{name}.{method}", function)
                lines += ["```python", shown, "```", "", "```text", inspect.getdoc(function) or "", "```", ""]
        for method, function in methods.items():
            if not inspect.ismethod(function):
                first = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
                lines.append(f"- `{method}`: {first}")
        lines.append("")
    return "\n".join(lines)


def _methods(value: type) -> dict[str, Any]:
    """Public methods with a docstring that the class or a base of ours defines."""
    ours = [base for base in reversed(value.__mro__) if base.__module__.startswith(("mtft.", "data_mixers."))]
    names = {name: None for base in ours for name in vars(base) if not name.startswith("_")}
    methods = {name: getattr(value, name) for name in names}
    return {
        name: method
        for name, method in methods.items()
        if (inspect.isfunction(method) or inspect.ismethod(method)) and inspect.getdoc(method)
    }


def page() -> str:
    import data_mixers
    import mtft

    parts = [HEAD]
    for module in (mtft, data_mixers):
        parts.append(f"## `{module.__name__}`\n")
        parts += [entry(module.__name__, name) for name in sorted(module.__all__, key=str.lower)]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        raise SystemExit("docs/api.md is not what the code says\n  do:    python scripts/make_api_docs.py")


if __name__ == "__main__":
    main()
