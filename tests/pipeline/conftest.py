"""The tiny model and tasks of tests/train, with a strong model beside it and a section for every stage."""

import pytest

from tests.training.conftest import write_model, write_tasks
from tests.warm_python.fixture import cold_proofs, warm_proofs  # noqa: F401  (fixtures)


@pytest.fixture(scope="session")
def whole_recipe(tmp_path_factory):
    """A recipe (dict) that runs every stage in seconds."""
    home = tmp_path_factory.mktemp("pipeline")
    weak, strong = write_model(home / "weak"), write_model(home / "strong", hidden=48, seed=1)
    files = write_tasks(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTFT_CACHE", str(home / "cache"))
        yield {
            "name": "whole",
            "model": {"path": str(weak), "dtype": "fp32"},
            "tasks": [
                {"name": task, "data": train, "eval_data": held_out} for task, (train, held_out) in files.items()
            ],
            "mixture": {"floors": {"copy": 0.1}, "max_epochs": 30, "on_cap": "redistribute"},
            "lora": {"r": 4, "alpha": 8},
            "train": {"steps": 6, "batch_tokens": 256, "max_length": 64, "learning_rate": 1e-2},
            "output": {"dir": str(home / "run")},
            "sweep": {"trials": 12, "steps": 2, "eval_limit": 4},
            "run": {"predicted": "always"},
            "merge": {"method": "linear"},
            "fuse": {"strong": {"path": str(strong), "dtype": "fp32"}, "alpha_rule": "forward"},
        }
