"""What does each merge method keep? Single-task experts merged by every method, against joint training, over seeds.

    python scripts/compare_merges.py recipes/code-tasks.yaml --out runs/compare-merges
    python scripts/compare_merges.py RECIPE --seeds 17 --only linear ties tsv   # some of them
    python scripts/compare_merges.py RECIPE --table --docs docs/merging.md      # only write the table of what is there

Per seed: one expert per task and one joint adapter on the same number of rows (the runs that `mtft run` makes), then
every method. Held-out rows are dealt into three parts: on `choose` each method gets its best common scale (searches,
gates and routers get these rows too), `check` is for the verdict of searches, and what the table shows comes from
`rest`. Scales are tried from a geometric grid, downhill from the one that gives the result the norm of a third of the
plain sum. Everything is kept in OUT/seed-N, and nothing is done twice. One thread; CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # after the number of threads is set

SCALES = tuple(round(2 ** (i / 2), 3) for i in range(-6, 11))  # 0.125 to 32, in steps of the root of 2
RANK = 64
BEGIN, END = "<!-- table of scripts/compare_merges.py -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Entry:
    """One row of the table. kind: plain (a method of merge()), or the section of the recipe that it needs."""

    method: str = "linear"
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "plain"
    section: dict[str, Any] = field(default_factory=dict)
    rank: int = RANK
    scaled: bool = True  # a common scale is chosen


def gates(kind: str, steps: int = 60) -> Entry:
    asked = {"kind": kind, "steps": steps, "learning_rate": 1.0 if kind == "self_positioning" else 2e-2}
    return Entry(kind="gates", section=asked, scaled=False)


ENTRIES: dict[str, Entry] = {
    "sum (linear, no scale)": Entry(scaled=False),
    "linear": Entry(),
    "svd (rank 16)": Entry("svd", rank=16),
    "tsv": Entry("tsv"),
    "iso_c": Entry("iso_c"),
    "iso_cts": Entry("iso_cts"),
    "knots_ties": Entry("knots_ties"),
    "knots_dare": Entry("knots_dare"),
    "core_ties": Entry("core_ties"),
    "core_dare": Entry("core_dare"),
    "wudi": Entry("wudi"),
    "svc": Entry("svc"),
    "ctm": Entry("ctm", {"rank": 16}),
    "lines": Entry("lines"),
    "delta_norm": Entry("delta_norm"),
    "regmean": Entry("regmean", kind="method"),
    "ties": Entry("ties"),
    "ties (rank 16)": Entry("ties", rank=16),
    "ties (global)": Entry("ties", {"scope": "global"}),
    "dare": Entry("dare"),
    "dare + ties": Entry("dare", {"then": "ties"}),
    "della": Entry("della"),
    "breadcrumbs": Entry("breadcrumbs"),
    "sce": Entry("sce"),
    "pcb": Entry("pcb"),
    "pcb (global)": Entry("pcb", {"scope": "global"}),
    "consensus": Entry("consensus"),
    "doge": Entry("doge", {"steps": 100}),
    "robustmerge": Entry("robustmerge"),
    "search cobyqa": Entry(kind="search", section={"by": "cobyqa", "budget": 14}, scaled=False),
    "search cma": Entry(kind="search", section={"by": "cma", "budget": 14}, scaled=False),
    "search lorahub": Entry(kind="search", section={"by": "lorahub", "budget": 14}, scaled=False),
    "adamerging_task": gates("adamerging_task"),
    "adamerging_layer": gates("adamerging_layer"),
    "atlas": gates("atlas"),
    "self_positioning": gates("self_positioning"),
    "cat_gates": gates("cat_gates"),
    "scalearn": gates("scalearn"),
    "concrete": gates("concrete"),
    "twin": Entry(kind="experts", section={"kind": "twin"}, scaled=False),
    "twin (mlp router)": Entry(kind="experts", section={"kind": "twin", "router": "mlp"}, scaled=False),
    "arrow": Entry(kind="experts", section={"kind": "arrow"}, scaled=False),
}


@dataclass
class Seed:
    """The runs of one seed, and scores of base, experts and joint."""

    recipe: Any
    adapters: dict[str, Path]
    adapted: Any
    base: dict
    singles: dict
    joint: dict
    folder: Path
    sum_norm: float


def prepare(recipe_file: str, seed: int, out: Path, rows: int, limit: int, overrides: list[str]) -> Seed:
    from data_mixers.mixture.mixture import uniform
    from mtft.data.store.token_store import open_stores
    from mtft.models.loading import load_tokenizer
    from mtft.pipeline.stages.adapter_evaluator import AdapterEvaluator
    from mtft.pipeline.stages.train import RunChoice, planned_runs, train_runs
    from mtft.recipe.load import load_recipe

    folder = out.absolute() / f"seed-{seed}"
    fixed = [f"seed={seed}", f"output.dir={folder}", "sweep=null", "fuse=null", "run.baseline=none"]
    recipe = load_recipe(recipe_file, [*overrides, *fixed, "merge={method: linear}", "output.save_every=null"])
    tokenizer = load_tokenizer(recipe.model)
    runs = planned_runs(recipe, RunChoice(uniform(recipe.task_names)), open_stores(recipe, tokenizer, "train"))
    results = train_runs(runs, fresh=False, launch=None, say=lambda text: say(f"seed {seed}: {text}"))
    adapters = {task: Path(results[f"single-{task}"].adapter_dir) for task in recipe.task_names}
    adapted = AdapterEvaluator(recipe, rows, open_stores(recipe, tokenizer, "eval", limit=limit))

    def scored(name: str, adapter: Path | None, tasks=None) -> dict:
        return kept(
            folder / "scores" / name, tasks or recipe.task_names, lambda: adapted.scores(adapter, "rest", tasks)
        )

    singles = {}
    for task, path in adapters.items():
        singles |= scored(f"single-{task}", path, (task,))
    joint = scored("joint", Path(results["joint"].adapter_dir))
    base = scored("base", None)
    return Seed(recipe, adapters, adapted, base, singles, joint, folder, norm_of_sum(adapters))


def norm_of_sum(adapters: dict[str, Path]) -> float:
    """||sum_k D_k|| over all modules."""
    from mtft.adapters.lora_factors import read_adapter
    from mtft.merge.linalg.core_space import to_core

    opened = [read_adapter(path) for path in adapters.values()]
    names = {name for adapter in opened for name in adapter.modules}
    cores = (to_core([a.factors(name) for a in opened], [1.0] * len(opened)).sum() for name in names)
    return math.sqrt(sum(float((core**2).sum()) for core in cores))


def kept(folder: Path, tasks, score) -> dict:
    from mtft.evaluation.score_cache import load_or_score as kept_scores

    return kept_scores(folder, tuple(tasks), score)


class InPlace:
    """A merged adapter added to the model's own weights, at any scale: no factors to multiply in the forward pass."""

    def __init__(self, model: Any, folder: Path) -> None:
        from mtft.adapters.lora_factors import read_adapter

        adapter = read_adapter(folder, "merged")
        self._deltas = []
        for name in adapter.modules:
            f = adapter.factors(name)
            weight = model.get_submodule(name).weight
            delta = torch.tensor(f.scale * (f.B_MR @ f.A_RN), dtype=weight.dtype, device=weight.device)
            self._deltas.append((weight, weight.detach().clone(), delta))
        self.norm = float(sum(delta.double().square().sum() for _, _, delta in self._deltas)) ** 0.5

    @contextmanager
    def at(self, scale: float) -> Iterator[None]:
        with torch.no_grad():
            for weight, before, delta in self._deltas:
                weight.copy_(before + scale * delta)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, before, _ in self._deltas:
                    weight.copy_(before)


