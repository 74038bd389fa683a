"""English nouns: their plural, and a or an (inflect)."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, pair, words

# Plural and sound are beyond dispute, and inflect is right (7.6.0 has "thiefs", "passer-bies", "a SUV").
NOUNS = words(
    "actor address aircraft album analysis animal apple artist axis baby bench berry bird body book bottle box boy "
    "branch brother brush bus calf candle car cat chair child church city class clock cloud country cow crisis "
    "criterion cup daughter day deer desk dish doctor dog door dress duck eagle echo egg elephant elf emperor engine "
    "enemy essay European evening eye face factory farmer fish fly foot fox friend game garden ghost girl glass goose "
    "grape guest guide half hammer hand hat heir hero hill honour horse hotel hour house hypothesis idea inch insect "
    "island jacket journey judge key king kitchen knife lady lake leaf lemon letter library life light lion loaf "
    "louse lunch man match mayor menu mile monkey month mother-in-law mountain mouse museum nation neighbour nucleus "
    "nurse oasis ocean office onion orange owl ox painter paper party peach pen penny person phenomenon photo piano "
    "picture pilot planet poem poet potato prize queen question quiz rabbit radio ring river road roof room salmon "
    "scarf school series sheep shelf ship shoe sister son-in-law song species spy star stone story student table tax "
    "teacher thesis ticket tomato tooth town toy train tree umbrella uncle uniform union unit university valley "
    "village violin voice volcano wall watch wave wife window wish wolf woman word yard year zebra"
)
ADJECTIVES = words(
    "able ancient angry awful big blue brave bright calm cheap clean clever cold common cruel curious dark deep dry "
    "eager early easy elegant empty endless equal evil exact expensive famous fast fine free fresh full funny gentle "
    "good great green happy heavy honest hourly huge hungry ideal idle important innocent kind large late lazy light "
    "local long loud lucky modern narrow new nice noisy obvious odd old only open orange ordinary outer own pale plain "
    "polite poor pretty quick quiet rare rich round sad safe sharp short silent small soft special strange strong "
    "sudden sweet tall thin tiny tired ugly uneasy unique united universal unknown unusual urgent used useful useless "
    "usual warm wet white wide wild wise wrong yellow young"
)

PLURAL = Wordings(
    seen=(
        "Plural of: {one}",
        "What is the plural of {one}?",
        "Here is one {one}. There are many:",
        "Put into the plural: {one}",
        "From one to many: {one}",
    ),
    unseen=("Say {one} for more than one.", "If there were two of them, {one} would become what?"),
)
ARTICLE = Wordings(
    seen=(
        "Put a or an in front of: {phrase}",
        "a or an? {phrase}",
        "With its article: {phrase}",
        "Complete: ___ {phrase}",
    ),
    unseen=("Which is right before it, a or an: {phrase}", "I saw ___ {phrase}. Fill in the article and the words."),
)


@cache
def engine() -> Any:
    from inflect import engine as make

    return make()


def plural(rng: random.Random, held_out: bool) -> MadeRow:
    noun = on_side(held_out, "word", lambda: rng.choice(NOUNS))
    before = rng.choice(("", f"{rng.choice(ADJECTIVES)} "))
    many = engine().plural_noun(noun)
    return pair(noun, PLURAL.draw(rng, held_out), f"{before}{many}", one=f"{before}{noun}")


def article(rng: random.Random, held_out: bool) -> MadeRow:
    first = on_side(held_out, "word", lambda: rng.choice(rng.choice((NOUNS, ADJECTIVES))))
    phrase = first if first in NOUNS else f"{first} {rng.choice(NOUNS)}"
    return pair(first, ARTICLE.draw(rng, held_out), engine().a(phrase), phrase=phrase)


TASKS = (
    TaskMaker("plural", plural, "noun, with or without an adjective → plural", "the noun", ("inflect",)),
    TaskMaker(
        "article", article, "noun or adjective and noun → with a or an", "the word behind the article", ("inflect",)
    ),
)
