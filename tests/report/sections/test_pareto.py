"""The trade-offs of a search, drawn: every pair of tasks has its panel, and the page carries the picture."""

import json

import numpy as np
import pytest

from mtft.merge.search.pareto import pareto_facts
from mtft.merge.search.weight_search import run_weight_search
from mtft.report.sections.pareto import TASKS, front_caption, front_figure, front_svg, save_front


def facts(tasks):
    """A bowl for each task, with its own best weights."""
    best = np.random.default_rng(0).uniform(0.2, 1.0, size=(tasks, 3))
    losses = lambda w: {f"t{i}": 1 + float(np.sum((np.array(w) - b) ** 2)) for i, b in enumerate(best)}  # noqa: E731
    return pareto_facts(("a", "b", "c"), run_weight_search(("a", "b", "c"), losses, "front", budget=40))


def test_front_is_marked_and_json():
    found = json.loads(json.dumps(facts(3)))
    front = [row for row in found["trials"] if row["front"]]
    assert 3 <= len(front) < len(found["trials"])
    for row in front:  # nobody is no worse everywhere and better somewhere
        gaps = [[other["losses"][t] - row["losses"][t] for t in found["tasks"]] for other in found["trials"]]
        assert not any(max(gap) <= 0 and min(gap) < 0 for gap in gaps)


@pytest.mark.parametrize(("tasks", "panels"), [(2, 1), (3, 3), (4, 6), (7, 6)])
def test_one_panel_for_each_pair_of_the_widest_tasks(tasks, panels, tmp_path):
    found = facts(tasks)
    figure = front_figure(found)
    drawn = [axis for axis in figure.axes if axis.get_xlabel()]
    assert len(drawn) == panels <= TASKS * (TASKS - 1) // 2
    dots = sum(len(collection.get_offsets()) for collection in drawn[0].collections)
    assert dots == len(found["trials"]) + 2  # every merge once; the uniform and the chosen one marked
    assert save_front(found, tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert front_svg(found).startswith("<svg")
    assert f"{tasks} tasks" in front_caption(found)
