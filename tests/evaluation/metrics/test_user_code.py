"""Code of the user's own: their function in a process of its own, their command for pass@k."""

from __future__ import annotations

import json
import os
import sys
import time

import psutil
import pytest

from mtft.common.errors import UserError
from mtft.common.fingerprint import file_hash
from mtft.evaluation.metrics import Answer, make_metrics
from mtft.evaluation.metrics.pass_at_k import PassAtK
from mtft.evaluation.metrics.python_metric import PythonMetric
from mtft.recipe.load import load_recipe
from mtft.recipe.schema.task import TaskSection


def rows(*texts, row=None):
    return [Answer(str(n), "Q", "A", (text,), row or {"n": n}, f"rows.jsonl:{n + 1}") for n, text in enumerate(texts)]


@pytest.fixture
def metric(tmp_path):
    def make(body, **options):
        (tmp_path / "mine.py").write_text(f"import os, sys, time\n\ndef score(prompt, reference, answer, row):\n{body}")
        return PythonMetric(f"{tmp_path}/mine.py:score", **options)

    return make


def refused(metric, *texts):
    with pytest.raises(UserError) as caught:
        metric.statistics(rows(*texts or ("x",)))
    return caught.value


def living(mark):
    """Processes with `mark` in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if process.info["status"] != psutil.STATUS_ZOMBIE and any(mark in word for word in words):
            found.append(process)
    return found


def gone(mark):
    """Whether no process has the mark any more; killed ones need a moment."""
    until = time.monotonic() + 10
    while living(mark):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def test_it_is_given_four_things_and_its_number_is_kept(metric):
    own = metric("    return len(prompt) + 10 * len(reference) + 100 * len(answer) + 1000 * row['n']\n")
    assert own.statistics(rows("", "xx", "é")).tolist() == [[11.0], [1211.0], [2111.0]]
    assert own.aggregate.name == "mean"
    assert metric("    return True\n", higher_is_better=False).aggregate.name == "error"


def test_its_file_is_named_and_hashed(metric):
    own = metric("    return 1\n")
    digest = file_hash(own.file)
    assert own.digest == digest
    assert own.describe() == f"runs your code: mine.py:score (sha256 {digest[:12]}...)"
    own.file.write_text("def score(*given):\n    return 2\n")  # what was read is what runs
    assert own.statistics(rows("x")).tolist() == [[1.0]]
    assert own.digest == digest
    assert [path.name for path in own.file.parent.iterdir()] == ["mine.py"]


def test_a_row_may_hold_anything(metric):
    own = metric("    return len(row['a']['b']) + len(answer)\n")
    row = {"a": {"b": "x" * 300_000}, "odd": object(), "nan": float("nan"), "half": "\ud800"}
    assert own.statistics(rows("y" * 200_000, "", row=row)).tolist() == [[500_000.0], [300_000.0]]


def test_what_it_prints_and_reads_does_not_matter(metric):
    own = metric("    print('{\"score\": 5}' * 100_000)\n    os.write(1, b'x\\n')\n    os.system('echo 7; cat')\n"
                 "    print(sys.stdin.read(), file=sys.stderr)\n    return 1\n")  # fmt: skip
    assert own.statistics(rows("a", "b")).tolist() == [[1.0], [1.0]]


@pytest.mark.slow
def test_an_endless_loop_is_ended_with_its_children(metric):
    mark = f"mtft-mark-{os.getpid()}-{time.time_ns()}"
    own = metric(
        f"    import subprocess\n    if answer == 'b':\n"
        f"        subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {mark!r}])\n"
        f"        while True: pass\n    return 1\n",
        timeout=5,
    )
    error = refused(own, "a", "b", "c")
    assert error.what == "score on the row of rows.jsonl:2 takes more than 5 s"
    assert (error.where, error.do) == (str(own.file), "mend it, or give it more time: timeout: 10")
    assert gone(mark)


def test_a_file_that_never_ends_loading_is_ended(tmp_path):
    (tmp_path / "mine.py").write_text("def score(*given): return 1\nwhile True: pass\n")
    assert refused(PythonMetric(f"{tmp_path}/mine.py:score", timeout=1)).what == "loading mine.py takes more than 1 s"


@pytest.mark.parametrize(
    ("body", "what", "line"),
    [
        ("    x = 1\n    return x / 0\n", "ZeroDivisionError: division by zero", 5),
        ("    return sys.exit(3)\n", "SystemExit: 3", 4),
        ("    return int('x')\n", "ValueError: invalid literal for int() with base 10: 'x'", 4),
        ("    return score(prompt, reference, answer, row)\n", "RecursionError: maximum recursion depth exceeded", 4),
        ("    raise Exception('y' * 10**7)\n", "Exception: yyy", 4),
        ("    return float('nan')\n", "ValueError: it returned nan", None),
        ("    return 10.0**308 * 10\n", "ValueError: it returned inf", None),
        ("    return 10**400\n", "OverflowError: int too large to convert to float", None),
        ("    return 'good'\n", "TypeError: it returned str, not a number", None),
        ("    pass\n", "TypeError: it returned NoneType, not a number", None),
        ("    return 1j\n", "TypeError: it returned complex, not a number", None),
    ],
)
def test_what_goes_wrong_in_it_is_told_with_its_line(metric, body, what, line):
    own = metric(body)
    error = refused(own)
    assert error.what.startswith(f"score on the row of rows.jsonl:1: {what}")
    assert len(error.what) < 600
    assert error.where == (f"{own.file}:{line}" if line else str(own.file))


def test_a_process_that_ends_itself_is_told(metric):
    assert "ended its process (exit code 5)" in refused(metric("    os._exit(5)\n")).what
    assert "ended its process (exit code -9)" in refused(metric("    os.kill(os.getpid(), 9)\n")).what
    own = metric("    os.closerange(3, 100)\n    os._exit(0)\n")
    assert "ended its process (exit code 0)" in refused(own).what


def test_what_it_writes_into_pipes_of_others_is_no_result(metric):
    body = (
        "    for pipe in range(3, 20):\n"
        "        try: os.write(pipe, b'[7]\\n')\n"
        "        except OSError: pass\n"
        "    return 1\n"
    )
    assert "wrote into the pipe of its results" in refused(metric(body)).what


def test_a_wrong_number_of_arguments_is_told(tmp_path):
    (tmp_path / "mine.py").write_text("def score(answer): return 1\n")
    assert "takes 1 positional argument but 4 were given" in refused(PythonMetric(f"{tmp_path}/mine.py:score")).what


def test_an_error_is_0_or_more(metric):
    error = refused(metric("    return -1\n", higher_is_better=False))
    assert "returned -1, and an error (higher_is_better: false) is 0 or more" in error.what


def test_modules_beside_it_are_not_found(tmp_path, monkeypatch):
    """The hash is of one file, so one file runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper_of_mine.py").write_text("VALUE = 1\n")
    (tmp_path / "mine.py").write_text("import helper_of_mine\ndef score(*given): return 1\n")
    error = refused(PythonMetric(f"{tmp_path}/mine.py:score"))
    assert error.what == "loading mine.py: ModuleNotFoundError: No module named 'helper_of_mine'"
    assert error.where == f"{tmp_path}/mine.py:1"
    (tmp_path / "mine.py").write_text("import token_f1\ndef score(*given): return 1\n")  # beside our own file
    assert "No module named 'token_f1'" in refused(PythonMetric(f"{tmp_path}/mine.py:score")).what


