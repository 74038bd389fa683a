"""A description as people see it: tables, one example per task with what is learnt in color, warnings.

Of many tasks (brief.py) a page: totals, extremes, one example.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from mtft.common.listing import listed
from mtft.data.summary.brief import (
    DATA_EXTREMES,
    EVERYTHING,
    MOST_TASKS,
    PLAN_EXTREMES,
    extremes,
    warning_lines,
)
from mtft.data.summary.data_summary import DataSummary, TaskSummary
from mtft.data.summary.wide_table import WideTable

SHOWN, SHOWN_OF_MANY = 1200, 300  # characters of a rendered example
STYLES = {"mixed": "", "unmixed": ", one task a micro-batch", "alternating": ", one task a step"}
Cell = Callable[[TaskSummary], str]
Total = Callable[[Sequence[TaskSummary]], str]
Columns = dict[str, tuple[Cell, Total]]


def _counted(count: Callable[[TaskSummary], int | None]) -> tuple[Cell, Total]:
    """A column of whole numbers, and their sum."""

    def shown(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    def total(tasks: Sequence[TaskSummary]) -> str:
        known = [value for task in tasks if (value := count(task)) is not None]
        return shown(sum(known) if known else None)

    return lambda task: shown(count(task)), total


def _summed(value: Callable[[TaskSummary], float], form: str) -> tuple[Cell, Total]:
    return lambda task: format(value(task), form), lambda tasks: format(sum(map(value, tasks)), form)


DATA: Columns = {
    "examples": _counted(lambda task: task.examples),
    "held out": _counted(lambda task: task.eval_examples),
    "prompt tokens": _counted(lambda task: task.prompt_tokens),
    "learnt tokens": _counted(lambda task: task.supervised_tokens),
    "mean": (
        lambda task: f"{task.mean_length:.0f}",
        lambda tasks: f"{sum(t.tokens for t in tasks) / sum(t.examples for t in tasks):.0f}",
    ),
    "longest": (lambda task: f"{task.longest:,}", lambda tasks: f"{max(task.longest for task in tasks):,}"),
    "cut": _counted(lambda task: task.truncated),
    "dropped": _counted(lambda task: task.dropped),
    "skipped": _counted(lambda task: task.skipped),
}
PLAN: Columns = {
    "asked": _summed(lambda task: task.asked_share, ".4f"),
    "played": _summed(lambda task: task.realised_share, ".4f"),
    "of tokens": _summed(lambda task: task.token_share, ".3f"),
    "of learnt": _summed(lambda task: task.supervised_share, ".3f"),
    "epochs": (
        lambda task: f"{task.epochs:.2f}",
        lambda tasks: f"{sum(t.epochs * t.examples for t in tasks) / sum(t.examples for t in tasks):.2f}",
    ),
    "examples/step": _summed(lambda task: task.examples_per_step, ".1f"),
    "tokens/step": _summed(lambda task: task.tokens_per_step, ",.0f"),
    "weight": (lambda task: f"{task.weight:g}", lambda tasks: ""),
    "share x weight": _summed(lambda task: task.effective_weight, ".4f"),
}


def render_summary(summary: DataSummary, *, everything: bool = False) -> Group:
    """Tables, the first example with its learnt tokens in color, and the warnings.

    Of more than MOST_TASKS tasks: totals, the extremes and one example, unless `everything` is asked for.
    """
    brief = len(summary.tasks) > MOST_TASKS and not everything
    of_data = extremes(summary.tasks, DATA_EXTREMES) if brief else summary.tasks
    of_plan = extremes(summary.tasks, PLAN_EXTREMES) if brief else summary.tasks
    parts: list[RenderableType] = [
        _table(f"{summary.name}: data", summary, DATA, of_data),
        _table(f"mixture, by {summary.unit}", summary, PLAN, of_plan),
    ]
    parts += [_spans(summary, of_plan)] if summary.spans else []
    parts += [Text(_summary(summary)), *_weighted(summary), Text("")]
    if brief:
        parts.append(Text(f"shown: the extremes of {len(summary.tasks):,} tasks (all of them: {EVERYTHING})"))
        parts.append(Text("the first example, learnt parts between ⟦ and ⟧"))
    else:
        parts.append(Text("the first example of each task, learnt parts between ⟦ and ⟧"))
    most = SHOWN_OF_MANY if brief else SHOWN
    parts += [panel for task in summary.tasks[: 1 if brief else None] for panel in _samples(task, most)]
    said = warning_lines(summary.warnings, [task.name for task in summary.tasks], everything=everything)
    return Group(*parts, *map(warning_text, said))


def warning_text(line: str) -> Text:
    """A warning as a line; the one that counts the rest as it is."""
    return Text(line) if line.startswith("... and ") else Text.assemble(("warning: ", "yellow"), line)


def summary_text(summary: DataSummary, width: int = 120, *, everything: bool = False) -> str:
    """`render_summary` as plain text: without color the learnt parts of an example stand between ⟦ and ⟧."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(render_summary(summary, everything=everything))
    return stream.getvalue()


