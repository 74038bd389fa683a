"""Parameters that only the slow part of the tests plays: `[one, *slow(another, third)]`."""

import pytest


def slow(*values):
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow) for value in values
    ]
