#!/bin/sh
# Says in one sentence what this machine lacks for `make demo` and `make test`, and the command that installs it.
# Usage: tools/require.sh PYTHON
set -u
python=$1
missing=""
need() { missing="$missing${missing:+, }$1"; packages="${packages:-} $2"; }

if ! command -v "$python" >/dev/null 2>&1; then
  need "$python (3.10 or newer)" python3
else
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    need "Python 3.10 or newer ($python is $("$python" -c 'import platform; print(platform.python_version())'))" python3
  "$python" -c 'import ensurepip, venv' 2>/dev/null || need "the venv module of $python" python3-venv
  "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    need "Python.h, the headers of $python" python3-dev
fi
if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
  need "a C++17 compiler" g++
elif ! echo 'int main() { if constexpr (true) return 0; }' | "${CXX:-c++}" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null; then
  need "a C++17 compiler (${CXX:-c++} does not take -std=c++17)" g++
fi
if [ -n "$missing" ]; then
  echo "fastsparse needs $missing: sudo apt-get install$packages" >&2
  exit 1
fi
