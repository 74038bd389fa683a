"""The answers that a run has until it is done: `.NAME.mtft-part` beside its output, which a killed run goes on from.

The first line says what the file is, the fingerprint of what decides an answer, and a token; every further one holds an
answer and its checksum. A line that is torn or was changed does not count: its row is answered again. A file of the
same name that does not begin as ours does is somebody's, and is left alone. The finished output is written to
`.NAME.TOKEN.mtft-done` first; a name that only we know, and stands in our file, is ours to replace.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from mtft.common.atomic_io import finite, sync
from mtft.common.fingerprint import content_hash, file_hash
from mtft.common.own_files import FORMAT, defect, irregular, read_own_lines
from mtft.fuse.alpha.spec import FusionError

Answer = dict[str, Any]
MAGIC = '{"mtft": "answers that are not complete", "format": '  # what a header begins with, and no other file
CHECKSUM = 16  # hexadecimal digits


class AnswersFile:
    """The side file of one output. The caller holds the output's lock.

    answers    by their index: what stands there whole, whatever request they answer
    damaged    lines that don't count
    fingerprint  of the run that wrote it; None: nothing is there, or no more than its beginning
    """

    def __init__(self, target: Path) -> None:
        """Reads it. FusionError if something else stands at its place."""
        self.target, self.path = target, target.with_name(f".{target.name}.mtft-part")
        self.answers: dict[int, Answer] = {}
        self.damaged = 0
        self.fingerprint: str | None = None
        self._token, self._written = secrets.token_hex(8), ""
        self._file: FileIO | None = None
        self._goes_on = False
        self._refuse_foreign()
        self._read()

    @property
    def is_done(self) -> bool:
        """Everything is written, and the output is there: its process died before it could remove this file."""
        try:
            return bool(self._written) and file_hash(self.target) == self._written
        except OSError:
            return False

    def claim(self, fingerprint: str) -> None:
        """Go on with what is there, or begin; nothing is written yet. FusionError if it is another run's."""
        if self.fingerprint not in (None, fingerprint) and self.answers:
            raise FusionError(
                "a broken-off run with another recipe, seed or other weights stands here",
                where=str(self.path),
                do="remove it, or give another --out",
            )
        self._goes_on, self.fingerprint = self.fingerprint == fingerprint, fingerprint

    def add(self, answers: Iterable[Answer]) -> list[Answer]:
        """On disk when it returns what stands there: NaN and infinity are null."""
        finite_answers: list[Answer] = [finite(answer) for answer in answers]
        self._write([self._line({"answer": answer}) for answer in finite_answers])
        return finite_answers

    def has_written(self, answers: Mapping[int, Answer]) -> bool:
        """Whether the output that stands there is the one of these answers, by this run."""
        return self.is_done and content_hash(_as_output(answers)) == self._written

    def finish(self, answers: Mapping[int, Answer]) -> None:
        """The output, whole, in place of this file."""
        done = self.target.with_name(f".{self.target.name}.{self._token}.mtft-done")
        text = _as_output(answers)
        try:
            with FileIO(done, "w") as file:
                _append(file, text)
            self._write([self._line({"written": content_hash(text)})])
            done.replace(self.target)
        finally:
            done.unlink(missing_ok=True)
        with suppress(OSError):  # there are file systems that force no folder to disk
            sync(self.target.parent)
        self.remove()

    def remove(self) -> None:
        """It, and what a killed `finish` left beside it."""
        self.close()
        self.target.with_name(f".{self.target.name}.{self._token}.mtft-done").unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.answers, self.damaged, self.fingerprint, self._written = {}, 0, None, ""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _refuse_foreign(self) -> None:
        kind = "a link" if self.path.is_symlink() else irregular(self.path)
        if kind is None and not self.path.exists():
            return
        if kind is None:
            try:
                with self.path.open("rb") as file:
                    begin = file.read(len(MAGIC))
            except OSError as error:
                raise FusionError(
                    f"can't be read: {error.strerror}", where=str(self.path), do="give another --out"
                ) from error
            if MAGIC.encode().startswith(begin):  # also when its first line was being written
                return
            kind = "a file that mtft did not write"
        raise FusionError(
            f"{kind} stands where the answers are kept until all are there",
            where=str(self.path),
            do="move it away, or give another --out",
        )

    def _read(self) -> None:
        if not self.path.exists():
            return
        do = "remove it: all rows are answered anew"
        lines = read_own_lines(self.path, do=do)
        if not lines.rows or lines.numbers[0] != 1 or defect(lines.rows[0], {"fingerprint": str, "token": str}):
            newer = next((what for what in lines.problems if "newer version" in what), None)
            if newer is not None:
                raise FusionError(newer, where=str(self.path), do="pip install -U mtft")
            self.damaged = len(lines.rows) + len(lines.problems)  # nothing says whose they are
            return
        header = lines.rows[0]
        self.fingerprint = header["fingerprint"]
        if len(token := header["token"]) == len(self._token) and token.isalnum():
            self._token = token
        self.damaged = len(lines.problems)  # a torn last line is no damage: kills do that
        for row in lines.rows[1:]:
            content = row.get("answer")
            if not self._is_whole(row):
                self.damaged += 1
            elif isinstance(content, dict):
                self.answers[content["index"]] = content
            else:
                self._written = str(row.get("written"))

    def _is_whole(self, row: Answer) -> bool:
        try:
            return self._line({key: row[key] for key in row if key != "sum"}) == _json(row)
        except ValueError:  # NaN, half a surrogate pair: nothing that we write
            return False

    def _line(self, content: Answer) -> str:
        return _json({"sum": content_hash(f"{self.fingerprint} {_json(content)}")[:CHECKSUM], **content})

    def _write(self, lines: Sequence[str]) -> None:
        if self._file is None and self._goes_on:  # without the end of a line that was torn
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
            self._file = FileIO(self.path, "a")
        elif self._file is None:
            self._file = FileIO(self.path, "w")
            header = {"mtft": "answers that are not complete", "format": FORMAT}
            lines = [json.dumps(header | {"fingerprint": self.fingerprint, "token": self._token}), *lines]
        _append(self._file, "".join(line + "\n" for line in lines))


def _as_output(answers: Mapping[int, Answer]) -> str:
    rows = ({key: x for key, x in answers[index].items() if key != "request"} for index in sorted(answers))
    return "".join(_json(row) + "\n" for row in rows)


def _append(file: FileIO, text: str) -> None:
    """On disk when it returns. Unbuffered: what a full disk didn't take is not tried again on closing."""
    data = memoryview(text.encode())
    try:
        while data:
            data = data[file.write(data) :]
        os.fsync(file.fileno())
    except OSError as error:
        raise FusionError(
            f"can't be written: {error.strerror or error}",
            where=str(file.name),
            do="free some space, or mend what is wrong with the disk; the same command continues",
        ) from error


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
