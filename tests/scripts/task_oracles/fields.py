"""The six fields, found in the text by patterns."""

import json
import re

NAME = r"([A-Z]\w+ [A-Z]\w+)"
BUYER = rf"{NAME} from|Order by {NAME}|buyer is {NAME}|On behalf of {NAME}|go to {NAME}|for {NAME} who lives"
CITY = r"from (\w+) orders|\((\w+)\)|To (\w+), please|sent to (\w+)\.|in (\w+), who pays|lives in (\w+)\."
PRODUCT = r"\d+ x (\w+)|of the (\w+),|pieces, (\w+),|(\w+), \d+ times"
QUANTITY = r"(\d+) x|(\d+) of the|(\d+) pieces|(\d+) times"


def first(pattern, text):
    match = re.search(pattern, text)
    return next(filter(None, match.groups())) if match else None


def json_fields(row):
    text = row["prompt"].rpartition("\n\n")[0]
    for opening in ("Please answer. ", "Question: ", "Task: ", "Quickly: ", "Hello! "):
        text = text.removeprefix(opening)
    assert json.loads(row["response"]) == {
        "name": first(BUYER, text),
        "city": first(CITY, text),
        "product": first(PRODUCT, text),
        "quantity": int(first(QUANTITY, text)),
        "price": float(first(r"([\d.]+) euros", text)),
        "email": first(r"Mail: (\S+@example\.com)\.", text),
    }


ORACLES = {"json_fields": json_fields}
