"""The text of the quickstart: the standard library of the running interpreter, split by module.

Files are grouped by top-level module or package; near twins (``decimal`` and ``_pydecimal``, ``pickle`` and
``pickletools``) are one group, so that no code stands on both sides. A group belongs to evaluation iff the SHA-256 of
its name falls into a fixed band. That depends on the name alone: the same module is on the same side in every version
of Python, so base models trained on one version can be evaluated on another.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mtft.common.fingerprint import content_hash, file_hash, hash_number

# The band is 12 % wide. Its start was chosen once, by looking at the names that fall in: a few large packages,
# and modules of many kinds (network, text, numbers, tools).
EVAL_BAND = (0.66, 0.78)

# Generated tables, machine-made files and other people's packages: neither code that people wrote nor prose.
_SKIPPED_FOLDERS = {
    "__pycache__",
    "__phello__",
    "_bundled",
    "dist-packages",
    "encodings",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
_SKIPPED_FILES = re.compile(r"^(_sysconfigdata.*|_build_details|config-.*|html/entities)(\.py)?$")
_LARGEST_FILE = 400_000  # bytes

# Modules that share code or describe the same thing; the first name stands for all. Names of newer Pythons are in here
# as well: a module that moves into a package must not change sides.
_TWINS = (
    ("abc", "_py_abc"),
    ("asyncore", "asynchat", "smtpd"),
    ("collections", "_collections_abc", "collections_abc"),
    ("datetime", "_pydatetime", "_strptime"),
    ("decimal", "_pydecimal"),
    ("dis", "opcode", "_opcode_metadata"),
    ("gzip", "bz2", "lzma", "_compression", "compression"),
    ("html", "_markupbase"),
    ("importlib", "imp", "pkgutil", "zipimport", "runpy", "modulefinder"),
    ("io", "_pyio"),
    ("os", "posixpath", "ntpath", "genericpath", "pathlib", "glob", "fnmatch"),
    ("pdb", "bdb", "_pyrepl", "code", "codeop", "cmd"),
    ("pickle", "pickletools", "_compat_pickle", "copyreg"),
    ("profile", "cProfile", "pstats", "profiling"),
    ("re", "sre_compile", "sre_constants", "sre_parse"),
    ("site", "_sitebuiltins"),
    ("subprocess", "_bootsubprocess"),
    ("sysconfig", "distutils", "_osx_support", "_aix_support", "_android_support", "_ios_support"),
    ("tarfile", "zipfile", "zipapp", "shutil"),
    ("threading", "_threading_local", "dummy_threading"),
    ("tokenize", "token", "lib2to3", "keyword", "tabnanny"),
    ("turtle", "turtledemo"),
    ("wave", "aifc", "sunau", "sndhdr", "chunk"),
    ("weakref", "_weakrefset"),
    ("xml", "xmlrpc", "plistlib"),
    ("unittest", "doctest"),
    ("http", "socketserver", "wsgiref", "cgi", "cgitb"),
    ("ast", "_ast_unparse"),
    ("int", "_pylong"),
    ("urllib", "nturl2path"),
)
_GROUP = {name: names[0] for names in _TWINS for name in names}


@dataclass(frozen=True)
class SourceFile:
    """One file of the standard library: `path` on disk, `name` relative to the library ("json/decoder.py")."""

    name: str
    path: Path

    @property
    def group(self) -> str:
        return group_of(self.name)

    @property
    def is_eval(self) -> bool:
        return is_eval(self.group)

    def text(self) -> str:
        """The source with "\\n" line ends."""
        return self.path.read_text(encoding="utf-8")


def group_of(name: str) -> str:
    """The group of a file name relative to the library: "json/decoder.py" -> "json", "_pydecimal.py" -> "decimal"."""
    top = name.replace("\\", "/").split("/")[0].removesuffix(".py")
    return _GROUP.get(top, top)


def is_eval(group: str) -> bool:
    """Whether a group is held out. Pure function of its name."""
    position = hash_number(group, "big", 4) / 2**32
    return EVAL_BAND[0] <= position < EVAL_BAND[1]


def library_root() -> Path:
    """Where the standard library of the running interpreter lies."""
    return Path(sysconfig.get_path("stdlib"))


def library_files(root: Path | None = None) -> list[SourceFile]:
    """All source files of the library, tests and tables left out, sorted by name."""
    root = root or library_root()
    files = []
    for folder, below, names in os.walk(root):
        # pruned, not filtered: site-packages may be large, and pip may be changing it right now
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            name = path.relative_to(root).as_posix()
            if _SKIPPED_FILES.match(name) or not 0 < path.stat().st_size <= _LARGEST_FILE:
                continue
            if _readable(path):
                files.append(SourceFile(name, path))
    return sorted(files, key=lambda file: file.name)


def suite_files(root: Path | None = None) -> list[SourceFile]:
    """Files of the library's own test suite that may be trained on, sorted; empty where Python came without it.

    Left out: tests of held-out modules, and every file that names one in an import or in its own name. Names are
    relative to the library ("test/test_heapq.py").
    """
    root = root or library_root()
    held_out = {top for top in _tops(library_files(root)) if is_eval(_GROUP.get(top, top))}
    files = []
    for path in (root / "test").rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if "__pycache__" in name or "bad" in path.name or not 0 < path.stat().st_size <= _LARGEST_FILE:
            continue
        if any(top.strip("_") in name for top in held_out) or not _readable(path):
            continue
        file = SourceFile(name, path)
        if not _imports(file.text()) & held_out:
            files.append(file)
    return sorted(files, key=lambda file: file.name)


def without_copies(files: Iterable[SourceFile], held_out: Iterable[SourceFile], run: int = 6) -> Iterator[SourceFile]:
    """The `files` that share no `run` consecutive lines of code (blank and comment lines apart) with `held_out`."""
    seen = {window for file in held_out for window in _windows(file.text(), run)}
    for file in files:
        if seen.isdisjoint(_windows(file.text(), run)):
            yield file


def pretraining_files(root: Path | None = None) -> tuple[list[SourceFile], list[SourceFile], list[SourceFile]]:
    """(library files to train on, test files to train on, held-out files). The first two copy nothing of the third."""
    files = library_files(root)
    held_out = [file for file in files if file.is_eval]
    library = list(without_copies((file for file in files if not file.is_eval), held_out))
    return library, list(without_copies(suite_files(root), held_out)), held_out


def prose() -> list[str]:
    """The language reference that pydoc carries ("help('if')"): plain text, one entry a topic, sorted by name.

    Topics that document held-out modules are about them, not their code; the reference has none that quotes them.
    """
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def prose_file(root: Path | None = None) -> SourceFile:
    """The file that `prose` comes from."""
    name = "pydoc_data/topics.py"
    return SourceFile(name, (root or library_root()) / name)


def fingerprint(files: Iterable[SourceFile]) -> str:
    """SHA-256 over the sorted (name, SHA-256 of the content) of `files`."""
    rows = sorted((file.name, file_hash(file.path)) for file in files)
    return content_hash("".join(f"{name} {digest}\n" for name, digest in rows))


def _tops(files: Iterable[SourceFile]) -> set[str]:
    return {file.name.split("/")[0].removesuffix(".py") for file in files}


def _imports(text: str) -> set[str]:
    return set(re.findall(r"^\s*(?:import|from)\s+([A-Za-z_]\w*)", text, flags=re.MULTILINE))


def _windows(text: str, run: int) -> set[int]:
    lines = [line for line in map(str.strip, text.splitlines()) if len(line) > 2 and not line.startswith("#")]
    return {hash("\n".join(lines[i : i + run])) for i in range(len(lines) - run + 1)}


def _readable(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True
