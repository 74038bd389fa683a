"""Dates, read by names of months and weekdays that are written down here, and by datetime."""

import re
from datetime import date, datetime

MONTHS = {
    "English": "January February March April May June July August September October November December",
    "German": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "French": "janvier février mars avril mai juin juillet août septembre octobre novembre décembre",
    "Spanish": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre",
    "Polish": "stycznia lutego marca kwietnia maja czerwca lipca sierpnia września października listopada grudnia",
}
WEEKDAYS = {
    "English": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "German": "Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag",
    "French": "lundi mardi mercredi jeudi vendredi samedi dimanche",
    "Spanish": "lunes martes miércoles jueves viernes sábado domingo",
    "Polish": "poniedziałek wtorek środa czwartek piątek sobota niedziela",
    "Japanese": "月曜日 火曜日 水曜日 木曜日 金曜日 土曜日 日曜日",
}
NUMBERS = (
    (r"(?P<y>\d{4})年(?P<m>\d+)月(?P<d>\d+)日", "Japanese"),
    (r"(?P<y>\d{4})/(?P<m>\d\d)/(?P<d>\d\d)", "Japanese"),
    (r"(?P<d>\d\d)\.(?P<m>\d\d)\.(?P<y>\d{4})", "German"),
)
NAMED = {
    "English": r"(?P<m>[A-Z][a-z]+) (?P<d>\d+), (?P<y>\d{4})",
    "German": r"(?P<d>\d+)\. (?P<m>[A-Z]\w+) (?P<y>\d{4})",
    "Spanish": r"(?P<d>\d+)(?: de)? (?P<m>[a-z]+)(?: de)? (?P<y>\d{4})",
    "French": r"(?P<d>\d+) (?P<m>[a-zéû]+)\.? (?P<y>\d{4})",
    "Polish": r"(?P<d>\d+) (?P<m>[a-zśź]+) (?P<y>\d{4})",
}


def read(text):
    """(date, languages that it may be in, whether it names its weekday) of the one date in a text."""
    found = [(re.search(pattern, text), language) for pattern, language in NUMBERS]
    found = [(match, int(match["m"]), language) for match, language in found if match]
    for language, pattern in NAMED.items():
        match = re.search(pattern, text)
        months = [i for i, name in enumerate(MONTHS[language].split(), 1) if match and name.startswith(match["m"])]
        found += [(match, months[0], language)] if len(months) == 1 else []
    days = {date(int(match["y"]), month, int(match["d"])) for match, month, _ in found}
    assert len(days) == 1, text
    day = days.pop()
    languages = {language for _, _, language in found}
    named = {language for language in languages if WEEKDAYS[language].split()[day.weekday()] in text}
    others = {name for language in languages for name in WEEKDAYS[language].split()} - {
        WEEKDAYS[language].split()[day.weekday()] for language in languages
    }
    assert not any(name in text for name in others), text
    return day, named or languages, bool(named)


def date_to_iso(row):
    day, _, _ = read(row["prompt"])
    assert row["response"] == f"{day.year}-{day.month:02}-{day.day:02}"


def iso_to_date(row):
    asked = datetime.strptime(re.search(r"\d{4}-\d\d-\d\d", row["prompt"])[0], "%Y-%m-%d").date()
    language = re.search("|".join(WEEKDAYS), row["prompt"])[0]
    day, languages, weekday = read(row["response"])
    assert day == asked
    assert language in languages
    assert weekday == ("with the weekday" in row["prompt"])


def digits(layout):
    def check(row):
        text = re.search(r"\d\d/\d\d/\d{4}", row["prompt"])[0]
        assert datetime.strptime(text, layout).date().isoformat() == row["response"]

    return check


ORACLES = {
    "date_to_iso": date_to_iso,
    "iso_to_date": iso_to_date,
    "date_day_first": digits("%d/%m/%Y"),
    "date_month_first": digits("%m/%d/%Y"),
}
