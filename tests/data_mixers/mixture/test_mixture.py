"""Shares by hand; what is accepted, and what the message of a refusal names."""

import numpy as np
import pytest

from data_mixers import MixError, Mixture, natural, tempered, uniform

SIZES = {"sql": 900, "sum": 90, "chat": 10}


def test_priors_by_hand():
    np.testing.assert_allclose(natural(SIZES).shares, [0.9, 0.09, 0.01])
    np.testing.assert_allclose(tempered(SIZES, 0).shares, [1 / 3] * 3)
    root = np.sqrt([900, 90, 10])
    np.testing.assert_allclose(tempered(SIZES, 0.5).shares, root / root.sum())
    assert uniform(("a", "b")).as_dict() == {"a": 0.5, "b": 0.5}


def test_distances_and_epochs():
    p, q = Mixture.of({"a": 0.75, "b": 0.25}), Mixture.of({"b": 0.5, "a": 0.5})
    assert p.kl(q) == pytest.approx(0.75 * np.log(1.5) + 0.25 * np.log(0.5))
    assert p.l1(q) == pytest.approx(0.5)
    assert Mixture.of({"a": 0.5, "b": 0.5}).kl(Mixture.of({"a": 1.0, "b": 0.0})) == np.inf
    np.testing.assert_allclose(p.epochs({"a": 75, "b": 100}, 100), [1.0, 0.25])


def test_yaml_round_trip_is_exact_and_orders_by_name(tmp_path):
    p = Mixture.of({"sql": 1 / 3, "yes": 1 / 7, "a.b-c_d": 1 - 1 / 3 - 1 / 7})
    p.to_yaml(tmp_path / "m.yaml", comment="two\nlines")
    assert Mixture.from_yaml(tmp_path / "m.yaml") == p
    assert Mixture.from_yaml(tmp_path / "m.yaml", names=("yes", "a.b-c_d", "sql")).names[0] == "yes"


def test_rounded_shares_are_renormalised_with_a_note(tmp_path):
    (tmp_path / "m.yaml").write_text("a: 0.333\nb: 0.666\n")
    with pytest.warns(UserWarning, match="renormalised"):
        p = Mixture.from_yaml(tmp_path / "m.yaml")
    assert p.shares.sum() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 0.5\nb: 0.4\n", "0.9"),
        ("a: 0.5\na: 0.5\n", "lines 1 and 2"),
        ("a: 1.5\nb: -0.5\n", "-0.5"),
        ("a: .nan\nb: 1\n", "not a number"),
        ("a: half\nb: 1\n", "'half'"),
        ("", "no shares"),
        ("a: [1\n", "not YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, text, says):
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(MixError) as error:
        Mixture.from_yaml(tmp_path / "m.yaml")
    assert says in str(error.value)
    assert "m.yaml" in str(error.value)


def test_unknown_and_missing_names_come_with_the_nearest(tmp_path):
    (tmp_path / "m.yaml").write_text("sqll: 0.5\nsum: 0.5\n")
    with pytest.raises(MixError, match="did you mean 'sql'") as error:
        Mixture.from_yaml(tmp_path / "m.yaml", names=("sql", "sum"))
    assert "no share for task 'sql'" in str(error.value)


def test_csv_in_both_shapes(tmp_path):
    (tmp_path / "row.csv").write_text("a,b,c\n0.5,0.25,0.25\n")
    (tmp_path / "columns.csv").write_text("name,share\na,0.5\nb,0.25\nc,0.25\n")
    assert Mixture.from_csv(tmp_path / "row.csv") == Mixture.from_csv(tmp_path / "columns.csv")


def test_shares_cannot_be_written_to():
    with pytest.raises(ValueError):
        uniform(("a", "b")).shares[0] = 1.0
