"""A description as people see it: tables, one example per task with what is learnt in color, warnings."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from mtft.data.summary.data_summary import DataSummary, TaskSummary
from mtft.data.summary.wide_table import WideTable

SHOWN = 1200  # characters of a rendered example
STYLES = {"mixed": "", "unmixed": ", one task a micro-batch", "alternating": ", one task a step"}
Columns = dict[str, Callable[[TaskSummary], str]]
MOST_SAMPLES, MOST_WARNINGS = 20, 40
DATA: Columns = {
    "examples": lambda task: f"{task.examples:,}",
    "held out": lambda task: "-" if task.eval_examples is None else f"{task.eval_examples:,}",
    "prompt tokens": lambda task: f"{task.prompt_tokens:,}",
    "learnt tokens": lambda task: f"{task.supervised_tokens:,}",
    "mean": lambda task: f"{task.mean_length:.0f}",
    "longest": lambda task: f"{task.longest:,}",
    "cut": lambda task: f"{task.truncated:,}",
    "dropped": lambda task: f"{task.dropped:,}",
    "skipped": lambda task: f"{task.skipped:,}",
}
PLAN: Columns = {
    "asked": lambda task: f"{task.asked_share:.4f}",
    "played": lambda task: f"{task.realised_share:.4f}",
    "of tokens": lambda task: f"{task.token_share:.3f}",
    "of learnt": lambda task: f"{task.supervised_share:.3f}",
    "epochs": lambda task: f"{task.epochs:.2f}",
    "examples/step": lambda task: f"{task.examples_per_step:.1f}",
    "tokens/step": lambda task: f"{task.tokens_per_step:,.0f}",
    "weight": lambda task: f"{task.weight:g}",
    "share x weight": lambda task: f"{task.effective_weight:.4f}",
}


def render_summary(summary: DataSummary) -> Group:
    """Tables, one example per task with its learnt tokens in color, and the warnings."""
    parts: list[RenderableType] = [
        _table(f"{summary.name}: data", summary, DATA),
        _table(f"mixture, by {summary.unit}", summary, PLAN),
    ]
    parts += [_spans(summary)] if summary.spans else []
    parts += [Text(_summary(summary)), Text(""), Text("the first example of each task, learnt parts between ⟦ and ⟧")]
    parts += [_sample(task) for task in summary.tasks[:MOST_SAMPLES]]
    if (more := len(summary.tasks) - MOST_SAMPLES) > 0:
        parts.append(Text(f"... and {more:,} more tasks"))
    parts += [Text.assemble(("warning: ", "yellow"), warning) for warning in summary.warnings[:MOST_WARNINGS]]
    if (more := len(summary.warnings) - MOST_WARNINGS) > 0:
        parts.append(Text(f"... and {more:,} more warnings (all of them: mtft check --json)"))
    return Group(*parts)


def summary_text(summary: DataSummary, width: int = 120) -> str:
    """`render_summary` as plain text: without color the learnt parts of an example stand between ⟦ and ⟧."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(render_summary(summary))
    return stream.getvalue()


def _table(title: str, summary: DataSummary, columns: Columns) -> WideTable:
    rows = [(task.name, *(cell(task) for cell in columns.values())) for task in summary.tasks]
    return WideTable(title, ("task", *columns), rows)


def _spans(summary: DataSummary) -> WideTable:
    """A schedule: how the shares move over the run."""
    names = [f"steps {span['steps'][0] + 1:,} to {span['steps'][1]:,}" for span in summary.spans]
    rows = [
        (task.name, *(f"{span['asked'][task.name]:.3f} {span['realised'][task.name]:.3f}" for span in summary.spans))
        for task in summary.tasks
    ]
    return WideTable("share over the run: asked, played", ("task", *names), rows)


def _summary(summary: DataSummary) -> str:
    return (
        f"{summary.steps:,} steps of {summary.batch:,} {summary.unit}: {summary.examples:,} examples, "
        f"{summary.tokens:,} tokens "
        f"({summary.tokens_per_step:,.0f} a step), {summary.micro_batches_per_step:.1f} micro-batches a step on one "
        f"process, {summary.padding_share:.1%} padding ({'packed' if summary.packing else 'one example a row'}"
        f"{STYLES[summary.batch_style]})"
    )


def _sample(task: TaskSummary) -> Panel:
    text = Text()
    for part, learnt in task.sample:
        shown = part if len(part) <= SHOWN else f"{part[: SHOWN // 2]} [...] {part[-SHOWN // 2 :]}"
        text.append(f"⟦{shown}⟧" if learnt else shown, style="bold green" if learnt else "dim")
    return Panel(text, title=Text(task.name), title_align="left")
