"""Every balancer of the dict against the shared properties."""

from __future__ import annotations

import inspect

import pytest

from mtft.gradients.aggregators import AGGREGATORS
from mtft.losses.balancers import BALANCERS
from tests.properties import balancers as properties

NAMES = properties.NAMES

# Options under which weights move within the 40 steps of the simulated run; the default for what is not named.
OPTIONS = {
    "uniform": {},
    "temperature": {"temperature": 2.0},
    "coba": {"warmup": 4, "window": 9, "valid_every": 1},
    "self_paced": {"window": 6, "valid_every": 1},
    "famo": {"smoothing": 0.5},
    "dwa": {"window": 4},
    "gradnorm": {"gram_every": 2},
    "lagged": {"gram_every": 2},
}
VARIANTS = {
    "coba, code of the authors": ("coba", {"variant": "mftcoder", "warmup": 4, "window": 9, "valid_every": 2}),
    "famo, second forward": ("famo", {"after": "exact"}),
    "famo, validation": ("famo", {"after": "valid", "valid_every": 3}),
    "famo, losses of the step": ("famo", {"step_loss": "exact"}),
    **{
        f"lagged, {name}": ("lagged", {"gram_every": 3, "aggregator": name}) for name in AGGREGATORS if name != "upgrad"
    },
    "gls, losses of the step": ("gls", {"step_loss": "exact"}),
    "stch, losses of the step": ("stch", {"step_loss": "exact", "mu": 0.1}),
}
CASES = {name: (name, OPTIONS.get(name, {})) for name in BALANCERS} | VARIANTS
GIVEN = {"fixed", "visatb"}  # their weights are options by task name, so tasks can't be repeated or renamed freely
CONSTANT = {"uniform", "fixed", "visatb", "temperature"}


def make(name, options):
    def build(context):
        by_task = {task: 1.0 + 0.3 * NAMES.index(task.split("-")[0]) for task in context.tasks}
        given = {"fixed": {"values": by_task}, "visatb": {"given": by_task, "received": by_task, "alone": by_task}}
        return BALANCERS[name](context, **given.get(name, {}), **options)

    return build


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "prop", [f for name, f in inspect.getmembers(properties, inspect.isfunction) if name.startswith("assert_")]
)
def test_property(prop, case):
    name, options = CASES[case]
    if prop is properties.assert_moves and name in CONSTANT:
        pytest.skip("constant by design")
    if name == "random" and prop in (
        properties.assert_equal_tasks_stay_equal,
        properties.assert_permutes_with_the_tasks,
    ):
        pytest.skip("random by design")
    if name == "lagged" and prop is properties.assert_user_weights_multiply:
        pytest.skip("user weights are the aggregator's preference: see test_lagged.py")
    if case == "lagged, pcgrad" and prop is properties.assert_permutes_with_the_tasks:
        pytest.skip("the order of projections is drawn by place")
    prop(make(name, options))
