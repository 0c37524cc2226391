#!/bin/sh
# Builds the torch-free test program of a family, static, from the sources of its kernels. Usage: tools/native_test.sh FAMILY OUT
# The flags are those of CMakeLists.txt.
set -eu
family=$1
out=$2
cxx=${CXX:-c++}
common="-std=c++17 -O2 -ffp-contract=off -Wall -Wextra -Wno-maybe-uninitialized -Wno-uninitialized"
objects=$(mktemp -d)
trap 'rm -rf "$objects"' EXIT
compile() { # source flags...
  source=$1
  shift
  # shellcheck disable=SC2086
  "$cxx" $common "$@" -c "$source" -o "$objects/$(echo "$source" | tr '/' '_').o"
}
# The ISA files of the family, and those of a family whose rows it uses.
kernels="csrc/$family/cpu"
[ "$family" != sparse_matmul ] || kernels="$kernels csrc/int8_gemm/cpu"
level() { # name flags...
  name=$1
  shift
  for folder in $kernels; do
    for source in "$folder/$name.cpp" "$folder"/*_"$name.cpp"; do
      [ ! -e "$source" ] || compile "$source" -fno-exceptions "$@"  # not every family has every level
    done
  done
}
avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni"
level scalar
# shellcheck disable=SC2086
{
  level avx2 $avx2
  level avxvnni $avx2 -mavxvnni
  level avx512 $avx512
  level avx512vbmi2 $avx512 -mavx512vbmi -mavx512vbmi2
  level amx $avx512 -mamx-tile -mamx-int8
}
for source in csrc/runtime/isa.cpp csrc/"$family"/*select.cpp csrc/"$family"/formats/*.cpp csrc/"$family"/cpu/*launch.cpp "tests/native/$family.cpp"; do
  [ ! -e "$source" ] || compile "$source"  # not every family has a format
done
"$cxx" -static "$objects"/*.o -o "$out"
