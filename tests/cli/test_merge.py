"""`mtft merge` with places and flags that can't be: one block, and nothing is touched."""

import os

import pytest

from mtft.__main__ import main
from tests.merge.golden import write_golden


@pytest.fixture
def merge(tmp_path, monkeypatch, capsys):
    """Calls `mtft merge` in a folder with three adapters: (exit code, output, what went to stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_golden(tmp_path / "in")

    def merge(*arguments: str) -> tuple[int, str, str]:
        code = main(["merge", *arguments])
        return code, *capsys.readouterr()

    return merge


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("out", "told"),
    [
        ("in", "holds, an input"),
        ("in/one", "holds, an input"),
        ("in/one/merged", "lies in an input"),
        ("in/../in/one", "holds, an input"),
        ("mine", "README.md"),
        ("mine/README.md", "is no folder"),
        ("pipe", "is no folder"),
        ("link", "a link"),
        ("x" * 300, "too long"),
        (f"{'x' * 300}/out", "too long"),
        ("bad\udcff", "not UTF-8"),
        ("/dev/null", "is no folder"),
        ("/dev/null/out", "is no folder"),
    ],
)
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_places_that_are_refused(merge, tmp_path, out, told, overwrite):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my thesis")
    (tmp_path / "link").symlink_to("mine")
    os.mkfifo(tmp_path / "pipe")
    before = files(tmp_path)
    code, _, err = merge("--out", out, *overwrite, "in/one", "in/two")
    assert code == 2
    assert err.startswith("error: ")
    assert "\n  do:    " in err
    assert told in err or (not overwrite and "something already" in err)
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--rank", "0"], "rank is 0"),
        (["--rank", "-1"], "rank is -1"),
        (["--rank", "9" * 5000], "rank is"),
        (["--min-energy", "nan"], "--min-energy is nan"),
        (["--min-energy", "1.1"], "--min-energy is 1.1"),
        (["--rank", "1", "--min-energy", "0.99"], "keeps only"),
        (["--method", "ties", "--set", "density=1", "--set", "density=0.1"], "density twice"),
        (["--experts", "arrow", "--rank", "4"], "--rank"),
        (["--experts", "arrow", "--min-energy", "0.1"], "--min-energy"),
        (["--base", "in/one", "--min-energy", "0.1"], "--min-energy"),
        (["--base", "in/one", "--rank", "lossless", "--experts", "twin"], "lossless"),
        (["--weights", "1,nan"], "--weights is nan"),
        (["--weights", "1e300,1e300"], "--weights is 1e300"),
    ],
)
def test_flags_that_are_refused(merge, tmp_path, arguments, told):
    before = files(tmp_path)
    code, _, err = merge("--out", "above/out", *arguments, "in/one", "in/two")
    assert code == 2
    assert told in err
    assert len(err) < 6000
    assert "Traceback" not in err
    assert files(tmp_path) == before


def test_an_adapter_whose_name_is_too_long(merge):
    code, _, err = merge("--out", "out", "x" * 300)
    assert code == 2
    assert "no folder" in err


def test_home_is_expanded(merge, tmp_path):
    assert merge("--out=~/merged", "in/one", "in/two")[0] == 0
    assert (tmp_path / "home" / "merged" / "merge.json").is_file()
    assert merge("--out", "again", "~/merged")[0] == 0
    assert not (tmp_path / "~").exists()


def test_what_a_broken_off_overwrite_moved_aside_is_merged(merge, tmp_path):
    """A system without renameat2, killed between its two renames: the next command that reads the folder finds it."""
    assert merge("--out", "a", "in/one", "in/two")[0] == 0
    (tmp_path / "a").rename(tmp_path / ".a.old-host-1-ab")
    assert merge("--out", "b", "a")[0] == 0
    assert (tmp_path / "a" / "merge.json").is_file()
