"""Dates: text in six locales (babel, CLDR) to ISO 8601 and back, and two tasks that read digits differently."""

from __future__ import annotations

import datetime
import random

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, pair

LOCALES = {
    "en_US": "English",
    "de_DE": "German",
    "fr_FR": "French",
    "es_ES": "Spanish",
    "pl_PL": "Polish",
    "ja_JP": "Japanese",
}
FIRST, LAST = datetime.date(1950, 1, 1).toordinal(), datetime.date(2049, 12, 31).toordinal()

TO_ISO = Wordings(
    seen=(
        "Write this date as YYYY-MM-DD: {date}",
        "{date} in ISO 8601?",
        "ISO date of: {date}",
        "Turn the date into year-month-day: {date}",
        "The letter is dated {date}. Which ISO date is that?",
    ),
    unseen=("Normalise the date to YYYY-MM-DD: {date}", "We met on {date}. Give the ISO form of that day."),
)
FROM_ISO = Wordings(
    seen=(
        "Write {iso} in {language}, {how}.",
        "How is {iso} written in {language}, {how}?",
        "{iso}, as a date in {language}, {how}:",
        "Put the date {iso} into {language} words, {how}.",
    ),
    unseen=(
        "Spell out {iso} for a reader of {language}, {how}.",
        "A letter in {language} needs the date {iso}, {how}.",
    ),
)
HOW = {"long": "without the weekday", "full": "with the weekday"}  # CLDR's two longest formats
DIGITS = Wordings(
    seen=("The form says {first:02}/{second:02}/{year}. ISO date?", "{first:02}/{second:02}/{year} as YYYY-MM-DD:"),
    unseen=("Stamped {first:02}/{second:02}/{year}: which ISO date?",),
)


def draw_date(rng: random.Random, held_out: bool) -> datetime.date:
    return on_side(held_out, "date", lambda: datetime.date.fromordinal(rng.randint(FIRST, LAST)))


def to_iso(rng: random.Random, held_out: bool) -> MadeRow:
    from babel.dates import format_date

    date = draw_date(rng, held_out)
    text = format_date(date, rng.choice(("full", "long", "medium")), locale=rng.choice(list(LOCALES)))
    return pair(date, TO_ISO.draw(rng, held_out), date.isoformat(), date=text)


def from_iso(rng: random.Random, held_out: bool) -> MadeRow:
    from babel.dates import format_date

    date, locale, length = draw_date(rng, held_out), rng.choice(list(LOCALES)), rng.choice(list(HOW))
    wording, answer = FROM_ISO.draw(rng, held_out), format_date(date, length, locale=locale)
    return pair(date, wording, answer, iso=date.isoformat(), language=LOCALES[locale], how=HOW[length])


def digits(rng: random.Random, held_out: bool, day_first: bool) -> MadeRow:
    """Both numbers could be the month, so that nothing but the convention decides."""
    year, *numbers = on_side(
        held_out, "digits", lambda: (rng.randint(1950, 2049), *sorted(rng.sample(range(1, 13), 2)))
    )
    first, second = rng.sample(numbers, 2)
    day, month = (first, second) if day_first else (second, first)
    wording = DIGITS.draw(rng, held_out)
    answer = datetime.date(year, month, day).isoformat()
    return pair("{} {}/{}".format(year, *numbers), wording, answer, first=first, second=second, year=year)


TASKS = (
    TaskMaker("date_to_iso", to_iso, "a date in one of six locales → YYYY-MM-DD", "the day", ("babel",)),
    TaskMaker("iso_to_date", from_iso, "YYYY-MM-DD → the date in one of six locales", "the day", ("babel",)),
    TaskMaker(
        "date_day_first",
        lambda rng, held_out: digits(rng, held_out, day_first=True),
        "03/04/2024 → 2024-04-03",
        "the year with its two numbers",
    ),
    TaskMaker(
        "date_month_first",
        lambda rng, held_out: digits(rng, held_out, day_first=False),
        "03/04/2024 → 2024-03-04",
        "the year with its two numbers",
    ),
)
