"""Which column plays which role: declared in the recipe, or seen in the columns, and never guessed silently.

A task's `format` is a name (`messages`, `alpaca`, ...), a dict of roles to columns ({prompt: article, response:
summary}), or `auto`, which looks at the columns of the first rows. `template` makes the prompt from any columns.
The idea that the mapping is data and not code is tasksource's (Sileo 2023, arXiv 2301.05948).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_mixers.common.suggest import closest_match
from mtft.common.errors import UserError
from mtft.data.formats.formats import FORMATS
from mtft.data.formats.messages import Conversation, RowError
from mtft.recipe.schema.task import TaskSection

PROMPTS = ("prompt", "question", "query", "instruction", "input")
RESPONSES = ("response", "completion", "answer", "output", "target")
# Columns that stand for a role when the recipe names none, in this order.
COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": PROMPTS,
    "response": RESPONSES,
    "text": ("text", "sentence", "content"),
    "answer": ("answer", "answerKey", "label"),
    "choices": ("choices", "options"),
}


@dataclass(frozen=True)
class RowReader:
    """What a task's `format` and `template` mean for its columns. Call it with a row."""

    name: str
    columns: dict[str, str]  # role -> column
    label_names: list[str] | None = None
    template: Any = None  # compiled Jinja template that makes the prompt (or the text)

    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        """The conversation of a row; raises RowError."""
        form = FORMATS[self.name]
        get: dict[str, Any] = {}
        if self.template is not None:
            get["text" if self.name == "text" else "prompt"] = self.template(row)
        for role, column in self.columns.items():
            if role == "label_names" and column not in row:
                get[role] = column  # written in the recipe itself: "negative, positive"
            elif column in row and (row[column] is not None or role in form.may):
                get[role] = row[column]
            elif role not in form.may:
                near = nearest(column, row)
                hint = f"; nearest: {near!r}" if near else f"; the row has {', '.join(map(repr, list(row)[:8]))}"
                raise RowError("is null" if column in row else f"missing{hint}", column)
        if self.label_names and "label_names" not in get:
            get["label_names"] = self.label_names
        try:
            return form.read(get)
        except RowError as error:  # say the user's column, not our role
            head, bracket, tail = (error.column or "").partition("[")
            raise RowError(error.what, self.columns.get(head, head) + bracket + tail, error.value) from None


