#!/bin/sh
# Compiles every .cu for the architectures of the wheel, where there is an nvcc; says loudly where there is none.
set -u
sources=$(git ls-files 'csrc/*.cu')
nvcc=$(command -v nvcc || true)
if [ -z "$nvcc" ]; then
  echo '**************************************************************************' >&2
  echo '** nvcc is not on this machine: NO CUDA SOURCE WAS COMPILED in this run **' >&2
  echo '**************************************************************************' >&2
  exit 0
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
failed=0
for source in $sources; do
  log=$out/log
  if ! "$nvcc" -std=c++17 -O3 -Xptxas -v -Xcompiler -Wall -gencode arch=compute_80,code=sm_80 \
    -gencode arch=compute_90,code=sm_90 -c "$source" -o "$out/object.o" >"$log" 2>&1; then
    cat "$log" >&2
    failed=1
  elif grep -E 'bytes spill' "$log" | grep -vq ' 0 bytes spill stores, 0 bytes spill loads'; then
    echo "$source: a kernel spills registers" >&2
    grep -B2 -E 'bytes spill' "$log" >&2
    failed=1
  else
    echo "$source: $(grep -c 'Used [0-9]* registers' "$log") kernels, no spills"
  fi
done
exit $failed
