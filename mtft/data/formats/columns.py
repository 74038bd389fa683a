"""Which column plays which role: declared in the recipe, or seen in the columns, and never guessed silently.

A task's `format` is a name (`messages`, `alpaca`, ...), a dict of roles to columns ({prompt: article, response:
summary}), or `auto`, which looks at the columns of the first rows. `template` makes the prompt from any columns.
The idea that the mapping is data and not code is tasksource's (Sileo 2023, arXiv 2301.05948).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from data_mixers.common.suggest import closest_match
from mtft.common.errors import UserError
from mtft.common.listing import listed
from mtft.data.formats.formats import FORMATS
from mtft.data.formats.messages import Conversation, RowError, as_weight, is_blank, refused_column
from mtft.data.formats.render_limit import RenderLimit, check_length
from mtft.data.readers.arrow_rows import UnreadableCell
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


# What Python raises inside of a template: {{ a / b }} on strings, {{ range(10 ** 9) }}, {{ "a" * 10 ** 12 }}
_FAILURES = (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError)
READ_ELSEWHERE = {"id"}  # columns that are read without a format: the row's name in reports


@dataclass(frozen=True)
class RowReader:
    """What a task's `format` and `template` mean for its columns. Call it with a row.

    Optional roles are looked for in every row, wherever in the file their column begins.
    """

    name: str
    columns: dict[str, str]  # role -> column
    label_names: list[str] | None = None
    template: Any = None  # compiled Jinja template that makes the prompt (or the text)
    template_columns: frozenset[str] = frozenset()
    declared: bool = False  # the recipe writes the columns out: what it leaves out is left out on purpose
    unseen: tuple[str, ...] = ()  # optional columns that the recipe names and the first rows don't have
    row_weight: str | None = None  # the column of the rows' weights
    last_turn: bool = False  # only the last assistant turn of a row is learnt

    def __call__(self, row: Mapping[str, Any]) -> Conversation:
        """The conversation of a row; raises RowError."""
        form = FORMATS[self.name]
        get: dict[str, Any] = {}
        for column in self._read:
            if isinstance(cell := row.get(column), UnreadableCell):
                raise RowError(f"can't be read: {cell.why}", column)
        weight = 1.0 if self.row_weight is None else self._weight(row, self.row_weight)
        if weight == 0:
            return Conversation((), weight=0.0)
        if self.template is not None:
            get["text" if self.name == "text" else "prompt"] = self.template(row)
        for role, column in self.columns.items():
            if column in row and (row[column] is not None or role in form.may):
                get[role] = row[column]
            elif role == "label_names" and self.declared:
                get[role] = column  # written in the recipe itself: "negative, positive"
            elif role not in form.may:
                raise _missing(column, row)
        if self.label_names and "label_names" not in get:
            get["label_names"] = self.label_names
        for column in () if self.declared else self.unread(row):
            if (why := refused_column(column, row[column])) is not None:
                do = "leave it out, or name the columns to read in tasks.*.format"
                raise RowError(f"is not read, and would change what is learnt: {why} ({do})", column, row[column])
        try:
            conversation = replace(form.read(get), weight=weight)
            return _last_turn_only(conversation) if self.last_turn else conversation
        except RowError as error:  # say the user's column, not our role
            head, bracket, tail = (error.column or "").partition("[")
            raise RowError(error.what, self.columns.get(head, head) + bracket + tail, error.value) from None

    @cached_property
    def _read(self) -> frozenset[str]:
        named = {self.row_weight} if self.row_weight is not None else set()
        return self.template_columns | set(self.columns.values()) | READ_ELSEWHERE | named

    def _weight(self, row: Mapping[str, Any], column: str) -> float:
        """The row's own weight. In CSV it is a text."""
        value = row.get(column)
        if is_blank(value):
            raise _missing(column, row)
        if isinstance(value, str) and "_" not in value:
            with suppress(ValueError):
                return as_weight(float(value), column)
        return as_weight(value, column)

    def unread(self, row: Mapping[str, Any]) -> list[str]:
        """Columns of the row that hold something and that nobody reads."""
        return [column for column, value in row.items() if column not in self._read and not is_blank(value)]


def make_readers(
    task: TaskSection, rows: Sequence[Mapping[str, Any]], names_of: Callable[[str], list[str] | None]
) -> tuple[RowReader, ...]:
    """A reader for each template of the task; one without any. A column that one of them reads counts as read."""
    readers = []
    for number, template in enumerate(task.templates):
        try:
            readers.append(make_reader(task.model_copy(update={"template": template}), rows, names_of))
        except UserError as error:
            if len(task.templates) > 1 and (error.where or "").endswith(".template"):
                raise UserError(error.what, where=f"{error.where}[{number}]", do=error.do) from error
            raise
    used = frozenset[str]().union(*(reader.template_columns for reader in readers))
    return tuple(replace(reader, template_columns=used) for reader in readers)


