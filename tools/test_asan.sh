#!/bin/sh
# Tests the kernels in a build with AddressSanitizer and UndefinedBehaviorSanitizer:
#   tools/test_asan.sh [pytest arguments]        default: tests/ops and tests/api that exist, without inductor
# VENV (default .venv) names the environment that has torch and the build tools; nothing is downloaded.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
asan=.venv-asan
sanitize=address,undefined
cxx=${CXX:-g++}

# Its own environment: an editable install's hook beats PYTHONPATH, and would silently test the normal build. The base
# environment's packages come in through a plain path line; .pth files found on such a path are not run, so the hook
# stays out.
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
"$venv/bin/python" -c 'import torch, pytest, hypothesis, scikit_build_core, pybind11' || {
    echo "test_asan: $venv lacks what the line above names; run 'make test' first" >&2
    exit 1
}
[ -x "$asan/bin/python" ] || "$venv/bin/python" -m venv --without-pip "$asan"
site "$venv" > "$(site "$asan")/base_environment.pth"
echo "test_asan: building with -fsanitize=$sanitize"
PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m pip --python "$asan/bin/python" install -q --no-build-isolation \
    --no-deps --no-index --force-reinstall --disable-pip-version-check \
    -C "cmake.define.FASTSPARSE_SANITIZE=$sanitize" -C "build-dir=build/asan-{wheel_tag}" .

# The runtimes must be there before Python loads the library; libstdc++ too, or ASan can't intercept C++ exceptions.
preload=
for runtime in libasan.so libubsan.so libstdc++.so.6; do
    path=$("$cxx" -print-file-name="$runtime")
    [ -e "$path" ] || { echo "test_asan: $cxx has no $runtime; on Debian: apt install libasan8 libubsan1" >&2; exit 1; }
    preload="$preload${preload:+:}$path"
done
# Python and torch keep memory to the end of the process, so leaks say nothing here. PYTHONMALLOC: every Python buffer
# gets its own red zone.
run() {
    LD_PRELOAD="$preload" ASAN_OPTIONS="detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1" \
        UBSAN_OPTIONS="print_stacktrace=1" PYTHONMALLOC=malloc PYTHONPATH= "$asan/bin/python" "$@"
}

proof=build/asan-proof
mkdir -p "$proof"
run tools/asan_proof.py which "$PWD/$asan" "$sanitize"
# A proof that an error would be seen: each of these must be stopped, with the right report.
must_fail() { # what, expected text, arguments...
    what=$1 expected=$2
    shift 2
    if run "$@" > "$proof/log" 2>&1 || ! grep -q "$expected" "$proof/log"; then
        echo "test_asan: $what was NOT caught; the run below would prove nothing. Its output:" >&2
        cat "$proof/log" >&2
        exit 1
    fi
    echo "test_asan: caught, as it must be: $what"
}
"$cxx" -O2 -g -fPIC -shared -fsanitize="$sanitize" -fno-sanitize-recover=all -fno-omit-frame-pointer \
    -x c++ -o "$proof/overrun.so" - <<'C'
extern "C" void write_at(char* p, long i) { p[i] = 1; }
extern "C" int add(int a, int b) { return a + b; }
C
must_fail "a write past a buffer" "heap-buffer-overflow" tools/asan_proof.py write "$proof/overrun.so"
must_fail "an overflowing addition" "signed integer overflow" tools/asan_proof.py add "$proof/overrun.so"
for isa in $(run -c 'import torch; from fastsparse import _C; print(*_C.isa_available())'); do
    # A vector that begins inside the buffer and ends outside has no name among ASan's kinds of error.
    must_fail "a kernel ($isa) reading past its input" "\(heap-buffer-overflow\|unknown-crash\).*libfastsparse" tools/asan_proof.py read "$isa"
done

# hypothesis and pytest-timeout come from the base environment. Left out: what torch compiles with its own flags, and
# the tests of graphs and schemas, which run the same kernels on the same shapes again, slowly.
if [ $# -eq 0 ]; then
    set -- tests/ops tests/api/test_io.py -k "not compile and not opcheck"
fi
# --capture=sys: a sanitizer writes to the process's own stderr and ends it; pytest would take the report with it.
run -m pytest --capture=sys -p no:cacheprovider -m "not inductor" "$@"
