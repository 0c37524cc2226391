"""int8_linear on the CPU stand-in: the CPU kernel's bits where no function is approximated, else near the oracle."""

from __future__ import annotations

import math
import os
import re
import time
from pathlib import Path

import builds
import pytest
import standin
import torch
from standin import SEEDS, Finding, StandIn
from torch import Tensor

from fastsparse import ops
from ops.test_int8_gemm import ACTIVATIONS, DTYPES, MODES, awkward_rows, linear_interval, quantization, s8
from support import same_bits, strided

# Off every tile: rows 8, 16, 32, 128; columns 4, 8, 16, 32, 128; k 4, 8, 32, 64, 128, a turn of all warps (1024), and
# the ring of 4 stages.
SHAPES = [
    (8, 33, 1029),
    (9, 48, 2120),
    (16, 65, 140),
    (1, 1, 1),
    (1, 130, 64),
    (3, 17, 5),
    (17, 31, 67),
    (32, 129, 255),
    (33, 128, 256),
    (129, 16, 257),
    (131, 136, 96),
    (1, 257, 33),
    (2, 8, 0),
]


def assert_right(got: Tensor, arguments: tuple, what: object) -> None:
    x, w, scale, bias, activation, x_scale, zero = arguments
    if activation in (None, "relu"):
        assert same_bits(got, ops.int8_linear(x, ops.pack(w), scale, bias, activation, x_scale, zero)), what
        return
    # erfcf and expf are the device's own: some units in the last place, more of them in the tails.
    low, high = linear_interval(*arguments)
    middle = (low.double() + high.double()) / 2
    slack = 1e-5 * middle.abs() * (2 if x.dtype == torch.float32 else 800) + 1e-6
    assert torch.equal(got.isnan(), low.isnan()), what
    outside = (got.double() < low.double() - slack) | (got.double() > high.double() + slack)
    assert not (outside & got.isfinite()).any(), what


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(kernels: StandIn, dtype: torch.dtype, mode: str, seed: int) -> None:
    scale, zero = quantization(mode)
    for i, (m, n, k) in enumerate(SHAPES):
        x = awkward_rows(m, k, dtype)
        weight_scale = torch.rand(n) * 1e-5
        bias = torch.randn(n) if i % 2 else None
        activation = ACTIVATIONS[(i + seed) % 4]
        arguments = (strided(x) if i % 3 == 1 else x, s8(n, k), weight_scale, bias, activation, scale, zero)
        with kernels.launches(seed, offset=i % 2):
            got = kernels.int8_linear(arguments[0], ops.pack(arguments[1]), *arguments[2:])
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert_right(got, arguments, (m, n, k))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_chained(kernels: StandIn, dtype: torch.dtype, seed: int) -> None:
    """Codes as x, a residual, codes as y: the CPU's bits."""
    for i, (m, n, k) in enumerate([*SHAPES, (5, 32, 64), (34, 36, 48), (17, 128, 80)]):
        per_row = i % 2 == 0
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        x = strided(x) if i % 3 == 1 else x
        x_scale = torch.rand(m, 1) + 0.1 if per_row else torch.tensor([0.37])
        if per_row and m > 1:
            x_scale[1] = math.nan
        weight, weight_scale = s8(n, k), torch.rand(n) * 1e-3
        bias = torch.randn(n) * 5 if i % 2 else None
        residual = torch.randn(m, n).mul(5).to(dtype) if i % 4 < 3 else None
        residual = strided(residual) if residual is not None and i % 4 == 1 else residual
        y_scale, y_zero = (0.11, i - 7) if (i + seed) % 3 else (None, 0)
        last = [residual, y_scale, y_zero, dtype]
        zero = torch.tensor([i % 5 - 2], dtype=torch.int32)
        arguments = [weight_scale, bias, ("relu", None)[i % 2], x_scale, zero]
        wanted = ops.int8_linear(x, ops.pack(weight), *arguments, residual, y_scale, y_zero if y_scale else None, dtype)
        with kernels.launches(seed, offset=(i + seed) % 2):
            got = kernels.int8_linear(x, ops.pack(weight), *arguments, *last)
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert same_bits(got, wanted), (m, n, k)


