"""Pipes, sockets, devices and folders where files belong, and environments without a place: one block, never a wait."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from mtft.__main__ import main
from mtft.common.cache_folder import default_cache, writable_cache
from mtft.common.errors import UserError
from mtft.distributed.launch import check_launch
from mtft.quickstart import model_path

RECIPE = """\
name: odd
model: {path: quickstart:weak, dtype: fp32}
tasks: [{name: t, data: rows.jsonl}]
train: {steps: 2}
output: {dir: out}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A recipe with its rows; what waits for a pipe is stopped."""

    def stop(number, frame):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 4)
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.jsonl")
    yield tmp_path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def refused(capsys, *arguments: str) -> str:
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert "error: " in text
    assert len(text.splitlines()) <= 4
    return text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check", "pipe"], "is a named pipe, not a recipe"),
        (["check", "/dev/zero"], "is a device, not a recipe"),
        (["eval", "pipe"], "is a named pipe, not a recipe"),
        (["check", "r.yaml", "tasks.t.data=pipe.jsonl"], "names a named pipe, not a file"),
        (["check", "r.yaml", "tasks.t.data=/dev/zero"], "names a device, not a file"),
        (["check", "r.yaml", "model.chat_template=pipe"], "is a named pipe"),
        (["check", "r.yaml", "model.chat_template=/dev/zero"], "is a device"),
        (["check", "r.yaml", "mixture.shares.file=pipe"], "names a named pipe, not a file"),
        (["mix", "fit", "--mixtures", "pipe", "--scores", "pipe", "--target", "all"], "a pipe or a device"),
        (["run", "r.yaml", "--launch", "sh --config_file pipe"], "is a named pipe"),
    ],
)
def test_what_is_no_file_is_refused_and_never_opened(folder, capsys, arguments, said):
    assert said in refused(capsys, *arguments)


def test_a_socket_is_no_data(folder, capsys):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("s.jsonl")
        assert "names a socket" in refused(capsys, "check", "r.yaml", "tasks.t.data=s.jsonl")


def test_a_pipe_among_a_models_files_is_refused(folder, capsys):
    shutil.copytree(model_path("weak"), folder / "model")
    os.mkfifo(folder / "model" / "more.safetensors")
    assert "more.safetensors" in refused(capsys, "check", "r.yaml", "model.path=./model")


@pytest.mark.parametrize("value", ['"a\\0b"', '"a\\ud800b"', "~nobody-of-this-name/x"])
def test_paths_that_no_file_can_have_are_refused(folder, capsys, value):
    refused(capsys, "check", "r.yaml", f"output.dir={value}")


def test_a_folder_whose_name_is_not_utf8_is_refused_at_the_start(folder, capsys, monkeypatch):
    place = os.fsencode(folder) + b"/\xff"
    try:
        os.mkdir(place)
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    shutil.copy("r.yaml", os.path.join(os.fsdecode(place), "r.yaml"))
    monkeypatch.chdir(os.fsdecode(place))
    assert "the path is not UTF-8" in refused(capsys, "check", "r.yaml")


def test_a_working_directory_that_is_gone_is_said(folder, capsys, monkeypatch):
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    assert "the working directory is gone" in refused(capsys, "check", "../r.yaml")


def test_a_cache_that_cannot_be_written_is_said(folder, monkeypatch):
    monkeypatch.setenv("MTFT_CACHE", str(folder / "r.yaml"))
    with pytest.raises(UserError, match=r"the cache: .*r\.yaml is no folder") as caught:
        writable_cache()
    assert "MTFT_CACHE" in (caught.value.do or "")


def test_without_a_home_the_cache_must_be_named(monkeypatch):
    monkeypatch.delenv("MTFT_CACHE", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UserError, match="no home folder"):
        default_cache()


@pytest.mark.parametrize(
    "command", ["", "a 'b", "no-such-program x", "sh --config_file nosuch.yaml", "sh --config_file=nosuch.yaml"]
)
def test_launch_commands_that_start_nothing_are_refused(command):
    with pytest.raises(UserError) as caught:
        check_launch(command)
    assert caught.value.where == "command line, --launch"


def _in_ascii(folder, *arguments: str):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "mtft", *arguments], env=os.environ | plain, cwd=folder, capture_output=True, check=False
    )


def test_in_an_ascii_locale_text_is_written_and_a_path_that_cannot_be_is_said(folder):
    text = RECIPE.replace("dir: out", "dir: öut").replace("data: rows", "eval_data: rows.jsonl, data: rows")
    (folder / "r.yaml").write_text(text, encoding="utf-8")
    done = _in_ascii(folder, "check", "r.yaml", "train.steps=zwölf")
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False)
    done = _in_ascii(folder, "mix", "design", "r.yaml", "sweep={trials: 2}")
    assert done.returncode == 2, done.stderr
    assert b"can't be written in ascii" in done.stderr


def test_an_error_block_has_an_end(folder, capsys):
    (folder / "r.yaml").write_text(RECIPE + "".join(f"k{i}: 1\n" for i in range(3000)))
    assert main(["check", "r.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 3,000 problems in the recipe"
    assert "  ... and 2,985 more" in lines
    assert len(lines) == 19
