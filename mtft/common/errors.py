"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: printed as one short block, exit code 2, no traceback.

    `what` is wrong, `where` it is (file, line, key), what to `do` about it. Several problems found in one pass
    are raised as one error whose `what` lists them, so that nobody fixes a file one message at a time.
    """

    def __init__(self, what: str, *, where: str | None = None, do: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.do = what, where, do

    def __str__(self) -> str:
        lines = [f"error: {self.what}"]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.do:
            lines.append(f"  do:    {self.do}")
        return "\n".join(lines)


class MergeError(UserError):
    """Adapters that can't be read, or a merge that can't be done as asked: what is wrong, where (file, key, module),
    what to do.
    """
