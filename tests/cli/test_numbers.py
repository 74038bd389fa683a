"""Every number on the command line has a range: one without is found here, by a walk over all commands."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import typer

from data_mixers.surrogates.base import MINIMUM_TRIALS
from mtft.__main__ import main
from mtft.cli import app
from mtft.cli.numbers import NumberRange
from tests.cli.test_mix import FILES, mix, trials, write  # noqa: F401

# Flags of text: those that are no numbers, and those that hold some, with a text that is right but for its number.
TEXTS = {
    "--design": None,
    "--target": None,
    "--index": None,
    "--surrogate": None,
    "--goal": None,
    "--objective": None,
    "--method": None,
    "--new": None,
    "--launch": None,
    "--host": None,
    "--api-key-env": None,
    "--experts": None,
    "--set": None,  # checked by the method's class
    "--bounds": "0,{}",
    "--cap": "code={}",
    "--floor": "code={}",
    "--weight": "loss={}",
    "--weights": "1,{}",
    "--rank": "{}",
}
BAD = ("nan", "inf", "-inf", "1e999", "-1e300", "1e300", "-100000000000000000000", "9" * 5000, "", "x", "0x10")


@dataclass(frozen=True)
class Flag:
    command: tuple[str, ...]
    parameter: str
    names: tuple[str, ...]
    kinds: frozenset[type]
    info: Any


def commands(group: typer.Typer, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Callable[..., Any]]]:
    if group.registered_callback is not None:
        yield path, group.registered_callback.callback
    for command in group.registered_commands:
        yield (*path, command.name or command.callback.__name__), command.callback
    for child in group.registered_groups:
        yield from commands(child.typer_instance, (*path, child.name))


def kinds_in(annotation: Any) -> Iterator[type]:
    if get_origin(annotation) is Annotated:
        yield from kinds_in(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType, list, tuple):
        for part in get_args(annotation):
            yield from kinds_in(part)
    elif isinstance(annotation, type):
        yield annotation


def flags(group: typer.Typer = app) -> list[Flag]:
    """Every option and argument of every command, by what its function says of it."""
    found = []
    for path, function in commands(group):
        for name, annotation in get_type_hints(function, include_extras=True).items():
            if name == "return" or annotation is typer.Context:
                continue
            info = next((i for i in annotation.__metadata__ if hasattr(i, "param_decls")), None)
            said = [info.default, *(info.param_decls or ())]  # typer takes the first one for the default
            said = [text for text in said if isinstance(text, str) and text.startswith("--")]
            names = tuple(said) or (f"--{name.replace('_', '-')}",)
            found.append(Flag(path, name, names, frozenset(kinds_in(annotation)), info))
    return found


def without_range(group: typer.Typer) -> list[str]:
    """Numeric flags that declare none, or one without ends, or under another name than their own."""
    return [
        f"{' '.join(flag.command)} {flag.names[0]}"
        for flag in flags(group)
        if flag.kinds & {int, float}
        and not (
            isinstance(parser := flag.info.parser, NumberRange)
            and math.isfinite(parser.low)
            and math.isfinite(parser.high)
            and parser.low < parser.high
            and (parser.flag,) == flag.names
            and parser.whole == (int in flag.kinds)
        )
    ]


NUMBERS = [flag for flag in flags() if flag.kinds & {int, float}]


def test_every_numeric_flag_declares_a_range():
    assert len(NUMBERS) > 20
    assert without_range(app) == []


def test_the_walk_finds_a_flag_without_a_range():
    group, child = typer.Typer(), typer.Typer()

    @child.command("try")
    def attempt(
        plain: Annotated[int, typer.Option()] = 1,
        half: Annotated[float | None, typer.Option(min=1)] = None,
        several: Annotated[list[int] | None, typer.Argument()] = None,
        word: Annotated[str, typer.Option()] = "",
    ) -> None: ...

    group.add_typer(child, name="inner")
    attempt.__annotations__ = {
        "plain": Annotated[int, typer.Option()],
        "half": Annotated[float | None, typer.Option(min=1)],
        "several": Annotated[list[int] | None, typer.Argument()],
        "word": Annotated[str, typer.Option()],
    }
    assert without_range(group) == ["inner try --plain", "inner try --half", "inner try --several"]


def test_every_flag_of_text_is_known_to_hold_a_number_or_none():
    """A new flag of text is to be written down above: with a number in it, it is attacked below."""
    texts = {flag.names[0] for flag in flags() if str in flag.kinds and isinstance(flag.info, typer.models.OptionInfo)}
    assert texts <= TEXTS.keys()


@pytest.mark.parametrize("flag", NUMBERS, ids=lambda flag: "-".join((*flag.command, flag.parameter)))
def test_a_number_outside_is_refused_with_flag_and_range(flag, capsys):
    """Before anything is read: no recipe or file is given."""
    limits = flag.info.parser
    just_outside = (
        [str(limits.low - 1), str(limits.high + 1)]
        if limits.whole
        else [repr(math.nextafter(limits.low, -math.inf)), repr(math.nextafter(limits.high, math.inf))]
    )
    for text in [*BAD, *just_outside]:
        assert main([*flag.command, f"{flag.names[0]}={text}"]) == 2, text
        said = capsys.readouterr().err
        assert said.count("error: ") == 1
        assert flag.names[0] in said.splitlines()[0]
        assert limits.text() in said.splitlines()[0]
        assert len(said.splitlines()) == 3


@pytest.mark.parametrize("flag", NUMBERS, ids=lambda flag: "-".join((*flag.command, flag.parameter)))
def test_the_ends_of_a_range_are_inside(flag):
    limits = flag.info.parser
    if flag.parameter == "limit":
        assert limits.low == MINIMUM_TRIALS
    for end in (limits.low, limits.high):
        assert limits(str(end)) == end
        assert isinstance(limits(str(end)), int if limits.whole else float)


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("name", [name for name, form in TEXTS.items() if form is not None])
def test_a_number_inside_of_a_text_is_refused_with_flag_and_range(trials, capsys, name, text):  # noqa: F811
    flag = next(flag for flag in flags() if flag.names[0] == name)
    given = f"{name}={TEXTS[name].format(text)}"
    if flag.command == ("merge",):
        code = main(["merge", "one", "two", "--out", "merged", given])
    else:
        code = main(["mix", "propose", *FILES, "--target", "loss", "--surrogate", "ridge", given])
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("error: ") == 1
    assert name in said
    assert " to " in said or "<=" in said


@pytest.mark.parametrize("high", [False, True])
def test_the_ends_of_the_ranges_of_mix_work(trials, capsys, high):  # noqa: F811
    """Each to the end, one by one: done, or refused in one block that names what does not fit."""
    write("sizes.csv", ["name", "rows"], [["news", 500], ["code", 100], ["chat", 1000]])
    write("s.csv", ["row", "a", "b", "c"], [[i, *row] for i, row in enumerate(np.eye(3).tolist())])
    ways = {
        ("mix", "propose"): [*FILES, "--target", "loss", "--surrogate", "ridge", "--sizes", "sizes.csv"],
        ("mix", "fit"): [*FILES, "--target", "loss", "--surrogate", "ridge"],
        ("mix", "relevance"): ["--sketches", "s.csv", "--target", "a"],
    }
    for flag in NUMBERS:
        if flag.command not in ways:
            continue
        end = flag.info.parser.high if high else flag.info.parser.low
        more = ["--total", "1000"] if flag.names[0] == "--max-epochs" else []
        code = main([*flag.command, *ways[flag.command], f"{flag.names[0]}={end}", *more])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert "nan" not in said.out
        assert code == 0 or (code == 2 and said.err.count("error: ") == 1), (flag.names, said.err)
