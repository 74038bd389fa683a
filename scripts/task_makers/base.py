"""What every made task is: a name, a function that draws one row, and a side for each entity and each wording.

The sides hang on names alone, not on the seed: an entity that is held out is held out for every seed, and in every task
about the same kind of thing. So rows of two seeds, or of two tasks (a date in words, and back), never leak.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from mtft.common.errors import UserError
from mtft.common.fingerprint import content_hash, hash_number

T = TypeVar("T")

HELD_OUT = 5  # one entity in so many
_MOST_REPEATS = 5000  # in a row, before a task is said to have no more rows


@dataclass(frozen=True)
class MadeRow:
    """entity    what the row is about
    template  the words around it; neither an entity nor a template stands on both sides of a task
    columns   what is learnt: prompt and response, or messages and tools
    """

    entity: str
    template: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class TaskMaker:
    """draw        (source of chance, whether the row is held out) -> row
    about       what is asked and answered
    unseen      which entity no training row has that a held-out row has; templates are unseen in every task
    libraries   packages that `draw` imports, by their names in pip
    metrics, format, max_new_tokens   as the recipe has them (docs/tasks.md)
    beside      files that the recipe needs, copied from this folder
    """

    name: str
    draw: Callable[[random.Random, bool], MadeRow]
    about: str
    unseen: str
    libraries: tuple[str, ...] = ()
    metrics: tuple[str | dict[str, Any], ...] = ("loss", "text_match")
    format: str = "prompt_response"
    max_new_tokens: int = 32
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wordings:
    """Ways to ask, with {slots}, of training rows and of held-out rows. Each stands in several frames."""

    seen: tuple[str, ...]
    unseen: tuple[str, ...]

    def draw(self, rng: random.Random, held_out: bool) -> str:
        before, after = _FRAMES[held_out]
        return rng.choice(before) + rng.choice(self.unseen if held_out else self.seen) + rng.choice(after)


_FRAMES = (
    (
        ("", "Please answer. ", "Question: ", "Task: ", "Quickly: ", "Hello! "),
        ("", "\nAnswer with nothing else.", "\nOnly the answer, please.", "\nBe brief."),
    ),
    (
        ("Next item: ", "One more. ", "Exercise: ", "Can you do this? "),
        ("\nGive just the answer.", "\nNo explanation.", "\nThe answer alone will do."),
    ),
)


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def is_held_out(kind: str, entity: object) -> bool:
    """The side of an entity among those of its kind."""
    return hash_number(f"{kind} {entity}", "big", 4) % HELD_OUT == 0


def on_side(held_out: bool, kind: str, draw: Callable[[], T]) -> T:
    """The first draw that belongs to the side; what `str` makes of it is its name."""
    return next(item for item in iter(draw, None) if is_held_out(kind, item) == held_out)


def pair(entity: object, wording: str, response: str, **slots: object) -> MadeRow:
    """A row of prompt and response."""
    return MadeRow(str(entity), wording, {"prompt": wording.format(**slots), "response": response})


def make_rows(maker: TaskMaker, count: int, seed: int, held_out: bool) -> list[dict[str, Any]]:
    """`count` different rows of one side, as they are written. Raises UserError where the task has too few."""
    side = "eval" if held_out else "train"
    rng = random.Random(f"{seed} {maker.name} {side}")
    rows = []
    for row in _different(maker, rng, held_out):
        if len(rows) == count:
            break
        name = f"{row.entity}|{content_hash(row.template)[:8]}|{len(rows)}"  # mtft names it in scores and answers
        rows.append({"id": name, **row.columns})
    if len(rows) < count:
        what = f"the task {maker.name} has about {len(rows):,} different {side} rows, and {count:,} are asked for"
        option = "--eval-rows" if held_out else "--rows"
        raise UserError(what, where=option, do=f"{option} {len(rows)}, or leave the task out with --tasks")
    return rows


def _different(maker: TaskMaker, rng: random.Random, held_out: bool) -> Iterator[MadeRow]:
    """Rows until no new one comes."""
    seen: set[str] = set()
    repeats = 0
    while repeats < _MOST_REPEATS:
        row = maker.draw(rng, held_out)
        text = json.dumps(row.columns, sort_keys=True)
        repeats = repeats + 1 if text in seen else 0
        if not repeats:
            seen.add(text)
            yield row
