"""Names of every kind in plots: drawn as they are, or cut, and never read as a formula."""

import re

import pytest

from mtft.report.components import plots
from mtft.report.sections.pareto import front_svg, save_front

NAMES = [
    "$\\frac{a}{b$",
    "a_b^{c}",
    "$x_1$ $y$",
    "\\alpha",
    "_hidden",
    "🦊🦀",
    "שלום עולם",
    "a\u202eb\nc\x00d",
    "n" * 300,
    "",
]


def all_plots(names):
    curves = {name: ([1, 2, 3], [3.0, 2.0, 1.0 + place]) for place, name in enumerate(names)}
    square = [[0.1] * len(names) for _ in names]
    losses = {name: 1.0 + place for place, name in enumerate(names)}
    rows = [{"losses": losses, "front": True}, {"losses": dict.fromkeys(names, 1.5), "front": False}]
    return {
        "lines": plots.line_plot(curves, ylabel="loss", points=curves),
        "bars": plots.grouped_bars({name: {name: 0.5, "other": 0.1} for name in names}),
        "map": plots.heat_map(square, names),
        "values": plots.bar_plot(dict.fromkeys(names, 0.5), xlabel="retention"),
        "front": front_svg({"trials": rows, "tasks": list(names), "uniform": rows[0], "chosen": rows[1]}),
    }


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_drawn_as_it_stands(name):
    drawn = all_plots([name, "plain"])
    shown = plots.name_shown(name)
    assert len(shown) <= plots.LONGEST_NAME + 1
    written = re.sub(r"[<>&]", "", shown).strip()
    for kind, svg in drawn.items():
        texts = [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
        assert "plain" in texts or kind == "front"
        assert any(text.endswith(written) for text in texts), kind
        assert "\u202e" not in svg
        assert "\x00" not in svg


def test_a_picture_of_any_name_is_saved(tmp_path):
    rows = [
        {"losses": {"$\\frac{": 1.0, "🦊": 2.0}, "front": True},
        {"losses": {"$\\frac{": 2.0, "🦊": 1.0}, "front": True},
    ]
    facts = {"trials": rows, "tasks": ["$\\frac{", "🦊"], "uniform": rows[0], "chosen": rows[1]}
    assert save_front(facts, tmp_path / "front.png").stat().st_size > 1000


def test_names_that_are_cut_to_the_same_keep_their_own_bars():
    names = ["n" * 300 + str(i) + "m" * 300 for i in range(3)]
    svg = plots.bar_plot({name: i + 0.25 for i, name in enumerate(names)}, xlabel="x")
    assert all(f">{value}<" in svg.replace(" ", "") for value in ("0.25", "1.25", "2.25"))


def test_of_many_tasks_the_legend_and_the_map_show_what_can_be_read():
    names = [f"task{i}" for i in range(60)]
    lines = plots.line_plot({name: ([1, 2], [1.0, 2.0]) for name in names}, ylabel="loss")
    assert "the first 36 of 60" in lines
    assert "task36" not in lines
    assert ">0.12<" in plots.heat_map([[0.12] * 5] * 5, names[:5])
    assert ">.12<" not in plots.heat_map([[0.12] * 60] * 60, names)
