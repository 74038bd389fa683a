"""Silence for scripts whose own lines are the result."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """What libraries say, about a machine without a GPU for one, is no result."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging as transformers_logging

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
