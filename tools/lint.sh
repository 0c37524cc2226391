#!/bin/sh
# Everything that looks at the sources and the binary without running a test. Usage: tools/lint.sh VENV/bin
set -u
bin=$1
failed=0
step() {
  name=$1
  shift
  echo "-- $name"
  "$@" || { echo "FAILED: $name" >&2; failed=1; }
}

step 'ruff check' "$bin/ruff" check .
step 'ruff format' "$bin/ruff" format --check .
step 'mypy' "$bin/mypy"
# shellcheck disable=SC2046
step 'clang-format' "$bin/clang-format" --dry-run --Werror $(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.inl' 'csrc/*.cu' 'bench/*.cpp' 'tests/native/*.cpp' 'tests/cuda_on_cpu/*.h' 'tests/cuda_on_cpu/*.cpp' 'tests/cuda_on_cpu/*.cu')
library=$("$bin/python" -c 'from fastsparse._library import library_path; print(library_path())')
step 'stable ABI' "$bin/torch-abi-audit" --check torch "$library"
step 'ISA objects' tools/check_isa_objects.sh "$("$bin/python" -c 'import glob; print(sorted(glob.glob("build/cp*"))[-1])')"
step 'CUDA sources' tools/compile_cuda.sh
exit $failed