def best_scale(start: float, objective: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Downhill over SCALES from the one nearest to `start`; returns the best and all that were tried."""
    tried: dict[float, float] = {}

    def at(index: int) -> float:
        scale = SCALES[index]
        if scale not in tried:
            tried[scale] = objective(scale)
        return tried[scale]

    here = min(range(len(SCALES)), key=lambda i: abs(math.log(SCALES[i] / start)))
    while True:
        around = [i for i in (here - 1, here + 1) if 0 <= i < len(SCALES)]
        better = min(around, key=at)
        if at(better) >= at(here):
            return SCALES[here], tried
        here = better


def measure(entry: Entry, seed: Seed, out: Path) -> dict[str, Any]:
    """Merge, choose the scale, score. Returns the row of one seed."""
    from mtft.evaluation.evaluation_mode import evaluation_mode
    from mtft.merge.search.retention import retention

    row: dict[str, Any] = merge_once(entry, seed, out)
    adapted = seed.adapted
    if entry.kind == "experts":
        found = adapted.routed_scores(out, "rest")
    else:
        merged, score = InPlace(adapted.model, out), adapted.score_with(adapted.model)

        def scores(scale: float, part: str) -> dict:
            with merged.at(scale), evaluation_mode(adapted.model):
                return adapted.scored(score, part, None, packing=True)

        if entry.scaled:
            start = seed.sum_norm / 3 / max(merged.norm, 1e-12)
            row["scale"], row["tried"] = best_scale(start, lambda scale: mean_loss(scores(scale, "choose")))
        found = scores(row["scale"], "rest")
    for task, scored in found.items():
        scored.save(out.parent / "scores" / f"{task}.jsonl")
    kept_share = retention(seed.base, seed.singles, found, others={"joint": seed.joint}, draws=200)
    row |= {"summary": kept_share.summary, "tasks": kept_share.tasks, "joint": kept_share.others["joint"]}
    return row


def mean_loss(found: dict) -> float:
    """Over tasks: what scales are chosen by."""
    return fmean(scores.summary()["loss"] for scores in found.values())


def merge_once(entry: Entry, seed: Seed, out: Path) -> dict[str, Any]:
    """Merge into `out`; CPU seconds, and for methods without a model the peak of numpy's memory (in a second pass)."""
    from mtft.adapters.lora_factors import read_adapter
    from mtft.merge.engine.merge import merge_adapters
    from mtft.pipeline.stages import derived_recipes
    from mtft.pipeline.stages.merge import merge_recipe

    named = [read_adapter(path, task) for task, path in seed.adapters.items()]
    if entry.kind == "plain":
        run = partial(
            merge_adapters, named, out, entry.method, entry.options, rank=entry.rank, min_energy=0, overwrite=True
        )
        begin = time.process_time()
        report = run()
        cpu = time.process_time() - begin
        tracemalloc.start()
        run()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return {"cpu_s": cpu, "memory_mb": peak / 2**20, "energy": report.energy, "scale": 1.0}
    section = {
        "method": entry.method,
        "options": entry.options,
        "rank": entry.rank,
        "min_energy": 0.0,
        "overwrite": True,
    }
    rows = {"rows": seed.adapted.ids("choose")[seed.recipe.task_names[0]].__len__()}
    more = {entry.kind: {**rows, **entry.section}} if entry.kind != "method" else {}
    if entry.kind == "experts":
        section["average"] = entry.section["kind"] == "twin"
    recipe = derived_recipes.override_section(seed.recipe, merge={**section, **more})
    begin = time.process_time()
    outcome = merge_recipe(recipe, named, out, adapted=seed.adapted)
    cpu = time.process_time() - begin
    energy = None if outcome.report is None else outcome.report.energy
    return {"cpu_s": cpu, "memory_mb": None, "energy": energy, "scale": 1.0, "said": outcome.said}


def table(found: dict[str, list[dict]]) -> str:
    """Markdown: mean over seeds, in the order of the retained loss; +- is the standard deviation over seeds."""

    def over(rows: list[dict], pick) -> list[float]:
        return [value for row in rows if (value := pick(row)) is not None]

    def cell(values: list[float], form: str = "{:.0%}") -> str:
        if not values:
            return "–"
        spread = f" ± {form.format(stdev(values))}" if len(values) > 1 else ""
        return form.format(fmean(values)) + spread

    def kept_mean(metric: str):
        return lambda row: row["summary"][metric]["mean"]["value"]

    def place(item) -> float:
        return -fmean(over(item[1], kept_mean("loss")) or [-9.0])

    def scale(rows: list[dict]) -> str:
        values = [f"{row['scale']:g}" for row in rows if "scale" in row]
        return ", ".join(values if len(set(values)) > 1 else values[:1]) or "–"

    columns = {
        "seeds": lambda rows: str(len(rows)),
        "retained loss": lambda rows: cell(over(rows, kept_mean("loss"))),
        "worst task": lambda rows: cell(over(rows, lambda row: row["summary"]["loss"]["min"])),
        "retained accuracy": lambda rows: cell(over(rows, kept_mean("accuracy"))),
        "retained exact match": lambda rows: cell(over(rows, kept_mean("exact_match"))),
        "scale": scale,
        "CPU s": lambda rows: f"{fmean(row['cpu_s'] for row in rows):.1f}" if "cpu_s" in rows[0] else "–",
        "MB": lambda rows: f"{fmean(row['memory_mb'] for row in rows):.0f}" if rows[0].get("memory_mb") else "–",
    }
    if not any(over(rows, kept_mean("exact_match")) for rows in found.values()):
        del columns["retained exact match"]  # no expert beats the base in it
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, rows in sorted(found.items(), key=place):
        cells = [f"`{name}`" if name != "joint training" else name, *(column(rows) for column in columns.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def joint_row(tasks: dict[str, dict]) -> dict:
    """The joint adapter as a row of the table, from the same comparison."""
    summary = {}
    for metric in ("loss", "accuracy", "exact_match"):
        values = [row[metric]["retained"]["value"] for row in tasks.values()]
        known = [value for value in values if value is not None]
        summary[metric] = {"mean": {"value": fmean(known) if known else None}, "min": min(known, default=None)}
    return {"summary": summary}


def collect(out: Path, seeds: list[int]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for name in ENTRIES:
        files = [out / f"seed-{seed}" / "merges" / slug(name) / "row.json" for seed in seeds]
        rows = [json.loads(file.read_text("utf-8")) for file in files if file.is_file()]
        if rows:
            found[name] = rows
    if found:
        any_rows = max(found.values(), key=len)
        found["joint training"] = [joint_row(row["joint"]) for row in any_rows]
    return found


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--out", type=Path, default=Path("runs/compare-merges"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[17, 18, 19])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows of the table to make")
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of each task to choose on")
    parser.add_argument("--limit", type=int, default=80, help="held-out rows of each task in all")
    parser.add_argument("--docs", type=Path, help="page with the two marks between which the table is written")
    parser.add_argument("--table", action="store_true", help="only print what is there already")
    asked, overrides = parser.parse_known_args()
    if unknown := [name for name in asked.only or () if name not in ENTRIES]:
        parser.error(f"no row {unknown[0]!r}: {', '.join(ENTRIES)}")
    if not asked.table:
        torch.set_num_threads(1)
        open_seed = cache(lambda n: prepare(asked.recipe, n, asked.out, asked.rows, asked.limit, overrides))
        names = list(asked.only or ENTRIES)
        for phase in (("plain", "method", "experts"), ("search", "gates")):  # what costs little first
            for number in asked.seeds:
                for name in (name for name in names if ENTRIES[name].kind in phase):
                    one_row(name, open_seed(number))
    found = collect(asked.out, asked.seeds)
    (asked.out / "merges.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = table(found)
    print(text)
    if asked.docs is not None:
        page = asked.docs.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        asked.docs.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def one_row(name: str, seed: Seed) -> None:
    folder = seed.folder / "merges" / slug(name)
    if (folder / "row.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    row = measure(ENTRIES[name], seed, folder / "adapter")
    (folder / "row.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    kept_loss = row["summary"]["loss"]["mean"]["value"]
    say(f"{seed.folder.name}: {name}: retained loss {kept_loss}, {row['cpu_s']:.1f} CPU s")


if __name__ == "__main__":
    main()
