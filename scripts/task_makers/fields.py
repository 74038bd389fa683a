"""Free text to JSON: who ordered what, for how much, from where. Others are named too, an address may be missing."""

from __future__ import annotations

import json
import random

from scripts.task_makers.base import MadeRow, TaskMaker, Wordings, on_side, pair, words

FIRST = words(
    "Alma Boris Chloe Daria Emil Farid Greta Hana Ivan Jana Karim Lena Marco Nadia Oskar Petra Rui Sofia Tomas Vita"
)
LAST = words(
    "Abel Bauer Costa Dahl Ekman Fabre Garcia Haas Ivanov Jansen Keller Lind Moreau Novak Olsen Park Quist Rossi "
    "Silva Thorn Ueda Vogel Weber Young Zeman Amato Brandt Castro Dubois Egger Falk Grant Holm Ito Jung Kovac Lopez "
    "Maier Nagy Ortega Petit Romano Sato Torres Urban Vidal Wolff Yilmaz"
)
CITIES = words(
    "Aarhus Basel Bologna Bristol Cardiff Galway Genoa Leipzig Linz Nantes Odense Rouen Seville Tampere Zagreb"
)
PRODUCTS = words(
    "backpack bicycle blanket camera carpet cooker guitar helmet keyboard microscope printer projector tripod"
)

ASK = "\n\nAs JSON with name, city, product, quantity, price, email (null where it isn't said)."
TEXTS = Wordings(
    seen=(
        "{name} from {city} orders {quantity} x {product} at {price} euros each.{email}",
        "Order by {name} ({city}): {quantity} of the {product}, {price} euros a piece.{email} Taken down by {clerk}.",
        "To {city}, please: {quantity} pieces, {product}, unit price {price} euros. "
        "The buyer is {name}, not {clerk}.{email}",
        "On behalf of {name}, {clerk} asks for {quantity} x {product} for {price} euros each, sent to {city}.{email}",
    ),
    unseen=(
        "{clerk} notes that {quantity} x {product} go to {name} in {city}, who pays {price} euros for each.{email}",
        "{product}, {quantity} times, {price} euros each, for {name} who lives in {city}.{email}",
    ),
)


def person(rng: random.Random, held_out: bool) -> tuple[str, str]:
    return rng.choice(FIRST), on_side(held_out, "surname", lambda: rng.choice(LAST))


def draw(rng: random.Random, held_out: bool) -> MadeRow:
    (first, last), clerk = person(rng, held_out), " ".join(person(rng, held_out))
    address = rng.choice((f"{first}.{last}@example.com".lower(), None))
    values = {
        "name": f"{first} {last}",
        "city": rng.choice(CITIES),
        "product": rng.choice(PRODUCTS),
        "quantity": rng.randint(2, 99),
        "price": rng.randint(50, 19_999) / 100,
        "email": address,
    }
    email = f" Mail: {address}." if address else ""
    wording = TEXTS.draw(rng, held_out) + ASK
    return pair(
        last, wording, json.dumps(values), **{**values, "email": email, "price": f"{values['price']:.2f}"}, clerk=clerk
    )


TASKS = (
    TaskMaker(
        "json_fields",
        draw,
        "an order in free text → JSON of six fields, one of which may be null",
        "the surname",
        metrics=("loss", "json_match"),
        max_new_tokens=96,
    ),
)
