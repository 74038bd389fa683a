"""Sentiment of sentences where someone else's view distracts; and the same sentences with the labels swapped."""

from __future__ import annotations

import random

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, pair, words

GOOD = words(
    "amazing beautiful brilliant charming delicious delightful excellent fantastic flawless fun great helpful "
    "impressive lovely marvellous outstanding perfect pleasant splendid superb terrific wonderful"
)
BAD = words(
    "annoying appalling awful bland boring broken clumsy disappointing dreadful dull filthy horrible lousy "
    "mediocre miserable nasty poor rude shabby terrible unpleasant useless"
)
THINGS = words(
    "book breakfast concert film flight game garden guide hotel lecture meal museum phone play room service show tour"
)
OTHERS = words("brother colleague cousin friend guidebook neighbour poster sister teacher website")
LABELS = ("negative", "positive")

# {view} decides, in sentences with "not" its opposite; {noise} is someone else's and may say anything.
PLAIN = Wordings(
    seen=(
        "The {thing} was {view}.",
        "My {other} called the {thing} {noise}, but I found it {view}.",
        "Although my {other} had promised something {noise}, the {thing} was {view}.",
        "This {thing} is {view}, whatever the {other} says about {noise} ones.",
    ),
    unseen=("I thought the {thing} {view}; that my {other} thinks it {noise} is another matter.",),
)
NEGATED = Wordings(
    seen=(
        "The {thing} was not {view} at all.",
        "My {other} called the {thing} {noise}. To me it was anything but {view}.",
        "Nobody could call this {thing} {view}, even if the {other} wrote {noise}.",
    ),
    unseen=("Far from {view}, this {thing}, although a {other} of mine had said {noise}.",),
)
ASK = "\n\nSentiment of the writer:"


def draw(rng: random.Random, held_out: bool, swapped: bool) -> MadeRow:
    view = on_side(held_out, "view", lambda: rng.choice(GOOD + BAD))
    negated = rng.random() < 1 / 3
    wording = (NEGATED if negated else PLAIN).draw(rng, held_out) + ASK
    label = LABELS[(view in GOOD) ^ negated ^ swapped]
    words = {"thing": rng.choice(THINGS), "other": rng.choice(OTHERS), "noise": rng.choice(GOOD + BAD)}
    return pair(view, wording, label, view=view, **words)


def _task(name: str, swapped: bool, about: str) -> TaskMaker:
    return TaskMaker(
        name,
        lambda rng, held_out: draw(rng, held_out, swapped),
        about,
        "the word that decides",
        metrics=("loss", {"name": "label_accuracy", "labels": list(LABELS)}),
        max_new_tokens=4,
    )


TASKS = (
    _task("sentiment", False, "a sentence → negative or positive; negations, and other people's views"),
    _task("sentiment_swapped", True, "the same sentences, the other label"),
)
