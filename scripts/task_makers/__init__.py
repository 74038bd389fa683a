"""The made tasks (docs/made-tasks.md): one file a family, each with its `TASKS`."""

from __future__ import annotations

from scripts.task_makers import countries, dates, fields, functions, labels, nouns, numbers, sql, tools, units
from scripts.task_makers.base import TaskMaker

FAMILIES = (dates, numbers, nouns, countries, units, sql, fields, functions, tools, labels)
MAKERS: dict[str, TaskMaker] = {maker.name: maker for family in FAMILIES for maker in family.TASKS}
