"""What the commands of `mtft mix` share: options, outputs, weights, warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from mtft.cli.common import expand, say
from mtft.cli.numbers import LARGEST, NumberRange

Goal = Literal["min", "max"]
Bounds = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[TARGET=]LOW,HIGH",
        help="Lowest and highest score there can be, as 0,1: for every target, or one. Predictions stay inside.",
    ),
]
Link = Annotated[
    Literal["auto", "none", "logit"],
    typer.Option(help="Fit bounded scores by their logit, as they are, or as predicts better (auto)."),
]
INDEX_HELP = "Column that joins the files. Default: index, id or trial, else the first."
SURROGATE_HELP = "auto (a stack), or one: linear, ridge, lightgbm, mlp, exp, power, bimix, transfer, gp, warped."


def checked_output(out: Path | None, inputs: list[Path | None], overwrite: bool) -> Path | None:
    """The output's path; UserError if it can't be written, is an input, or is there (without --overwrite)."""
    from mtft.common.output_paths import check_output_file

    if out is None:
        return None
    check_output_file(expand(out), inputs=inputs, overwrite=overwrite)
    return expand(out)


def parse_weights(entries: list[str] | None) -> dict[str, float]:
    """{target: weight} of TARGET=W entries."""
    from mtft.common.errors import UserError
    from mtft.common.listing import clipped

    weights: dict[str, float] = {}
    for entry in entries or []:
        name, _, text = entry.rpartition("=")
        if name in weights:
            raise UserError(f"--weight {name} twice", where="command line", do="give each target one weight")
        weights[name] = NumberRange(f"--weight {clipped(name, 60)}", 0, LARGEST, whole=False)(text)
    return weights


@contextmanager
def warnings_said() -> Iterator[None]:
    """What the mixing room warns of, each once, as lines for people."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for text in dict.fromkeys(str(item.message) for item in caught):
                say(f"warning: {text}")
