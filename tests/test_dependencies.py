"""What the packages import is declared in pyproject.toml: not only brought along by something else."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = {"mtft", "data_mixers"}


def imported():
    """{module: a file that imports it}, of the packages' own files."""
    found = {}
    for path in sorted(path for package in OURS for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            for name in names:
                found.setdefault(name.partition(".")[0], path.relative_to(ROOT))
    return {name: path for name, path in found.items() if name not in OURS | set(sys.stdlib_module_names)}


def declared():
    """Distributions of pyproject.toml, but for those of `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra, lines in project["optional-dependencies"].items() if extra != "dev" for line in lines]
    return {_normal(re.split(r"[\[<>=!~; ]", line)[0]) for line in (*project["dependencies"], *optional)}


def _normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_imported_is_declared():
    known, names = packages_distributions(), declared()
    lost = {
        module: str(path)
        for module, path in imported().items()
        if not names & {_normal(name) for name in known.get(module, [module])}
    }
    assert lost == {}
