"""weight_only_linear on CUDA, against float64: exact sums of groups, one rounding for each group added."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from standin import SEEDS, StandIn
from torch import Tensor

from fastsparse import ops
from ops.test_int8_gemm import ACTIVATIONS, DTYPES, awkward_rows, s8
from support import same_bits, strided

# Off every tile: rows 8, 16; columns 4, 16, 32; k 4, 8, groups, a turn of 128 and a turn of all warps (1024).
SHAPES = [
    (1, 1, 1),
    (1, 130, 64),
    (3, 17, 5),
    (8, 33, 1030),
    (9, 64, 2180),
    (16, 47, 129),
    (17, 31, 67),
    (2, 8, 0),
    (35, 5, 256),
]
KINDS = [32, 64, 128, -32, -64, -128, 8]  # groups of 4 bits, negative: with zero points; 8: eight bits


def weight(kind: int, n: int, k: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(pack, weight_scale, integers s8[n, groups * group], scales f32[n, groups])."""
    if kind == 8:
        codes, scale, groups = s8(n, k), torch.rand(n) - 0.5, -(-k // 128)
        padded = torch.nn.functional.pad(codes, (0, groups * 128 - k))
        return ops.pack(codes), scale, padded, scale[:, None].expand(n, groups)
    group = abs(kind)
    groups = -(-k // group)
    scale = (torch.rand(n, groups) - 0.5).half()
    if kind > 0:
        codes, zero = torch.randint(-8, 8, (n, k), dtype=torch.int8), None
        integers = codes
    else:
        codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
        zero = torch.randint(0, 16, (n, groups), dtype=torch.uint8)
        integers = (codes.int() - zero.int().repeat_interleave(group, 1)[:, :k]).to(torch.int8)
    padded = torch.nn.functional.pad(integers, (0, groups * group - k))
    return ops.pack(codes, "u4", scale=scale, zero_point=zero, group_size=group), None, padded, scale.float()


def terms(x: Tensor, integers: Tensor, scales: Tensor) -> Tensor:
    """isum * (x_scale * w_scale) by [m, n, groups], the product of scales in float32, the rest exact in float64."""
    (m, k), (n, groups) = x.shape, scales.shape
    if groups == 0:
        return torch.zeros(m, n, 0, dtype=torch.float64)
    group = integers.shape[1] // groups
    rows = torch.nn.functional.pad(x.float(), (0, groups * group - k)).reshape(m, groups, group)
    absmax = rows.abs().amax(2)
    scale = torch.where(absmax == 0, 1.0, torch.clamp(absmax / 127, min=torch.finfo(torch.float32).tiny))
    scale = torch.where(rows.isfinite().all(2), scale, math.nan)
    codes = torch.where(scale.isnan()[..., None], 0.0, torch.round(rows * (1 / scale)[..., None]))
    isum = torch.einsum("mgk,ngk->mng", codes.double(), integers.reshape(n, groups, group).double())
    return isum * (scale[:, None, :] * scales[None]).double()


def activated(y: Tensor, activation: str | None) -> Tensor:
    if activation == "gelu":
        return 0.5 * y * torch.special.erfc(-y * 0.5**0.5)
    return {None: lambda v: v, "relu": torch.relu, "silu": torch.nn.functional.silu}[activation](y)


def assert_right(got: Tensor, x: Tensor, w: Any, bias: Tensor | None, activation: str | None, what: Any) -> None:
    each = terms(x, w[2], w[3])
    exact, size = each.sum(2), each.abs().sum(2)
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    wanted = activated(exact, activation)
    rounding = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[x.dtype]
    # Each of the sums and of gelu and silu is some units of float32 off; they steepen an error at most by 1.13.
    slack = 1.13 * (each.shape[2] + 9) * 2.0**-24 * size + (1.01 * rounding + 1e-6) * wanted.abs() + 1e-7
    # Where the sum of some of the groups may overflow, anything can come.
    counts = (size < torch.finfo(torch.float32).max) & (wanted.abs() < 0.99 * torch.finfo(x.dtype).max)
    assert torch.equal((got.isnan() & ~(size > 1e38)), wanted.isnan()), what
    assert ((got.double() - wanted).abs() <= slack)[counts].all(), what


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only(kernels: StandIn, dtype: torch.dtype, kind: int, seed: int) -> None:
    for i, (m, n, k) in enumerate(SHAPES):
        x = awkward_rows(m, k, dtype) if i % 2 else torch.randn(m, k).to(dtype)
        x = strided(x) if i % 3 == 1 else x
        w = weight(kind, n, k)
        bias = torch.randn(n) if (i + seed) % 2 else None
        activation = ACTIVATIONS[(i + seed) % 4]
        with kernels.launches(seed, offset=i % 2):
            got = kernels.weight_only_linear(x, w[0], bias, activation, w[1], n)
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert_right(got, x, w, bias, activation, (m, n, k))


@pytest.mark.parametrize("kind", KINDS)
def test_one_group_is_exact(kernels: StandIn, kind: int) -> None:
    m, n, k = 7, 37, 128 if kind == 8 else abs(kind)
    x, w, bias = torch.randn(m, k), weight(kind, n, k), torch.randn(n)
    with kernels.launches():
        got = kernels.weight_only_linear(x, w[0], bias, None, w[1], n)
    assert same_bits(got, terms(x, w[2], w[3]).sum(2).float() + bias)
    assert same_bits(got, ops.weight_only_linear(x, w[0], bias, None, w[1], n))


@pytest.mark.parametrize("kind", KINDS)
def test_up_to_128_k_the_bits_are_the_cpus(kernels: StandIn, kind: int) -> None:
    for m, n, k in ((7, 37, 128), (11, 16, 99)):
        x, w, bias = torch.randn(m, k), weight(kind, n, k), torch.randn(n)
        with kernels.launches():
            got = kernels.weight_only_linear(x, w[0], bias, "relu", w[1], n)
        assert same_bits(got, ops.weight_only_linear(x, w[0], bias, "relu", w[1], n))


def test_bits_do_not_depend_on_the_rows_beside(kernels: StandIn) -> None:
    x, w = torch.randn(19, 1300), weight(-32, 40, 1300)
    with kernels.launches():
        together = kernels.weight_only_linear(x, w[0], None, None, None, 40)
        alone = torch.cat([kernels.weight_only_linear(x[i : i + 1], w[0], None, None, None, 40) for i in range(19)])
    assert same_bits(together, alone)


def test_nothing_is_done_for_nothing(kernels: StandIn) -> None:
    with kernels.launches():
        assert kernels.weight_only_linear(torch.empty(0, 5), weight(32, 3, 5)[0], None, None, None, 3).shape == (0, 3)
        assert kernels.weight_only_linear(torch.randn(2, 5), weight(32, 0, 5)[0], None, None, None, 0).shape == (2, 0)
