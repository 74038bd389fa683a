"""A run directory written by hand."""

import json

TASKS = ("sql", "sum<b>")  # a name that would break a page that does not escape


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_run(tmp_path):
    """A folder of `mtft run` with two training runs, trials and results; returns it."""
    for index, name in enumerate(("joint", "baseline")):
        folder = tmp_path / "train" / name
        steps = [
            {
                "step": step,
                "loss": 3 - 0.05 * step,
                "tokens": 1000,
                "seconds": 0.5,
                "tasks": {
                    task: {"loss": 3 - 0.05 * step + k, "weight": 1 + 0.01 * step * k} for k, task in enumerate(TASKS)
                },
            }
            for step in range(1, 21)
        ]
        steps[3]["tasks"][TASKS[0]]["loss"] = None  # absent from the step
        write(folder / "metrics.jsonl", lines(steps))
        write(folder / "eval.jsonl", lines([{"step": s, "tasks": {t: {"loss": 2.5} for t in TASKS}} for s in (0, 20)]))
        shares = (0.5 + 0.2 * index, 0.5 - 0.2 * index)
        rows = {t: {"asked": p, "realised": p, "rows": 80, "size": 60, "epochs": 1.3} for t, p in zip(TASKS, shares)}
        write(folder / "plan.json", {"steps": 20, "batch": 8, "tasks": rows})
        write(folder / "env.json", {"versions": {"mtft": "0.1.0", "torch": "2.13"}, "seed": 1})
    points = [{"measured": 2 + i / 9, "predicted": 2.1 + i / 9, "lower": 2 + i / 9, "upper": 2.4} for i in range(6)]
    found = [{"name": name, "rho": 91.0, "r2": 0.8, "weight": weight} for name, weight in (("ridge", 1.0), ("gp", 0.0))]
    target = {
        "candidates": found,
        "trials": points,
        "rho": 91.0,
        "r2": 0.8,
        "coverage": 0.9,
        "noise_sd": 0.1,
        "sd": 1.0,
    }
    write(tmp_path / "mix" / "fit.json", {"targets": {"sql/loss": {**target, "n": 6}}})
    write(tmp_path / "mix" / "proposal.json", {"text": "not distinguishable from your current mixture"})
    table = {
        stage: {task: {"loss": loss, "exact_match": 1 - loss / 4} for task in TASKS}
        for stage, loss in (("base", 3.0), ("joint uniform", 1.25), ("joint predicted", 1.125))
    }
    write(tmp_path / "results.json", table)
    write(tmp_path / "recipe.yaml", "name: by-hand\nseed: 1\n")
    return tmp_path
