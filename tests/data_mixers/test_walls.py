"""data_mixers stands alone: no torch, nothing of mtft; what is heavy is imported inside the function that needs it."""

import ast
import subprocess
import sys
from pathlib import Path

import data_mixers

PACKAGE = Path(data_mixers.__file__).parent
HEAVY = {"sklearn", "lightgbm", "ray", "ruamel", "pandas", "datasets"}


def imports(node):
    for item in ast.walk(node):
        if isinstance(item, ast.Import):
            yield from (alias.name.split(".")[0] for alias in item.names)
        elif isinstance(item, ast.ImportFrom) and item.level == 0:
            yield item.module.split(".")[0]


def test_no_file_imports_torch_or_mtft():
    for file in PACKAGE.rglob("*.py"):
        assert not {"torch", "mtft"} & set(imports(ast.parse(file.read_text()))), file


def test_importing_the_package_and_its_models_stays_light():
    modules = "data_mixers.propose.proposal, data_mixers.fitting.scale_transfer"
    code = f"import data_mixers, {modules}, sys; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert not HEAVY & {name.split(".")[0] for name in ran.stdout.split()}
