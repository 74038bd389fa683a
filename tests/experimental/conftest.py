"""The tiny model, tasks and recipe of tests/training."""

from tests.training.conftest import model_folder, recipe, task_files  # noqa: F401  (fixtures)
from tests.warm_python.fixture import cold_proofs, warm_proofs  # noqa: F401  (fixtures)
