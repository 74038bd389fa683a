"""The tiny base model of tests/merge."""

from tests.merge.conftest import base  # noqa: F401  (fixtures)