def test_the_file_is_read_before_anything_runs(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text("open('touched', 'w')\ndef score(*given):\n    return 1\nalias = score\n")
    PythonMetric(f"{mine}:score")
    PythonMetric(f"{mine}:alias")
    assert not (tmp_path / "touched").exists()
    with pytest.raises(UserError, match="there is no function 'scroe': did you mean 'score'"):
        PythonMetric(f"{mine}:scroe")
    mine.write_text("def score(:\n")
    with pytest.raises(UserError, match="not readable as Python") as caught:
        PythonMetric(f"{mine}:score")
    assert caught.value.where == f"{mine}:1"
    mine.unlink()
    with pytest.raises(UserError, match="can't be read: No such file"):
        PythonMetric(f"{mine}:score")


def test_a_file_that_became_a_link_elsewhere_is_refused(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "out.py").write_text("def score(*given): return 1\n")
    (tmp_path / "recipe" / "mine.py").symlink_to(tmp_path / "out.py")
    with pytest.raises(UserError, match="lies outside of"):
        PythonMetric(f"{tmp_path}/recipe/mine.py:score", folder=f"{tmp_path}/recipe")


RECIPE = """
name: r
model: {path: org/small}
tasks: [{name: t, data: rows.jsonl, metrics: METRICS}]
train: {steps: 1}
output: {dir: out}
"""


def made(tmp_path, metrics):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "r.yaml").write_text(RECIPE.replace("METRICS", metrics))
    return make_metrics(load_recipe(tmp_path / "r.yaml").tasks[0])


