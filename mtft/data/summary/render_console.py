"""A description as people see it: tables, one example per task with what is learnt in colour, warnings."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from mtft.data.summary.wide_table import WideTable

if TYPE_CHECKING:
    from mtft.data.summary.summary import DataSummary, TaskSummary

SHOWN = 1200  # characters of a rendered example


def render(found: DataSummary) -> Group:
    parts: list[RenderableType] = [_data(found), _plan(found)]
    parts += [_spans(found)] if found.spans else []
    parts += [Text(_summary(found)), Text(""), Text("the first example of each task, learnt parts between ⟦ and ⟧")]
    parts += [_sample(task) for task in found.tasks]
    parts += [Text.assemble(("warning: ", "yellow"), warning) for warning in found.warnings]
    return Group(*parts)


def plain(found: DataSummary, width: int = 120) -> str:
    """Without colour the learnt parts of an example stand between ⟦ and ⟧."""
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(render(found))
    return stream.getvalue()


def _data(found: DataSummary) -> WideTable:
    names = (
        "task",
        "examples",
        "held out",
        "prompt tokens",
        "learnt tokens",
        "mean",
        "longest",
        "cut",
        "dropped",
        "skipped",
    )
    rows = [
        (
            task.name,
            f"{task.examples:,}",
            "-" if task.eval_examples is None else f"{task.eval_examples:,}",
            f"{task.prompt_tokens:,}",
            f"{task.supervised_tokens:,}",
            f"{task.mean_length:.0f}",
            f"{task.longest:,}",
            f"{task.truncated:,}",
            f"{task.dropped:,}",
            f"{task.skipped:,}",
        )
        for task in found.tasks
    ]
    return WideTable(f"{found.name}: data", names, rows)


def _plan(found: DataSummary) -> WideTable:
    names = "task", "asked", "played", "of tokens", "of learnt", "epochs", "examples/step", "tokens/step", "weight"
    rows = [
        (
            task.name,
            f"{task.asked_share:.4f}",
            f"{task.realised_share:.4f}",
            f"{task.token_share:.3f}",
            f"{task.supervised_share:.3f}",
            f"{task.epochs:.2f}",
            f"{task.examples_per_step:.1f}",
            f"{task.tokens_per_step:,.0f}",
            f"{task.weight:g}",
            f"{task.effective_weight:.4f}",
        )
        for task in found.tasks
    ]
    return WideTable(f"mixture, by {found.unit}", (*names, "share x weight"), rows)


def _spans(found: DataSummary) -> WideTable:
    """A schedule: how the shares move over the run."""
    names = [f"steps {span['steps'][0] + 1:,} to {span['steps'][1]:,}" for span in found.spans]
    rows = [
        (task.name, *(f"{span['asked'][task.name]:.3f} {span['realised'][task.name]:.3f}" for span in found.spans))
        for task in found.tasks
    ]
    return WideTable("share over the run: asked, played", ("task", *names), rows)


STYLES = {
    "mixed": "",
    "unmixed": ", one task a micro-batch",
    "alternating": ", one task a step",
}


def _summary(found: DataSummary) -> str:
    return (
        f"{found.steps:,} steps of {found.batch:,} {found.unit}: {found.examples:,} examples, {found.tokens:,} tokens "
        f"({found.tokens_per_step:,.0f} a step), {found.micro_batches_per_step:.1f} micro-batches a step on one "
        f"process, {found.padding_share:.1%} padding ({'packed' if found.packing else 'one example a row'}"
        f"{STYLES[found.batch_style]})"
    )


def _sample(task: TaskSummary) -> Panel:
    text = Text()
    for part, learnt in task.sample:
        shown = part if len(part) <= SHOWN else f"{part[: SHOWN // 2]} [...] {part[-SHOWN // 2 :]}"
        text.append(f"⟦{shown}⟧" if learnt else shown, style="bold green" if learnt else "dim")
    return Panel(text, title=Text(task.name), title_align="left")
