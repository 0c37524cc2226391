"""docs/gpu-status.md is true: it names every kernel there is, with nvcc's figures, and no run that nothing recorded."""

from __future__ import annotations

import os
import shutil
import sys

import builds
import pytest
import test_cuda_compiled

sys.path.insert(0, str(builds.ROOT / "tools"))
import gpu_status

pytestmark = pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="looked at once, not for each build")
HINT = "run pytest tests/cuda_on_cpu, then python tools/gpu_status.py"


def test_the_page_is_the_one_that_the_facts_give() -> None:
    assert gpu_status.PAGE.read_text(encoding="utf-8") == gpu_status.render(gpu_status.load()), HINT


def test_every_kernel_ran_in_every_build() -> None:
    kernels = gpu_status.load()["kernels"]
    assert set(kernels) == set(gpu_status.kernels_in_sources()), HINT
    for name, entry in kernels.items():
        for build in gpu_status.BUILDS:
            run = entry["standin"]["runs"][build]
            assert run is not None, f"{name} never ran in the build {build}"
            assert run["launches"] > 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on this machine")
def test_registers_and_spills_are_those_of_the_sources() -> None:
    kernels = gpu_status.load()["kernels"]
    for name, source in gpu_status.kernels_in_sources().items():
        _, report = test_cuda_compiled.compiled(source)
        found = gpu_status.compiled(report)[name.split()[1]]
        registers = [min(found["registers"]), max(found["registers"])]
        assert (kernels[name]["registers"], kernels[name]["spills"]) == (registers, max(found["spills"])), (name, HINT)


def test_what_no_hardware_ran_is_said_to_be_so() -> None:
    recorded = (builds.ROOT / "docs" / "gpu-results.json").exists()
    for name, entry in gpu_status.load()["kernels"].items():
        assert recorded or "hardware" not in entry, name
        if "hardware" not in entry:
            (line,) = [line for line in gpu_status.render({"kernels": {name: entry}}).splitlines() if _row(line, name)]
            assert line.endswith("| never run |")


def _row(line: str, name: str) -> bool:
    source, kernel = name.split()
    return line.startswith(f"| `{kernel}` | `{source}` |")


def test_the_parser_reads_what_ptxas_writes() -> None:
    report = """ptxas info    : Compiling entry function '_ZN2fs3qdqI1aEEvPf' for 'sm_80'
ptxas info    : Function properties for _ZN2fs4sm8012_GLOBAL__N_13runIfEEvPKT_
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 384 bytes cmem[0]
ptxas info    : Function properties for _ZN2fs4sm8012_GLOBAL__N_13runIiEEvPKT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, 384 bytes cmem[0]
"""
    assert gpu_status.compiled(report) == {"run": {"registers": [32, 40], "spills": [4, 0]}}
