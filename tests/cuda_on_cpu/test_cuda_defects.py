"""Planted defects (defects.cu): each must be caught, by the builds meant to catch it, and the report name its lines."""

from __future__ import annotations

import faulthandler
import os
import re
from pathlib import Path

import pytest
import torch
from standin import Finding, StandIn
from torch import Tensor

SOURCE = Path(__file__).parent / "defects.cu"
N = 2048 - 3  # not a whole number of 16-byte chunks

WRONG = "wrong result"
CONFLICTS = "bank conflicts"
BOUNDS = "use-after-poison|out of bounds"
# number: (what is wrong, {build: what it must say})
# The asan build is its own process; there "asan" below means a report of the sanitizers.
DEFECTS: dict[int, tuple[str, dict[str, str]]] = {
    1: ("a reduction with too few steps", {"fast": WRONG, "race": WRONG}),
    2: ("a shuffle from a lane outside of its mask", {"fast": "shuffle from outside"}),
    3: ("a lane that is not in its own mask", {"fast": "caller not in its mask|shuffle from outside"}),
    4: ("lanes of one mask in different shuffles", {"fast": "lanes of one mask in different operations"}),
    5: ("a shuffle width of 24", {"fast": "width must be a power of two"}),
    6: ("an exited lane in the mask", {"fast": "exited lane in mask"}),
    7: ("a read past the end of the input", {"race": "out of bounds: read of global", "asan": BOUNDS}),
    8: ("a read of host memory", {"race": "not device memory"}),
    9: ("a read through a null pointer", {"fast": "segmentation fault"}),
    10: ("a write past a shared array", {"race": "out of bounds: write of shared", "asan": BOUNDS}),
    11: ("a read of shared memory that nobody wrote", {"fast": WRONG, "race": "uninitialised"}),
    12: ("a missing barrier between write and read", {"race": "race"}),
    13: ("a missing barrier between read and the next write", {"race": "race"}),
    14: ("a divergent barrier", {"fast": "divergent barrier"}),
    15: ("a barrier that one warp does not come to", {"fast": "deadlock|divergent barrier"}),
    16: ("half a warp at a barrier, half at a __syncwarp", {"fast": "deadlock"}),
    17: ("all threads write one word", {"race": "race"}),
    18: ("all blocks write one word", {"race": "race: write of global[^$]*another block"}),
    19: ("output added to without being set", {"race": "uninitialised: read of global"}),
    20: ("plain and atomic accesses of one word", {"race": "race"}),
    21: ("a missing __syncwarp: votes order no memory", {"race": "race"}),
    23: ("a column of an unpadded tile", {"race": CONFLICTS}),
    24: ("vectors of 16 bytes at a stride of 32", {"race": CONFLICTS}),
    31: ("cp.async that reads past the end of its source", {"race": "out of bounds", "asan": BOUNDS}),
    32: ("cp.async from a misaligned source", {"fast": "misaligned"}),
    33: ("cp.async past the end of the last stage", {"race": "out of bounds|race|under way", "asan": "poison"}),
    34: ("cp.async into global memory", {"fast": "not shared memory"}),
    35: ("a wait that leaves one group too many", {"fast": WRONG, "race": "under way", "asan": BOUNDS}),
    36: ("a missing barrier after the wait", {"race": "race|under way"}),
    37: ("copies that are never committed", {"fast": WRONG, "race": "under way", "asan": BOUNDS}),
    38: ("the barrier before the wait", {"race": "race|under way"}),
    39: ("cp.async read without any wait", {"fast": WRONG, "race": "under way", "asan": BOUNDS}),
    40: ("a stage refilled while others read it", {"race": "race|under way"}),
    51: ("a lost swizzle", {"fast": CONFLICTS, "race": CONFLICTS}),
    52: ("ldmatrix by half a warp", {"fast": "exited lane in mask"}),
    53: ("ldmatrix of misaligned rows", {"race": "misaligned", "asan": "misaligned address"}),
    54: ("ldmatrix past the end of its tile", {"race": "out of bounds|uninitialised", "asan": BOUNDS}),
    55: ("a transposing ldmatrix in place of the plain one", {"fast": WRONG}),
    56: ("matrices of ldmatrix in the wrong lanes", {"fast": WRONG}),
    57: ("mma without the last lane", {"fast": "exited lane in mask|deadlock|different operations"}),
    61: ("a misaligned vector access", {"race": "misaligned", "asan": "misaligned address"}),
    62: ("a misaligned ptx::load16", {"fast": "misaligned: ptx::load16"}),
    63: ("dynamic shared memory that the launch does not give", {"fast": "the launch gives none"}),
    64: ("a read past a shared array", {"race": "out of bounds: read of shared", "asan": BOUNDS}),
    65: ("sparsity metadata out of order", {"fast": "metadata must name two positions"}),
    66: ("more static shared memory than a block has", {"fast": "limited to 48 KB"}),
    67: ("two threads write one byte", {"race": "race"}),
    68: ("a full mask in a warp of 16 lanes", {"fast": "which the block does not have"}),
    69: ("a block of 2048 threads", {"fast": "invalid configuration"}),
}
# The kernels as they should be, by the number of a defect that they have not.
RIGHT = {"sums": 0, "reversed": 22, "ring copy": 41, "small product": 58, "assorted": 70}


