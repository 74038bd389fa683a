"""What the mix stage writes beside a user's files: ours are replaced and continued, a user's own never, nor touched."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import TrialRecord
from mtft.__main__ import main
from mtft.pipeline.stages import mix, mix_files
from mtft.recipe.load import load_recipe

MINE = {
    "design.csv": "sample,copy,twice\n1,0.5,0.5\n",
    "fit.json": '{"slope": 1.5}\n',
    "proposal.json": '{"names": [], "targets": {}}\n',
    "blame.json": '{"mixture": "mine"}\n',
    "mixture.yaml": "shares: {copy: 0.2, shout: 0.3, twice: 0.5}  # by hand\n",
}
WRITTEN = {
    "design": ("design.csv",),
    "sweep": ("design.csv", "ledger.jsonl"),
    "propose": ("fit.json", "proposal.json", "mixture.yaml"),
    "blame": ("blame.json",),
}
# One that looks nearly like ours, one that holds nothing, one that is cut: none may be taken for ours.
NEARLY = {
    "design.csv": ["trial,copy\n1,0.500000\n", "", "trial,copy\n0123456789ab,0.5\n", "trial,copy\n0123456789ab,0.50"],
    "fit.json": ['{"names": ["a"], "targets": {}, "notes": "mine"}', "", "[]", '{"names": ["a"], "targets": [1]}'],
    "proposal.json": ['{"mixture": {}, "verdict": "mine"}', "", '{"mixture": '],
    "blame.json": ['{"mixture": {}, "datasets": {}}', "", '{"mixture": {}, "level": 0.9, "datasets": []}'],
    "mixture.yaml": ["", "# my mixture\nshares: {a: 1}\n", "\ufeff# mixture\n", "# mixture proposed from trials\n"],
    "ledger.jsonl": ["notes without an end", '{"trial": 5}\n', "a\n", '{"tri": 1'],
    "ledger.jsonl.lock": ["mine"],
    "ledger.jsonl.append.lock": ["mine"],
}


def trial(number: int, names) -> TrialRecord:
    shares = {name: (1 + number * place % 7) for place, name in enumerate(names, 1)}
    total = sum(shares.values())
    mixture = {name: share / total for name, share in shares.items()}
    return TrialRecord(
        trial=f"{number:012x}",
        status="done",
        mixture=mixture,
        scores={f"{name}/loss": 1 + mixture[name] ** 2 for name in names},
        config="c",
    )


@pytest.fixture(scope="module")
def swept(whole_recipe, tmp_path_factory):
    """A recipe, and beside it the mix folder of its sweep, with what every command has written."""
    home = tmp_path_factory.mktemp("mix-files")
    content = {key: value for key, value in whole_recipe.items() if key not in ("merge", "fuse")}
    content["output"] = {"dir": str(home / "run")}
    (home / "recipe.yaml").write_text(yaml.safe_dump(content))
    recipe = load_recipe(home / "recipe.yaml")
    assert main(["mix", "design", str(home / "recipe.yaml")]) == 0
    ledger = TrialLedger(mix.mix_dir(recipe) / mix.LEDGER)
    for number in range(16):
        ledger.append([trial(number, recipe.task_names)])
    assert main(["mix", "propose", str(home / "recipe.yaml")]) == 0
    assert main(["mix", "blame", str(home / "recipe.yaml")]) == 0
    return home


@pytest.fixture
def place(swept, tmp_path):
    """(recipe file, its mix folder: a copy of what was written)."""
    content = yaml.safe_load((swept / "recipe.yaml").read_text())
    content["output"] = {"dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    shutil.copytree(swept / "run", tmp_path / "run")
    return tmp_path / "recipe.yaml", tmp_path / "run" / "mix"


def cases():
    return [
        pytest.param(command, name, text, id=f"{command}-{name}-{number}")
        for command, names in {**WRITTEN, "run": tuple(name for name in NEARLY if name != "blame.json")}.items()
        for name in names + (("ledger.jsonl.lock", "ledger.jsonl.append.lock") if command == "sweep" else ())
        for number, text in enumerate([*([MINE[name]] if name in MINE else []), *NEARLY[name]])
    ]


@pytest.mark.parametrize(("command", "name", "text"), cases())
def test_a_file_of_the_users_is_refused_at_the_start_and_kept(place, capsys, monkeypatch, command, name, text):
    recipe, folder = place
    (folder / name).write_text(text)
    for module, work in (("mtft.pipeline.stages.mix", "_stores"), ("mtft.data.store.token_store", "open_stores")):
        monkeypatch.setattr(f"{module}.{work}", lambda *_: pytest.fail("work has begun"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = main(["run", str(recipe)] if command == "run" else ["mix", command, str(recipe)])
    said = capsys.readouterr()
    assert code == 2, said.err
    assert str(folder / name) in said.err
    assert said.err.count("error:") == 1
    assert "do:" in said.err
    assert said.out == ""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("kind", ["folder", "link"])
@pytest.mark.parametrize(("command", "name"), [(c, n) for c, names in WRITTEN.items() for n in names])
def test_what_is_no_file_is_refused(place, capsys, command, name, kind):
    recipe, folder = place
    (folder / name).unlink()
    mine = folder / "mine"
    mine.write_text("mine")
    (folder / name).mkdir() if kind == "folder" else (folder / name).symlink_to(mine)
    assert main(["mix", command, str(recipe)]) == 2
    assert str(folder / name) in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert (folder / name).is_symlink() if kind == "link" else (folder / name).is_dir()


def test_what_the_commands_have_written_is_ours(place, capsys):
    recipe, folder = place
    for name in mix_files.OURS:
        assert (folder / name).is_file(), name
    before = {name: (folder / name).read_bytes() for name in mix_files.OURS}
    assert main(["mix", "design", str(recipe)]) == 0
    assert main(["mix", "propose", str(recipe)]) == 0, capsys.readouterr().err
    assert main(["mix", "blame", str(recipe)]) == 0, capsys.readouterr().err
    assert {name: (folder / name).read_bytes() for name in mix_files.OURS} == before


@pytest.mark.slow
def test_files_of_earlier_versions_are_ours(place, capsys):
    """Without a format, and with the comment that mixture.yaml once began with."""
    recipe, folder = place
    for name in (mix.FIT, mix.PROPOSAL):
        content = json.loads((folder / name).read_text())
        del content["format"]
        (folder / name).write_text(json.dumps(content))
    shares = (folder / mix.MIXTURE).read_text().partition("shares:")[2]
    for first in ("the current mixture, kept", "better: cross-fitted gain 0.2", "mixture proposed from trials"):
        (folder / mix.MIXTURE).write_text(f"# {first}\nshares:{shares}")
        assert main(["mix", "propose", str(recipe)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("torn", ['{"trial": "00', '{"tr', "\0\0\0"])
def test_a_killed_sweep_is_ours(place, capsys, torn):
    """A torn last line, empty locks, and no proposal yet: a propose goes on as before."""
    recipe, folder = place
    for name in (mix.FIT, mix.PROPOSAL, mix.MIXTURE):
        (folder / name).unlink()
    with (folder / mix.LEDGER).open("a") as file:
        file.write(torn)
    (folder / "ledger.jsonl.lock").touch()
    loaded = load_recipe(recipe)
    mix_files.refuse_foreign_files(loaded, mix.DESIGN, mix.LEDGER)
    assert main(["mix", "propose", str(recipe)]) == 0, capsys.readouterr().err
    TrialLedger(folder / mix.LEDGER).append([trial(99, loaded.task_names)])
    assert len(TrialLedger(folder / mix.LEDGER).records) == 17


def test_a_proposal_never_replaces_the_mixture_that_it_reads(place, capsys):
    recipe, folder = place
    before = (folder / mix.MIXTURE).read_bytes()
    assert main(["mix", "propose", str(recipe), f"mixture.shares={{file: {folder / mix.MIXTURE}}}"]) == 2
    assert "the output is an input" in capsys.readouterr().err
    assert (folder / mix.MIXTURE).read_bytes() == before


def test_a_finished_stage_writes_nothing_and_refuses_nothing(place):
    """Its mixture may have been mended by hand: it is read."""
    recipe, folder = place
    (folder / mix.MIXTURE).write_text(MINE[mix.MIXTURE])
    (folder / "done.json").write_text('{"seconds": 1}')
    mix_files.refuse_foreign_stage(load_recipe(recipe))
