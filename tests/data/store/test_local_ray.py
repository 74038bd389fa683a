"""`data.backend: ray` without RAY_ADDRESS: a Ray of this machine is started once, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mtft.data.store.token_store import open_stores
from tests.data.store.test_encoding_backends import MADE, ROOT, recipe_of, rows
from tests.data.toy_examples import write_jsonl

INTERRUPTED = """
import sys
from pathlib import Path
import mtft.data.tokenize.parallel_encode as parallel
from mtft.data.store.token_store import open_stores
from tests.data.store.ray_tokenizers import SaysWhere, made_as
from tests.data.store.test_encoding_backends import recipe_of
folder = Path(sys.argv[1])
parallel.BLOCK_ROWS = 4
made = made_as(SaysWhere, folder=folder / "where", seconds=0.2)
try:
    open_stores(recipe_of(folder, folder / "a.jsonl", "ray", 2), made, "train", cache_dir=folder / "cache")
except KeyboardInterrupt:
    import ray
    assert not ray.is_initialized()
    print("interrupted", flush=True)
    sys.stdin.read()  # still there while it is looked at what is left
"""


def running(text):
    """Command lines of processes that hold a text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        found += [line] if text in line else []
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    """No half store, and nothing of the Ray that was started."""
    pytest.importorskip("ray")
    write_jsonl(tmp_path / "a.jsonl", rows(400))
    (tmp_path / "where").mkdir()
    with tempfile.TemporaryDirectory(prefix="r") as short:  # paths of sockets are at most 107 bytes long
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_TMPDIR": short}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        with subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as victim:
            assert victim.stdin is not None
            assert victim.stdout is not None
            until = time.monotonic() + 90
            while not any((tmp_path / "where").iterdir()):
                assert victim.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            assert running(short)
            os.killpg(victim.pid, signal.SIGINT)  # as a terminal does: Ray's processes get it too
            assert victim.stdout.readline() == "interrupted\n"
            until = time.monotonic() + 20
            while running(short) and time.monotonic() < until:
                time.sleep(0.1)
            assert running(short) == []
            assert [file.name for file in (tmp_path / "cache" / "stores").iterdir() if "tmp" in file.name] == []
            victim.stdin.close()


@pytest.mark.slow
def test_a_ray_of_ours_ends_and_leaves_the_signals_as_they_were(tmp_path, monkeypatch):
    """One start for all stores of a recipe; Ray's own handler of SIGTERM would end a run without its checkpoint."""
    ray = pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    starts, start = [], ray.init
    monkeypatch.setattr(ray, "init", lambda **options: starts.append(options) or start(**options))
    before = signal.getsignal(signal.SIGTERM)
    path = write_jsonl(tmp_path / "a.jsonl", rows(20))
    stores = open_stores(recipe_of(tmp_path, path, "ray", 1), MADE, "train", cache_dir=tmp_path / "cache")
    assert [len(store) for store in stores] == [20, 20]
    assert len(starts) == 1
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) is before
    open_stores(recipe_of(tmp_path, path, "ray", 1), MADE, "train", cache_dir=tmp_path / "cache")
    assert len(starts) == 1  # stores that are there need no Ray
