"""Checkpoints that are whole or not there, found again and verified.

    checkpoint-120/
      weights.safetensors    trainable parameters by name (adapter, or the full model)
      state.json             step, optimizer, scheduler, balancer, random state of every rank, plan; tensors lie in
      state.safetensors
      trainer_state.json     transformers' own TrainerState
      manifest.json          size and CRC-32 of each file above

A checkpoint is written into `checkpoint-120.part`, synced file by file, and renamed: a process that dies at any point
leaves the old ones untouched and at the most a `.part` that the next run removes. What the rename can't exclude (a
disk that lies about syncing, a file cut later) is caught by the manifest: such a checkpoint is skipped with a message.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from mtft.common.atomic_io import sync
from mtft.common.errors import UserError
from mtft.common.own_files import FORMAT, Types, read_own
from mtft.common.state_tree import flatten, unflatten

MANIFEST, STATE = "manifest.json", "state.json"
PART = ".part"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoint-{step}"


def checkpoint_step(path: Path) -> int:
    match = _NAME.match(path.name)
    if match is None:
        raise ValueError(f"{path} is not a checkpoint folder")
    return int(match[1])


@contextmanager
def atomic_checkpoint_dir(
    target: Path, *, manifest: bool = True, writer: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yields a temporary folder that becomes `target` when the block ends well, and vanishes when it doesn't.

    manifest  write manifest.json, so that damage done later is seen
    writer    rank 0, which makes, syncs and renames the folder; others may write into it between the barriers
    A full disk ends in UserError with the last good state untouched.
    """
    folder, old = target.with_name(target.name + PART), target.with_name(f"{target.name}.old{PART}")
    if writer:
        for left_over in (folder, old):
            shutil.rmtree(left_over, ignore_errors=True)
        folder.mkdir(parents=True)
    barrier()
    try:
        yield folder
        barrier()
        if writer:
            _seal(folder, manifest=manifest)
            if target.exists():  # whole under its name until the new one stands there
                target.rename(old)
            folder.rename(target)
            sync(target.parent)
            shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        full = _is_full(error, folder)  # before the folder is removed: it may be what fills the disk
        shutil.rmtree(folder, ignore_errors=True)
        if full:
            raise UserError(
                f"the disk is full: {target.name} could not be written",
                where=str(target.parent),
                do="free some space (or lower output.keep) and run the same command: it continues from the last "
                "checkpoint that stands",
            ) from error
        raise
    except BaseException:
        if writer:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    barrier()


def save_tree(folder: Path, tree: Any) -> None:
    """Writes a nested state as state.json and state.safetensors."""
    plain, tensors = flatten(tree)
    save_file(tensors, folder / "state.safetensors")
    content = json.dumps({"format": FORMAT, **plain})
    (folder / STATE).write_text(content, encoding="utf-8")


def load_tree(folder: Path) -> Any:
    """The inverse of `save_tree`."""
    plain = read_state(folder)
    plain.pop("format", None)
    return unflatten(plain, load_file(folder / "state.safetensors"))


def read_state(folder: Path, needs: Mapping[str, Types] | None = None) -> dict[str, Any]:
    """What is no tensor of a checkpoint's state, cheaper than `load_tree`. UserError if it is damaged."""
    return read_own(folder / STATE, needs, do=f"remove {folder.name}: the run goes on from the one before it")


def ended_at(folder: Path) -> bool:
    """Whether the held-out losses had ended the run when the checkpoint was written."""
    return read_state(folder, {"stopping": dict, "stopping.ended": (str, type(None))})["stopping"]["ended"] is not None


def checkpoint_defects(folder: Path) -> str | None:
    """Why a checkpoint can't be used; None if it is whole."""
    try:
        manifest = read_own(folder / MANIFEST, do="")
    except UserError as error:
        return f"{MANIFEST}: {error.what}"
    for name, listed in manifest.items():
        if name == "format":
            continue
        if not isinstance(listed, list) or len(listed) != 2:
            return f"{MANIFEST}: damaged: key {name} is not [size, checksum]"
        size, checksum = listed
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _crc32(path) != checksum:
            return f"{name} has changed since it was written"
    return None


def latest_checkpoint(run_dir: Path, *, say: Callable[[str], None] = print, tidy: bool = True) -> Path | None:
    """The newest checkpoint that is whole; says which ones it skips and why. tidy: removes unfinished ones."""
    if not run_dir.is_dir():
        return None
    for unfinished in run_dir.glob(f"checkpoint-*{PART}") if tidy else ():
        shutil.rmtree(unfinished, ignore_errors=True)
    for folder in sorted(_checkpoints(run_dir), key=checkpoint_step, reverse=True):
        defect = checkpoint_defects(folder)
        if defect is None:
            return folder
        say(f"{folder.name} is skipped: {defect}")
    return None


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Keeps the newest `keep` checkpoints."""
    # Those of another program, which may lie there too, have no manifest: they neither count nor go.
    ours = [folder for folder in _checkpoints(run_dir) if (folder / MANIFEST).is_file()]
    for folder in sorted(ours, key=checkpoint_step)[:-keep]:
        # Renamed first: a kill in the middle of the removal must not leave half a checkpoint under its good name.
        doomed = folder.with_name(folder.name + PART)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _checkpoints(run_dir: Path) -> list[Path]:
    return [path for path in run_dir.iterdir() if _NAME.match(path.name) and path.is_dir()]


def _is_full(error: Exception, folder: Path) -> bool:
    """True if a write failed for want of space. Not every library says so with an OSError: safetensors has an error of
    its own with the system's text in it, and torch's writer one without."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        return True
    return isinstance(error, RuntimeError) and shutil.disk_usage(folder.parent).free < 2**16


def _seal(folder: Path, *, manifest: bool) -> None:
    if manifest:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        content = {str(path.relative_to(folder)): (path.stat().st_size, _crc32(path)) for path in files}
        (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum
