"""The regular expressions in somebody's adapter_config.json, matched as PEFT does, in a time that has a bound.

PEFT matches `(.*\\.)?(KEY)$` against a module's name, the first key that fits counts. Keys that are names are looked up
as such; of the others only those are tried that can't backtrack without end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Generic, TypeVar

Number = TypeVar("Number", int, float)

LONGEST, MOST = 2_000, 1_000  # characters of an expression, and expressions in a config
_NAME = re.compile(r"[\w.\-]+")
_ATOMS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)  # escapes and classes: one character each


def refuse_endless(pattern: str, repeats: int = 3) -> str:
    """The pattern. ValueError if it is no regular expression, or may take for ever on a name.

    repeats: of how many `*`, `+` or `{n}`. A repeated group with a repeat or a choice inside takes exponential time.
    """
    shown = pattern[:80]
    if len(pattern) > LONGEST:
        raise ValueError(f"an expression of {len(pattern)} characters ({shown}...)")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown!r} is not a regular expression: {error}") from None
    count, groups = 0, [False]
    text = _ATOMS.sub("x", pattern)
    for here, after in zip(text, f"{text[1:]} ", strict=False):
        if here == "(":
            groups.append(False)
        elif here == ")" and len(groups) > 1:
            inner = groups.pop()
            if inner and after in "*+{":
                raise ValueError(f"{shown!r} repeats a group that holds a repeat or a choice: it may take for ever")
            groups[-1] |= inner
        elif here == "|":
            groups[-1] = True
        elif here in "*+{":
            groups[-1] = True
            count += 1
    if count > repeats:
        raise ValueError(f"{shown!r} has {count} repeats (*, +, {{}}), more than {repeats}: it may take for ever")
    return pattern


class ModulePatterns(Generic[Number]):
    """{pattern: number} of rank_pattern or alpha_pattern. ValueError for patterns that can't be used."""

    def __init__(self, patterns: Mapping[str, Number]) -> None:
        self.values = list(patterns.values())
        self.names = {key: place for place, key in enumerate(patterns) if _NAME.fullmatch(key)}
        others = {place: key for place, key in enumerate(patterns) if key not in self.names}
        if len(others) > MOST:
            raise ValueError(f"{len(others)} regular expressions, more than {MOST}")
        self.others = {place: refuse_endless(key) for place, key in others.items()}

    @cached_property
    def _compiled(self) -> list[tuple[int, re.Pattern[str]]]:
        return [(place, re.compile(rf"(.*\.)?({key})$")) for place, key in self.others.items()]

    def first(self, module: str, default: Number) -> Number:
        """The number of the first pattern that fits the end of a module's name."""
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        places = [self.names[end] for end in ends if end in self.names]
        places += [place for place, pattern in self._compiled if pattern.match(module)]
        return self.values[min(places)] if places else default
