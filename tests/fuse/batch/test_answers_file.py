"""The side file of `fuse generate`: killed anywhere, damaged anywhere, or somebody else's; the output is the same."""

import json
import os
import random
import sys
from io import FileIO

import pytest

from mtft.common.errors import UserError
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.batch import answers_file
from mtft.fuse.batch.request_rows import read_requests
from mtft.fuse.batch.resumable_jsonl import output_of, resume, run_buckets

# the children that die hold no thread's lock: they touch files only
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
ROWS = [{"prompt": f"row {i}", "id": i} for i in range(5)] + [{"bad": True}]


def prepare(index, row):
    if "bad" in row:
        raise FusionError("a bad row")
    return len(row["prompt"])


def run(folder, *, work=None, identity="one", overwrite=False, rows=None, **options):
    """What `_run` of jsonl_commands does, without models. rows: changes the input."""
    source = folder / "x.jsonl"
    if rows is not None or not source.exists():
        source.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    work = work or (lambda found: [{"text": f"{row['prompt']} é {row['id'] / 3}"} for row in found])
    with output_of(source, folder / "y.jsonl", overwrite=overwrite) as answers:
        jobs = read_requests(source, prepare)
        done = resume(jobs, answers, identity, overwrite=overwrite)
        return run_buckets(jobs, answers, done, work, bucket=2, **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def whole(tmp_path):
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole")
    return (tmp_path / "whole" / "y.jsonl").read_bytes()


@pytest.fixture
def broken_off(tmp_path):
    """A folder whose run was interrupted in its third bucket."""
    folder = tmp_path / "broken"
    folder.mkdir()
    run_interrupted(folder)
    return folder


def run_interrupted(folder, text="", **options):
    calls = []

    def work(rows):
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [{"text": text or f"{row['prompt']} é {row['id'] / 3}"} for row in rows]

    with pytest.raises(KeyboardInterrupt):
        run(folder, work=work, **options)


def killed_at(event, folder, **options):
    """The run in a child that dies at its n-th touch of the disk, in the middle of it if it writes. False: it ended."""
    child = os.fork()
    if child == 0:
        left = [event]

        def touch(name, *_):
            if name in ("open", "os.rename", "os.remove", "os.truncate"):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)

        class Dying(FileIO):
            def write(self, data):
                left[0] -= 1
                if not left[0]:
                    super().write(bytes(data)[: len(data) * 2 // 3])
                    os._exit(9)
                return super().write(data)

        answers_file.FileIO = Dying
        sys.addaudithook(touch)
        try:
            run(folder, **options)
        except UserError:  # it is all done
            os._exit(0)
        except BaseException:  # noqa: BLE001  a child of the test must not go on with the test
            os._exit(3)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def run_again(folder, **options):
    """The same command; where all was done but for the lock's file, it may say that the output is there."""
    try:
        assert run(folder, **options).rows == len(ROWS)
    except UserError as error:
        assert "there already" in error.what  # noqa: PT017
        assert names(folder) == ["x.jsonl", "y.jsonl"]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("overwrite", "step"), [(False, 4), pytest.param(False, 1, marks=SLOW), pytest.param(True, 1, marks=SLOW)]
)
def test_killed_anywhere_and_run_again_gives_the_same_and_leaves_nothing(tmp_path, whole, overwrite, step):
    points = 0
    for event in range(1, 200, step):
        folder = tmp_path / str(event)
        folder.mkdir()
        if overwrite:
            (folder / "y.jsonl").write_text("older\n")
        if not killed_at(event, folder, overwrite=overwrite):
            break
        points += 1
        if overwrite:
            assert (folder / "y.jsonl").read_bytes() in (b"older\n", whole)
        run_again(folder, overwrite=overwrite)
        assert (folder / "y.jsonl").read_bytes() == whole
        assert names(folder) == ["x.jsonl", "y.jsonl"]
    assert points > 15 // step


@SLOW
def test_killed_twice(tmp_path, whole):
    draw = random.Random(0)
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        first, second = (killed_at(draw.randint(1, 30), folder) for _ in range(2))
        if first or second:
            run_again(folder)
        assert (folder / "y.jsonl").read_bytes() == whole
        assert names(folder) == ["x.jsonl", "y.jsonl"]


def test_a_run_that_has_its_output_stands_in_nobodys_way(tmp_path, monkeypatch):
    """It died before it removed its side file; then other rows, or another recipe, are asked for."""
    for name, options in {"rows": {"rows": ROWS[:2]}, "recipe": {"identity": "other"}}.items():
        folder = tmp_path / name
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(answers_file.AnswersFile, "remove", lambda self: self.close())
            run(folder)
        assert ".y.jsonl.mtft-part" in names(folder)
        before = (folder / "y.jsonl").read_bytes()
        with pytest.raises(UserError, match="there already"):
            run(folder, **options)
        assert (folder / "y.jsonl").read_bytes() == before
        assert run(folder, overwrite=True, **options).resumed == 0
        assert names(folder) == ["x.jsonl", "y.jsonl"]


DAMAGE = {
    "not JSON": lambda line: line[:-9] + "\n",
    "another answer": lambda line: line.replace("row 1", "row 8"),
    "another index": lambda line: line.replace('"index": 1', '"index": 4'),
    "another request": lambda line: line.replace('"request": "', '"request": "0'),
    "no checksum": lambda line: json.dumps({"answer": json.loads(line)["answer"]}) + "\n",
    "a number": lambda line: "7\n",
    "NaN": lambda line: line.replace('"id": 1', '"id": NaN'),
    "half a pair": lambda line: line.replace("row 1", "\\ud83d"),
    "zero bytes": lambda line: "\0" * len(line) + "\n",
    "deep": lambda line: "[" * 100_000 + "\n",
    "no UTF-8": lambda line: line.replace("row 1", "\udcff"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_line_is_computed_again(broken_off, whole, kind):
    part = broken_off / ".y.jsonl.mtft-part"
    lines = part.read_text().splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if "row 1" in line)
    lines[at] = DAMAGE[kind](lines[at])
    part.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match="a line is damaged"):
        done = run(broken_off)
    assert done.resumed == 4  # of five: four rows and the bad one
    assert (broken_off / "y.jsonl").read_bytes() == whole
    assert names(broken_off) == ["x.jsonl", "y.jsonl"]


def test_a_damaged_first_line_makes_all_of_it_worth_nothing(broken_off, whole):
    part = broken_off / ".y.jsonl.mtft-part"
    part.write_text(part.read_text().replace('"fingerprint": "one"', '"fingerprint": one'))
    with pytest.warns(UserWarning, match="6 lines are damaged"):
        assert run(broken_off).resumed == 0
    assert (broken_off / "y.jsonl").read_bytes() == whole


def test_lines_of_another_run_are_not_taken(broken_off, tmp_path, whole):
    """Copied in from a file whose fingerprint differs: the checksum knows whose it is."""
    other = tmp_path / "other"
    other.mkdir()
    run_interrupted(other, identity="other", text="x")
    part = broken_off / ".y.jsonl.mtft-part"
    part.write_text(part.read_text() + (other / ".y.jsonl.mtft-part").read_text().partition("\n")[2])
    with pytest.warns(UserWarning, match="damaged"):
        run(broken_off)
    assert (broken_off / "y.jsonl").read_bytes() == whole


@pytest.mark.parametrize("kind", ["text", "folder", "link", "pipe", "broken link"])
def test_what_is_not_ours_at_the_side_files_place_is_left_alone(tmp_path, kind):
    part, users = tmp_path / ".y.jsonl.mtft-part", tmp_path / "mine.txt"
    users.write_text("mine\n")
    if kind == "text":
        part.write_text('{"mtft": "my notes"}\n')
    elif kind == "folder":
        part.mkdir()
    elif kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to(users if kind == "link" else tmp_path / "nowhere")
    before = names(tmp_path)
    with pytest.raises(FusionError, match="stands where the answers are kept") as refused:
        run(tmp_path)
    assert refused.value.where == str(part)
    assert names(tmp_path) == sorted([*before, "x.jsonl"])
    assert users.read_text() == "mine\n"
    if kind == "text":
        assert part.read_text() == '{"mtft": "my notes"}\n'


def test_a_users_files_with_the_old_names_are_left_alone(tmp_path):
    for name in ("y.jsonl.part", "y.jsonl.sorted"):
        (tmp_path / name).write_text("mine")
    run(tmp_path)
    assert names(tmp_path) == ["x.jsonl", "y.jsonl", "y.jsonl.part", "y.jsonl.sorted"]
    assert {(tmp_path / name).read_text() for name in ("y.jsonl.part", "y.jsonl.sorted")} == {"mine"}


def test_a_side_file_of_a_newer_version(broken_off):
    part = broken_off / ".y.jsonl.mtft-part"
    part.write_text(part.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(FusionError, match="newer version") as refused:
        run(broken_off)
    assert refused.value.do == "pip install -U mtft"


def test_another_recipe_may_begin_where_no_answer_stands_yet(tmp_path):
    for event in range(1, 30):
        if not killed_at(event, tmp_path, identity="other") or (tmp_path / ".y.jsonl.mtft-part").exists():
            break
    assert run(tmp_path).rows == len(ROWS)


@pytest.mark.parametrize("space", [10, 700, 900, 1200])
def test_a_full_disk_is_said_and_the_same_command_continues(tmp_path, whole, monkeypatch, space):
    """In the first line, in an answer, in the finished output, in the line that says so."""

    class Full(FileIO):
        room = space

        def write(self, data):
            taken = data[: max(0, Full.room)]
            Full.room -= len(data)
            if not taken:
                raise OSError(28, "No space left on device")
            return super().write(taken)

    with monkeypatch.context() as patch:
        patch.setattr(answers_file, "FileIO", Full)
        with pytest.raises(FusionError, match="No space left on device") as full:
            run(tmp_path)
    assert full.value.where.startswith(str(tmp_path / ".y.jsonl."))
    assert not (tmp_path / "y.jsonl").exists()
    assert "the same command continues" in full.value.do
    assert (run(tmp_path).resumed > 0) == (space > 10)
    assert (tmp_path / "y.jsonl").read_bytes() == whole
    assert names(tmp_path) == ["whole", "x.jsonl", "y.jsonl"]


def test_progress_is_said(tmp_path, monkeypatch):
    from mtft.common import long_work

    monkeypatch.setattr(long_work, "SILENCE", 0.0)
    said = []
    run(tmp_path, say=said.append)
    assert [line.partition(" after ")[0] for line in said] == [f"rows: {n} of 6 done" for n in (1, 3, 5)]
