"""The quickstart over several seeds, as the tables of docs/quickstart.md.

for seed in 1 2 3; do scripts/quickstart.sh seed=$seed output.dir=runs/quickstart-$seed; done
python scripts/quickstart_table.py runs/quickstart-{1,2,3} --docs docs/quickstart.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mtft.common.atomic_io import write_text  # noqa: E402
from mtft.recipe.load import load_recipe  # noqa: E402

BEGIN, END = "<!-- tables of scripts/quickstart_table.py -->", "<!-- end of the tables -->"
METRICS = {"exact_match": "exact match", "loss": "held-out loss, nats a token"}
STAGES = ("base", "single", "joint uniform", "joint predicted", "merged", "strong base", "fused", "strong tuned")

Results = dict[str, dict[str, dict[str, float]]]  # stage -> task -> metric


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def score_table(runs: Sequence[Results], metric: str) -> list[str]:
    """Tasks down, stages across: the mean over the seeds, and from where to where they go."""
    tasks = list(runs[0]["base"])

    def cell(stage: str, chosen: Sequence[str]) -> str:
        values = [fmean(run[stage][task][metric] for task in chosen) for run in runs]
        low, mean, high = (f"{value:.2f}".removeprefix("0") for value in (min(values), fmean(values), max(values)))
        return mean if low == high else f"{mean} ({low} to {high})"

    lines = [f"| {METRICS[metric]} | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 1) + "|"]
    for name, chosen in (*((f"`{task}`", [task]) for task in tasks), ("**mean**", tasks)):
        lines.append(f"| {name} | {' | '.join(cell(stage, chosen) for stage in STAGES)} |")
    return lines


def verdict_table(folders: Sequence[Path]) -> list[str]:
    proposals = {
        load_recipe(folder / "recipe.yaml", files=False).seed: read(folder, "mix/proposal.json") for folder in folders
    }
    names = list(next(iter(proposals.values()))["mixture"])
    lines = [
        f"| seed | verdict of 20 trials | {' | '.join(f'`{name}`' for name in names)} |",
        "|---" * (len(names) + 2) + "|",
    ]
    for seed, found in proposals.items():
        shares = " | ".join(f"{100 * found['mixture'][name]:.0f} %" for name in names)
        lines.append(f"| {seed} | {found['verdict']} (probability {100 * found['probability']:.1f} %) | {shares} |")
    return lines


def kept_table(folders: Sequence[Path], runs: Sequence[Results]) -> list[str]:
    """(merged - base) / (joint predicted - base) of the tasks' means."""
    lines = ["| seed | merged keeps, of the joint adapter's gain in loss | in exact match |", "|---|---|---|"]
    for folder, run in zip(folders, runs, strict=True):
        shares = []
        for metric in ("loss", "exact_match"):
            base, joint, merged = (
                fmean(scores[metric] for scores in run[stage].values())
                for stage in ("base", "joint predicted", "merged")
            )
            shares.append(f"{100 * (merged - base) / (joint - base):.0f} %")
        lines.append(f"| {load_recipe(folder / 'recipe.yaml', files=False).seed} | {' | '.join(shares)} |")
    return lines


def tables(folders: Sequence[Path]) -> str:
    runs = [read(folder, "results.json") for folder in folders]
    parts = [verdict_table(folders), *(score_table(runs, metric) for metric in METRICS), kept_table(folders, runs)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, one a seed")
    parser.add_argument("--docs", type=Path, help="page with the two marks between which the tables are written")
    asked = parser.parse_args(words)
    text = tables(asked.runs)
    print(text)
    if asked.docs is not None:
        before, begin, rest = asked.docs.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            parser.error(f"{asked.docs} lacks the marks {BEGIN} and {END}")
        write_text(asked.docs, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
