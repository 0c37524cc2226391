"""What nvcc makes of each .cu for sm_80: no register spilled, and the instructions that the file counts on.

Runs where there is an nvcc; the instructions are looked at where there is a cuobjdump too (on PATH, or from the
packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm). What did not change is not compiled again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
from pathlib import Path
from typing import Any

import builds
import pytest

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on this machine: no CUDA source was compiled"),
    pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="compiled once, not for each build"),
]

FLAGS = ["-std=c++17", "-O3", "-arch=sm_80", "-cubin", "-Xptxas", "-v"]
# A file whose kernels spill says so here, with the reason.
MAY_SPILL: dict[str, str] = {}
# The instructions that make a kernel what its header says it is.
INSTRUCTIONS = {
    "csrc/int8_gemm/cuda/sm80.cu": {
        "multiply": ["IMMA.16832.S8.S8", "LDGSTS.E", "LDSM.16.M88.4", "STS.64", "LDS.128"],
        "multiply_few": ["IMMA.16832.S8.S8", "LDG.E.128", "LDG.E.64", "STS.128"],
    },
    "csrc/int8_gemm/cuda/sm80_weight_only.cu": {
        "multiply_groups": ["IMMA.16832.S8.S8", "LDG.E.128", "LDG.E.64", "STS.128"],
        "quantize_groups": ["LDG.E", "SHFL.BFLY", "STG.E"],
    },
    "csrc/kl_loss/cuda/sm80.cu": {
        "rows_by_warp": ["LDG.E.128", "MUFU.EX2", "SHFL.BFLY", "STG.E.EF.128"],
        "rows_by_block": ["LDG.E.128", "MUFU.EX2", "SHFL.BFLY", "STG.E.EF.128"],
    },
    "csrc/qdq/cuda/sm80.cu": {
        "quantize_all": ["LDG.E.128", "STG.E.64"],
        "dequantize_all": ["LDG.E.64", "STG.E.128"],
        "token_by_warp": ["LDG.E.128", "SHFL.BFLY", "STG.E.64"],
    },
    "csrc/sparse_matmul/cuda/sm80_bitmap16.cu": {
        "few_rows16": ["HMMA.16816.F32", "LDGSTS.E", "LDS.U16", "R2P", "POPC", "STS.128"],
    },
    "csrc/sparse_matmul/cuda/sm80_blocks.cu": {
        "multiply_blocks": ["HMMA.16816.F32", "LDGSTS.E", "LDSM.16.M88.4", "STG.E.128"],
    },
    "csrc/sparse_matmul/cuda/sm80_csr.cu": {"spmm_rows": ["SHFL.IDX", "FFMA", "LDG.E"]},
    "csrc/sparse_matmul/cuda/sm80_few_rows.cu": {"few_rows": ["POPC", "SHFL.IDX", "REDUX.SUM", "LDS.128"]},
    "csrc/sparse_matmul/cuda/sm80_mma_sp.cu": {
        "multiply_sparse": ["HMMA.SP.16832.F32", "LDGSTS.E", "LDSM.16.M88.4", "STG.E.128"],
    },
}
SOURCES = sorted(str(p.relative_to(builds.ROOT)) for p in (builds.ROOT / "csrc").glob("*/cuda/*.cu"))


def compiled(source: str) -> tuple[Path, str]:
    """(cubin, what ptxas said), from the last time if no source changed."""
    folder = builds.OUT / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    cubin = folder / (source.replace("/", "_") + ".cubin")
    record = cubin.with_suffix(".json")
    if cubin.exists() and record.exists():
        known: dict[str, Any] = json.loads(record.read_text())
        same = all(builds.digest(builds.ROOT / p) == d for p, d in known["files"].items())
        if known["flags"] == FLAGS and same:
            return cubin, known["report"]
    deps = cubin.with_suffix(".d")
    command = ["nvcc", *FLAGS, "-MD", "-MF", str(deps), source, "-o", str(cubin)]
    done = subprocess.run(command, cwd=builds.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    needs = {Path(builds.ROOT, p).resolve() for p in deps.read_text().replace("\\\n", " ").split(":", 1)[1].split()}
    ours = sorted(str(p.relative_to(builds.ROOT)) for p in needs if builds.ROOT in p.parents)
    assert source in ours
    files = {p: builds.digest(builds.ROOT / p) for p in ours}
    record.write_text(json.dumps({"flags": FLAGS, "files": files, "report": done.stderr}))
    return cubin, done.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(source: str) -> None:
    _, report = compiled(source)
    spills = re.findall(r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores", report)
    assert spills, report
    if source not in MAY_SPILL:
        assert not [kernel for kernel, _, stores in spills if int(stores) > 0], report


def cuobjdump() -> tuple[str, dict[str, str]] | None:
    """The tool, and the environment in which it finds nvdisasm."""
    folders = [os.environ["PATH"], *(str(p) for s in site.getsitepackages() for p in Path(s).glob("nvidia/*/bin"))]
    path = os.pathsep.join(folders)
    tool = shutil.which("cuobjdump", path=path)
    return None if tool is None or shutil.which("nvdisasm", path=path) is None else (tool, {**os.environ, "PATH": path})


@pytest.mark.skipif(cuobjdump() is None, reason="neither cuobjdump nor nvdisasm is on this machine")
@pytest.mark.parametrize("source", INSTRUCTIONS)
def test_the_instructions_meant_are_there(source: str) -> None:
    found = cuobjdump()
    assert found is not None
    done = subprocess.run(
        [found[0], "-sass", str(compiled(source)[0])], capture_output=True, text=True, env=found[1], check=True
    )
    functions = re.split(r"^\s*Function : ", done.stdout, flags=re.MULTILINE)[1:]
    for kernel, instructions in INSTRUCTIONS[source].items():
        bodies = [body for body in functions if f"{len(kernel)}{kernel}I" in body.split("\n", 1)[0]]
        assert bodies, f"no {kernel} in {source}"
        for body in bodies:
            for instruction in instructions:
                assert instruction in body, f"{instruction} is not in {body.splitlines()[0]}"