def test_float_in_codes_out(kernels: StandIn) -> None:
    for m in (3, 20, 40):
        x, weight, scale = torch.randn(m, 70), s8(21, 70), torch.rand(21) * 1e-2
        with kernels.launches():
            got = kernels.int8_linear(x, ops.pack(weight), scale, None, "relu", y_scale=0.05, y_zero_point=-128)
        assert same_bits(got, ops.int8_linear(x, ops.pack(weight), scale, None, "relu", None, None, None, 0.05, -128))


@pytest.mark.parametrize("fill", [(-128, -128), (-128, 127), (127, 127)])
def test_corners_of_the_range(kernels: StandIn, fill: tuple[int, int]) -> None:
    # Static codes at the ends of the range; 70 stages of k.
    m, n, k = 5, 20, 4480
    x = torch.full((m, k), float(fill[0]))
    w = torch.full((n, k), fill[1], dtype=torch.int8)
    with kernels.launches():
        got = kernels.int8_linear(x, ops.pack(w), torch.ones(n), None, None, torch.ones(1))
    assert torch.equal(got, torch.full((m, n), float(fill[0] * fill[1] * k)))


def test_nothing_is_done_for_nothing(kernels: StandIn) -> None:
    with kernels.launches():
        got = kernels.int8_linear(torch.empty(0, 5), ops.pack(s8(3, 5)), torch.ones(3))
        assert got.shape == (0, 3)
        got = kernels.int8_linear(torch.randn(2, 5), ops.pack(s8(0, 5)), torch.ones(0))
        assert got.shape == (2, 0)


@pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="a product of a usual size, in fast and race only")
def test_a_whole_product(capsys: pytest.CaptureFixture[str]) -> None:
    m, n, k = 512, 512, 1024
    x, w = torch.randn(m, k), s8(n, k)
    scale, pack = torch.rand(n) / math.sqrt(k), ops.pack(w)
    wanted = ops.int8_linear(x, pack, scale)
    for build in ("fast", "race"):
        kernels = standin.load(build)
        with kernels.launches():
            begin = time.perf_counter()
            got = kernels.int8_linear(x, pack, scale)
            seconds = time.perf_counter() - begin
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert same_bits(got, wanted)
        with capsys.disabled():
            print(f" int8_linear {m}x{n}x{k} {build}: {seconds:.2f} s", end="")


# --- Defects planted in copies of the kernels: the tests above would see them ----------------------------------------

SOURCE = builds.ROOT / "csrc/int8_gemm/cuda/sm80.cu"
CONFLICTS = "bank conflicts"
# what is wrong: (right, wrong, rows of x, what the race build says)
DEFECTS = {
    "sums over a stage that others still read": (
        "__syncthreads();  // nobody reads a stage any more, and",
        "// nobody reads a stage any more, and",
        40,
        r"race: .*sm80\.cu:\d+",
    ),
    "sums of warps added before all are there": (
        "store_sums(sums, rows[warp]);\n  __syncthreads();",
        "store_sums(sums, rows[warp]);",
        9,
        r"(race|uninitialised): .*sm80\.cu:\d+",
    ),
    "rows of sums without their padding": ("kPitch = 136", "kPitch = 128", 40, CONFLICTS),
}


@pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="race, in the process without sanitizers")
@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defects_are_caught(name: str, tmp_path: Path) -> None:
    right, wrong, m, expected = DEFECTS[name]
    text = SOURCE.read_text()
    assert text.count(right) == 1, f"{right!r} must stand in {SOURCE.name} once"
    kernels = StandIn("race", builds.variant("race", SOURCE, text.replace(right, wrong), tmp_path))
    x, weight, scale = torch.randn(m, 260), s8(130, 260), torch.rand(130)
    report = ""
    try:
        with kernels.launches():
            kernels.int8_linear(x, ops.pack(weight), scale)
            if kernels.bank_conflicts() > 0:
                report = f"{CONFLICTS}: {kernels.conflict_places()}"
    except Finding as finding:
        report = str(finding)
    assert re.search(expected, report), report or "nothing was found"
    assert "csrc/int8_gemm/cuda/sm80.cu:" in report
