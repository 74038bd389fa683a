"""Puts this folder on the path for `golden`, and keeps LAPACK to one thread."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
