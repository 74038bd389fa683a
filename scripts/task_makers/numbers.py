"""Numbers: digits to words in four languages (num2words) and back."""

from __future__ import annotations

import random

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, pair

# The largest number of each language: above it num2words 0.5.14 writes what no one says (einhunderteinstausend,
# veintiuno mil).
LANGUAGES = {"English": ("en", 999_999), "German": ("de", 9_999), "French": ("fr", 999_999), "Spanish": ("es", 9_999)}

TO_WORDS = Wordings(
    seen=(
        "Write {number} in words, in {language}.",
        "How is {number} said in {language}?",
        "{number}, spelt out in {language}:",
        "Spell the number {number} ({language}).",
    ),
    unseen=("Read {number} aloud in {language}.", "A cheque in {language} over {number}: which words stand on it?"),
)
FROM_WORDS = Wordings(
    seen=(
        "Write as digits: {words}",
        "Which number is this? {words}",
        "The {language} words are: {words}. The number?",
        "{words} = ?",
    ),
    unseen=("Someone says in {language}: {words}. Note it in digits.", "Digits for: {words}"),
)


def draw_number(rng: random.Random, held_out: bool) -> tuple[int, str, str]:
    """(number, words, language): as many short numbers as long ones."""
    from num2words import num2words

    language = rng.choice(list(LANGUAGES))
    code, most = LANGUAGES[language]
    number = on_side(held_out, "number", lambda: rng.randint(0, min(most, 10 ** rng.randint(2, 6) - 1)))
    return number, num2words(number, lang=code), language


def to_words(rng: random.Random, held_out: bool) -> MadeRow:
    number, words, language = draw_number(rng, held_out)
    return pair(number, TO_WORDS.draw(rng, held_out), words, number=number, language=language)


def from_words(rng: random.Random, held_out: bool) -> MadeRow:
    number, words, language = draw_number(rng, held_out)
    return pair(number, FROM_WORDS.draw(rng, held_out), str(number), words=words, language=language)


TASKS = (
    TaskMaker("number_to_words", to_words, "digits → words, in four languages", "the number", ("num2words",)),
    TaskMaker(
        "words_to_number",
        from_words,
        "words in four languages → digits",
        "the number",
        ("num2words",),
        ("loss", "numeric"),
    ),
)
