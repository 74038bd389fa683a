"""Does fusion help, and with which alpha rule? Strong model, expert, fusion by every rule, and the strong model tuned.

    python scripts/compare_fusions.py recipes/code-tasks.yaml --out runs/compare-fusions
    python scripts/compare_fusions.py RECIPE --seeds 17 --run runs/code-tasks   # the adapters of a finished `mtft run`
    python scripts/compare_fusions.py RECIPE --table --docs docs/fusion.md      # only write the table of what is there

Per seed the joint adapter of the small model and the strong model's own LoRA are trained on the same rows, as
`mtft run` does. All are scored on the recipe's held-out rows, teacher-forced. A table shows the mean over the seeds
with 95 % intervals from 1,000 paired resamples of the held-out rows (of each row's mean over the seeds), and the range
over the seeds. Everything is kept in OUT/seed-N, and nothing is done twice. One thread.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch  # after the number of threads is set

from mtft.common.atomic_io import write_json
from mtft.data.store.token_store import open_stores
from mtft.evaluation.evaluate_recipe import evaluate
from mtft.evaluation.gap_closed import gap_closed
from mtft.evaluation.heldout_loss import BatchLayout, score_tasks
from mtft.evaluation.score_cache import Scores, load_or_score
from mtft.evaluation.task_scores import TaskScores
from mtft.fuse.alpha.spec import RULES
from mtft.fuse.decoding.score_text import AlphaStats, fused_scores
from mtft.fuse.from_recipe import load_fusion
from mtft.pipeline.stages.derived_recipes import joint_recipe, override_section, strong_recipe
from mtft.recipe.load import load_recipe
from mtft.recipe.schema.recipe import Recipe
from mtft.training.run_training import train

BEGIN, END = "<!-- table of scripts/compare_fusions.py -->", "<!-- end of the table -->"
ALONE = ("strong base", "weak base", "weak expert", "strong tuned")


def one_seed(recipe: Recipe, rules: list[str], root: Path, finished: Path | None) -> None:
    """Train what is not trained yet, score what is not scored yet. finished: of `mtft run`, with both adapters."""
    if recipe.fuse is None:
        raise SystemExit("the recipe has no fuse section")
    held_out = tuple(task.name for task in recipe.tasks if task.eval_data is not None)
    on_strong = strong_recipe(recipe, recipe.fuse.strong, None, root / "tuned")
    if finished is not None:
        expert, tuned = (finished.resolve() / "train" / name / "adapter" for name in ("joint", "strong"))
    else:
        expert = train(joint_recipe(recipe, None, root / "expert")).adapter_dir
        tuned = train(on_strong).adapter_dir
    ways = {
        "strong base": lambda: evaluate(on_strong),
        "weak base": lambda: evaluate(recipe),
        "weak expert": lambda: evaluate(recipe, expert),
        "strong tuned": lambda: evaluate(on_strong, tuned),
    } | {rule: partial(fused, recipe, rule, expert, root) for rule in rules}
    for name, score in ways.items():
        print(f"{root.name}: {name}", flush=True)
        load_or_score(root / "scores" / name.replace(" ", "-"), held_out, score)


def fused(recipe: Recipe, rule: str, expert: Path, root: Path) -> Scores:
    assert recipe.fuse is not None
    section = override_section(recipe.fuse, alpha_rule=rule, alpha=1.0)
    model = load_fusion(override_section(recipe, fuse=section), [expert])
    on_strong, stats = override_section(recipe, model=recipe.fuse.strong), AlphaStats()
    stores = open_stores(on_strong, model.tokenizer, "eval")
    layout = BatchLayout(recipe.train.micro_batch_tokens, recipe.train.max_length, 0, packing=False)
    found = score_tasks(partial(fused_scores, model, stats=stats), stores, layout, device=model.device)
    write_json(root / "alpha" / f"{rule}.json", stats.summary())
    return found


def over_seeds(scores: list[TaskScores]) -> TaskScores:
    """Each row's sums over all seeds: its metrics are means over the seeds, its resamples are resamples of rows."""
    first = scores[0]
    if any(other.ids != first.ids for other in scores):
        raise SystemExit(f"{first.task}: the seeds have other held-out rows")
    return TaskScores(first.task, first.ids, *(np.sum([getattr(s, field) for s in scores], 0) for field in FIELDS))


