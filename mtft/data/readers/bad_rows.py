"""What happens to rows that can't be used: all named in one error, or skipped and counted up to a limit."""

from __future__ import annotations

from mtft.common.errors import UserError
from mtft.data.readers.row_files import FileRow, RowProblem

SHOWN = 10
LIMIT = 0.01  # share of a file's rows that policy `skip` puts up with


class BadRowCollector:
    """Collects the bad rows of one task. policy: "error" or "skip"."""

    def __init__(self, where: str, policy: str) -> None:
        if policy not in ("error", "skip"):
            raise ValueError(f"bad_rows is {policy!r}: error or skip")
        self.where, self.policy = where, policy
        self.count = 0
        self.empty: FileRow | None = None  # the first row whose answer is empty
        self.example: str | None = None  # a drawn example, where it helps
        self._shown: list[str] = []
        self._before = 0  # bad rows of the files before
        self._rows = 0

    @property
    def fatal(self) -> bool:
        """True once the build can't succeed any more."""
        return self.policy == "error" and self.count > 0

    def add(self, problem: RowProblem, row: FileRow | None = None) -> None:
        """Count a bad row; `row` is what could be read of it."""
        self.count += 1
        if self.empty is None and problem.what == "is empty":
            self.empty = row
        if len(self._shown) < SHOWN:
            self._shown.append(str(problem))

    def end_of_file(self, name: str, rows: int) -> None:
        """Skipping must not hide that a file is broken: over 1 % of its rows is an error."""
        bad, self._before = self.count - self._before, self.count
        self._rows += rows
        if self.policy == "skip" and bad > LIMIT * rows:
            self._raise(
                f"{bad} of {rows} rows of {name} can't be used, more than the {LIMIT:.0%} that bad_rows: skip allows",
                "mend the rows, or correct tasks.*.format if it names the wrong columns",
            )

    def finish(self) -> None:
        """Raise what policy `error` has collected."""
        if self.fatal:
            do = "mend the rows"
            if self.count <= LIMIT * self._rows:
                do += ", or set train.bad_rows: skip to leave them out (up to 1 % of a file)"
            if self.count == self._rows:
                do = "mend the rows, or name other columns in tasks.*.format"
            self._raise(f"{self.count} of {self._rows} rows can't be used", do)

    def _raise(self, what: str, do: str) -> None:
        more = self.count - len(self._shown)
        lines = self._shown + ([f"... and {more} more"] if more else [])
        drawn = f"\n  one example, learnt parts between ⟦ and ⟧:\n{self.example}" if self.example else ""
        raise UserError(what + ":\n    " + "\n    ".join(lines) + drawn, where=self.where, do=do)
