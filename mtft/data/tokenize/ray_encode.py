"""Blocks of rows to blocks of examples on Ray, over as many machines as its cluster has.

The rows are read here and the results are taken in their order, so a store is the same to the byte as with processes,
and the files need not be where the workers are. What encodes them (tokenizer, task, demonstrations) is sent once and
read once by each worker. A block is a task, no actor's: it goes to whichever CPU is free, also where others use the
cluster or a machine joins late.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from data_mixers.common.errors import MixError, optional_package
from data_mixers.common.ray_session import ray_session
from mtft.common.errors import UserError

if TYPE_CHECKING:
    from mtft.data.tokenize.parallel_encode import Block, EncodedBlock, RowEncoder, Run

WHERE = "data.backend: ray"
# What decides about tokens and is not sent: Python and Ray itself refuse workers with other versions of them.
_PACKAGES = ("mtft", "transformers", "tokenizers", "jinja2")


class RayEncoding:
    """Ray as what encodes: joined, or started, with the first store that is built, and left with this context.

    workers: blocks at the same time; None: one for each CPU of the cluster.
    """

    def __init__(self, workers: int | None) -> None:
        self.workers, self._ray = workers, None
        self._held = ExitStack()

    def __enter__(self) -> RayEncoding:
        return self

    def __exit__(self, *failure: Any) -> None:
        self._ray = None
        self._held.__exit__(*failure)

    @contextmanager
    def encode(self, encoder: RowEncoder) -> Iterator[Run]:
        """As parallel_encode."""
        ray = self._started()
        at_once = self.workers or max(1, int(ray.cluster_resources().get("CPU", 0)))
        # in a list, the encoder is fetched by workers that have not read it yet, not with every block
        sent, versions = [ray.put(encoder.arguments)], _versions()
        # max_retries=0: Ray would try again for ever where a worker is killed for memory
        task = ray.remote(num_cpus=1, max_retries=0)(_encode_on_ray)
        waiting: deque[tuple[Block, Any]] = deque()

        def run(blocks: Iterable[Block], tokenise: Callable[[], bool]) -> Iterator[tuple[Block, EncodedBlock]]:
            for block in blocks:
                if self.workers is not None:  # else the CPUs are the limit, and the next blocks wait beside them
                    _wait_for_place(ray, [reference for _, reference in waiting], self.workers)
                waiting.append((block, task.remote(sent, versions, block, tokenise())))
                if len(waiting) > 2 * at_once:  # what is in flight stays small, however large the file
                    yield first_result()
            while waiting:
                yield first_result()

        def first_result() -> tuple[Block, EncodedBlock]:
            block, reference = waiting[0]
            try:
                found = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                _explain(error)
                raise
            except ray.exceptions.RayError:  # a dead worker or machine costs time, not the build
                found = encoder(block)
            waiting.popleft()  # not before: a wait that is interrupted gives the block up
            if isinstance(found, UserError):
                raise found
            return block, found

        try:
            yield run
        finally:
            for _, reference in waiting:  # of a build that has failed, or was interrupted
                ray.cancel(reference)

    def _started(self) -> Any:
        from mtft.data.tokenize.parallel_encode import usable_cores

        if self._ray is None:
            try:
                ray = optional_package("ray", "Ray", where=WHERE, install="'mtft[ray]'")
                self._held.enter_context(ray_session(ray, self.workers or usable_cores(), where=WHERE))
            except MixError as error:
                raise UserError(error.what, where=error.where, do=error.do) from error
            if not ray.cluster_resources().get("CPU"):
                what = "no machine of the Ray cluster has a CPU: rows wait until one joins"
                warnings.warn(f"{what} ({WHERE})", stacklevel=2)
            self._ray = ray
        return self._ray


def _wait_for_place(ray: Any, running: list[Any], workers: int) -> None:
    """Until fewer blocks are encoded than there may be at the same time."""
    if running:
        _, running = ray.wait(running, num_returns=len(running), timeout=0)
    while len(running) >= workers:
        _, running = ray.wait(running, num_returns=1)


def _explain(error: Any) -> None:
    """UserError where a worker could not even import what it should call."""
    if "failed to import" in str(error.cause):
        why = str(error.cause).strip().splitlines()[-1]
        do = "install the same mtft on every machine of the cluster"
        what = f"a worker of the Ray cluster can't import what encodes the rows: {why}"
        raise UserError(what, where=WHERE, do=do) from error


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


_worker: tuple[str, RowEncoder] | None = None  # in a worker of Ray: of which encoding, and what encodes


def _encode_on_ray(sent: list[Any], versions: dict[str, str], block: Block, tokenise: bool) -> EncodedBlock | UserError:
    """In a worker. An error for people is a result: Ray would wrap it into one with a traceback."""
    global _worker
    [reference] = sent
    if _worker is None or _worker[0] != reference.hex():
        import ray

        from mtft.data.tokenize.parallel_encode import RowEncoder

        own = _versions()
        other = [f"{name} {own[name]}, the driver {versions[name]}" for name in own if own[name] != versions[name]]
        if other:
            what = f"a worker of the Ray cluster has {'; '.join(other)}: its tokens could be others"
            return UserError(what, where=WHERE, do="install the same versions on every machine of the cluster")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
        _worker = reference.hex(), RowEncoder(*ray.get(reference))
    try:
        return _worker[1](block, tokenise)
    except UserError as error:
        return error
