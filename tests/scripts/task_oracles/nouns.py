"""Plurals and articles by school grammar: lists of exceptions, then rules of spelling and sound."""

import re

from scripts.task_makers.base import words
from scripts.task_makers.nouns import ADJECTIVES

IRREGULAR = dict(
    word.split("/")
    for word in words(
        "aircraft/aircraft analysis/analyses axis/axes calf/calves child/children crisis/crises criterion/criteria "
        "deer/deer elf/elves fish/fish foot/feet goose/geese half/halves hypothesis/hypotheses knife/knives "
        "leaf/leaves life/lives loaf/loaves louse/lice man/men mother-in-law/mothers-in-law mouse/mice nucleus/nuclei "
        "oasis/oases ox/oxen person/people phenomenon/phenomena quiz/quizzes salmon/salmon scarf/scarves "
        "series/series sheep/sheep shelf/shelves son-in-law/sons-in-law species/species thesis/theses tooth/teeth "
        "wife/wives wolf/wolves woman/women echo/echoes hero/heroes potato/potatoes tomato/tomatoes volcano/volcanoes"
    )
)
AS_CONSONANT = {
    "European", "one", "uniform", "union", "unique", "unit", "united", "universal", "university", "used", "useful",
    "useless", "usual",
}  # fmt: skip
SILENT_H = {"heir", "honest", "honour", "hour", "hourly"}


def plural_of(noun):
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if re.search(r"[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + ("es" if re.search(r"(s|x|z|ch|sh)$", noun) else "s")


def plural(row):
    noun = row["id"].split("|")[0]
    before = re.search(rf"(?:(\S+) )?(?<![\w-]){noun}(?![\w-])", row["prompt"])[1]
    expected = plural_of(noun)
    assert row["response"] == (f"{before} {expected}" if before in ADJECTIVES else expected)


def article(row):
    given, phrase = row["response"].split(" ", 1)
    first = phrase.split()[0]
    vowel = first in SILENT_H or (first[0].lower() in "aeiou" and first not in AS_CONSONANT)
    assert given == ("an" if vowel else "a")
    assert re.search(rf"(: |\? |___ ){phrase}(\.|\n|$)", row["prompt"])


ORACLES = {"plural": plural, "article": article}
