"""Report: what runs left on disk, as one offline HTML page.

    components/   run_data.py reads a run's files; elements.py is what a section consists of; plots.py draws
    sections/     one section a function: results, affinity, Pareto front, merge and fusion
    page.py       the sections in the template

`write_report` is imported on first use (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtft.report.page import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mtft.report.page import write_report

    return write_report
