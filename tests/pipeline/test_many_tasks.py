"""What a run says on the terminal does not grow with the number of tasks; its files have everything."""

import io
import json

import pytest
from rich.console import Console

from data_mixers import Mixture, MixturePlan
from mtft.pipeline.results_table import print_results
from mtft.training.run_files.metrics_log import MetricsLog


def scores(number, step):
    return {
        f"t{i}": {"loss": 1.0 + step * i / number, "token_accuracy": 0.5, "exact_match": None} for i in range(number)
    }


def printed(number):
    stream = io.StringIO()
    print_results({"base": scores(number, 1), "joint": scores(number, 2)}, Console(file=stream, width=108))
    return stream.getvalue()


def test_the_final_table():
    text = printed(200)
    assert len(text.splitlines()) <= 60
    assert "mean of 200" in text
    assert "t199" in text  # changed most
    assert "and 192 more tasks (results.json)" in text
    assert all(f"t{i} " in printed(20) for i in range(20))
    assert "more tasks" not in printed(20)


@pytest.mark.parametrize("number", [3, 20, 21, 200])
def test_losses_of_a_step(tmp_path, number, monkeypatch):
    said = []
    log = MetricsLog(tmp_path, steps=2)
    monkeypatch.setattr(log, "say", said.append)
    log.evaluation(2, scores(number, 1))
    (line,) = said
    assert len(line) < 400
    assert f"t{number - 1} " in line  # the highest
    assert (f"and {number - 5} more tasks" in line) == (number > 20)
    assert len(json.loads((tmp_path / "eval.jsonl").read_text())["tasks"]) == number


def test_shares_before_the_first_step(monkeypatch):
    from types import SimpleNamespace

    from torch import nn

    from mtft.training.trainer_parts import print_summary

    plan = MixturePlan(Mixture.of({f"t{i}": 1 / 200 for i in range(200)}), [5] * 200, steps=3, batch=200, seed=0)
    args = SimpleNamespace(world_size=1, device=SimpleNamespace(type="cpu"))
    said = []
    print_summary(SimpleNamespace(name="r"), plan, nn.Linear(1, 1), args, None, None, say=said.append)
    assert len(said) <= 22
    assert said[-1] == "  and 180 more tasks (plan.json)"
