#!/bin/sh
# An ISA object must have no weak symbol (V, W, u): the linker may keep its copy, and with it AVX-512, for every machine.
# Nor may a hot loop of an AVX2 or AVX-512 tile keep a vector on the stack. Usage: tools/check_isa_objects.sh BUILD_FOLDER
set -u
objects=$(find "$1" -path '*isa_*' -name '*.o')
[ -n "$objects" ] || { echo "no ISA object in $1" >&2; exit 1; }
failed=0
for object in $objects; do
  if nm -C "$object" | grep -E '^[0-9a-f ]* [VWu] '; then
    echo "weak symbols in $object" >&2
    failed=1
  fi
done
count=$(echo "$objects" | wc -l)
[ $failed = 0 ] && echo "$count objects, no weak symbol"
exit $failed
