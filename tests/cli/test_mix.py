"""`mtft mix fit` and `mtft mix propose` as a user with two CSV files meets them, and mistakes that name the cell."""

import csv

import numpy as np
import pytest

from data_mixers import Mixture
from mtft.__main__ import main
from tests.slow import slow

NAMES = ("news", "code", "chat")
BEST = np.array([0.2, 0.7, 0.1])


def write(path, header, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def trials(tmp_path, monkeypatch):
    """30 trials whose loss is smallest near BEST; also accuracy (higher is better)."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(3), 30)
    loss = 2 + np.sum((np.sqrt(rows) - np.sqrt(BEST)) ** 2, axis=1) + 0.003 * rng.standard_normal(30)
    write("x.csv", ["index", *NAMES], [[i, *map(repr, row)] for i, row in enumerate(rows.tolist())])
    write("y.csv", ["index", "loss", "accuracy"], [[i, value, 1 / value] for i, value in enumerate(loss.tolist())])
    write("natural.csv", ["name", "share"], zip(NAMES, (0.6, 0.2, 0.2), strict=True))
    return tmp_path


def mix(capsys, *arguments):
    code = main(["mix", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


FILES = ("--mixtures", "x.csv", "--scores", "y.csv", "--index", "index")


def test_fit_prints_every_surrogate_by_cross_validation(trials, capsys):
    code, out, _ = mix(capsys, "fit", *FILES, "--target", "loss", "--cv", "4")
    assert code == 0
    table = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    assert {"surrogate", "ridge", "transfer", "trees", "gp", "auto"} <= set(table)
    assert table["surrogate"].split() == ["surrogate", "CV", "rho", "CV", "R2", "cover", "weight"]
    name, rho, r2, cover = table["auto"].split()
    assert float(rho) > 90
    assert float(r2) > 0.8
    assert 0.7 <= float(cover) <= 1


def test_propose_writes_a_mixture_within_the_caps(trials, capsys):
    command = ("propose", *FILES, "--target", "loss", "--prior", "natural.csv", "--cap", "code=0.55", "--kl", "0")
    code, out, err = mix(capsys, *command, "--out", "mixture.yaml")
    assert code == 0, err
    found = Mixture.from_yaml("mixture.yaml", NAMES)
    assert found["code"] == pytest.approx(0.55, abs=1e-6)
    assert "better: cross-fitted gain" in out
    assert "held back by: cap of code (0.55)" in out
    assert "the proposed mixture in mixture.yaml" in err
    again = mix(capsys, *command)[1]
    assert again == out  # reproducible


def test_propose_keeps_what_cannot_be_beaten(trials, capsys):
    write("best.csv", ["name", "share"], zip(NAMES, BEST.tolist(), strict=True))
    code, out, err = mix(capsys, "propose", *FILES, "--target", "loss", "--current", "best.csv", "--out", "m.yaml")
    assert code == 0
    assert "not distinguishable" in out or "worse" in out
    assert "the current mixture, kept, in m.yaml" in err
    np.testing.assert_allclose(Mixture.from_yaml("m.yaml", NAMES).shares, BEST)


def test_epoch_caps_come_from_sizes(trials, capsys):
    write("sizes.csv", ["name", "rows"], zip(NAMES, (500, 100, 1000), strict=True))
    limits = ("--sizes", "sizes.csv", "--total", "1000", "--max-epochs", "4")
    code, out, _ = mix(capsys, "propose", *FILES, "--target", "loss", *limits, "--kl", "0")
    assert code == 0
    assert "cap of code (0.4)" in out
    code, _, err = mix(capsys, "propose", *FILES, "--target", "loss", "--max-epochs", "4")
    assert code == 2
    assert "--max-epochs needs --sizes and --total" in err


def test_few_trials_are_said_to_be_few(trials, capsys):
    code, out, err = mix(capsys, "fit", *FILES, "--target", "loss", "--limit", "6", "--surrogate", "ridge")
    assert code == 0
    assert "warning: 6 trials of 3 tasks" in err
    code, _, err = mix(capsys, "fit", *FILES, "--target", "loss", "--limit", "3")
    assert code == 2
    assert "at least 5" in err


def test_large_runs_move_predictions_to_their_scale(trials, capsys):
    rows = np.random.default_rng(5).dirichlet(np.ones(3), 20)
    loss = 1 + 0.5 * np.sum((np.sqrt(rows) - np.sqrt(BEST)) ** 2, axis=1)
    write("bx.csv", ["index", *NAMES], [[i, *map(repr, row)] for i, row in enumerate(rows[:6].tolist())])
    write("by.csv", ["index", "loss"], [[i, value] for i, value in enumerate(loss[:6].tolist())])
    write("z.csv", ["index", *NAMES], [[i, *map(repr, row)] for i, row in enumerate(rows[6:].tolist())])
    large = ("--large-mixtures", "bx.csv", "--large-scores", "by.csv", "--predict", "z.csv", "--out", "p.csv")
    code, out, err = mix(capsys, "fit", *FILES, "--target", "loss", *large)
    assert code == 0, err
    assert "mapped to 6 large runs" in out
    with open("p.csv") as file:
        table = list(csv.DictReader(file))
    np.testing.assert_allclose([float(row["loss"]) for row in table], loss[6:], atol=0.03)
    assert all(float(row["loss_lower"]) < float(row["loss"]) < float(row["loss_upper"]) for row in table)


def spoil(name, line, column, text):
    """Replace a cell (line 1 = header)."""
    with open(name, newline="") as file:
        rows = list(csv.reader(file))
    rows[line - 1][column] = text
    write(name, rows[0], rows[1:])


@pytest.mark.parametrize(
    ("file", "line", "column", "text", "says"),
    [
        ("x.csv", 4, 1, "0.9", "x.csv:4"),
        ("x.csv", 4, 1, "-0.1", "row 2: a negative share"),
        ("x.csv", 4, 1, "", "x.csv:4, column news"),
        ("x.csv", 4, 1, "nan", "x.csv:4, column news"),
        ("x.csv", 5, 0, "2", "index 2 stands on lines 4 and 5"),
        ("y.csv", 5, 0, "99", "are not in y.csv: 3"),
        ("y.csv", 3, 1, "abc", "y.csv:3, column loss"),
        ("y.csv", 1, 1, "accuracy", "column named twice: accuracy"),
    ],
)
def test_a_wrong_cell_is_named(trials, capsys, file, line, column, text, says):
    spoil(file, line, column, text)
    code, _, err = mix(capsys, "fit", *FILES, "--target", "loss")
    assert code == 2
    assert says in err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["", "nan", "NaN", "inf"])
def test_a_score_that_is_missing_or_diverged_is_left_out_and_counted(trials, capsys, text):
    spoil("y.csv", 3, 1, text)
    code, out, err = mix(capsys, "fit", *FILES, "--target", "loss", "--surrogate", "ridge")
    assert code == 0, err
    assert "29 trials (1 without a finite score left out)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("fit", *FILES, "--target", "los"), "unknown target 'los' (did you mean 'loss'?)"),
        (("fit", *FILES, "--target", "loss", "--limit", "0"), "limit is 0"),
        (("fit", *FILES, "--target", "loss", "--predict", "gone.csv", "--out", "p.csv"), "gone.csv"),
        (("fit", *FILES, "--target", "loss", "--surrogate", "rigde"), "did you mean 'ridge'?"),
        (("propose", *FILES, "--cap", "code=0.1", "--cap", "news=0.1", "--cap", "chat=0.1"), "caps add up to 0.3"),
        (("propose", *FILES, "--weight", "los=1"), "did you mean 'loss'?"),
        (("propose", "--mixtures", "x.csv"), "both --mixtures and --scores"),
        (("propose",), "both --mixtures and --scores"),
        *slow(  # they are seen after the fit
            (("propose", *FILES, "--cap", "cod=0.5"), "did you mean 'code'?"),
            (("propose", *FILES, "--cap", "code"), "--cap NAME=SHARE"),
            (("propose", *FILES, "--prior", "gone.csv"), "gone.csv"),
        ),
    ],
)
def test_mistakes_on_the_command_line_say_what_was_meant(trials, capsys, arguments, says):
    code, _, err = mix(capsys, *arguments)
    assert code == 2
    assert says in err
    assert "Traceback" not in err


def test_relevance_of_the_spec_s_example(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("w.csv", ["row", "a", "b", "both", "target"], [[0, 1, 0, 1, 1], [1, 0, 1, 1, 1]])
    code, out, _ = mix(capsys, "relevance", "--sketches", "w.csv", "--target", "target", "--rows", "600")
    assert code == 0
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:4]}
    assert table == {
        "a": ["0.0000", "0.0000", "0"],
        "b": ["0.0000", "0.0000", "0"],
        "both": ["1.0000", "1.0000", "600"],
    }
    code, out, _ = mix(capsys, "relevance", "--sketches", "w.csv", "--target", "target", "--method", "l2")
    assert [line.split()[2] for line in out.splitlines()[1:4]] == ["0.1667", "0.1667", "0.6667"]
    code, _, err = mix(capsys, "relevance", "--sketches", "w.csv", "--target", "targte")
    assert code == 2
    assert "did you mean 'target'?" in err


@pytest.mark.parametrize("first", [None, "index", "id", "trial", "row", "", "name", "counted"])
@pytest.mark.parametrize("order", [("a", "b", "both", "target"), ("target", "both", "b", "a")])
def test_relevance_loses_no_task_with_or_without_an_index_column(tmp_path, monkeypatch, capsys, first, order):
    monkeypatch.chdir(tmp_path)
    columns = {"a": (0.5, 0.0), "b": (0.0, 1.0), "both": (1.0, 1.0), "target": (1.0, 1.0)}
    rows = [[columns[name][line] for name in order] for line in (0, 1)]
    if first is not None:
        rows = [
            [{"name": f"layer {line}", "counted": line + 1}.get(first, line), *row] for line, row in enumerate(rows)
        ]
    write("w.csv", [*([] if first is None else [first]), *order], rows)
    code, out, err = mix(capsys, "relevance", "--sketches", "w.csv", "--target", "target")
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[1:4]] == [name for name in order if name != "target"]
    assert ("numbers the rows" in err) == (first is not None)


RIDGE = ("--surrogate", "ridge", "--target", "loss")
LARGE = ("--large-mixtures", "x.csv", "--large-scores", "z.csv")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (("fit", *FILES, *RIDGE, "--predict", "x.csv"), "x.csv"),
        (("fit", *FILES, *RIDGE, "--predict", "x.csv"), "y.csv"),
        (("fit", *FILES, *RIDGE, "--predict", "natural.csv"), "natural.csv"),
        (("fit", *FILES, *RIDGE, "--predict", "x.csv"), "below/../x.csv"),
        (("fit", *FILES, *RIDGE, "--predict", "x.csv"), "hard.csv"),
        (
            ("fit", *FILES, *RIDGE, "--predict", "x.csv", "--large-mixtures", "x.csv", "--large-scores", "z.csv"),
            "z.csv",
        ),
        (("propose", *FILES, *RIDGE), "x.csv"),
        (("propose", *FILES, *RIDGE), "y.csv"),
        (("propose", *FILES, *RIDGE, "--prior", "natural.csv"), "natural.csv"),
        (("propose", *FILES, *RIDGE, "--current", "natural.csv"), "natural.csv"),
        (("propose", *FILES, *RIDGE, "--sizes", "natural.csv"), "natural.csv"),
    ],
)
def test_no_output_is_an_input(trials, capsys, command, name):
    (trials / "below").mkdir()
    (trials / "hard.csv").hardlink_to("x.csv")
    (trials / "z.csv").write_text((trials / "y.csv").read_text())
    before = {path.name: path.read_bytes() for path in trials.glob("*.csv")}
    code, out, err = mix(capsys, *command, "--out", name, "--overwrite")
    assert (code, out) == (2, "")
    assert "the output is an input" in err
    assert {path.name: path.read_bytes() for path in trials.glob("*.csv")} == before


@pytest.mark.parametrize("command", [("fit", *FILES, *RIDGE, "--predict", "x.csv"), ("propose", *FILES, *RIDGE)])
def test_nothing_there_is_replaced_unasked(trials, capsys, command):
    (trials / "out").write_text("mine")
    (trials / "folder").mkdir()
    (trials / "link").symlink_to("out")
    for name, told in (("out", "there already"), ("folder", "a folder"), ("link", "a link"), ("x" * 300, "too long")):
        code, out, err = mix(capsys, *command, "--out", name)
        assert (code, out) == (2, ""), name
        assert told in err
    assert (trials / "out").read_text() == "mine"
    assert mix(capsys, *command, "--out", "out", "--overwrite")[0] == 0
    assert "mine" not in (trials / "out").read_text()


def test_flags_that_a_recipe_would_ignore(trials, capsys):
    code, _, err = mix(capsys, "propose", "recipe.yaml", "--cap", "news=0.1", "--kl", "1")
    assert code == 2
    assert "--cap, --kl" in err


def scores(name, factor, column="loss"):
    """y.csv with the losses multiplied, or empty (None)."""
    with open("y.csv", newline="") as file:
        header, *rows = csv.reader(file)
    text = [[row[0], "" if factor is None else repr(float(row[1]) * factor), row[2]] for row in rows]
    return write(name, header, text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--kl", "-1"), "kl is -1"),
        (("--kl", "nan"), "kl is nan"),
        (("--min-gain", "nan"), "--min-gain is nan"),
        (("--min-gain", "inf"), "--min-gain is inf"),
        (("--cv", "1"), "cv is 1"),
        (("--limit", "0"), "limit is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--seed", "9" * 30), "seed is 999"),
        (("--weight", "loss=nan"), "--weight loss is nan"),
        (("--cap", "news=nan"), "--cap news=nan"),
        (("--cap", "news=0.1", "--cap", "code=0.1", "--cap", "chat=0.1"), "caps add up to 0.3"),
        (("--floor", "news=0.6", "--floor", "code=0.6"), "floors add up to 1.2"),
        (("--max-epochs", "-1", "--sizes", "natural.csv", "--total", "5"), "--max-epochs is -1"),
        (("--max-epochs", "nan", "--sizes", "natural.csv", "--total", "5"), "--max-epochs is nan"),
        (("--max-epochs", "1", "--sizes", "natural.csv", "--total", "0"), "--total is 0"),
        (("--max-epochs", "1", "--sizes", "natural.csv", "--total", "nan"), "--total is nan"),
    ],
)
def test_numbers_that_cannot_be(trials, capsys, arguments, told):
    code, _, err = mix(capsys, "propose", *FILES, *RIDGE, *arguments, "--out", "m.yaml")
    assert code == 2
    assert err.startswith("error: ")
    assert told in err
    assert not (trials / "m.yaml").exists()


@pytest.mark.parametrize("command", ["fit", "propose"])
def test_scores_that_are_all_empty(trials, capsys, command):
    scores("empty.csv", None)
    files = ("--mixtures", "x.csv", "--scores", "empty.csv")
    code, _, err = mix(capsys, command, *files, *RIDGE)
    assert code == 2
    assert "no trial has a finite 'loss': all 30 are empty" in err
    assert "empty.csv" in err


@pytest.mark.parametrize("factor", [1e200, 1e-200, 1e-300])
def test_scores_of_any_size_say_the_same(trials, capsys, factor):
    """The shares, the gain and the verdict have no unit; what is predicted has that of the scores."""
    scores("times.csv", factor)
    found, tables = [], []
    for name, out in (("y.csv", "near"), ("times.csv", "far")):
        files = ("--mixtures", "x.csv", "--scores", name, "--index", "index", *RIDGE)
        assert mix(capsys, "fit", *files, "--predict", "x.csv", "--out", f"{out}.csv")[0] == 0
        code, text, _ = mix(capsys, "propose", *files, "--out", f"{out}.yaml")
        assert code == 0
        found.append((Mixture.from_yaml(f"{out}.yaml", NAMES).shares, text.splitlines()[-1]))
        tables.append(np.loadtxt(f"{out}.csv", delimiter=",", skiprows=1)[:, 1:])
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-4)
    assert found[1][1].split(":")[0] == found[0][1].split(":")[0] == "better"
    np.testing.assert_allclose(tables[1] / factor, tables[0], rtol=1e-6)


@pytest.mark.parametrize("few", [(), ("--limit", "5")])
def test_what_is_kept_lies_inside_the_bounds(trials, capsys, few):
    command = ("propose", *FILES, *RIDGE, *few, "--cap", "code=0", "--cap", "chat=0")
    code, out, err = mix(capsys, *command, "--out", "m.yaml")
    assert code == 0, err
    np.testing.assert_allclose(Mixture.from_yaml("m.yaml", NAMES).shares, [1, 0, 0], atol=1e-9)
    assert "your current mixture breaks the bounds (code has 0.333333, its cap is 0" in out
    assert "moved inside the bounds" in err


def test_shares_that_do_not_quite_add_up_are_named(trials, capsys):
    with open("x.csv", newline="") as file:
        header, *rows = csv.reader(file)
    write("off.csv", header, [[row[0], *(repr(1.001 * float(cell)) for cell in row[1:])] for row in rows])
    write("prior.csv", ["name", "share"], zip(NAMES, (0.601, 0.2, 0.2), strict=True))
    files = ("--mixtures", "off.csv", "--scores", "y.csv", "--index", "index")
    code, _, err = mix(capsys, "propose", *files, *RIDGE, "--prior", "prior.csv")
    assert code == 0
    assert "off.csv: the shares of 30 rows don't add up to 1 (line 2: 1.001); scaled" in err
    assert "prior.csv: the shares add up to 1.001000; renormalised" in err
