"""A group is one task to its balancer: by hand, and by the shared properties."""

from __future__ import annotations

import json

import pytest
import torch

from mtft.common.errors import UserError
from mtft.losses.balancers import Observation, make_balancer
from mtft.losses.balancers.task_groups import read_groups
from mtft.recipe.load import load_recipe
from mtft.recipe.schema.loss import BalancerSection
from tests.properties import balancers as properties

NAN = torch.nan


def fp64(*values):
    return torch.tensor(values, dtype=torch.float64)


def grouped(name="uniform", user=(1, 1, 1), groups=None, **options):
    section = BalancerSection(name=name, groups=groups or {"code": ["sql", "python"]}, **options)
    return make_balancer(section, ("python", "chat", "sql"), user, examples=[10, 5, 30])


def test_a_group_counts_as_one_task():
    assert grouped().weights(1).tolist() == pytest.approx([0.75, 1.5, 0.75])
    # 3 : 1 inside the group, 4 : 4 between the groups
    assert grouped(user=(3, 4, 1)).weights(1).tolist() == pytest.approx([1.125, 1.5, 0.375])


def test_the_balancer_sees_group_means():
    balancer = grouped("gls", step_loss="exact", user=(3, 1, 1))
    w_K = balancer.weights(1, fp64(1.0, 4.0, 5.0))  # group losses 2 and 4, so b = 4/3 and 2/3
    torch.testing.assert_close(w_K / w_K.sum(), fp64(0.75 * 2 / 3, 1 / 3, 0.25 * 2 / 3))
    w_K = balancer.weights(2, fp64(NAN, 4.0, 2.0))  # an absent task leaves the mean to the others
    assert float(w_K[1] / w_K.sum()) == pytest.approx(1 / 3)


def test_gram_matrix_of_group_means():
    gradient_KD = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean_GD = torch.stack([gradient_KD[[0, 2]].mean(dim=0), gradient_KD[1]])
    torch.testing.assert_close(grouped()._mean(gradient_KD @ gradient_KD.T), mean_GD @ mean_GD.T)


def test_sizes_add_up():
    w_K = grouped("temperature", temperature=1.0).weights(1)
    torch.testing.assert_close(w_K / w_K.sum(), fp64(20 / 45, 5 / 45, 20 / 45))


@pytest.mark.parametrize("name", ["uniform", "coba", "famo", "dwa", "gradnorm", "random"])
@pytest.mark.parametrize(
    "prop",
    [
        properties.assert_positive_with_mean_one,
        properties.assert_single_task_is_one,
        properties.assert_absent_tasks_are_no_trouble,
        properties.assert_infinity_is_ignored_and_counted,
        properties.assert_resume_is_bit_equal,
        properties.assert_refuses_the_state_of_other_tasks,
    ],
)
def test_properties(prop, name):
    options = {"coba": {"warmup": 4, "window": 9, "valid_every": 1}, "gradnorm": {"gram_every": 2}}.get(name, {})

    def make(context):
        pair = [task for task in context.tasks if task in ("maths", "prose")]
        section = BalancerSection(name=name, groups={"pair": pair} if pair else {}, **options)
        return make_balancer(section, context.tasks, [1] * len(context.tasks))

    prop(make)


def test_the_state_of_one_without_groups_is_refused():
    plain = make_balancer(BalancerSection(name="dwa"), ("python", "chat", "sql"), [1, 1, 1])
    plain.update(Observation(1, fp64(1, 2, 3)))
    with pytest.raises(UserError, match="without groups"):
        grouped("dwa").load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"code": ["sql", "pyton"]}, "unknown task 'pyton': did you mean 'python'"),
        ({"code": ["sql"], "db": ["sql"]}, "task sql is in groups code and db"),
        ({"chat": ["sql", "python"]}, "chat is a group and a task outside of it"),
        ({"code": []}, "must name lists of tasks"),
        (["sql"], "must name lists of tasks"),
    ],
)
def test_bad_groups_are_refused(groups, message):
    with pytest.raises(UserError, match=message):
        grouped(groups=groups)


def test_groups_from_a_former_runs_affinity(tmp_path):
    """A path of a run directory, or of its affinity.json: the groups that the run found; a new task is alone."""
    found = {"tasks": ["a", "b", "c"], "measures": 9, "clusters": {"groups": {"group-1": ["a", "c"], "group-2": ["b"]}}}
    (tmp_path / "affinity.json").write_text(json.dumps(found))
    for path in (tmp_path, tmp_path / "affinity.json"):
        assert read_groups(str(path), ("a", "b", "c", "new")) == {"group-1": [0, 2], "group-2": [1], "new": [3]}
    with pytest.raises(UserError, match=r"affinity\.json"):
        read_groups(3, ("a", "b"))


def test_the_path_of_groups_is_relative_to_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "name: x\nmodel: {path: quickstart:weak}\ntasks: [{name: a, data: 'quickstart:code'}]\n"
        "loss: {balancer: {name: gls, groups: first/affinity.json}}\ntrain: {steps: 1}\noutput: {dir: runs}\n"
    )
    section = load_recipe(tmp_path / "recipe.yaml").loss.balancer
    assert section.model_extra == {"groups": str(tmp_path / "first" / "affinity.json")}
