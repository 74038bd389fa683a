"""`mtft refresh` on what does not fit, is damaged or belongs to the user: refused before any work; nothing is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from mtft.__main__ import main
from mtft.experimental import refresh_adapter
from tests.experimental.test_refresh_adapter import adapters, variant  # noqa: F401  (a fixture)

SHORT = ("--rounds", "1", "--steps", "1", "--rows", "4")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(recipe, adapters, tmp_path_factory):  # noqa: F811
    """A folder with a recipe and two adapters of its own."""
    home = tmp_path_factory.mktemp("attacks")
    for name, folder in zip(("before", "after"), adapters, strict=True):
        shutil.copytree(folder, home / name)
    content = variant(recipe, home / "run", ("copy", "shout"), train={"steps": 1}).model_dump(
        mode="json", exclude_unset=True
    )
    (home / "r.yaml").write_text(yaml.safe_dump(content))
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def refresh(*more: str, before="before", after="after", out="out", new="shout", recipe="r.yaml") -> int:
    return main(["refresh", recipe, "--before", before, "--after", after, "--new", new, "--out", out, *SHORT, *more])


def config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def users_adapter(home: Path) -> dict:
    (home / "out" / "adapter").mkdir(parents=True)
    (home / "out" / "adapter" / "mine.txt").write_text("mine")
    return {}


def users_json(home: Path) -> dict:
    (home / "out").mkdir()
    (home / "out" / "refresh.json").write_text('{"mine": 1}')
    return {}


def users_part(home: Path) -> dict:
    (home / "out" / "adapter.part").mkdir(parents=True)
    (home / "out" / "adapter.part" / "mine.txt").write_text("mine")
    return {}


def other_run(home: Path) -> dict:
    shutil.copytree(home / "after", home / "out" / "adapter")
    return {}


def data_within(home: Path) -> dict:
    content = yaml.safe_load((home / "r.yaml").read_text())
    (home / "out").mkdir()
    shutil.copy(content["tasks"][0]["data"], home / "out" / "rows.jsonl")
    content["tasks"][0]["data"] = str(home / "out" / "rows.jsonl")
    (home / "r.yaml").write_text(yaml.safe_dump(content))
    return {}


def a_file(home: Path) -> dict:
    (home / "out").write_text("mine")
    return {}


def a_link(home: Path) -> dict:
    (home / "target").mkdir()
    (home / "out").symlink_to(home / "target")
    return {}


def cut(home: Path) -> dict:
    path = home / "after" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return {}


def garbage(home: Path) -> dict:
    (home / "before" / "adapter_model.safetensors").write_bytes(b"\xff" * 5000)
    return {}


def damaged_config(home: Path) -> dict:
    (home / "after" / "adapter_config.json").write_text('{"r": ')
    return {}


def no_config(home: Path) -> dict:
    (home / "after" / "adapter_config.json").unlink()
    return {}


def without_rank(home: Path) -> dict:
    config(home / "after", r=0)
    return {}


def other_scale(home: Path) -> dict:
    config(home / "after", lora_alpha=64)
    return {}


def other_kind(home: Path) -> dict:
    config(home / "after", peft_type="IA3")
    return {}


ATTACKS = [
    (users_adapter, "something already"),
    (users_json, "something already"),
    (users_part, "something already"),
    (other_run, "something already"),
    (data_within, "is, or holds, an input"),
    (a_file, "out is no folder"),
    (a_link, "is a link"),
    (cut, "adapter_model.safetensors"),
    (garbage, "adapter_model.safetensors"),
    (damaged_config, "adapter_config.json"),
    (no_config, "holds no adapter_config.json"),
    (without_rank, "adapter_config.json"),
    (other_scale, "lora_alpha"),
    (other_kind, "LoRA"),
    (lambda home: {"out": "before"}, "input"),
    (lambda home: {"out": "after"}, "input"),
    (lambda home: {"out": "after/new"}, "input"),
    (lambda home: {"out": "."}, "input"),
    (lambda home: {"out": "n" * 300}, "too long"),
    (lambda home: {"before": "gone"}, "gone"),
    (lambda home: {"after": "gone"}, "gone"),
    (lambda home: {"before": "r.yaml"}, "r.yaml"),
    (lambda home: {"after": "before"}, "the same adapter"),
    (lambda home: {"new": "sing"}, "sing"),
]


@pytest.mark.parametrize("flag", [(), ("--overwrite",)], ids=["plain", "overwrite"])
@pytest.mark.parametrize(("attack", "told"), ATTACKS, ids=lambda value: getattr(value, "__name__", value))
def test_what_does_not_fit_is_refused_before_any_work(home, capsys, monkeypatch, attack, told, flag):
    changes = attack(home)
    for work in ("load_base", "read_training_inputs"):
        monkeypatch.setattr(refresh_adapter, work, lambda *_, **__: pytest.fail("work has begun"))
    before = snapshot(home)
    code = refresh(*flag, **changes)
    said = capsys.readouterr().err
    assert code == 2, said
    assert said.count("error: ") == 1
    assert "  do: " in said
    assert "Traceback" not in said
    if not (flag and told == "something already"):
        assert told in said
    assert snapshot(home) == before


def test_its_own_folder_is_replaced_only_when_asked_and_only_unchanged(home, capsys):
    assert refresh() == 0, capsys.readouterr().err
    assert {path.name for path in (home / "out").iterdir()} >= {"adapter", "refresh.json"}
    first = snapshot(home / "out")
    assert refresh() == 2
    assert "--overwrite" in capsys.readouterr().err
    assert snapshot(home / "out") == first
    assert refresh("--overwrite", "seed=3") == 0, capsys.readouterr().err
    assert snapshot(home / "out").keys() == first.keys()
    (home / "out" / "notes.txt").write_text("mine")
    assert refresh("--overwrite") == 2
    assert "notes.txt" in capsys.readouterr().err
    assert not [path for path in home.iterdir() if path.name.startswith(".out")]


def test_what_fails_midway_leaves_nothing(home, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError("the disk is gone")

    monkeypatch.setattr(refresh_adapter, "export_model", fail)
    before = snapshot(home)
    assert refresh() == 1
    assert snapshot(home) == before
    assert not (home / "out").exists()
    assert not [path for path in home.iterdir() if path.name.startswith(".out")]


def test_tasks_without_held_out_rows_are_only_tuned_on(home, capsys):
    content = yaml.safe_load((home / "r.yaml").read_text())
    for task in content["tasks"]:
        del task["eval_data"]
    (home / "r.yaml").write_text(yaml.safe_dump(content))
    code = refresh()
    said = capsys.readouterr().err
    assert code == 0, said
    assert json.loads((home / "out" / "refresh.json").read_text())["losses"]["refreshed"] == {}


def test_settings_of_training_that_a_short_run_has_not(home, capsys):
    """patience, evaluations, an online mixture and a start are the run's own."""
    more = ("train.patience=2", "train.eval_every=5", "lora.start=gone", "mixture.online={name: bandit}")
    code = refresh(*more)
    assert code == 0, capsys.readouterr().err
