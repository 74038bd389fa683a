"""The report's plots. Each function takes plain numbers and returns one SVG as text; no state, no display."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from mtft.common.listing import clipped

# Okabe & Ito's palette: eight colours that colour-blind readers can tell apart; line styles go on from there.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A900")
STYLES = ("-", "--", ":", "-.")
GREY = "#8a8f98"
# A name is a name: `$` begins no formula in it. Texts ask for this when they are made, so each function is decorated.
plain_text = matplotlib.rc_context({"text.parse_math": False})
LONGEST_NAME = 24
NUMBERS_UP_TO = 40  # rows of a heat map; beyond, they could not be read, and drawing them takes minutes
MOST_IN_LEGEND = 36
_number = count()

Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def task_style(index: int) -> tuple[str, str]:
    """Colour and line style of the index-th task, the same in every plot of a page."""
    return COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]


def name_shown(name: str) -> str:
    """A name as plots write it: in one line, no longer than there is room for, no signs that turn the text around."""
    printable = "".join(letter if letter.isprintable() else " " for letter in clipped(name, 4 * LONGEST_NAME))
    shown = clipped(" ".join(printable.split()), LONGEST_NAME)
    return f" {shown}" if shown.startswith("_") else shown or "–"  # matplotlib leaves `_...` out of legends


@contextmanager
def quiet_glyphs() -> Iterator[None]:
    """matplotlib's font has no emoji; in SVG text stays text, and the reader's fonts draw them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


@plain_text
def line_plot(
    curves: Curves, *, ylabel: str, xlabel: str = "optimizer step", points: Curves | None = None, smooth: int = 1
) -> str:
    """One line a task; `points` (held-out values) are drawn as markers; `smooth` = window of a running mean."""
    figure, axis = _axis(7.6, 3.4)
    for index, (name, (x, y)) in enumerate(curves.items()):
        colour, style = task_style(index)
        if smooth > 1 and len(y) >= 2 * smooth:
            axis.plot(x, y, color=colour, alpha=0.18, linewidth=0.8)
            y = np.convolve(y, np.ones(smooth) / smooth, mode="valid")
            x = x[smooth - 1 :]
        axis.plot(x, y, color=colour, linestyle=style, linewidth=1.5, label=name_shown(name))
        if points and name in points and points[name][0]:
            axis.plot(
                *points[name], color=colour, linestyle="none", marker="o", markersize=4.5, markeredgecolor="white"
            )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    _legend(axis, len(curves))
    return to_svg(figure)


