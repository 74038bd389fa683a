"""The affinity section: from a run's affinity.json to heat maps, a verdict, the pairs that conflict most."""

import json
import re

import pytest

from mtft.report.components import plots
from mtft.report.components.run_data import load_run
from mtft.report.page import write_report
from mtft.report.sections.affinity import affinity

TASKS = ["sql", "sum<b>", "chat", "maths"]
COSINE = [[1, -0.4, 0.6, None], [-0.4, 1, -0.2, 0.5], [0.6, -0.2, 1, 0.1], [None, 0.5, 0.1, 1]]


def run(folder, **more):
    """A run of 20 steps, measured at steps 10 and 20."""
    lines = []
    for step in range(1, 21):
        line = {"step": step, "loss": 1.0, "tasks": {task: {"loss": 1.0, "weight": 1.0} for task in TASKS}}
        if step % 10 == 0:
            line["gradients"] = {"norm": {task: None if task == "maths" else 0.1 * step for task in TASKS}}
        lines.append(json.dumps(line) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    clusters = {"groups": {"group-1": ["sql", "chat"], "group-2": ["sum<b>", "maths"]}, "heights": [0.4, 0.5, 1.2],
                "silhouette": 0.41, "guessed": [["sql", "maths"]]}  # fmt: skip
    content = {
        "tasks": TASKS,
        "step": 20,
        "measures": 6,
        "cosine": COSINE,
        "conflict_rate": [[0, 0.9, 0, None], [0.9, 0, 0.7, 0], [0, 0.7, 0, 0.3], [None, 0, 0.3, 0]],
        "transfer": [[3e-4, -1.5e-4, 2e-4, None], [-1e-4, 3e-4, -1e-4, 1e-4], [1e-4] * 4, [None, 1e-4, 0, 2e-4]],
        "gradient_norm": [1.0, 1.0, 1.0, None],
        "measured_together": [[6] * 4] * 4,
        "clusters": clusters,
    }
    content |= more
    (folder / "affinity.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return folder


def texts(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_maps_are_ordered_by_group_and_say_what_is_unknown(tmp_path):
    section = affinity(load_run(run(tmp_path)))
    (maps,) = [part for part in section.parts if part.kind == "plots" and len(part.plots) == 3]
    cosine, conflict, transfer = (texts(plot.svg) for plot in maps.plots)
    labels = [text for text in cosine if not re.match(r"[-–\d.]+$", text)]
    assert labels == ["sql", "chat", "sum&lt;b&gt;", "maths"] * 2
    numbers = [text for text in cosine if re.match(r"[-–\d.]+$", text)]
    assert numbers == ["1.00", "0.60", "-0.40", "–", "0.60", "1.00", "-0.20", "0.10",
                       "-0.40", "-0.20", "1.00", "0.50", "–", "0.10", "0.50", "1.00"]  # fmt: skip
    assert "0.90" in conflict
    assert {"2.00", "-1.50"} <= {*transfer}  # in units of 1e-4
    assert "step on" in transfer
    assert "1e-04" in maps.plots[2].caption


def test_page_is_offline_escaped_and_says_the_groups(tmp_path):
    html = write_report([run(tmp_path)]).read_text(encoding="utf-8")
    assert "sql, chat; sum&lt;b&gt;, maths (silhouette 0.41" in html
    assert "sum<b>" not in html
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', html) == []
    assert "Length of each task" in html
    assert "sql – sum&lt;b&gt;" in html


@pytest.mark.parametrize(
    ("clusters", "says"),
    [
        ({"groups": {"group-1": TASKS}, "heights": [], "silhouette": None, "guessed": []}, "No group of tasks"),
        (None, "too few to group"),
    ],
)
def test_verdict_is_honest(tmp_path, clusters, says):
    section = affinity(load_run(run(tmp_path, clusters=clusters)))
    assert says in section.parts[0].text


def test_verdict_names_pairs_that_conflict_without_groups(tmp_path):
    """9 of 10 is within three standard deviations of a coin, 22 of 25 is not."""
    one = {"groups": {"group-1": TASKS}, "heights": [], "silhouette": None, "guessed": []}
    for times, named in ((10, False), (25, True)):
        together = [[times] * 4] * 4
        rate = [[0, 0.88, 0, None], [0.88, 0, 0.7, 0], [0, 0.7, 0, 0.3], [None, 0, 0.3, 0]]
        section = affinity(load_run(run(tmp_path, clusters=one, measured_together=together, conflict_rate=rate)))
        text = section.parts[0].text
        assert ("sql and sum<b> (88% of 25)" in text) == named
        assert ("nothing here speaks for" in text) == (not named)


def test_note_says_what_noise_does(tmp_path):
    for split, says in ((False, "loss.gradients.split: true"), (True, "halves")):
        section = affinity(load_run(run(tmp_path, split=split)))
        assert says in section.parts[1].text


def test_no_section_without_measurements(tmp_path):
    folder = run(tmp_path)
    (folder / "affinity.json").unlink()
    assert affinity(load_run(folder)) is None


def test_thirty_tasks_are_readable():
    """Small cells without the leading zero, names upright below; numbers of 10 and more keep their digits."""
    names = [f"task-{k}" for k in range(30)]
    svg = plots.heat_map([[0.25 if i != j else 10.2 for i in range(30)] for j in range(30)], names, high=11, low=-11)
    found = texts(svg)
    assert found.count(".25") == 870
    assert found.count("10.20") == 30
    assert found.count("task-7") == 2
    assert len(svg) < 600_000
