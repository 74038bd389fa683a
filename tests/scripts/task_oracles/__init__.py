"""The answers of the made tasks by a second way: another library, rules written down here, or execution."""

from tests.scripts.task_oracles import (
    countries,
    dates,
    fields,
    functions,
    labels,
    nouns,
    numbers,
    sql,
    tools,
    units,
)

FAMILIES = (countries, dates, fields, functions, labels, nouns, numbers, sql, tools, units)
ORACLES = {task: check for family in FAMILIES for task, check in family.ORACLES.items()}
"""{task: function of a row as it stands in its file, which raises AssertionError where the answer is another}."""
