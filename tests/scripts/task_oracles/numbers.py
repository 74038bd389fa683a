"""Numbers, spelt by the rules of each language as they are written down here; English by inflect too."""

import re
from functools import cache

import inflect
from word2number import w2n

from scripts.task_makers.base import words

DE = words(
    "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
)
DE_TENS = words("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")
ES = words(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete "
    "dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete "
    "veintiocho veintinueve"
)
ES_TENS = words("treinta cuarenta cincuenta sesenta setenta ochenta noventa")
ES_HUNDREDS = words(
    "ciento doscientos trescientos cuatrocientos quinientos seiscientos setecientos ochocientos novecientos"
)
FR = words("zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize")
FR_TENS = {20: "vingt", 30: "trente", 40: "quarante", 50: "cinquante", 60: "soixante"}

engine = cache(inflect.engine)


def english(n):
    spelt = engine().number_to_words(n)
    assert w2n.word_to_num(spelt.replace(",", "").replace("-", " ")) == n
    return spelt


def german(n, last=True):
    if n >= 1000:
        return german(n // 1000, False) + "tausend" + (german(n % 1000) if n % 1000 else "")
    if n >= 100:
        return german(n // 100, False) + "hundert" + (german(n % 100) if n % 100 else "")
    if n >= 20:
        return (DE[n % 10] + "und" if n % 10 else "") + DE_TENS[n // 10 - 2]
    return "eins" if n == 1 and last else DE[n]


def spanish(n):
    if n >= 1000:
        return " ".join(
            filter(None, ["" if n < 2000 else spanish(n // 1000), "mil", spanish(n % 1000) if n % 1000 else ""])
        )
    if n > 100:
        return ES_HUNDREDS[n // 100 - 1] + (f" {spanish(n % 100)}" if n % 100 else "")
    if n == 100:
        return "cien"
    if n >= 30:
        return ES_TENS[n // 10 - 3] + (f" y {ES[n % 10]}" if n % 10 else "")
    return ES[n]


def french(n, last=True):
    """`last`: no mille follows, so that cents and quatre-vingts have their s."""
    if n >= 1000:
        thousands = "" if n < 2000 else french(n // 1000, False) + " "
        return thousands + "mille" + (f" {french(n % 1000)}" if n % 1000 else "")
    if n >= 100:
        hundreds = "cent" if n < 200 else f"{FR[n // 100]} cent"
        if n % 100:
            return f"{hundreds} {french(n % 100, last)}"
        return hundreds + ("s" if n >= 200 and last else "")
    if n >= 80:
        return "quatre-vingt" + (f"-{french(n - 80)}" if n > 80 else "s" if last else "")
    if n >= 70:
        return "soixante et onze" if n == 71 else f"soixante-{french(n - 60)}"
    if n >= 20:
        ten, rest = FR_TENS[n // 10 * 10], n % 10
        return ten + (" et un" if rest == 1 else f"-{FR[rest]}" if rest else "")
    return FR[n] if n <= 16 else f"dix-{FR[n - 10]}"


SPELL = {"English": english, "German": german, "French": french, "Spanish": spanish}


def number_to_words(row):
    (number,) = re.findall(r"\d+", row["prompt"])
    (language,) = (name for name in SPELL if name in row["prompt"])
    assert row["response"] == SPELL[language](int(number))


@cache
def words_of_numbers():
    found = {word for n in range(100) for spell in SPELL.values() for word in re.split(r"[ -]", spell(n))}
    return found - {"and", "et", "y"} | {"hundred", "thousand", "cent", "cents", "mille", "mil", "cien", *ES_HUNDREDS}


def words_to_number(row):
    """The words stand in the prompt, and no other word of a number does (frames begin with a capital)."""
    left = []
    for spell in SPELL.values():
        spelt = re.escape(spell(int(row["response"])))
        text, count = re.subn(rf"(?<![\w-]){spelt}(?![\w-])", "", row["prompt"])
        left += [text] if count == 1 else []
    assert any(
        not words_of_numbers() & set(re.findall(r"\w+", text)) and not re.search("hundert|tausend", text)
        for text in left
    ), row


ORACLES = {"number_to_words": number_to_words, "words_to_number": words_to_number}
