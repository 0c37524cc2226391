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
avx2="-mavx2 -mfma -mf16c"
compile "csrc/$family/cpu/scalar.cpp" -fno-exceptions
# shellcheck disable=SC2086
compile "csrc/$family/cpu/avx2.cpp" -fno-exceptions $avx2
avxvnni="csrc/$family/cpu/avxvnni.cpp"
# shellcheck disable=SC2086
[ ! -e "$avxvnni" ] || compile "$avxvnni" -fno-exceptions $avx2 -mavxvnni
# shellcheck disable=SC2086
compile "csrc/$family/cpu/avx512.cpp" -fno-exceptions $avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni
amx="csrc/$family/cpu/amx.cpp"
# shellcheck disable=SC2086
[ ! -e "$amx" ] || compile "$amx" -fno-exceptions $avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mamx-tile -mamx-int8
for source in csrc/runtime/isa.cpp csrc/"$family"/select.cpp csrc/"$family"/formats/*.cpp csrc/"$family"/cpu/*launch.cpp "tests/native/$family.cpp"; do
  [ ! -e "$source" ] || compile "$source"  # not every family has a format
done
"$cxx" -static "$objects"/*.o -o "$out"