def _table(title: str, summary: DataSummary, columns: Columns, shown: Sequence[TaskSummary]) -> WideTable:
    rows = [(task.label, *(cell(task) for cell, _ in columns.values())) for task in shown]
    if len(shown) < len(summary.tasks):
        every = f"all {len(summary.tasks):,} tasks"
        rows.append((every, *(total(summary.tasks) for _, total in columns.values())))
    return WideTable(title, ("task", *columns), rows)


def _spans(summary: DataSummary, shown: Sequence[TaskSummary]) -> WideTable:
    """A schedule: how the shares move over the run."""
    names = [f"steps {span['steps'][0] + 1:,} to {span['steps'][1]:,}" for span in summary.spans]
    rows = [
        (task.name, *(f"{span['asked'][task.name]:.3f} {span['realised'][task.name]:.3f}" for span in summary.spans))
        for task in shown
    ]
    return WideTable("share over the run: asked, played", ("task", *names), rows)


def _summary(summary: DataSummary) -> str:
    about = "about " if summary.sampled else ""
    return (
        f"{summary.steps:,} steps of {summary.batch:,} {summary.unit}: {summary.examples:,} examples, "
        f"{summary.tokens:,} tokens "
        f"({summary.tokens_per_step:,.0f} a step), {about}{summary.micro_batches_per_step:,.1f} micro-batches a step "
        f"on one process, {about}{summary.padding_share:.1%} padding "
        f"({'packed' if summary.packing else 'one example a row'}{STYLES[summary.batch_style]})"
    )


def _weighted(summary: DataSummary) -> list[Text]:
    """How many tokens the rows themselves weigh; nothing where none is."""
    of = [f"{task.name} {task.weighted_tokens:,}" for task in summary.tasks if task.weighted_tokens]
    total = sum(task.weighted_tokens for task in summary.tasks)
    return [Text(f"weighted: {total:,} learnt tokens at other weights than 1 ({listed(of, 8)})")] if of else []


def _samples(task: TaskSummary, most: int) -> list[Panel]:
    """The first example, or of several templates the first of each."""
    if not any(task.templates):
        return [_sample(task.name, task.sample, most)]
    number = len(task.templates)
    shown = ((f"{task.name}, template {k} of {number}", parts) for k, parts in enumerate(task.templates, 1))
    return [_sample(title, parts, most) for title, parts in shown if parts]


def _sample(title: str, parts: Sequence[tuple[str, bool]], most: int) -> Panel:
    text = Text()
    for part, learnt in parts:
        shown = part if len(part) <= most else f"{part[: most // 2]} [...] {part[-most // 2 :]}"
        text.append(f"⟦{shown}⟧" if learnt else shown, style="bold green" if learnt else "dim")
    return Panel(text, title=Text(title), title_align="left")
