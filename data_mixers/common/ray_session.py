"""Ray for as long as a block of code: a cluster that is there, or one of this machine that ends with the block."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_mixers.common.errors import MixError


@contextmanager
def ray_session(ray: Any, cpus: int, *, where: str) -> Iterator[bool]:
    """Joins the cluster of RAY_ADDRESS (or the one that is initialised), else starts a local one with so many CPUs.

    Yields whether machines may join it. Only what was joined or started here is left at the end. where: the key that
    asks for Ray; MixError if no cluster answers.
    """
    if ray.is_initialized():
        yield True
        return
    address = os.environ.get("RAY_ADDRESS")
    # "local": with no address Ray would look for a cluster that somebody else has started on this machine
    options = {"address": address} if address else {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            _look_for(address or "")
            ray.init(log_to_driver=False, configure_logging=False, **options)
        except (OSError, ValueError) as error:
            if not address:
                raise
            do = "start it (ray start --head), correct RAY_ADDRESS, or unset it: then Ray is started on this machine"
            raise MixError(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}", where=where, do=do) from error
        yield bool(address)
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread() and on_sigterm is not None:
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray leaves one that ends the process


def _look_for(address: str) -> None:
    """OSError if nobody listens at HOST:PORT: Ray would try for five minutes, and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
