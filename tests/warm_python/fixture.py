"""`warm_python`: a path to use in place of sys.executable, for programs whose start is not what a test is about."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory):
    """Path of a Python that has its imports done (server.py). Started with the first test that asks for it."""
    address = tmp_path_factory.mktemp("warm") / "socket"
    variables = {"MTFT_WARM_PYTHON": str(address), "MTFT_TESTS_PYTHON": sys.executable}
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.warm_python.server", str(address)]
    environment = {**os.environ, **quiet}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        server = subprocess.Popen(command, env=environment, cwd=HERE.parents[1], stdin=subprocess.PIPE)
        while not address.exists():
            assert server.poll() is None, "the server ended"
            time.sleep(0.05)
        yield str(HERE / "warm-python")
        server.stdin.close()
        assert server.wait(timeout=60) == 0


class _Proofs:
    """In the place of `sys` in mtft.training.export.proof: the server starts with the first proof."""

    def __init__(self, request):
        self._request = request

    @property
    def executable(self):
        return self._request.getfixturevalue("warm_python")


@pytest.fixture(scope="session", autouse=True)
def warm_proofs(request):
    """Exports are proved in forked processes; `cold_proofs` is for tests of the proof itself."""
    from mtft.training.export import proof

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "sys", _Proofs(request))
        yield


@pytest.fixture(scope="module")
def cold_proofs(warm_proofs):
    """Exports are proved in processes of their own, as users have it."""
    from mtft.training.export import proof

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "sys", sys)
        yield
