"""Writes scripts/constraints.txt: the version of every package of this environment, for scripts/setup.sh.

    scripts/test.sh --all --newest && .venv/bin/python scripts/make_constraints.py

Run it where all tests have passed, with the oldest Python that mtft supports: what exists for it mostly exists for
newer ones too, not the other way round. A package that a machine does not need costs it nothing: a constraint installs
nothing. Not in the file: mtft itself, the installers, the CUDA libraries (torch asks for exactly those that it was
built with), and local versions such as torch's `+cpu` (`torch==2.13.0` takes the CPU build and the CUDA build).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

FILE = Path(__file__).with_name("constraints.txt")
OURS = re.compile(r"mtft|pip|setuptools|wheel")
OF_A_PLATFORM = re.compile(r"nvidia-.*|cuda-.*|triton|pytorch-triton.*|pywin32|colorama")
HEAD = """\
# The set that the tests passed with, on Python {python}. scripts/setup.sh installs it; with --newest it does not.
# Written by scripts/make_constraints.py: do not edit. Where a version does not exist for your Python: --newest.
"""


def normal(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(installed: Iterable[Distribution]) -> dict[str, str]:
    """{normalised name: public version}, sorted, without what another machine can't or need not take."""
    found = {}
    for one in installed:
        name = normal(one.metadata["Name"])
        from_an_index = one.read_text("direct_url.json") is None  # PEP 610: else a folder, an URL, an editable install
        if from_an_index and not OURS.fullmatch(name) and not OF_A_PLATFORM.fullmatch(name):
            found.setdefault(name, one.version.partition("+")[0])  # the first on the path is the one that is imported
    return dict(sorted(found.items()))


def read(text: str) -> dict[str, str]:
    """The pins of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return dict(line.split("==") for line in lines if line)


def differences(text: str) -> list[str]:
    """`name 1.2 (tested with 1.1)` of every installed package that is not the one of the file."""
    tested, here = read(text), pins(distributions())
    moved = [name for name in tested if here.get(name, tested[name]) != tested[name]]
    return [f"{name} {here[name]} (tested with {tested[name]})" for name in moved]


def main() -> None:
    found = pins(distributions())
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    FILE.write_text(HEAD.format(python=python) + "".join(f"{name}=={at}\n" for name, at in found.items()), "utf-8")
    print(f"{FILE}: {len(found)} packages")


if __name__ == "__main__":
    main()
