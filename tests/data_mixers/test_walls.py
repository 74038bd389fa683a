"""data_mixers is light: what is heavy is imported inside the function that needs it."""

import subprocess
import sys
from pathlib import Path

import data_mixers

PACKAGE = Path(data_mixers.__file__).parent
HEAVY = {"sklearn", "lightgbm", "ray", "ruamel", "pandas", "datasets"}


def test_importing_the_package_and_its_models_stays_light():
    modules = "data_mixers.propose.proposal, data_mixers.fitting.scale_transfer"
    code = f"import data_mixers, {modules}, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert not HEAVY & {name.split(".")[0] for name in ran.stdout.split()}
