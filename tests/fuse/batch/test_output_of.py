"""Where `fuse generate` may write and what it may read: asked before anything else is done."""

import os
import time

import pytest

from mtft.common.errors import UserError
from mtft.common.folder_lock import FolderBusyError, sole_writer
from mtft.fuse.alpha.spec import FusionError
from mtft.fuse.batch.resumable_jsonl import output_of
from tests.fuse.batch.test_answers_file import names, run

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "device", "the input"])
def test_an_output_that_is_no_file(tmp_path, kind):
    out = tmp_path / "y.jsonl"
    (tmp_path / "x.jsonl").write_text("{}\n")
    if kind == "link":
        out.symlink_to(tmp_path / "x.jsonl")
    elif kind == "folder":
        out.mkdir()
    elif kind == "pipe":
        os.mkfifo(out)
    elif kind == "device":
        out = type(out)("/dev/null")
    else:
        out = tmp_path / "." / "x.jsonl"
    before = names(tmp_path)
    with pytest.raises(UserError, match="the output is"), output_of(tmp_path / "x.jsonl", out, overwrite=True):
        pass
    assert names(tmp_path) == before


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "nothing", "long"])
def test_an_input_that_is_no_file_is_never_waited_for(tmp_path, kind):
    source = tmp_path / "x.jsonl"
    if kind == "folder":
        source.mkdir()
    elif kind == "pipe":
        os.mkfifo(source)
    elif kind == "device":
        source = type(source)("/dev/zero")
    elif kind == "long":
        source = tmp_path / ("x" * 300 + ".jsonl")
    message = "there is no such input" if kind in ("nothing", "long") else "not a file"
    with pytest.raises(FusionError, match=message), output_of(source, tmp_path / "y.jsonl"):
        pass


def test_a_second_command_on_one_output_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n")
    child = os.fork()
    if child == 0:
        try:
            with output_of(tmp_path / "x.jsonl", tmp_path / "y.jsonl"):
                (tmp_path / "ready").touch()
                while not (tmp_path / "enough").exists():
                    time.sleep(0.01)
        finally:
            os._exit(0)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    try:
        with pytest.raises(FolderBusyError, match="another run writes this file"):
            run(tmp_path)
    finally:
        (tmp_path / "enough").touch()
        os.waitpid(child, 0)
    with sole_writer(tmp_path / "y.jsonl"):
        pass