def make_reader(
    task: TaskSection, rows: Sequence[Mapping[str, Any]], names_of: Callable[[str], list[str] | None]
) -> RowReader:
    """The reader of a task, decided from the recipe and from its first rows. Raises UserError if nothing fits."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    template = _compile(task, task.template, columns) if isinstance(task.template, str) else None
    if isinstance(task.format, dict):
        reader = _declared(task, task.format, columns, template)
    else:
        reader = _named(task, task.format, rows, columns, template)
    label = reader.columns.get("label")
    render, used = template or (None, frozenset())
    if reader.name == "text":
        _refuse_turns(task)
    learnt = {"row_weight": task.row_weight, "last_turn": task.loss_on == "last"}
    names = names_of(label) if label else None
    return replace(reader, label_names=names, template=render, template_columns=used, **learnt)


def _missing(column: str, row: Mapping[str, Any]) -> RowError:
    near = nearest(column, row)
    hint = f"; nearest: {near!r}" if near else f"; the row has {listed(map(repr, row), 8)}"
    return RowError("is null" if column in row else f"missing{hint}", column)


def _last_turn_only(conversation: Conversation) -> Conversation:
    """Of the turns that are learnt the last one alone, which ends the conversation; the others are context."""
    *before, last = conversation.messages
    context = (turn | {"train": False} if turn["role"] == "assistant" else turn for turn in before)
    return replace(conversation, messages=(*context, last))


def _refuse_turns(task: TaskSection) -> None:
    """UserError for what is said about assistant turns where there are none."""
    for key in ("loss_on", "thinking_weight"):
        if getattr(task, key) != TaskSection.model_fields[key].default:
            what = f"task {task.name}: rows of the format text have no turns, and all of them is learnt"
            raise UserError(what, where=f"tasks.{task.name}.{key}", do="leave it out, or name another format")


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
        what = f"the roles {listed(sorted(declared))} make no format"
        raise UserError(what, where=where, do=f"formats are {ways}")
    if template is not None and declared.keys() & {"prompt", "text"}:
        what = "`template` makes the prompt, and `format` names a column for it too"
        raise UserError(what, where=where, do="keep one")
    missing = [c for role, c in declared.items() if c not in columns and role in FORMATS[fitting[0]].needs]
    if missing:
        what = f"task {task.name}: no row has the column {_hinted(missing, columns)}"
        raise UserError(what, where=where, do=f"the columns are {listed(columns)}")
    optional = [c for role, c in declared.items() if role in FORMATS[fitting[0]].may and role != "label_names"]
    unseen = tuple(column for column in optional if column not in columns)
    return RowReader(fitting[0], dict(declared), declared=True, unseen=unseen)


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
            do = f"write format: {{response: COLUMN}}; the columns are {listed(columns)}"
            raise UserError(what, where=where, do=do)
        beside = (role for role in FORMATS["prompt_response"].may if role not in template[1])
        return RowReader("prompt_response", {"response": response} | {role: role for role in beside})
    # the first row that fits decides, so that one broken row at the top changes nothing
    candidates = [wanted] if wanted != "auto" else list(FORMATS)
    for row in rows:
        for name in candidates:
            form = FORMATS[name]
            columns_of = {role: next((c for c in COLUMNS.get(role, (role,)) if c in row), None) for role in form.needs}
            if all(columns_of.values()):
                mapping = {role: str(column) for role, column in columns_of.items()}
                used = set(mapping.values())
                mapping |= {role: role for role in form.may if role not in used}
                if name == "sharegpt" and _role_content(row.get(mapping["conversations"])):
                    beside = {role: column for role, column in mapping.items() if role != "conversations"}
                    return RowReader("messages", {"messages": mapping["conversations"]} | beside)
                return RowReader(name, mapping)
    need = "; ".join(f"{name}: {', '.join(FORMATS[name].needs)}" for name in candidates)
    hints = [
        f"{c!r} is near {near!r}" for name in candidates for c in FORMATS[name].needs if (near := nearest(c, columns))
    ]
    raise UserError(
        f"task {task.name}: the columns {listed(columns) or '(none)'} fit "
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
    hints = (f"{c!r}" + (f" (did you mean {near!r}?)" if (near := nearest(c, columns)) else "") for c in missing)
    return listed(hints)


def _role_content(value: object) -> bool:
    """True for `conversations` that hold role/content, not from/value."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _compile(
    task: TaskSection, template: str, columns: list[str]
) -> tuple[Callable[[Mapping[str, Any]], str], frozenset[str]]:
    """The template as a function of a row, and the columns that it reads."""
    from jinja2 import StrictUndefined, TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    where = f"tasks.{task.name}.template"
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_written)
    try:
        with RenderLimit():  # what is constant, {{ 9 ** 9 ** 9 }}, is computed here
            tree = environment.parse(template)
            compiled = environment.from_string(tree)
            used = frozenset(meta.find_undeclared_variables(tree) - set(environment.globals))
    except (TemplateError, *_FAILURES) as error:
        do = "columns stand in double braces: {{ column }}"
        raise UserError(f"the template cannot be parsed: {error}", where=where, do=do) from error
    unknown = used - set(columns)
    if unknown and columns:
        what = f"no row has the column {_hinted(sorted(unknown), columns)}"
        raise UserError(what, where=where, do=f"the columns are {listed(columns)}")
    return partial(_render, compiled), used


def _written(value: Any) -> Any:
    """What `{{ ... }}` writes. A null would be written as "None"; `{% if column %}` asks for it."""
    if value is None:
        raise RowError("the template writes a null: ask for it first, {% if column %}")
    if isinstance(value, list | dict):
        raise RowError(
            "the template writes a list or an object: pick from it, or use {{ column | tojson }}", None, value
        )
    return value


def _render(compiled: Any, row: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        with RenderLimit():
            return check_length(compiled.render(row))
    except RowError:
        raise
    except TemplateError as error:
        raise RowError(f"the template fails: {error}") from error
    except _FAILURES as error:
        raise RowError(f"the template fails: {type(error).__name__}: {error}") from error
