#!/bin/sh
# Builds the wheel's library with FASTSPARSE_CUDA=ON beside whatever torch there is, and tries it where there is no
# driver: it must load, say what it is, run on the CPU, and refuse a CUDA tensor with a sentence.
# VENV (default .venv) names the environment that has torch and the build tools; nothing is downloaded. Says loudly
# where there is no nvcc.
set -eu
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
cuda=.venv-cuda
if ! command -v nvcc > /dev/null; then
    echo '** nvcc is not on this machine: THE BUILD WITH CUDA WAS NOT TRIED in this run **' >&2
    exit 0
fi
# Its own environment, as in test_asan.sh: the hook of an editable install beats PYTHONPATH.
site() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
[ -x "$cuda/bin/python" ] || "$venv/bin/python" -m venv --without-pip "$cuda"
site "$venv" > "$(site "$cuda")/base_environment.pth"
log=$cuda/build.log
if ! PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -m pip --python "$cuda/bin/python" install -v --no-build-isolation \
    --no-deps --no-index --force-reinstall --disable-pip-version-check -C cmake.define.FASTSPARSE_CUDA=ON \
    -C "build-dir=build/cuda-{wheel_tag}" . > "$log" 2>&1 || grep -q 'CMake Error' "$log"; then
    grep -nE 'CMake Error|error|ERROR' "$log" | head -20 >&2
    echo "test_cuda_build: the build failed; the whole log is $log" >&2
    exit 1
fi
export PYTHONPATH=
"$cuda/bin/python" tools/try_cuda_build.py "$PWD/$cuda"
"$cuda/bin/fastsparse" info > /dev/null
"$cuda/bin/fastsparse" check > /dev/null
echo 'test_cuda_build: fastsparse info and check pass'
