"""docs/papers.md names what there is: every method once, every file and test it points to."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")


def section(title):
    return TEXT.split(f"## {title}:", 1)[1].split("\n## ", 1)[0]


def test_every_method_is_named_in_its_room():
    from data_mixers.surrogates.registry import SURROGATES
    from mtft.evaluation.metrics import METRICS
    from mtft.fuse.alpha.spec import RULES
    from mtft.gradients.aggregators import AGGREGATORS
    from mtft.losses.balancers import BALANCERS
    from mtft.merge.methods import METHODS

    rooms = {"Mix": SURROGATES, "Balance": BALANCERS, "Gradients": AGGREGATORS, "Merge": METHODS, "Fuse": RULES}
    rooms |= {"Evaluate": METRICS}
    for title, names in rooms.items():
        missing = [name for name in names if f"`{name}`" not in section(title)]
        assert not missing, f"docs/papers.md, section {title}, lacks {missing}"


def test_every_path_exists():
    paths = re.findall(r"`((?:mtft|data_mixers|tests)/[\w/]+\.py)`", TEXT)
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).is_file()] == []
