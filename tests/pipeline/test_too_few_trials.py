"""With fewer trials than a fit needs, or constant surrogates, no command shows a prediction, a gain or an interval."""

import csv
import json
import re

import numpy as np
import pytest
import yaml

from data_mixers import Mixture
from data_mixers.fitting.enough_trials import TOO_FEW, needed_trials
from data_mixers.fitting.surrogate_fits import fit_surrogates
from data_mixers.propose.proposal import propose_mixture
from data_mixers.sweep.ledger import TrialLedger
from data_mixers.sweep.trial import TrialRecord
from mtft.__main__ import main
from mtft.cli.mix import mix_app
from mtft.pipeline.stages import mix
from mtft.recipe.load import load_recipe

NAMES = ("copy", "twice", "shout")
# what a number about a mixture that nobody tried looks like: an interval, a gain, a measure of a fit
CLAIM = re.compile(
    r"\(-?[\d.e-]+ to -?[\d.e-]+\)|gain -?\d|interval -?\d|explains|CV R2|could have shown|more trials would"
)


def records(n, score=lambda row: float(np.exp(-2 * row[0])), seed=0):
    rows = np.random.default_rng(seed).dirichlet(np.ones(3), n)
    return [
        TrialRecord(
            trial=str(i),
            status="done",
            mixture=dict(zip(NAMES, row.tolist(), strict=True)),
            scores={f"{task}/loss": score(row) for task in NAMES},
        )
        for i, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def home(whole_recipe, tmp_path_factory):
    """A recipe with a ledger of four trials, and the same as two CSV files; the current shares are written out."""
    home = tmp_path_factory.mktemp("few")
    content = {
        **whole_recipe,
        "sweep": {"trials": 4, "steps": 1, "eval_limit": 2},
        "output": {"dir": str(home / "run")},
    }
    content = {key: value for key, value in content.items() if key not in ("merge", "fuse")}
    (home / "recipe.yaml").write_text(yaml.safe_dump(content))
    trials = records(4)
    with (home / "x.csv").open("w") as x, (home / "y.csv").open("w") as y:
        one, other = csv.writer(x), csv.writer(y)
        one.writerow(["id", *NAMES])
        other.writerow(["id", "loss"])
        for trial in trials:
            one.writerow([trial.trial, *trial.mixture.values()])
            other.writerow([trial.trial, trial.scores["copy/loss"]])
    return home


RECIPE = ("RECIPE",)
FILES = ("--mixtures", "x.csv", "--scores", "y.csv")
# every way to ask about a mixture; {command of mix: arguments, ...}
WAYS = {
    "mix design": RECIPE,
    "mix sweep": RECIPE,
    "mix propose": RECIPE,
    "mix blame": RECIPE,
    "mix blame --mixtures": ("mix", "blame", *FILES, "--out", "blame.json"),
    "mix fit": (*FILES, "--target", "loss"),
    "mix fit --predict": ("mix", "fit", *FILES, "--target", "loss", "--predict", "x.csv", "--out", "predicted.csv"),
    "mix propose --mixtures": ("mix", "propose", *FILES, "--out", "own.yaml"),
    "check": RECIPE,
}
SILENT = {"mix relevance"}  # has no trials


def test_every_command_of_mix_is_here():
    assert {f"mix {command.name}" for command in mix_app.registered_commands} <= {*WAYS, *SILENT}


@pytest.mark.parametrize("way", WAYS)
def test_four_trials_are_too_few_to_say(home, way, monkeypatch, capsys):
    monkeypatch.chdir(home)
    arguments = WAYS[way] if WAYS[way][0] == "mix" else (*way.split(), *WAYS[way])
    code = main([str(home / "recipe.yaml") if word == "RECIPE" else word for word in arguments])
    said = "\n".join(capsys.readouterr())
    assert code == (2 if "--predict" in arguments else 0), said
    assert TOO_FEW in said
    assert not CLAIM.search(said), said
    assert not (home / "predicted.csv").exists()


@pytest.mark.parametrize("n", [1, 3, 4, needed_trials(3) - 1])
def test_the_files_of_a_proposal_hold_no_prediction(home, tmp_path, n, monkeypatch, capsys):
    recipe = load_recipe(home / "recipe.yaml", [f"output.dir={tmp_path / 'run'}"])
    ledger = TrialLedger(mix.mix_dir(recipe) / mix.LEDGER)
    mix.mix_dir(recipe).mkdir(parents=True)
    ledger.append(records(n))
    proposal = mix.mix_propose(recipe)
    assert proposal.verdict == TOO_FEW
    folder = mix.mix_dir(recipe)
    saved = json.loads((folder / mix.PROPOSAL).read_text())
    assert saved["gain"] is None
    assert saved["predicted"] == saved["predicted_current"] == {}
    assert saved["mixture"] == saved["current"]
    assert all(target["trials"] == [] for target in json.loads((folder / mix.FIT).read_text())["targets"].values())
    text = (folder / mix.MIXTURE).read_text()
    assert TOO_FEW in text
    assert not CLAIM.search(text)
    assert Mixture.from_yaml(folder / mix.MIXTURE, NAMES) == proposal.current
    # the page of the run
    assert main(["report", str(tmp_path / "run")]) == 0
    page = next((tmp_path / "run").glob("**/*.html")).read_text()
    assert TOO_FEW in page
    assert "Each dot is a trial" not in page


def flat(row):
    return 1.0


def noise(row):
    return float(np.random.default_rng([int(row[0] * 1e9), 2]).standard_normal())


@pytest.mark.filterwarnings("ignore:.*every trial has the score")
@pytest.mark.parametrize(("surrogate", "score"), [("auto", flat), ("lightgbm", flat), ("linear", noise)])
def test_a_constant_surrogate_says_nothing_either(surrogate, score):
    fits = fit_surrogates(TrialLedger(None, records(30, score)), ["copy/loss"], surrogate=surrogate)
    assert fits.unsaid is not None
    even = Mixture(NAMES, np.full(3, 1 / 3))
    proposal = propose_mixture(fits, prior=even)
    assert (proposal.verdict, proposal.gain, proposal.predicted) == ("no signal", None, {})
    for text in (fits["copy/loss"].text(), proposal.table()):
        assert "no signal" in text
        assert not re.search(r"\(-?[\d.e-]+ to|explains|gain -?\d", text)
    assert fits.report()["targets"]["copy/loss"]["trials"] == []


def test_trees_that_are_one_number_win_nothing():
    """Five trials, a leaf of two at least: the trees' error is the mean's but for rounding, which is no signal."""
    for n in range(4, 9):
        for seed in range(4):
            model = fit_surrogates(TrialLedger(None, records(n, seed=seed)), ["copy/loss"], surrogate="lightgbm")[
                "copy/loss"
            ].model
            spread = np.ptp(model.mean(model.data.X))
            assert not model.signal or spread > 1e-6


def test_the_design_of_trials_that_were_run_is_kept(home, tmp_path, monkeypatch, capsys):
    arguments = [str(home / "recipe.yaml"), f"output.dir={tmp_path / 'run'}"]
    recipe = load_recipe(home / "recipe.yaml", arguments[1:])
    written = mix.mix_dir(recipe) / mix.DESIGN
    for tried in (False, True):
        if tried:
            TrialLedger(mix.mix_dir(recipe) / mix.LEDGER).append(records(2))
        assert main(["mix", "design", *arguments, "sweep.trials=5"]) == 0
        before = written.read_text()
        assert main(["mix", "design", *arguments, "--design", "cocktail"]) == 0
        assert (written.read_text() == before) == tried
        written.write_text(before)
    assert f"{written} is kept" in capsys.readouterr().err
