"""Run by tests/test_devices.py in a process of their own: MTFT_SIMULATED_DEVICE=1 pytest tests/devices"""

import os

from tests.training.conftest import model_folder, recipe, task_files

__all__ = ["model_folder", "recipe", "task_files"]

collect_ignore_glob = [] if os.environ.get("MTFT_SIMULATED_DEVICE") else ["test_*.py"]
