"""Questions, read here and answered over the tables in plain Python, against what the SQL finds."""

import re
from collections import Counter

from scripts.task_makers import sql_metric


def read(question):
    """{slot: value, condition: number} of a question."""

    def number(pattern):
        match = re.search(pattern, question)
        return int(next(filter(None, match.groups()))) if match else None

    def word(words):
        return next((word for word in words if re.search(rf"\b{word}\b", question)), None)

    return {
        "city": word(sql_metric.CITIES),
        "product": word(sql_metric.PRODUCTS),
        "from_year": number(r"(\d{4}) or (?:later|afterwards)"),
        "before_year": number(r"(?:before|earlier than) (\d{4})"),
        "least": number(r"(\d+)(?: pieces)? or more|at least (\d+)"),
        "above": number(r"(?:more than|over|above|exceeded|dearer than) (\d+)"),
        "most": number(r"(\d+) or less|at most (\d+)"),
        "first": number(r"top (\d+)|Best (\d+)|: the (\d+) products"),
    }


def answer(question, customers, orders):
    """The rows, sorted as the question asks."""
    q = read(question)
    city_of = {id: city for id, _, city, _ in customers}
    since = {id: year for id, *_, year in customers}
    name_of = {id: name for id, name, *_ in customers}
    old = {id for id in since if not since[id] < (q["from_year"] or 0)}
    if q["first"]:
        pieces = Counter()
        for _, _, product, quantity, price in orders:
            pieces[product] += quantity if price <= q["most"] else 0
        pieces = {product: count for product, count in pieces.items() if count}
        return sorted(pieces.items(), key=lambda item: (-item[1], item[0]))[: q["first"]]
    if q["city"] and q["before_year"]:
        return sorted((name_of[id],) for id in since if city_of[id] == q["city"] and since[id] < q["before_year"])
    if q["city"]:
        theirs = [order for order in orders if order[1] in old and city_of[order[1]] == q["city"]]
        if re.search("Revenue|pay|Turnover", question):
            return [(sum(quantity * price for *_, quantity, price in theirs) if theirs else None,)]
        return [(sum(city == q["city"] and id in old for id, city in city_of.items()),)]
    if q["from_year"]:
        buyers = {order[1] for order in orders if order[2] == q["product"]}
        return sorted((name_of[id],) for id in old - buyers)
    if q["product"]:
        theirs = [order for order in orders if order[2] == q["product"]]
        if q["above"] is not None:
            return sorted({(name_of[order[1]],) for order in theirs if order[3] > q["above"]})
        if q["most"] is not None:
            found = [quantity for *_, quantity, price in theirs if price <= q["most"]]
            return [(sum(found) if found else None,)]
        found = [price for *_, quantity, price in theirs if quantity >= q["least"]]
        return [(round(sum(found) / len(found), 6) if found else None,)]
    counts = Counter(city_of[order[1]] for order in orders if order[4] > q["above"])
    return sorted((city, count) for city, count in counts.items() if count >= q["least"])


def sql(row):
    schema, question = row["prompt"].split("\n\n")
    assert schema == sql_metric.SCHEMA
    for number in range(sql_metric.DATABASES):
        assert sql_metric.found(row["response"], number) == answer(question, *sql_metric.tables(number)), row


ORACLES = {"sql": sql}
