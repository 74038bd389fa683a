#!/usr/bin/env bash
# Sets up .venv with everything for development, then lints and runs the tests.
#
#   scripts/test.sh            lint + fast tests
#   scripts/test.sh --all      lint + fast tests + slow tests (several processes, whole runs, real models)
#   scripts/test.sh --slow     only the slow tests
#   scripts/test.sh --newest   with the newest releases of everything, not those of scripts/constraints.txt; goes with
#                              --all and --slow, before or after them
# Anything after that goes to pytest: scripts/test.sh -k merge
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=fast
versions=()
while [ $# -gt 0 ]; do
  case "$1" in
    --all) which=all ;;
    --slow) which=slow ;;
    --newest) versions=(--newest) ;;
    *) break ;;
  esac
  shift
done

scripts/setup.sh dev ${versions[@]+"${versions[@]}"}

# One thread a worker: two workers with two threads each on two cores are slower than this. No hub: tests are offline.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=.venv/bin/python
# loadfile: tests of one file share their fixtures (one launch of two ranks serves many assertions). Files stay in the
# order of tests/conftest.py, the longest first; xdist would begin with those of most tests.
workers=(-n 2 --dist loadfile --no-loadscope-reorder)

if [ "$which" != slow ]; then
  "$python" -m ruff check .
  "$python" -m ruff format --check .
  "$python" -m pytest "${workers[@]}" -m "not slow" --durations=10 "$@"
fi
if [ "$which" != fast ]; then
  "$python" -m pytest "${workers[@]}" -m slow --durations=20 "$@"
fi
