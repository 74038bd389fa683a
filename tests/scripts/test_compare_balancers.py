"""The comparison of balancers: its figures, on losses whose intervals are known."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_balancers.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_balancers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_interval_is_students(script):
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(.975, 2) = 4.302653."""
    found = script.interval(np.array([1.0, 2.0, 3.0]))
    assert (found["low"], found["high"]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert found["verdict"] == "no"
    assert script.interval(np.array([1.0, 1.1, 1.2]))["verdict"] == "worse"
    assert script.interval(np.array([-1.0, -1.1, -1.2]))["verdict"] == "better"


def test_worst_task_is_taken_run_by_run(script):
    table = script.compare(
        {"uniform": np.array([[3.0, 1.0], [1.0, 4.0]]), "upgrad": np.array([[2.0, 2.0], [2.0, 3.0]])}
    )
    assert table["uniform"] == {"worst": 3.5, "mean": 2.25}
    assert table["upgrad"]["worst against uniform"]["difference"] == -1
    assert table["upgrad"]["mean against uniform"]["difference"] == 0
    assert "| upgrad | 2.5000 | 2.2500 | -1.0000 [-1.0000, -1.0000] better |" in script.show(table)


def test_pairs_are_means_over_the_runs(script, tmp_path):
    for seed, cosine in ((17, -0.2), (18, -0.4)):
        folder = script.folder_of(tmp_path, "upgrad lagged", seed)
        assert folder.name == f"upgrad-lagged-{seed}"
        folder.mkdir()
        rates = {"conflict_rate": [[0, 0.9], [0.9, 0]], "tasks": ["a", "b"]}
        (folder / "affinity.json").write_text(json.dumps({"cosine": [[1, cosine], [cosine, None]], **rates}))
    folders = [script.folder_of(tmp_path, "upgrad lagged", seed) for seed in (17, 18, 19)]
    assert script.pairs(folders) == [], "seed 19 was not measured"
    ((names, cosine, rate),) = script.pairs(folders[:2])
    assert (names, cosine, rate) == ("a, b", pytest.approx(-0.3), pytest.approx(0.9))


@pytest.mark.parametrize("method", ["upgrade", "uniform lagged", "f_mtl lagged", "samo direct"])
def test_unknown_methods_are_named(script, method):
    with pytest.raises(SystemExit, match=method):
        script.options_of(method)
