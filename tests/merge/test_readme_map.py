"""README.md beside this file says which test holds which line: all of these tests exist, and no method is left out."""

import re
from pathlib import Path

from mtft.merge.methods import METHODS

HERE = Path(__file__).parent
NAMED = re.findall(r"`([\w./]+\.py)::(\w+)`", (HERE / "README.md").read_text(encoding="utf-8"))


def test_every_test_that_is_named_exists():
    assert len(NAMED) > 50
    lost = [
        f"{file}::{test}" for file, test in NAMED if f"def {test}(" not in (HERE / file).read_text(encoding="utf-8")
    ]
    assert lost == []


def test_every_method_has_a_row_in_the_docs():
    page = (HERE.parents[1] / "docs" / "merging.md").read_text(encoding="utf-8")
    assert [name for name in METHODS if f"`{name}`" not in page] == []