@plain_text
def grouped_bars(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Grouped horizontal bars: {task: {series: share}}."""
    tasks, series = list(rows), list(dict.fromkeys(name for row in rows.values() for name in row))
    figure, axis = _axis(7.6, 0.7 + 0.17 * len(tasks) * (len(series) + 0.8))
    height = 0.8 / max(len(series), 1)
    for index, name in enumerate(series):
        at = np.arange(len(tasks)) + (index - (len(series) - 1) / 2) * height
        values = [rows[task].get(name, 0.0) for task in tasks]
        bars = axis.barh(at, values, height=height * 0.9, color=COLORS[index % len(COLORS)], label=name_shown(name))
        axis.bar_label(bars, labels=[f"{value:.1%}" for value in values], padding=3, fontsize=7.5)
    axis.set_yticks(np.arange(len(tasks)), [name_shown(task) for task in tasks])
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_xlabel("share")
    _legend(axis, len(series))
    return to_svg(figure)


@plain_text
def prediction_plot(
    measured: Sequence[float], mean: Sequence[float], lower: Sequence[float], upper: Sequence[float]
) -> str:
    """Out-of-fold predictions with intervals against what the trials measured."""
    y, m = np.asarray(measured, float), np.asarray(mean, float)
    low, high = np.asarray(lower, float), np.asarray(upper, float)
    figure, axis = _axis(3.6, 3.2)
    inside = (low <= y) & (y <= high)
    for mask, colour, label in ((inside, COLORS[0], "inside its interval"), (~inside, COLORS[1], "outside")):
        if mask.any():
            bars = np.vstack([np.maximum(m - low, 0), np.maximum(high - m, 0)])[:, mask]
            axis.errorbar(
                y[mask], m[mask], yerr=bars, fmt="o", color=colour, ecolor=colour, markersize=4, elinewidth=0.7,
                alpha=0.8, label=label,
            )  # fmt: skip
    ends = [min(y.min(), m.min()), max(y.max(), m.max())]
    axis.plot(ends, ends, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axis.set_xlabel("measured")
    axis.set_ylabel("predicted, out of fold")
    axis.legend(frameon=False, fontsize=8)
    return to_svg(figure)


@plain_text
def heat_map(
    values: Sequence[Sequence[float | None]],
    names: Sequence[str],
    *,
    low: float = -1,
    high: float = 1,
    blocks: Sequence[int] = (),
    ylabel: str = "",
    xlabel: str = "",
) -> str:
    """Square matrix with its numbers: cosines, overlaps, transfer. None or NaN: grey, a dash.

    Where low < 0: blue above 0, white at 0, red below. Else white to red (a rate of something bad). Colour-blind eyes
    tell the two apart.
    blocks: sizes of groups of names along the diagonal, outlined.
    """
    grid = np.array([[np.nan if value is None else value for value in row] for row in values], float)
    small = len(names) > 10
    size = 1.6 + (0.27 if small else 0.62) * len(names)
    figure, axis = _axis(size + 0.8, size)
    colours = matplotlib.colormaps["RdBu" if low < 0 else "Reds"].with_extremes(bad="#d9dce1")
    edges = np.arange(len(names) + 1) - 0.5
    cells = np.ma.masked_invalid(grid)
    many = len(names) > NUMBERS_UP_TO  # then the cells are one picture, not shapes of their own
    axis.pcolormesh(
        edges, edges, cells, vmin=low, vmax=high, cmap=colours, edgecolor="face", linewidth=0.2, rasterized=many
    )
    axis.invert_yaxis()
    axis.set_aspect("equal")
    names = [name_shown(name) for name in names]
    for (row, column), value in () if many else np.ndenumerate(grid):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        text = re.sub(r"^(-?)0\.", r"\1.", text) if small else text  # -0.31 -> -.31
        depth = abs(value) / high if low < 0 else (value - low) / (high - low)
        ink = "white" if depth > 0.64 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=5.5 if small else 8, color=ink)
    _outline(axis, blocks)
    turn = {"rotation": 90, "ha": "center"} if small else {"rotation": 30, "ha": "right"}
    axis.set_xticks(range(len(names)), names, **turn)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylabel(ylabel)
    axis.set_xlabel(xlabel)
    axis.grid(False)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return to_svg(figure)


def _outline(axis, blocks: Sequence[int]) -> None:
    start = 0
    for block in blocks:
        axis.add_patch(
            Rectangle((start - 0.5, start - 0.5), block, block, fill=False, edgecolor="black", linewidth=1.4)
        )
        start += block


@plain_text
def bar_plot(rows: Mapping[str, float], *, xlabel: str, reference: float | None = None) -> str:
    """Horizontal bars with their values; `reference` draws a dashed line (for instance 1.0 = the tuned model)."""
    names, values = list(rows), [float(value) for value in rows.values()]
    figure, axis = _axis(7.6, 0.8 + 0.32 * len(names))
    drawn = axis.barh(
        range(len(names)), values, color=[COLORS[0] if value >= 0 else COLORS[1] for value in values], height=0.62
    )
    axis.bar_label(drawn, labels=[f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(names)), [name_shown(name) for name in names])
    if reference is not None:
        axis.axvline(reference, color=GREY, linestyle="--", linewidth=1)
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel(xlabel)
    return to_svg(figure)


def _axis(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.add_subplot()
    axis.grid(True, color="#e6e8eb", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8.5, color="#b8bcc4")
    axis.xaxis.label.set_fontsize(9)
    axis.yaxis.label.set_fontsize(9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#b8bcc4")
    return figure, axis


def _legend(axis, entries: int) -> None:
    """Beside the plot, never over the data."""
    if entries < 2:
        return
    handles, labels = axis.get_legend_handles_labels()
    shown = labels[:MOST_IN_LEGEND]
    title = None if len(labels) == len(shown) else f"the first {len(shown)} of {len(labels)}"
    axis.legend(
        handles[: len(shown)], shown, title=title, frameon=False, fontsize=8, title_fontsize=8, loc="center left",
        bbox_to_anchor=(1.01, 0.5), ncols=1 + len(shown) // 18,
    )  # fmt: skip


def to_svg(figure: Figure) -> str:
    """SVG without the XML header; ids made unique, since several SVGs share one page."""
    out = io.StringIO()
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "svg.hashsalt": "mtft",
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings), quiet_glyphs():
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    prefix = f"p{next(_number)}-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", text)
    return re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{prefix}\1"', text)
