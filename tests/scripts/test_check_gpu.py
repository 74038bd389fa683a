"""The check of a GPU: its page and exit status whatever its checks do, and its cheapest checks on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
PLANTED = Path(__file__).with_name("planted_checks.py")


@pytest.fixture(scope="module")
def planted():
    """(check_gpu, the planted checks)."""
    before, known = list(sys.path), set(sys.modules)
    sys.path[:0] = [str(SCRIPTS), str(PLANTED.parent)]
    try:
        import check_gpu
        import planted_checks

        yield check_gpu, planted_checks.CHECKS
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - known:
            if name.startswith(("check_gpu", "gpu_checks", "planted_checks")):
                del sys.modules[name]


@pytest.fixture
def run(planted, tmp_path):
    """run(names, ...) -> (page, how many workers were started, what was said)."""
    check_gpu, checks = planted

    def start(*names, minutes=5.0, patience=10.0, gpus=0):
        started, said = [], []

        def worker(asked):
            started.append(list(asked))
            command = [sys.executable, str(PLANTED), ",".join(asked), str(tmp_path)]
            return check_gpu.Worker(command, dict(os.environ), tmp_path / f"log-{len(started)}")

        options = {"minutes": minutes, "patience": patience, "gpus": gpus, "start": worker, "say": said.append}
        page = check_gpu.Session(checks, names, **options).run()
        return page, started, said

    return start


def lines(page, check):
    return [(row.line.what, row.line.verdict, row.line.note) for row in page.rows if row.check == check]


def test_what_passes_is_a_page_with_the_cards_name(run):
    page, started, said = run("good", "last")
    assert page.code == 0
    assert started == [["good", "last"]]
    text = page.text()
    assert text.splitlines()[0].startswith("a planted card, 80 GiB; torch none")
    assert "\ngood\n  PASS  a small figure" in text
    assert text.splitlines()[-1].startswith("2 PASS, 2 INFO in ")
    assert "talks" not in text
    assert said[0] == "PASS  good: a small figure 0.5 (note of a figure)"
    rows = json.loads(json.dumps(page.as_dict()))["lines"]
    assert [(row["check"], row["figure"], row["bar"], row["verdict"]) for row in rows[:2]] == [
        ("good", 0.5, 1.0, "PASS"),
        ("good", None, None, "INFO"),
    ]


def test_a_planted_miss_is_said_and_the_exit_status(run):
    page, *_ = run("high", "last")
    assert page.code == 1
    assert [verdict for _, verdict, _ in lines(page, "high")] == ["MISS", "MISS", "PASS"]
    assert page.counts() == {"PASS": 2, "MISS": 2, "SKIP": 0, "INFO": 1}
    assert "MISS  a high figure" in page.text()


def test_a_check_that_raises_misses_and_the_others_run(run):
    page, started, _ = run("raises", "last")
    assert lines(page, "raises") == [
        ("before it raised", "PASS", ""),
        ("what raises", "MISS", "RuntimeError: a planted error"),
    ]
    assert lines(page, "last")[0][1] == "PASS"
    assert len(started) == 1


@pytest.mark.parametrize(
    ("name", "reason"), [("killed", "killed by SIGKILL"), ("leaves", "exit status 7; planted last words")]
)
def test_a_worker_that_dies_misses_and_the_next_goes_on(run, name, reason):
    page, started, _ = run("good", name, "last")
    assert lines(page, name)[-1][1] == "MISS"
    assert reason in lines(page, name)[-1][2]
    assert started == [["good", name, "last"], ["last"]]
    assert lines(page, "last")[0][1] == "PASS"
    assert page.code == 1


def test_a_check_that_hangs_is_stopped(run):
    page, started, _ = run("hangs", "last", patience=0.5)
    assert lines(page, "hangs")[-1] == ("what hangs", "MISS", "took too long and was stopped")
    assert lines(page, "last")[0][1] == "PASS"
    assert started == [["hangs", "last"], ["last"]]


def test_what_does_not_fit_the_time_is_skipped(run):
    page, *_ = run("good", "long", "last", minutes=2)
    assert lines(page, "long") == [("what takes an hour", "SKIP", "no time left: --minutes 2")]
    assert lines(page, "last")[0][1] == "PASS"
    assert page.code == 0


def test_what_the_machine_lacks_is_skipped(run):
    page, started, _ = run("two", "good")
    assert lines(page, "two") == [("what needs two GPUs", "SKIP", "no GPU here")]
    assert started == [["good"]]
    page, started, _ = run("good", "two", "last", gpus=1)
    assert lines(page, "two")[0][1:] == ("SKIP", "needs 2 GPUs, 1 here") or "no GPU" in lines(page, "two")[0][2]
    assert page.code == 0


def test_gpus_that_torch_does_not_see_are_none(run):
    """nvidia-smi knows two, and torch was built for CPUs."""
    page, *_ = run("good", "two", "last", gpus=2)
    assert [verdict for _, verdict, _ in lines(page, "two")] == ["SKIP"]
    assert lines(page, "last")[0][1] == "PASS"


def test_a_worker_that_never_starts_ends_the_session(planted, tmp_path):
    check_gpu, checks = planted

    def worker(asked):
        command = [sys.executable, "-c", "raise SystemExit('no such library')"]
        return check_gpu.Worker(command, dict(os.environ), tmp_path / "log")

    session = check_gpu.Session(checks, ["good", "last"], minutes=5, start=worker, gpus=0, say=lambda _: None)
    page = session.run()
    assert [row.line.verdict for row in page.rows] == ["MISS", "MISS"]
    assert "no such library" in page.rows[0].line.note


@pytest.mark.parametrize(
    ("visible", "found"), [("", ()), ("-1", ()), ("3", ("3",)), ("0, 1", ("0", "1")), ("MIG-a", ("MIG-a",))]
)
def test_visible_gpus_are_those_of_the_environment(planted, monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert planted[0].visible_gpus() == found


def start_script(*arguments):
    command = [sys.executable, str(SCRIPTS / "check_gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=1500)


def test_the_parent_imports_no_torch():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPTS / "check_gpu.py"), "--list"], capture_output=True, text=True
    )
    assert "packing" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "gpu_checks_train" in imported
    assert not imported & {"torch", "transformers", "mtft"}


def test_wrong_arguments_are_refused(tmp_path):
    for words, told in (
        (("--only", "packin"), "no check 'packin'"),
        (("--minutes", "0"), "must be above 0"),
        (("--json", tmp_path / "none" / "out.json"), "there is no folder"),
    ):
        done = start_script(*words)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_cheapest_checks_really_run_on_a_cpu(tmp_path):
    out = tmp_path / "found.json"
    names = ("versions", "split", "packing", "gradients", "fp16", "memory")
    done = start_script("--only", *names, "--minutes", 20, "--patience", 60, "--json", out)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    passed = {line["check"] for line in found["lines"] if line["verdict"] == "PASS"}
    assert {"split", "packing", "gradients", "fp16"} <= passed
    assert [line["note"] for line in found["lines"] if line["check"] == "memory"] == ["no GPU here"]
    assert all(line["note"] for line in found["lines"] if line["verdict"] == "SKIP")
    assert found["facts"]["torch"]