def test_from_a_recipe(tmp_path):
    (tmp_path / "mine.py").write_text("def score(*given): return 0.5\n")
    (tmp_path / "check.py").write_text("import sys; sys.exit(open(sys.argv[1]).read() != 'good')\n")
    metrics = made(
        tmp_path,
        "[{python: mine.py:score, timeout: 5}, {name: pass_at_k, key: runs, command: [python, check.py, '{answer}']}]",
    )
    assert list(metrics) == ["score", "runs"]
    assert metrics["score"].statistics(rows("x")).tolist() == [[0.5]]
    assert metrics["runs"].statistics(rows("good", "bad")).tolist() == [[1.0], [0.0]]
    assert metrics["runs"].describe().startswith(f"runs your command: python {tmp_path}/check.py {{answer}} (sha256 ")


@pytest.mark.parametrize(
    ("metric", "what", "where", "do"),
    [
        ({"name": "contains", "ignore_cas": True}, "has no option 'ignore_cas': did you mean 'ignore_case'",
         "tasks.t.metrics.contains.ignore_cas", "its options: ignore_case"),
        ({"name": "exact_match", "ignore_case": True}, "exact_match has no option 'ignore_case'",
         "tasks.t.metrics.exact_match.ignore_case", "text_match"),
        ({"name": "numeric", "relative_tolerance": -1}, "-1: input should be greater than or equal to 0",
         "tasks.t.metrics.numeric.relative_tolerance", "the default is 1e-06"),
        ("regex", "metric regex needs the option pattern", "tasks.t.metrics.regex", "{name: regex, pattern: ...}"),
        ({"name": "regex", "pattern": "a("}, "is no regular expression", "tasks.t.metrics.regex.pattern", "mend it"),
        ({"name": "json_match", "fields": []}, "no field is named", "tasks.t.metrics.json_match.fields", "leave"),
        ({"name": "label_accuracy", "labels": ["a"]}, "fewer than two labels", "tasks.t.metrics.label_accuracy.labels",
         "name all"),
        ({"name": "label_accuracy", "labels": ["a", "a"]}, "label 'a' stands twice",
         "tasks.t.metrics.label_accuracy.labels", "once"),
        ({"name": "pass_at_k", "command": ["no-such-program", "{answer}"]}, "there is no program 'no-such-program'",
         "tasks.t.metrics.pass_at_k.command", "install it"),
        ({"name": "pass_at_k", "command": ["true"]}, "no word of the command is {answer}",
         "tasks.t.metrics.pass_at_k.command", "give the check the path"),
        ({"name": "pass_at_k", "command": ["true", "{answer}"], "k": 3, "samples": 2}, "pass@3 can't be told from 2",
         "tasks.t.metrics.pass_at_k.samples", "set samples: 3 or more"),
        ({"name": "pass_at_k", "command": ["true", "a\0", "{answer}"]}, "holds a zero byte",
         "tasks.t.metrics.pass_at_k.command", "remove"),
        ({"python": "/gone.py:f"}, "the file can't be read", "/gone.py (tasks.t.metrics)", "check the path"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_metric_is_said_with_its_key(metric, what, where, do):
    task = TaskSection.model_validate({"name": "t", "data": "rows.jsonl", "metrics": [metric]})
    with pytest.raises(UserError) as caught:
        make_metrics(task)
    assert what in caught.value.what
    assert caught.value.where == where
    assert do in caught.value.do


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
def test_a_package_that_is_missing_is_named_before_anything_runs(package, monkeypatch):
    from mtft.evaluation.metrics import base

    monkeypatch.setattr(base, "find_spec", lambda name: None if name == package else object())
    name = {"sacrebleu": "bleu", "rouge_score": "rouge_2"}[package]
    task = TaskSection.model_validate({"name": "t", "data": "rows.jsonl", "metrics": [name]})
    with pytest.raises(UserError) as caught:
        make_metrics(task)
    assert (caught.value.where, caught.value.do) == (f"tasks.t.metrics.{name}", 'pip install "mtft[eval]"')


def check(code, **options):
    return PassAtK([sys.executable, "-c", code, "{answer}", "{row}"], **options)


@pytest.mark.slow
def test_pass_at_k_is_chens_estimator():
    """By hand, as lm-eval and human-eval have it: 1 - C(n - c, k) / C(n, k)."""
    passes = "import sys; sys.exit(open(sys.argv[1]).read() != 'good')"

    def passed(k, good, n):
        texts = ("good",) * good + ("bad",) * (n - good) + ("good",)  # what is beyond n does not count
        answers = [Answer("0", "", "", texts, {}, "f:1")]
        return check(passes, k=k, samples=n).statistics(answers).item()

    assert passed(1, 2, 5) == pytest.approx(2 / 5)
    assert passed(2, 2, 5) == pytest.approx(1 - 3 / 10)
    assert passed(3, 1, 4) == pytest.approx(3 / 4)
    assert passed(4, 1, 5) == pytest.approx(4 / 5)
    assert passed(3, 3, 5) == 1
    assert passed(2, 0, 3) == 0


def test_a_command_sees_the_answer_the_row_and_an_empty_folder(tmp_path):
    code = (
        f"import json, os, sys; answer, row = sys.argv[1:]; json.dump([open(answer, newline='').read(),"
        f" json.load(open(row)), os.listdir()], open({str(tmp_path / 'seen')!r}, 'w')); print('x' * 10**7)"
    )
    text = "a\r\nb 'quoted' $(touch here) ü\n"
    assert check(code).statistics(rows(text)).tolist() == [[1.0]]
    given = {"prompt": "Q", "reference": "A", "row": {"n": 0}}
    assert json.loads((tmp_path / "seen").read_text()) == [text, given, []]


@pytest.mark.slow
def test_a_command_is_ended_with_its_children():
    mark = f"mtft-mark-{os.getpid()}-{time.time_ns()}"
    code = (
        "import os, subprocess, sys, time\n"
        f"for _ in range(3): subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', {mark!r}])\n"
        "if open(sys.argv[1]).read() == 'loop': time.sleep(600)\n"
    )
    assert check(code, timeout=3).statistics(rows("loop")).tolist() == [[0.0]]
    assert gone(mark)
    assert check(code, timeout=60).statistics(rows("returns, and leaves its children")).tolist() == [[1.0]]
    assert gone(mark)


@pytest.mark.slow
def test_an_answer_that_forks_without_end_is_ended():
    """Each child starts two more, and all sleep: the group ends as one. A cap keeps a broken test from harm."""
    mark = f"mtft-mark-{os.getpid()}-{time.time_ns()}"
    code = f"import os, time\nmark = {mark!r}\nfor _ in range(5): os.fork()\ntime.sleep(600)\n"  # 32 processes
    assert check(code, timeout=2).statistics(rows("x")).tolist() == [[0.0]]
    assert gone(mark)


def test_a_command_that_is_no_program_is_told(tmp_path):
    program = tmp_path / "check"
    program.write_text("no program\n")
    program.chmod(0o755)
    metric = PassAtK([str(program), "{answer}"])
    with pytest.raises(UserError, match="the command can't be run: "):
        metric.statistics(rows(*"abcdef"))
