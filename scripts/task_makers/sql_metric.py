"""Scores SQL by what it finds: the answer's rows against the reference's, in three small databases in memory.

Three, since a wrong query may find the right rows of one table by chance. A query may read, and nothing else; one that
takes too long, fails or finds other rows scores 0. The order of rows counts where the reference has ORDER BY.

Stands alone: make_tasks.py copies it beside the recipe.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter
from functools import cache


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SCHEMA = (
    "CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT, since INTEGER);\n"
    "CREATE TABLE orders (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers, "
    "product TEXT, quantity INTEGER, price INTEGER);"
)
NAMES = words(
    "Ada Ben Cleo Dan Eva Finn Gita Hugo Ines Jon Kira Leo Mia Nils Olga Paul Rosa Sam Tara Uma Vera Will Yara Zoe"
)
CITIES = words("Bergen Cork Dresden Gdansk Ghent Graz Lyon Malmo Porto Turin Utrecht Vigo")
PRODUCTS = words(
    "chair clock desk drill fan kettle lamp mirror oven ladder radio rug saw shelf sofa table tent toaster"
)
DATABASES = 3
_MOST_STEPS = 2_000_000  # of SQLite's machine, for one query
_READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


@cache
def tables(number: int) -> tuple[list[tuple], list[tuple]]:
    """(customers, orders) of one database: always the same."""
    rng = random.Random(number)
    customers = [(i, name, rng.choice(CITIES), rng.randint(2000, 2024)) for i, name in enumerate(NAMES, 1)]
    orders = [
        (i, rng.randint(1, len(NAMES) - 4), rng.choice(PRODUCTS), rng.randint(1, 9), rng.randint(1, 60) * 5)
        for i in range(1, 121)
    ]
    return customers, orders


@cache
def database(number: int) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.executescript(SCHEMA)
    customers, orders = tables(number)
    connection.executemany("INSERT INTO customers VALUES (?, ?, ?, ?)", customers)
    connection.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", orders)
    connection.commit()
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1_000_000)  # bytes of one value
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _READING else sqlite3.SQLITE_DENY)
    return connection


def found(query: str, number: int) -> list[tuple]:
    """The rows that a query finds, numbers rounded. Raises sqlite3.Error where it is refused, wrong or endless."""
    connection = database(number)
    steps = iter(range(_MOST_STEPS // 1000))
    connection.set_progress_handler(lambda: next(steps, None) is None, 1000)
    rows = connection.execute(query.strip().rstrip(";")).fetchmany(10_000)
    return [tuple(round(value, 6) if isinstance(value, float) else value for value in row) for row in rows]


def same_rows(prompt: str, reference: str, answer: str, row: dict) -> float:
    """1 where the answer, which may stand in a fence, finds the reference's rows in each database."""
    fenced = re.search(r"```(?:sql)?\s*(.*?)```", answer, re.DOTALL)
    query = fenced[1] if fenced else answer
    in_order = re.search(r"\border\s+by\b", reference, re.IGNORECASE)
    try:
        pairs = [(found(reference, number), found(query, number)) for number in range(DATABASES)]
    except (sqlite3.Error, sqlite3.Warning, ValueError):
        return 0.0
    return float(all(asked == given if in_order else Counter(asked) == Counter(given) for asked, given in pairs))
