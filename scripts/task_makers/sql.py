"""Questions about two tables, and the SQL that answers them. The schema and the databases are sql_metric.py's."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, pair
from scripts.task_makers.sql_metric import CITIES, DATABASES, PRODUCTS, SCHEMA, found


@dataclass(frozen=True)
class Kind:
    """One kind of question: its SQL and its wordings, with the same slots."""

    sql: str
    wordings: Wordings


SLOTS: dict[str, Callable[[random.Random], object]] = {
    "city": lambda rng: rng.choice(CITIES),
    "product": lambda rng: rng.choice(PRODUCTS),
    "year": lambda rng: rng.randint(2000, 2024),
    "number": lambda rng: rng.randint(1, 9),
    "price": lambda rng: rng.randint(1, 60) * 5,
}

KINDS = {
    "count in city": Kind(
        "SELECT COUNT(*) FROM customers WHERE city = '{city}' AND since >= {year}",
        Wordings(
            seen=(
                "How many customers of {city} are with us since {year} or later?",
                "Number of customers in {city}, {year} or later:",
            ),
            unseen=("Count the customers from {city} that came in {year} or afterwards.",),
        ),
    ),
    "names in city": Kind(
        "SELECT name FROM customers WHERE city = '{city}' AND since < {year} ORDER BY name",
        Wordings(
            seen=(
                "Names of the customers in {city} since before {year}, sorted.",
                "Who in {city} was a customer before {year}? By name.",
            ),
            unseen=("List alphabetically everyone of {city} who joined earlier than {year}.",),
        ),
    ),
    "sum": Kind(
        "SELECT SUM(quantity) FROM orders WHERE product = '{product}' AND price <= {price}",
        Wordings(
            seen=(
                "How many pieces of {product} were ordered for {price} or less?",
                "Total of {product} at {price} or less:",
            ),
            unseen=("Add up the quantity of each order of {product} that costs at most {price}.",),
        ),
    ),
    "average": Kind(
        "SELECT AVG(price) FROM orders WHERE product = '{product}' AND quantity >= {number}",
        Wordings(
            seen=(
                "Average price of {product} in orders of {number} or more?",
                "What does {product} cost on average, {number} pieces or more?",
            ),
            unseen=("Mean price of orders with at least {number} of {product}.",),
        ),
    ),
    "who ordered": Kind(
        "SELECT DISTINCT c.name FROM customers c JOIN orders o ON o.customer_id = c.id "
        "WHERE o.product = '{product}' AND o.quantity > {number} ORDER BY c.name",
        Wordings(
            seen=(
                "Who ordered more than {number} of {product} at once? Names, sorted.",
                "Customers with an order of over {number} of {product}, by name.",
            ),
            unseen=("Alphabetically, whose single order of {product} exceeded {number} pieces?",),
        ),
    ),
    "revenue": Kind(
        "SELECT SUM(o.quantity * o.price) FROM orders o JOIN customers c ON c.id = o.customer_id "
        "WHERE c.city = '{city}' AND c.since >= {year}",
        Wordings(
            seen=(
                "Revenue from {city}, customers since {year} or later?",
                "What did customers of {city} since {year} or later pay in all?",
            ),
            unseen=("Turnover with those in {city} who joined in {year} or afterwards.",),
        ),
    ),
    "by city": Kind(
        "SELECT c.city, COUNT(*) FROM orders o JOIN customers c ON c.id = o.customer_id "
        "WHERE o.price > {price} GROUP BY c.city HAVING COUNT(*) >= {number} ORDER BY c.city",
        Wordings(
            seen=(
                "Cities with {number} or more orders above {price}, and how many, sorted by city.",
                "Per city, the number of orders over {price}, where it is {number} or more; by city.",
            ),
            unseen=(
                "Which cities placed at least {number} orders dearer than {price}? City and count, alphabetically.",
            ),
        ),
    ),
    "without": Kind(
        "SELECT name FROM customers WHERE since >= {year} AND id NOT IN "
        "(SELECT customer_id FROM orders WHERE product = '{product}') ORDER BY name",
        Wordings(
            seen=(
                "Which customers since {year} or later never ordered {product}? Sorted names.",
                "Names of those since {year} or later without an order of {product}, sorted.",
            ),
            unseen=("Alphabetically, who joined in {year} or afterwards and has not bought any {product}?",),
        ),
    ),
    "best": Kind(
        "SELECT product, SUM(quantity) AS pieces FROM orders WHERE price <= {price} "
        "GROUP BY product ORDER BY pieces DESC, product LIMIT {number}",
        Wordings(
            seen=(
                "The top {number} of products by pieces, orders at {price} or less; product and pieces, ties by name.",
                "Best {number} products at {price} or less by quantity, ties by name. Product and quantity.",
            ),
            unseen=(
                "Of orders that cost at most {price}: the {number} products sold most, with pieces; ties by name.",
            ),
        ),
    ),
}


@dataclass(frozen=True)
class Question:
    kind: str
    slots: dict[str, object]

    @property
    def sql(self) -> str:
        return KINDS[self.kind].sql.format(**self.slots)

    def __str__(self) -> str:
        return ", ".join([self.kind, *map(str, self.slots.values())])


def draw_question(rng: random.Random) -> Question:
    """One that finds something in each database: nothing is what many a wrong query finds."""
    while True:
        kind = rng.choice(list(KINDS))
        asked = [name for name in SLOTS if f"{{{name}}}" in KINDS[kind].sql]
        question = Question(kind, {name: SLOTS[name](rng) for name in asked})
        if all(found(question.sql, number) not in ([], [(0,)], [(None,)]) for number in range(DATABASES)):
            return question


def draw(rng: random.Random, held_out: bool) -> MadeRow:
    question = on_side(held_out, "question", lambda: draw_question(rng))
    wording = f"{SCHEMA}\n\n{KINDS[question.kind].wordings.draw(rng, held_out)}"
    return pair(question, wording, question.sql, **question.slots)


TASKS = (
    TaskMaker(
        "sql",
        draw,
        "a question about two tables → SQL, scored by what it finds",
        "the kind of question with these values (each kind, and each value with others, is seen)",
        metrics=("loss", {"python": "sql_metric.py:same_rows"}),
        max_new_tokens=96,
        beside=("sql_metric.py",),
    ),
)
