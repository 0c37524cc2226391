#!/bin/sh
# Builds and installs fastsparse into a virtual environment, editable; what did not change is not compiled again.
# Usage: tools/build.sh VENV [further arguments of pip install]
set -eu
venv=$1
shift
log=$venv/build.log
# CMake can print an error and pip still end in 0: the log decides.
# The constraint: whatever a package asks for, torch stays the build that fastsparse is compiled against.
if ! "$venv/bin/python" -m pip install --quiet --no-build-isolation -v "$@" -c requirements/torch.txt \
  -e '.[test,demo,bench,examples,lint]' >"$log" 2>&1 ||
  grep -q 'CMake Error' "$log"; then
  grep -nE 'CMake Error|error:|ERROR' "$log" | head -20 >&2
  echo "the build failed; the whole log is $log" >&2
  exit 1
fi
grep -E 'warning:' "$log" | grep -v '^ *WARNING' | sort -u | head -20 || true