def make_reader(
    task: TaskSection, rows: Sequence[Mapping[str, Any]], names_of: Callable[[str], list[str] | None]
) -> RowReader:
    """The reader of a task, decided from the recipe and from its first rows. Raises UserError if nothing fits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    template = _compile(task, columns) if task.template is not None else None
    if isinstance(task.format, dict):
        reader = _declared(task, task.format, columns, template)
    else:
        reader = _named(task, task.format, rows, columns, template)
    label = reader.columns.get("label")
    return RowReader(reader.name, reader.columns, names_of(label) if label else None, template)


def _declared(task: TaskSection, declared: dict[str, str], columns: list[str], template: Any) -> RowReader:
    where = f"tasks.{task.name}.format"
    roles = {role for form in FORMATS.values() for role in form.needs + form.may}
    for role in declared.keys() - roles:
        near = nearest(role, roles)
        do = f"did you mean {near!r}?" if near else f"use some of {', '.join(sorted(roles))}"
        raise UserError(f"format has an unknown role {role!r}", where=where, do=do)
    roles_filled = set(declared)
    if template is not None:
        roles_filled.add("text" if set(declared) <= {"text"} else "prompt")
    fitting = [name for name, form in FORMATS.items() if set(form.needs) <= roles_filled <= {*form.needs, *form.may}]
    if not fitting:
        ways = "; ".join(f"{name}: {', '.join(form.needs)}" for name, form in FORMATS.items())
        what = f"the roles {', '.join(sorted(declared))} make no format"
        raise UserError(what, where=where, do=f"formats are {ways}")
    if template is not None and declared.keys() & {"prompt", "text"}:
        what = "`template` makes the prompt, and `format` names a column for it too"
        raise UserError(what, where=where, do="keep one")
    missing = [c for role, c in declared.items() if c not in columns and role in FORMATS[fitting[0]].needs]
    if missing:
        what = f"task {task.name}: no row has the column {_hinted(missing, columns)}"
        raise UserError(what, where=where, do=f"the columns are {', '.join(columns)}")
    return RowReader(fitting[0], dict(declared))


def _named(task: TaskSection, wanted: str, rows: Sequence[Mapping], columns: list[str], template: Any) -> RowReader:
    where, wanted = f"tasks.{task.name}.format", ALIASES.get(wanted, wanted)
    if wanted != "auto" and wanted not in FORMATS:
        near = nearest(wanted, [*FORMATS, *ALIASES, "auto"])
        do = f"did you mean {near!r}?" if near else f"use one of auto, {', '.join(FORMATS)}, or {{prompt: COLUMN, ...}}"
        raise UserError(f"unknown format {wanted!r}", where=where, do=do)
    if template is not None:
        if wanted == "text":
            return RowReader("text", {})
        response = next((c for c in RESPONSES if c in columns), None)
        if response is None:
            what = f"task {task.name}: `template` makes the prompt, but where is the response?"
            do = f"write format: {{response: COLUMN}}; the columns are {', '.join(columns)}"
            raise UserError(what, where=where, do=do)
        return RowReader("prompt_response", {"response": response})
    # the first row that fits decides, so that one broken row at the top changes nothing
    candidates = [wanted] if wanted != "auto" else list(FORMATS)
    for row in rows:
        for name in candidates:
            form = FORMATS[name]
            columns_of = {role: next((c for c in COLUMNS.get(role, (role,)) if c in row), None) for role in form.needs}
            if all(columns_of.values()):
                mapping = {role: str(column) for role, column in columns_of.items()}
                used = set(mapping.values())
                mapping |= {role: role for role in form.may if role in columns and role not in used}
                if name == "sharegpt" and _role_content(row.get(mapping["conversations"])):
                    return RowReader("messages", {"messages": mapping["conversations"]})
                return RowReader(name, mapping)
    need = "; ".join(f"{name}: {', '.join(FORMATS[name].needs)}" for name in candidates)
    hints = [
        f"{c!r} is near {near!r}" for name in candidates for c in FORMATS[name].needs if (near := nearest(c, columns))
    ]
    raise UserError(
        f"task {task.name}: the columns {', '.join(columns) or '(none)'} fit "
        + ("no known format" if wanted == "auto" else f"not the format {wanted!r}")
        + (f" ({'; '.join(hints)})" if hints else ""),
        where=where,
        do=f"say which column is what, for instance {{prompt: COLUMN, response: COLUMN}}; known formats need {need}",
    )


ALIASES = {
    "prompt/response": "prompt_response",
    "pairs": "prompt_response",
    "instruction/input/output": "alpaca",
    "mftcoder": "chat_rounds",
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The most similar of the known names, if any is similar."""
    match = closest_match(word, [name for name in known if isinstance(name, str)])
    return match if match != word else None


def _hinted(missing: Iterable[str], columns: Iterable[str]) -> str:
    """Columns that are not there, each with the nearest that is."""
    hints = [f"{c!r}" + (f" (did you mean {near!r}?)" if (near := nearest(c, columns)) else "") for c in missing]
    return ", ".join(hints)


def _role_content(value: object) -> bool:
    """True for `conversations` that hold role/content, not from/value."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _compile(task: TaskSection, columns: list[str]) -> Callable[[Mapping[str, Any]], str]:
    from jinja2 import StrictUndefined, TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    where = f"tasks.{task.name}.template"
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
    try:
        tree = environment.parse(task.template or "")
        compiled = environment.from_string(tree)
    except TemplateError as error:
        do = "columns stand in double braces: {{ column }}"
        raise UserError(f"the template cannot be parsed: {error}", where=where, do=do) from error
    unknown = meta.find_undeclared_variables(tree) - set(columns) - set(environment.globals)
    if unknown and columns:
        what = f"no row has the column {_hinted(sorted(unknown), columns)}"
        raise UserError(what, where=where, do=f"the columns are {', '.join(columns)}")
    return partial(_render, compiled)


def _render(compiled: Any, row: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return compiled.render(row)
    except TemplateError as error:
        raise RowError(f"the template fails: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:  # {{ a / b }} on strings
        raise RowError(f"the template fails: {type(error).__name__}: {error}") from error
