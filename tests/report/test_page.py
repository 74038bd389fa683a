"""The page from a run directory written by hand: what it must say, and that nothing of a user's can break it."""

import json
import math
import os
import re
from html.parser import HTMLParser

import pytest

from mtft.common.errors import UserError
from mtft.report.components.run_data import load_run
from mtft.report.page import render, write_report
from tests.report.hand_made import TASKS, write, write_run


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)


class Balanced(HTMLParser):
    """Fails on an element that is closed without having been opened; collects the text."""

    VOID = {"meta", "br", "img", "link", "hr", "input"}

    def __init__(self):
        super().__init__()
        self.open, self.words = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def parse(path):
    page = Balanced()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return " ".join(" ".join(page.words).split())


def test_says_what_the_run_did(run_dir):
    words = parse(write_report([run_dir]))
    for expected in (
        "by-hand",
        "joint predicted",
        "1.125",
        "70.0%",
        "Throughput",
        "2,000",
        "torch",
        "ridge 1.00",
        "All candidates",
    ):
        assert expected in words


def test_needs_no_network(run_dir):
    html = write_report([run_dir]).read_text(encoding="utf-8")
    fetched = re.findall(r'(?:src|href)="(?!#)([^"]*)"', html) + re.findall(r"@import|url\((?!#)[^)]*\)", html)
    assert fetched == []
    assert "<script" not in html


def test_users_text_is_escaped(run_dir):
    html = write_report([run_dir]).read_text(encoding="utf-8")
    assert "sum&lt;b&gt;" in html
    assert "sum<b>" not in html


def test_best_is_marked_among_the_models_that_serve_all_tasks(run_dir):
    html = write_report([run_dir]).read_text(encoding="utf-8")
    assert re.search(r'<td class="best">1\.125</td>', html)
    assert re.search(r'<td class="ref">3\.000</td>', html)
    assert not re.search(r'<td class="best">3\.000</td>', html)


def test_ids_are_unique(run_dir):
    html = write_report([run_dir]).read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_absent_task_leaves_a_gap_not_a_zero(run_dir):
    steps, losses = load_run(run_dir).trains[0].curve(TASKS[0], "loss")
    assert 4 not in steps
    assert min(losses) > 1
    assert all(map(math.isfinite, losses))


def test_a_line_still_being_written_is_left_out(run_dir):
    path = run_dir / "train" / "joint" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 21, "lo', encoding="utf-8")
    assert len(load_run(run_dir).trains[0].steps) == 20


def test_broken_line_is_named(run_dir):
    path = run_dir / "train" / "joint" / "metrics.jsonl"
    broken = path.read_text().splitlines()
    broken[4] = "{"
    path.write_text("\n".join([*broken, ""]), encoding="utf-8")
    said = []
    words = parse(write_report([run_dir], say=said.append))
    assert len(said) == 2
    assert "train/joint/metrics.jsonl: line 5: not valid JSON" in said[0]
    assert "no line of step 5" in said[1]
    assert "Damaged or missing" in words
    assert "no line of step 5" in words
    assert "Throughput" in words


@pytest.mark.parametrize("make", [False, True])
def test_nothing_to_report_is_an_error(tmp_path, make):
    folder = tmp_path / "empty"
    if make:
        folder.mkdir()
    with pytest.raises(UserError):
        write_report([folder])


def test_two_runs_on_one_page(run_dir, tmp_path):
    page = write_report([run_dir, run_dir / "train" / "joint"], tmp_path / "both.html")
    words = parse(page)
    assert words.count("Throughput") == 2


def test_shares_that_changed_online_are_drawn(run_dir):
    """A staircase from what the run began with, also of a run that was cut before plan.json said what came of it."""
    assert load_run(run_dir).trains[0].share_curves == {}
    assert "mixture.online" not in render([load_run(run_dir)])
    folder = run_dir / "train" / "joint"
    plan, steps = json.loads((folder / "plan.json").read_text()), (folder / "metrics.jsonl").read_text().splitlines()
    decided = [(6, {TASKS[0]: 0.2, TASKS[1]: 0.8}), (11, {TASKS[0]: 0.1, TASKS[1]: 0.9})]
    for at, shares in decided:
        steps[at - 2] = json.dumps({**json.loads(steps[at - 2]), "mixture": {"from": at, "shares": shares}})
    steps[14] = json.dumps({**json.loads(steps[14]), "mixture": {"from": 16, "notes": ["the shares stay as they are"]}})
    start = {"from": 1, "shares": {TASKS[0]: 0.5, TASKS[1]: 0.5}}
    whole = [start, *({"from": at, "shares": shares} for at, shares in decided)]
    write(folder / "metrics.jsonl", "\n".join(steps) + "\n")
    for changes in ([start], whole):
        write(folder / "plan.json", {**plan, "changes": changes})
        run = load_run(run_dir)
        x, y = run.trains[0].share_curves[TASKS[1]]
        assert x == [1, 6, 6, 11, 11, 20]
        assert y == [0.5, 0.5, 0.8, 0.8, 0.9, 0.9]
        assert render([run]).count("Share of each task, as mixture.online decided") == 1


def test_somebody_elses_page_is_not_replaced(run_dir, tmp_path):
    mine = tmp_path / "page.html"
    mine.write_text("my notes")
    with pytest.raises(UserError, match="there already"):
        write_report([run_dir], mine)
    assert mine.read_text() == "my notes"
    assert write_report([run_dir], mine, overwrite=True).read_text() != "my notes"
    write_report([run_dir], mine)  # now it is ours


def test_a_named_pipe_is_no_page(run_dir, tmp_path):
    os.mkfifo(tmp_path / "page.html")
    with pytest.raises(UserError, match="a named pipe"):
        write_report([run_dir], tmp_path / "page.html", overwrite=True)


def test_a_file_of_the_run_is_no_page(run_dir):
    before = (run_dir / "train" / "joint" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="is an input"):
        write_report([run_dir], run_dir / "train" / "joint" / "metrics.jsonl", overwrite=True)
    assert (run_dir / "train" / "joint" / "metrics.jsonl").read_bytes() == before
