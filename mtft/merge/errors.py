"""The merge room's error for people."""

from __future__ import annotations

from mtft.errors import UserError


class MergeError(UserError):
    """A merge that can't be done as asked: what is wrong, where (file, key, module), what to do."""
