"""A limit for templates that never end, `{% for i in range(99999) %}` inside of itself or `{{ 9**9**9 }}`.

What counts is the processor time of this process in the template, so a busy machine refuses no row. Python asks for
signals in its main thread only, and there training and its worker processes render; in other threads (a server's, whose
template was tried when it started) and on Windows there is no limit.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

from mtft.common.errors import UserError

SECONDS = 5.0  # of the processor, for one conversation; templates take milliseconds
LONGEST_TEXT = 1 << 26  # characters of one conversation


class EndlessTemplate(UserError):
    """A template that takes longer than SECONDS, or writes more than LONGEST_TEXT: one row is enough to give it up."""

    def __init__(self, what: str) -> None:
        do = "mend the template (model.chat_template, the tokenizer's own, or tasks.*.template), or the row"
        super().__init__(f"the template {what}", do=do)


class _TimeIsUp(BaseException):
    """No Exception: Jinja takes those of constants that it can't compute for "not now", and goes on."""


class RenderLimit:
    """Raises EndlessTemplate in the middle of what takes more than SECONDS of the processor."""

    inside = False  # whether the main thread is in a template

    def __enter__(self) -> None:
        self._armed = sys.platform != "win32" and threading.current_thread() is threading.main_thread()
        if self._armed:
            RenderLimit.inside = True
            if signal.getsignal(signal.SIGVTALRM) is not _stop:
                signal.signal(signal.SIGVTALRM, _stop)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._armed:
            RenderLimit.inside = False  # a signal that comes now is too late to stop anything
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if kind is _TimeIsUp:
            raise EndlessTemplate(f"takes more than {SECONDS:g} seconds: does it ever end?") from None


def check_length(text: str) -> str:
    """The text; EndlessTemplate if it is longer than any conversation."""
    if len(text) > LONGEST_TEXT:
        raise EndlessTemplate(f"writes {len(text):,} characters, and {LONGEST_TEXT:,} is the most")
    return text


def _stop(number: int, frame: FrameType | None) -> None:
    if RenderLimit.inside:
        raise _TimeIsUp
