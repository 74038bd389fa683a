"""What DeepSpeed compiles on its first use: said before, and never waited for in vain.

    deepspeed_shm_comm   sums between the processes of a machine without a GPU
    cpu_adam             its own optimizer, where a configuration with offload doesn't forbid it

Compiling takes a minute or more, in silence. torch guards it by a file that the builder creates, holds open and deletes
(torch.utils.file_baton); the file of a builder that was killed stays, and everybody waits for it for ever.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from mtft.common.errors import UserError
from mtft.distributed.launch import LaunchConfig, engine, several_machines

OTHER_MACHINE = 3600.0  # seconds after which no machine can still be building


def extension_notes() -> list[str]:
    """What DeepSpeed will compile in this run, for people; [] without DeepSpeed or where all is built.

    Raises:
        UserError: for the lock of a build that was killed, or DeepSpeed missing.
    """
    if engine() != "deepspeed":
        return []
    notes = []
    for name, folder in _needed().items():
        lock = folder / "lock"
        if is_stale(lock):
            raise UserError(
                f"a build of DeepSpeed's extension {name} was killed and has left its lock: this run would wait for it "
                "for ever",
                where=str(lock),
                do="delete that file (no process here holds it; another machine may, if they share the folder)",
            )
        if not any(folder.glob("*.so")):
            notes.append(f"DeepSpeed compiles its {name} first, once, into {folder}: a minute or more")
    return notes


def is_stale(lock: Path) -> bool:
    """Whether a builder's lock is left over: it is there, and no process holds it. False where that can't be known."""
    try:
        about = lock.stat()
    except OSError:
        return False
    if several_machines() and time.time() - about.st_mtime < OTHER_MACHINE:
        return False
    if not Path("/proc/self/fd").is_dir() or os.getuid() not in (0, about.st_uid):
        return False
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it has ended, or is another user's
            if os.path.samestat(handle.stat(), about):
                return False
    with suppress(OSError):  # a builder that has just ended takes its own away
        return os.path.samestat(lock.stat(), about)
    return False


def _needed() -> dict[str, Path]:
    """{extension: folder that it is built in}, of those that this run loads and that were not installed with it."""
    import torch

    try:
        import deepspeed
        from deepspeed.git_version_info import installed_ops
    except ImportError as error:
        raise UserError(
            f"the launcher asks for DeepSpeed, which can't be imported: {error}",
            where="the launcher's configuration (distributed_type: DEEPSPEED)",
            do='pip install "mtft[deepspeed]", or launch with recipes/accelerate/ddp.yaml or fsdp2.yaml',
        ) from error
    from torch.utils.cpp_extension import _get_build_directory

    loads = {
        "deepspeed_shm_comm": not torch.cuda.is_available(),
        "cpu_adam": LaunchConfig.from_environment().cpu_optimizer,
    }
    possible = deepspeed.ops.__compatible_ops__
    names = [name for name, needed in loads.items() if needed and possible.get(name) and not installed_ops.get(name)]
    return {name: Path(_get_build_directory(name, verbose=False)) for name in names}
