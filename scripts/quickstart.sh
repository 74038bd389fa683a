#!/usr/bin/env bash
# From a fresh clone to a finished run: sets up .venv, then trains, mixes, merges, fuses and reports on the embedded
# models and tasks. No network beyond pip, no hub, no GPU. A second call skips what is finished; Ctrl-C and a second
# call continue. Arguments are overrides of the recipe: scripts/quickstart.sh seed=3 output.dir=runs/second
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$here/scripts/setup.sh"
exec "$here/.venv/bin/python" -m mtft run "$here/recipes/quickstart.yaml" "$@"
