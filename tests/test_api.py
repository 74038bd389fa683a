"""The public names: importable from their packages, lazy, documented, shadowed by no module."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import data_mixers
import mtft

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "scipy", "sklearn", "lightgbm", "matplotlib")
IMPORTS = """
from mtft import MultiTaskTrainer, merge_adapters, FusedCausalLM, fuse_logits, load_recipe
from data_mixers import MixturePlan, propose_mixture
"""


def in_process(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", mtft.__all__)
def test_name_of_mtft_is_the_object_of_its_package(name):
    value = getattr(mtft, name)
    assert callable(value)
    assert value.__doc__
    room = ".".join(value.__module__.split(".")[:2])
    assert getattr(importlib.import_module(room), name) is value


@pytest.mark.parametrize("name", data_mixers.__all__)
def test_name_of_data_mixers_is_an_object(name):
    value = getattr(data_mixers, name)
    assert callable(value)
    assert value.__doc__


@pytest.mark.parametrize("package", [mtft, data_mixers], ids=lambda package: package.__name__)
def test_no_module_has_a_public_name(package):
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(package.__all__)
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.slow
def test_names_of_acceptance_import():
    assert in_process(IMPORTS + "print(MultiTaskTrainer.__name__, propose_mixture.__name__)").split() == [
        "MultiTaskTrainer",
        "propose_mixture",
    ]


def test_importing_the_packages_loads_nothing_heavy():
    code = f"import json, sys, mtft, data_mixers; print(json.dumps([n for n in {HEAVY} if n in sys.modules]))"
    assert json.loads(in_process(code)) == []


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mtft.nonsense


def test_the_page_is_what_the_code_says(warm_python):
    command = [warm_python, str(ROOT / "scripts" / "make_api_docs.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