def marked_lines(number: int) -> list[int]:
    return [i for i, line in enumerate(SOURCE.read_text().splitlines(), 1) if f"<{number}>" in line]


def wanted(number: int, data: Tensor) -> Tensor:
    if number <= 20:
        return data[: N // 4 * 4].view(4, N // 4).sum(1, dtype=torch.int32)
    if number <= 30:
        return data[:32].flip(0)
    if number <= 50:
        return data
    if number <= 60:
        rows = data[: 24 * 16].view(torch.int8).view(24, 64).int()
        return (rows[:16] @ rows[16:].t()).reshape(-1)
    return data[:64]


def run(kernels: StandIn, number: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """(result, what it should be, bank conflicts)."""
    data = torch.randint(-1000, 1000, (N,), dtype=torch.int32)
    right = wanted(number, data)
    host = torch.zeros(2048, dtype=torch.int32)
    with kernels.launches(seed):
        there, out = kernels.copy(data), kernels.empty(right.shape, torch.int32)
        kernels.call("defects_run", number, there, out, N, host)
        return out.clone(), right, kernels.bank_conflicts()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kernel", RIGHT)
def test_without_defect(kernels: StandIn, kernel: str, seed: int) -> None:
    got, right, conflicts = run(kernels, RIGHT[kernel], seed)
    assert torch.equal(got, right)
    assert conflicts == 0, kernels.conflict_places()


def assert_named(number: int, report: str, build: str) -> None:
    """A line of the defect is named; of a race both."""
    lines = marked_lines(number)
    named = {int(n) for n in re.findall(r"defects\.cu:(\d+)", report)}
    if lines:
        assert named & set(lines), f"none of {lines} in: {report}"
    if build == "race" and report.startswith("race"):
        assert set(lines) <= named, f"{lines} wanted in: {report}"


def cases(*builds: str) -> list[tuple[int, str]]:
    return [(number, build) for number, (_, by) in DEFECTS.items() for build in builds if build in by]


@pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="fast and race, in the process without sanitizers")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("number", "build"), cases("fast", "race"))
def test_caught(number: int, build: str, seed: int) -> None:
    import standin

    kernels, expected = standin.load(build), DEFECTS[number][1][build]
    report = None
    try:
        got, right, conflicts = run(kernels, number, seed)
    except Finding as finding:
        report = str(finding)
    if report is not None:
        assert re.search(expected, report), report
        assert_named(number, report, build)
        return
    if expected == CONFLICTS:
        assert torch.equal(got, right), "conflicts cost time only"
        assert conflicts > 0
    else:
        assert expected == WRONG, "nothing was found"
        assert not torch.equal(got, right)


@pytest.mark.skipif(os.environ.get("CUDA_ON_CPU_BUILDS") != "asan", reason="in the process with sanitizers")
@pytest.mark.parametrize(("number", "build"), cases("asan"))
def test_caught_by_sanitizers(number: int, build: str, tmp_path: Path) -> None:
    import standin

    kernels = standin.load(build)
    log = tmp_path / "report"
    child = os.fork()
    if child == 0:  # the report ends the process
        faulthandler.disable()  # pytest's stands in the sanitizers' way
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
        run(kernels, number, 0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    report = log.read_text()
    assert os.waitstatus_to_exitcode(status) != 0, "nothing was found"
    assert re.search(DEFECTS[number][1][build], report), report
    assert_named(number, report, build)


def test_the_table_is_long_enough() -> None:
    assert len(DEFECTS) >= 25
    page = (SOURCE.parents[2] / "docs" / "cuda-on-cpu.md").read_text(encoding="utf-8")
    assert f"holds {len(DEFECTS)} planted defects" in page
    assert all(by for _, by in DEFECTS.values())
