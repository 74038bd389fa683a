"""The commands as a user meets them: what they print, where, and the exit code."""

from __future__ import annotations

import ast
import errno
import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

import mtft.report.page
from mtft.__main__ import main
from mtft.models.loading import load_base
from mtft.recipe.load import load_recipe
from tests.merge.golden import write_golden
from tests.warm_python.fixture import warm_proofs  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[1]

RECIPE = """\
name: small
model: {path: "quickstart:weak", dtype: fp32}
tasks:
  - {name: add, data: add.jsonl, eval_data: add.jsonl}
  - {name: sub, data: sub.jsonl, eval_data: sub.jsonl}
train: {steps: 4, batch_tokens: 512, micro_batch_tokens: 512, max_length: 128}
output: {dir: out}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a good recipe, as working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MTFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for name, sign in (("add", 1), ("sub", -1)):
        rows = [{"prompt": f"{name} {a} {b}", "response": str(a + sign * b)} for a in range(8) for b in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def call(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def one_block(err: str, code: int) -> None:
    """What a mistake looks like: exit code 2, `error:`, a way out, no trace."""
    assert code == 2
    assert err.startswith("error: ")
    assert "\n  do:    " in err
    assert "Traceback" not in err


COMMANDS = {
    "check": ["--json"],
    "train": ["--fresh"],
    "eval": ["--adapter", "--against", "--out", "--overwrite"],
    "merge": ["--method", "--rank", "--weights", "--set", "--base", "--experts", "--out", "--overwrite"],
    "report": ["--out"],
    "run": ["--fresh", "--launch"],
    "schema": [],
    "mix design": [],
    "mix sweep": [],
    "mix propose": ["--bounds", "--link"],
    "mix blame": ["--mixtures", "--scores", "--current", "--bounds", "--out", "--overwrite"],
    "mix relevance": ["--sketches", "--target", "--adapter", "--examples", "--size"],
    "mix fit": ["--mixtures", "--scores", "--target", "--surrogate", "--predict", "--out", "--index", "--goal",
                "--limit", "--seed", "--cv", "--bounds", "--link"],
    "fuse generate": ["--in", "--out", "--overwrite"],
    "fuse score": ["--in", "--out", "--overwrite"],
    "fuse serve": ["--host", "--port", "--api-key-env"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_its_options(call, command):
    code, out, err = call(*command.split(), "--help")
    assert (code, err) == (0, "")
    assert [option for option in COMMANDS[command] if option not in out] == []


def test_what_commands_import_exists():
    """Commands import inside themselves, so a wrong name would show only when a user runs one. Read, not imported."""
    wrong = []
    files = sorted((ROOT / "mtft" / "cli").glob("*.py"))
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("mtft.", "data_mixers.")):
            spec = importlib.util.find_spec(str(node.module))
            tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else None
            names = {getattr(item, "name", getattr(item, "id", None)) for item in ast.walk(tree)} if tree else set()
            wrong += [f"{node.module}.{alias.name}" for alias in node.names if alias.name not in names]
    assert wrong == []


def test_version_and_schema(call):
    assert call("--version")[:2] == (0, f"mtft {mtft.__version__}\n")
    code, out, _ = call("schema")
    assert code == 0
    assert set(json.loads(out)["required"]) == {"name", "model", "tasks", "train", "output"}


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["train"], ["train", "x.yaml", "--nosuch"], ["mix", "fit"]])
def test_wrong_usage(call, arguments):
    code, out, err = call(*arguments)
    assert code == 2
    assert "Usage: mtft" in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "gone.yaml"], "error: there is no recipe gone.yaml"),
        (["train", "recipe.yaml", "train.stps=3"], "error: 'stps' is not a key of train"),
        (["train", "recipe.yaml", "tasks.add.data=gone.jsonl"], "error: tasks.add.data names a file that is not there"),
        (["check", "recipe.yaml", "mixture.shares={add: 0, sub: 0}"], "error: mixture.shares adds up to 0"),
        (["mix", "sweep", "recipe.yaml"], "error: the recipe has no sweep section"),
        (["merge", "recipe.yaml"], "error: the recipe has no merge section"),
        (["fuse", "score", "recipe.yaml", "--in", "r", "--out", "o"], "error: the recipe has no fuse section"),
        (["eval", "recipe.yaml", "tasks.add.eval_data=", "tasks.sub.eval_data="], "error: no task has eval_data"),
        (["report", "gone"], "error: there is no run directory gone"),
        (["merge", "--out", "m", "recipe.yaml"], "error: recipe.yaml is no folder of an adapter"),
        (["merge", "--method", "ties", "a", "b"], "error: no folder for the merged adapter"),
        (["merge", "--weights", "1,x", "--out", "m", "a", "b"], "error: --weights is x, and must be a number from"),
        (["merge", "--set", "density", "--out", "m", "a", "b"], "error: --set density is not KEY=VALUE"),
        (["merge", "--base", "b", "--rank", "8", "--out", "m", "a", "c"], "error: with --base, --rank"),
        (["merge", "--experts", "arrow", "--method", "ties", "--out", "m", "a"], "error: --experts arrow keeps"),
        (["fuse", "serve", "recipe.yaml", 'fuse={strong: {path: "quickstart:strong"}}', "--host", "0.0.0.0"],
         "error: host 0.0.0.0 can be reached from outside, and no token protects it"),
        (["mix", "fit", "--mixtures", "a", "--scores", "b", "--target", "all", "--out", "p"],
         "error: --predict and --out belong together"),
    ],
)  # fmt: skip
def test_mistakes_are_one_block(folder, call, arguments, message):
    code, out, err = call(*arguments)
    one_block(err, code)
    assert err.startswith(message)
    assert out == ""


def test_mistakes_in_the_data_are_one_block(folder, call):
    """The two of the data room that the acceptance names; the others stand in tests/data."""
    with (folder / "add.jsonl").open("a") as file:
        file.write('{"prompt": "add 1 1", "respon\n')
    code, _, err = call("check", "recipe.yaml")
    one_block(err, code)
    assert "add.jsonl" in err
    assert "41" in err  # the line
    (folder / "add.jsonl").write_text('{"prompt": "a", "response": ""}\n' * 3)
    code, _, err = call("check", "recipe.yaml")
    one_block(err, code)
    assert "response" in err


def test_errors_of_data_mixers_are_one_block_too(folder, call):
    code, out, err = call("mix", "fit", "--mixtures", "gone.csv", "--scores", "gone.csv", "--target", "all")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "gone.csv" in err


def break_report(monkeypatch, error: BaseException) -> None:
    def write_report(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(mtft.report.page, "write_report", write_report)


def test_a_failure_nobody_foresaw(call, monkeypatch):
    break_report(monkeypatch, RuntimeError("wires crossed\nsecond line"))
    code, out, err = call("report", "x")
    assert (code, out) == (1, "")
    assert err.splitlines()[0] == "failed: RuntimeError: wires crossed"
    assert "--debug" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("arguments", [["--debug", "report", "x"], ["report", "x", "--debug"]])
def test_debug_shows_the_trace(call, monkeypatch, arguments):
    break_report(monkeypatch, RuntimeError("wires crossed"))
    code, _, err = call(*arguments)
    assert code == 1
    assert "Traceback" in err
    assert "write_report" in err


def test_a_full_disk_says_so(call, monkeypatch):
    break_report(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    code, _, err = call("report", "x")
    assert code == 1
    assert "free some space" in err


@pytest.mark.parametrize("number", [errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG])
def test_a_path_that_the_system_refuses_is_the_users_to_mend(call, monkeypatch, number):
    break_report(monkeypatch, OSError(number, os.strerror(number), "/data/loop"))
    code, _, err = call("report", "x")
    assert code == 2
    assert err.splitlines()[:2] == [f"error: {os.strerror(number)}", "  where: /data/loop"]


def test_ctrl_c(call, monkeypatch):
    break_report(monkeypatch, KeyboardInterrupt())
    assert call("report", "x") == (130, "", "interrupted\n")


def test_only_the_first_rank_speaks(call, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call("train", "gone.yaml") == (2, "", "")


def test_check_as_text_and_as_json(folder, call):
    code, out, _ = call("check", "recipe.yaml")
    assert code == 0
    place = "memory on each GPU" if torch.cuda.is_available() else "in memory, for each process"
    assert f"{place}: about" in out
    assert "add" in out
    code, out, _ = call("check", "recipe.yaml", "--json", "lora.r=4")
    found = json.loads(out)
    assert [task["name"] for task in found["tasks"]] == ["add", "sub"]
    assert found["steps"] == 4
    assert found["memory"]["trainable"] > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.optimizer=adamw_tooch", "did you mean adamw_torch?"),
        ("loss.balancer.name=unifrom", "unknown balancer 'unifrom'"),
        ("loss.gradients.aggregator=upgard", "unknown aggregator 'upgard': did you mean 'upgrad'?"),
        ("loss.gradients={aggregator: upgrad, options: {epsilom: 1}}", "has no option 'epsilom'"),
        ("merge.method=teis", "unknown merge method 'teis'\n  where: merge.method"),
        ("merge.per_module=[{modules: q, method: teis}]", "unknown merge method 'teis'"),
        ("merge.per_module=[{modules: q, method: ties, options: {densty: 0.5}}]", "ties has no option 'densty'"),
        ("merge.per_module=[{modules: q, options: {density: 0.5}}]", "has no option 'density'"),
        ("lora.targets=[q_prj]", "no module of the model is called 'q_prj'"),
        ("model.path=./gone", "no model folder at"),
    ],
)
def test_check_finds_names_that_only_rooms_know(folder, call, override, message):
    code, _, err = call("check", "recipe.yaml", override)
    one_block(err, code)
    assert message in err


def test_run_knows_wrong_names_before_it_starts(folder, call):
    code, _, err = call("run", "recipe.yaml", "merge.method=teis")
    one_block(err, code)
    assert "where: merge.method" in err
    assert not (folder / "out").exists()


def test_mix_fit_writes_predictions(folder, call):
    """Scores are linear in the shares here, so the linear surrogate predicts them."""
    shares = [(k / 12, 1 - k / 12) for k in range(13)]
    (folder / "x.csv").write_text("id,add,sub\n" + "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(shares)))
    (folder / "y.csv").write_text("id,loss\n" + "".join(f"{i},{3 - a}\n" for i, (a, _) in enumerate(shares)))
    arguments = [
        "--mixtures",
        "x.csv",
        "--scores",
        "y.csv",
        "--target",
        "loss",
        "--index",
        "id",
        "--surrogate",
        "linear",
    ]
    code, out, _ = call("mix", "fit", *arguments, "--predict", "x.csv", "--out", "p.csv")
    assert code == 0
    assert "loss (lower is better), 13 trials" in out
    head, *rows = (folder / "p.csv").read_text().splitlines()
    assert head == "id,loss,loss_lower,loss_upper"
    assert [float(row.split(",")[1]) for row in rows] == pytest.approx([3 - a for a, _ in shares], abs=1e-3)


def test_merge_keeps_experts_apart_for_servers(folder, call):
    adapters = [str(path) for path in write_golden(folder / "in")]
    code, out, err = call("merge", "--experts", "arrow", "--out", "arrow", *adapters)
    assert code == 0, err
    assert "router" in out
    assert sorted(path.name for path in (folder / "arrow").iterdir()) == [
        ".mtft_files.json", "arrow.json", "expert_one", "expert_three", "expert_two", "router.safetensors",
    ]  # fmt: skip
    code, out, err = call("merge", "--experts", "twin", "--method", "tsv", "--rank", "4", "--out", "twin", *adapters)
    assert code == 0, err
    assert (folder / "twin" / "shared" / "adapter_config.json").is_file()
    assert "fits one" in out


def test_merge_with_and_without_a_recipe(folder, call):
    adapters = [str(path) for path in write_golden(folder / "adapters")]
    code, out, _ = call(
        "merge", "--method", "linear", "--rank", "lossless", "--weights", "0.5,0.3,0.2", "--out", "a", *adapters
    )
    assert code == 0, out
    assert (folder / "a" / "adapter_model.safetensors").is_file()
    listed = ", ".join(adapters)
    merge = f"merge={{method: linear, rank: lossless, weights: [0.5, 0.3, 0.2], adapters: [{listed}], out: b}}"
    # The training data may be gone: a merge reads none of it.
    code, out, _ = call("merge", "recipe.yaml", merge, "tasks.add.data=gone.jsonl")
    assert code == 0, out
    saved = "adapter_model.safetensors"
    assert (folder / "a" / saved).read_bytes() == (folder / "b" / saved).read_bytes()
    code, _, err = call("merge", "recipe.yaml", merge)
    one_block(err, code)  # it is there already
    assert call("merge", "recipe.yaml", merge, "--overwrite")[0] == 0
    code, _, err = call("merge", "--set", "densty=0.5", "--method", "ties", "--out", "c", *adapters)
    one_block(err, code)
    assert "ties has no option 'densty'" in err


def test_eval_against_an_older_adapter(folder, call):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load_base(load_recipe("recipe.yaml", []).model)
    random = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, random).save_pretrained("old")
    code, out, err = call("eval", "recipe.yaml", "--against", "old")
    assert code == 0, err
    for task in json.loads(out).values():
        compared = task["against"]
        assert sum(compared["flips"].values()) == task["examples"]
        lower, upper = compared["difference"]["loss"]["interval"]
        assert lower <= compared["difference"]["loss"]["value"] <= upper < 0  # random weights are worse than none


@pytest.mark.slow
def test_train_eval_report_and_an_interrupt(folder, call, warm_python):
    """One small run through the commands: Ctrl-C, the same command again, scores as JSON, the page."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [warm_python, "-m", "mtft", "train", "recipe.yaml", "train.steps=120", "output.save_every=120"]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not (folder / "out" / "metrics.jsonl").is_file() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=240)[1]
    assert process.returncode == 130, err
    assert "Traceback" not in err
    done = len((folder / "out" / "metrics.jsonl").read_text().splitlines())
    again = subprocess.run(
        [*command], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert again.returncode == 0, again.stderr
    steps = [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert done < 120
    assert steps == list(range(1, 121))  # continued, not begun again
    code, _, err = call("train", "recipe.yaml", "train.steps=5")
    one_block(err, code)  # another recipe in the same folder
    code, out, _ = call("eval", "recipe.yaml", "--adapter", "out/adapter")
    assert code == 0
    assert set(json.loads(out)) == {"add", "sub"}
    code, out, _ = call("report", "out")
    assert code == 0
    assert Path(out.strip()).is_file()
