"""`mtft report`: everything that runs left on disk, as one HTML page that needs no network and no other file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mtft.common.atomic_io import write_text
from mtft.common.errors import UserError
from mtft.common.folder_lock import sole_writer
from mtft.common.output_paths import check_output_file, refuse_input_as_output
from mtft.common.own_files import irregular
from mtft.report.components.elements import PageSection, Paragraph, table
from mtft.report.components.run_data import RunData, load_run
from mtft.report.sections import affinity, merge_and_fuse, results

# Each section, and the files that it is drawn from.
MAKERS = {
    results.results: "results.json",
    results.mixture: "plan.json, mix/proposal.json",
    results.training: "metrics.jsonl, eval.jsonl, plan.json",
    affinity.affinity: "affinity.json, metrics.jsonl",
    results.trials: "mix/fit.json",
    merge_and_fuse.merging: "merge/retention.json, merge/front.json",
    merge_and_fuse.fusion: "fuse/fusion.json",
    results.environment: "env.json, recipe.yaml",
}
MOST_TOLD, MOST_SHOWN = 20, 200  # problems on stderr, and on the page

PAGE = "report.html"
MARKS = (b'<meta name="generator" content="mtft">', b" MTFT report</title>")  # the second one: of earlier versions
PATIENCE = 30.0  # seconds: another command that writes the page takes less


def write_report(
    run_dirs: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Writes one page for one or several run directories; returns its path.

    `out` defaults to report.html in the first directory. An earlier page of ours is replaced, another file only with
    `overwrite`. What is damaged or missing is listed on the page, and told to `say` (None: stderr). Raises UserError
    when a folder holds nothing to report, nothing of them can be drawn, or the page can't be written.
    """
    target = Path(out) if out is not None else Path(run_dirs[0]) / PAGE
    runs = [load_run(Path(folder)) for folder in run_dirs]
    if not _is_ours(target):
        files = (path for folder in run_dirs for path in Path(folder).rglob("*") if path.is_file())
        read = (path for path in files if path.suffix != PAGE[-5:])
        refuse_input_as_output(target, read)
    check_page(target, overwrite=overwrite)
    sections = [_sections(run) for run in runs]
    problems = [f"{run.folder}: {problem}" for run in runs for problem in run.problems]
    if not any(sections):
        more = [f"and {len(problems) - MOST_TOLD:,} more"] if len(problems) > MOST_TOLD else []
        shown = "\n  ".join([*problems[:MOST_TOLD], *more])
        raise UserError(
            f"nothing of it can be drawn:\n  {shown}",
            where=", ".join(map(str, run_dirs)),
            do="mend or remove what is named, or run the recipe again",
        )
    with sole_writer(target, wait=PATIENCE):
        write_text(target, render(runs, sections))
    say = say or _say
    for problem in problems[:MOST_TOLD]:
        say(f"warning: {problem}")
    if len(problems) > MOST_TOLD:
        say(f"warning: and {len(problems) - MOST_TOLD:,} more, on the page")
    return target


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def check_page(target: Path, *, overwrite: bool = False) -> None:
    """UserError if no page can be written at `target`, or a file stands there that is none of ours."""
    check_output_file(target, overwrite=overwrite or _is_ours(target))


def _is_ours(page: Path) -> bool:
    try:
        if irregular(page) is not None:
            return False
        with page.open("rb") as file:
            start = file.read(4096)
    except OSError:
        return False
    return any(mark in start for mark in MARKS)


def render(runs: Sequence[RunData], sections: Sequence[list[PageSection]] | None = None) -> str:
    """The page's HTML. sections: of each run, where they are made already."""
    # Everything that comes from a user's files is escaped; only our own SVGs go in as they are.
    template = Environment(
        loader=PackageLoader("mtft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.j2")
    made = [_sections(run) for run in runs] if sections is None else sections
    blocks = [
        {"id": f"run{index}", "name": run.name, "sections": _problems(run) + parts}
        for index, (run, parts) in enumerate(zip(runs, made, strict=True))
    ]
    return template.render(title=" · ".join(run.name for run in runs), subtitle=_subtitle(runs), runs=blocks)


def _sections(run: RunData) -> list[PageSection]:
    """What can be drawn; what can't is added to run.problems."""
    sections = []
    for maker, files in MAKERS.items():
        try:
            section = maker(run)
        except Exception as error:  # noqa: BLE001  files that anything may have happened to: the others are drawn
            what = f"key {error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
            run.problems.append(f"{files}: damaged: its section can't be drawn: {what}")
            continue
        if section is not None:
            sections.append(section)
    return sections


def _problems(run: RunData) -> list[PageSection]:
    """The section of what is not whole, if anything is."""
    if not run.problems:
        return []
    text = "The page shows what is whole. None of this touches the weights of a model or an adapter."
    rows = [[problem.partition(": ")[0], problem.partition(": ")[2]] for problem in run.problems[:MOST_SHOWN]]
    if len(run.problems) > MOST_SHOWN:
        rows.append(["", f"and {len(run.problems) - MOST_SHOWN:,} more"])
    return [PageSection("problems", "Damaged or missing", [Paragraph(text), table(["file", "what"], rows, words=True)])]


def _subtitle(runs: Sequence[RunData]) -> str:
    run = runs[0]
    counts = ((len(run.tasks), "task"), (len(run.trains), "training run"))
    parts = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts]
    targets = [target.get("n") for target in run.fit.get("targets", {}).values() if isinstance(target, dict)]
    trials = max((number for number in targets if isinstance(number, int)), default=0)
    if trials:
        parts.append(f"{trials} mixture trials")
    versions = [train.env.get("versions") for train in run.trains if train.env]
    version = versions[0].get("mtft") if versions and isinstance(versions[0], dict) else None
    return " · ".join(parts + ([f"mtft {version}"] if version else []))