FIELDS = ("nll_N", "tokens_N", "correct_N")


def table(found: dict[str, dict[str, list[TaskScores]]]) -> str:
    """found: {model: {task: scores of each seed}}. Markdown, one table a task."""
    blocks = []
    for task in found["strong base"]:
        lines = [
            f"**{task}** ({len(found['strong base'][task][0].ids)} rows)\n",
            "| model | loss | accuracy | gap closed, loss | over seeds | gap closed, accuracy | ratio, accuracy |",
            "|---|---|---|---|---|---|---|",
        ]
        base, goal = found["strong base"][task], found["strong tuned"][task]
        for name, by_task in found.items():
            scores = by_task[task]
            pooled = over_seeds(scores)
            intervals, summary = pooled.intervals(draws=1000), pooled.summary()
            cells = [_cell(summary[m], intervals[m]) for m in ("loss", "token_accuracy")]
            if name not in ("strong base", "strong tuned"):
                loss, hits = (
                    gap_closed(over_seeds(base), pooled, over_seeds(goal), metric=m) for m in ("loss", "token_accuracy")
                )
                triples = zip(base, scores, goal, strict=True)
                each = [gap for s, f, t in triples if (gap := gap_closed(s, f, t, draws=10).gap) is not None]
                span = f"{min(each):.2f} to {max(each):.2f}" if each else "-"
                cells += [_cell(loss.gap, loss.gap_interval), span]
                cells += [_cell(hits.gap, hits.gap_interval), _cell(hits.ratio, hits.ratio_interval)]
            else:
                cells += ["0" if name == "strong base" else "1", "", "0" if name == "strong base" else "1", ""]
            lines.append(f"| {name if name in ALONE else f'fused, `{name}`'} | " + " | ".join(cells) + " |")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _cell(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")


def read(out: Path, seeds: list[int], rules: list[str]) -> dict[str, dict[str, list[TaskScores]]]:
    """What stands in OUT. A model is shown if all seeds have it."""
    found: dict[str, dict[str, list[TaskScores]]] = {}
    for name in (*ALONE[:3], *rules, ALONE[3]):
        folders = [out / f"seed-{seed}" / "scores" / name.replace(" ", "-") for seed in seeds]
        if all(folder.is_dir() for folder in folders):
            tasks = sorted(path.stem for path in folders[0].glob("*.jsonl"))
            found[name] = {task: [TaskScores.load(folder / f"{task}.jsonl") for folder in folders] for task in tasks}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE of the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-fusions"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--run", type=Path, help="take the adapters of this finished run, whose seed is --seeds")
    parser.add_argument("--table", action="store_true", help="train and score nothing")
    parser.add_argument("--docs", type=Path, help="page that holds the table between two marks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done: list[int] = []
    for seed in args.seeds:
        if not args.table:
            asked = load_recipe(args.recipe, [*args.overrides, f"seed={seed}"])
            one_seed(asked, args.rules, args.out.resolve() / f"seed-{seed}", args.run)
        if (args.out / f"seed-{seed}" / "scores" / "strong-tuned").is_dir():
            done.append(seed)
    if not done:
        raise SystemExit(f"nothing stands in {args.out}")
    found: Any = read(args.out, done, args.rules)
    text = f"{'Seeds' if len(done) > 1 else 'Seed'} {', '.join(map(str, done))}.\n\n{table(found)}"
    print(text)
    if args.docs:
        before, _, rest = args.docs.read_text("utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        args.docs.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
