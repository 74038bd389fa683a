"""`mtft report`: everything that runs left on disk, as one HTML page that needs no network and no other file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from mtft.common.atomic_io import write_text
from mtft.common.folder_lock import sole_writer
from mtft.common.output_paths import check_output_file
from mtft.common.own_files import irregular
from mtft.report.components.elements import PageSection
from mtft.report.components.run_data import RunData, load_run
from mtft.report.sections import affinity, merge_and_fuse, results

MAKERS = (
    results.results,
    results.mixture,
    results.training,
    affinity.affinity,
    results.trials,
    merge_and_fuse.merging,
    merge_and_fuse.fusion,
    results.environment,
)

PAGE = "report.html"
MARKS = (b'<meta name="generator" content="mtft">', b" MTFT report</title>")  # the second one: of earlier versions
PATIENCE = 30.0  # seconds: another command that writes the page takes less


def write_report(run_dirs: Sequence[str | Path], out: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Writes one page for one or several run directories; returns its path.

    `out` defaults to report.html in the first directory. An earlier page of ours is replaced, another file only with
    `overwrite`. Raises UserError when a folder holds nothing to report, or the page can't be written.
    """
    target = Path(out) if out is not None else Path(run_dirs[0]) / PAGE
    runs = [load_run(Path(folder)) for folder in run_dirs]
    check_page(target, overwrite=overwrite)
    with sole_writer(target, wait=PATIENCE):
        write_text(target, render(runs))
    return target


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


def render(runs: Sequence[RunData]) -> str:
    """The page's HTML."""
    # Everything that comes from a user's files is escaped; only our own SVGs go in as they are.
    template = Environment(
        loader=PackageLoader("mtft.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html.j2")
    blocks = [{"id": f"run{index}", "name": run.name, "sections": _sections(run)} for index, run in enumerate(runs)]
    return template.render(title=" · ".join(run.name for run in runs), subtitle=_subtitle(runs), runs=blocks)


def _sections(run: RunData) -> list[PageSection]:
    return [section for maker in MAKERS if (section := maker(run)) is not None]


def _subtitle(runs: Sequence[RunData]) -> str:
    run = runs[0]
    counts = ((len(run.tasks), "task"), (len(run.trains), "training run"))
    parts = [f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts]
    trials = max((target["n"] for target in run.fit.get("targets", {}).values()), default=0)
    if trials:
        parts.append(f"{trials} mixture trials")
    version = next((train.env.get("versions", {}).get("mtft") for train in run.trains if train.env), None)
    return " · ".join(parts + ([f"mtft {version}"] if version else []))
