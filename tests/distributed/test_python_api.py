"""A trainer made of Python objects on two ranks: each reads the same rows, and the steps are those of one process."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.from_rows import run

pytestmark = pytest.mark.slow


def test_two_ranks_equal_one_process(recipe, task_files, launch, tmp_path):
    """The batch size of TrainingArguments is that of one rank: 2 ranks x 4 examples are the 8 of one process."""
    rows = {
        task: [json.loads(line) for line in Path(file).read_text().splitlines()]
        for task, (file, _) in task_files.items()
    }
    (tmp_path / "tasks.json").write_text(json.dumps(rows))
    program = Path(__file__).with_name("from_rows.py")
    model = recipe["model"]["path"]
    launch("ddp.yaml", "--num_processes", "2", program, model, tmp_path / "tasks.json", tmp_path / "two")
    run(model, rows, tmp_path / "one", batch_size=8)
    one, two = (
        [json.loads(line) for line in (tmp_path / ranks / "metrics.jsonl").read_text().splitlines()]
        for ranks in ("one", "two")
    )
    assert len(one) == len(two) == 6
    for a, b in zip(one, two):
        assert sum(task["examples"] for task in b["tasks"].values()) == 8
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    left, right = (load_file(tmp_path / ranks / "adapter" / "adapter_model.safetensors") for ranks in ("one", "two"))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert float((right[name] - value).abs().max()) <= 1e-5
