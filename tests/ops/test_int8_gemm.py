"""int8_mm and int8_linear against their oracle: equal where integers are, in a derived interval where floats are."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsparse import _C, ops, reference
from fastsparse.ops.int8_gemm import _by_views
from fastsparse.reference.int8_gemm import quantize_rows, quantize_static
from support import around_tiles, asks_for_huge_pages, forced, guarded, isa_levels, same_bits, strided, threads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "gelu", "silu"]
MODES = ["dynamic", "static", "affine"]
MAX_K, MAX_K_AFFINE = 131071, 65793

raw = torch.ops.fastsparse


def s8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def filled(m: int, n: int, k: int, fill: str) -> tuple[Tensor, Tensor]:
    if fill == "random":
        return s8(m, k), s8(k, n)
    values = {"min": -128, "max": 127}
    a, b = (values[name] for name in fill.split("_"))
    return torch.full((m, k), a, dtype=torch.int8), torch.full((k, n), b, dtype=torch.int8)


# --- int8_mm: equal, never close --------------------------------------------------------------------------------------

FILLS = ["random", "min_min", "min_max", "max_max"]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("isa", isa_levels())
def test_mm_is_exact_round_the_tiles(isa: str, fill: str) -> None:
    with forced(isa):
        for m, n, k in around_tiles("int8_gemm"):
            a, b = filled(m, n, k, fill)
            wanted = reference.int8_mm(a, b)
            for side in ("end", "begin"):
                got = ops.int8_mm(guarded(a, side), guarded(b, side))
                assert got.dtype == torch.int32
                assert torch.equal(got, wanted), (m, n, k, side)


# A panel holds 1024 bytes of a row in one block (512 or 1024 k); beyond 128 rows there are several chunks. B is packed
# 64 columns and 64 rows at a time, and of a large K not all columns at once.
BLOCKS = [
    *((7, 33, k) for k in (511, 512, 513, 1023, 1024, 1025, 1030)),
    *((m, 17, 9) for m in (127, 128, 129, 257)),
    *((9, n, 150) for n in (64, 112, 117, 133)),
    *((m, 333, 4100) for m in (15, 130)),
]


@pytest.mark.parametrize("isa", isa_levels())
def test_mm_is_exact_across_blocks_and_chunks(isa: str) -> None:
    for m, n, k in BLOCKS:
        a, b = filled(m, n, k, "random")
        with forced(isa):
            assert torch.equal(ops.int8_mm(guarded(a), guarded(b)), reference.int8_mm(a, b)), (m, n, k)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("isa", isa_levels())
def test_mm_is_exact_at_the_limit_of_k(isa: str, fill: str) -> None:
    a, b = filled(2, 3, MAX_K, fill)
    with forced(isa):
        got = ops.int8_mm(a, b)
    assert torch.equal(got, reference.int8_mm(a, b))
    if fill == "min_min":
        assert got[0, 0] == 128 * 128 * MAX_K


# One row, few rows, tiles with remainders of rows and columns: each way to a sum holds it in registers of its own.
WAYS = [(1, 33), (3, 17), (5, 33), (17, 33), (33, 17)]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("isa", isa_levels())
def test_every_way_is_exact_at_the_limit_of_k(isa: str, fill: str) -> None:
    for m, n in WAYS:
        a, b = filled(m, n, MAX_K, fill)
        pack, one, wanted = ops.pack(b.t()), torch.ones(n), reference.int8_mm(a, b)
        for count in (1, 2):
            with forced(isa), threads(count):
                assert torch.equal(ops.int8_mm(a, b), wanted), (m, n, count)
                assert torch.equal(ops.int8_linear(a, pack, one, x_scale=1.0), wanted.float()), (m, n, count)


@pytest.mark.parametrize("isa", isa_levels())
def test_every_way_is_exact_at_the_limit_of_k_with_a_zero_point(isa: str) -> None:
    for m, n in WAYS:
        w = torch.full((n, MAX_K_AFFINE), -128, dtype=torch.int8)
        for code, zero_point, wanted in ((-128, 127, 255 * 128), (127, -128, -255 * 128)):
            x = torch.full((m, MAX_K_AFFINE), code, dtype=torch.int8)
            for count in (1, 2):
                with forced(isa), threads(count):
                    got = ops.int8_linear(x, ops.pack(w), torch.ones(n), None, None, 1.0, zero_point)
                assert torch.equal(got, torch.full((m, n), float(wanted * MAX_K_AFFINE))), (m, n, code, count)


def layouts(t: Tensor) -> dict[str, Tensor]:
    """One matrix of values in every way that it can lie in memory."""
    rows, columns = t.shape
    return {
        "contiguous": t,
        "transposed": t.t().contiguous().t(),
        "strided rows": strided(t),
        "strided columns": t.repeat_interleave(2, dim=1)[:, ::2],
        "strided both": t.repeat_interleave(3, dim=0).repeat_interleave(2, dim=1)[::3, ::2],
        "offset": torch.cat([t.new_zeros(1, columns), t])[1:],
        "broadcast row": t[:1].expand(rows, columns),
        "broadcast column": t[:, :1].expand(rows, columns),
        "one value": t[:1, :1].expand(rows, columns),
    }


@pytest.mark.parametrize("isa", isa_levels())
def test_mm_takes_any_strides(isa: str) -> None:
    with forced(isa):
        for m, n, k in [(5, 19, 7), (1, 1, 13), (13, 2, 1)]:
            a, b = s8(m, k), s8(k, n)
            for (name_a, la), (name_b, lb) in itertools.product(layouts(a).items(), layouts(b).items()):
                assert torch.equal(ops.int8_mm(la, lb), reference.int8_mm(la, lb)), (name_a, name_b)


@pytest.mark.parametrize("isa", isa_levels())
def test_strided_matrices_are_not_read_beyond_their_last_element(isa: str) -> None:
    a, b, w = strided(s8(7, 45)), strided(s8(45, 21)), s8(21, 45)
    x = strided(torch.randn(7, 45))
    with forced(isa):
        for side in ("end", "begin"):
            got = ops.int8_mm(guarded(a, side), guarded(b, side))
            assert torch.equal(got, reference.int8_mm(a, b))
            assert torch.equal(ops.unpack(ops.pack(guarded(strided(w), side))), w)
            assert_linear(guarded(x, side), w, torch.rand(21))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 4), (0, 3, 0), (3, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("isa", isa_levels())
def test_mm_of_nothing(isa: str, m: int, n: int, k: int) -> None:
    with forced(isa):
        got = ops.int8_mm(s8(m, k), s8(k, n))
    assert torch.equal(got, torch.zeros(m, n, dtype=torch.int32))


SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 13, 17, 31, 67])
LAYOUTS = st.sampled_from(list(layouts(torch.zeros(1, 1))))
SEEDS = st.integers(0, 2**32 - 1)


@given(isa=st.sampled_from(isa_levels()), m=SIZES, n=SIZES, k=SIZES, layout_a=LAYOUTS, layout_b=LAYOUTS, seed=SEEDS)
def test_mm_on_whatever(isa: str, m: int, n: int, k: int, layout_a: str, layout_b: str, seed: int) -> None:
    torch.manual_seed(seed)
    a, b = layouts(s8(m, k)), layouts(s8(k, n))
    a, b = a[layout_a], b[layout_b]
    # An empty matrix has no first row or column to broadcast.
    if a.shape == (m, k) and b.shape == (k, n):
        with forced(isa):
            assert torch.equal(ops.int8_mm(a, b), reference.int8_mm(a, b))


# --- int8_linear: the interval that the float32 epilogue may use ------------------------------------------------------

U = 2.0**-24  # one float32 rounding, relative
TINY = 2.0**-149  # the smallest float32
# gelu and silu end at e^-87: below this, what is left of a negative input is not told apart from zero.
VANISHED = 2.0**-100


def activate(y: Tensor, activation: str | None) -> Tensor:
    """In float64. torch's own gelu, 1 + erf, loses the left tail even there; erfc keeps it."""
    if activation == "relu":
        return y.relu()
    if activation == "gelu":
        return 0.5 * y * torch.erfc(-y * math.sqrt(0.5))
    if activation == "silu":
        return torch.where(y < 0, y * y.exp() / (1 + y.exp()), y / (1 + (-y).exp()))
    return y


def activation_error(y: Tensor, activation: str | None) -> Tensor:
    """Relative error that the float32 evaluation of an activation may have at y, by counting its roundings.

    silu: e^-x 2 (its stated 1.2e-7), 1 + e 1, the division 1.
    gelu: e^(-x^2/2) 2, and the rounding of x^2 comes through the exponential as x^2/2 roundings; u = 1/(1 + 0.3t) has
    3, which u P(u) amplifies at most threefold: 9; Horner's sums 4, the fit 1, four products and 1 - tail 5.
    """
    if activation == "silu":
        return torch.full_like(y, 4 * U)
    if activation == "gelu":
        return (21 + y * y / 2).clamp_max(2.0**20) * U
    return torch.zeros_like(y)


def linear_interval(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """[low, high] in x's dtype: the kernel's float32 value lies between their float64 ends, and rounding to the dtype
    is monotonic, so that nothing is added for it."""
    product = reference.int8_linear(x, weight, weight_scale, None, None, x_scale, x_zero_point)
    y = product if bias is None else product + bias.double()
    # float(sum) and x_scale * weight_scale round once each, the fma once more. Where the scale is subnormal, it is off
    # by half a TINY times a sum of at most 255 * 128 * K.
    error = 2.001 * U * product.abs() + 1.001 * U * y.abs() + TINY * (1 + 255 * 64 * x.shape[-1])
    ends = torch.stack([activate(y - error, activation), activate(y, activation), activate(y + error, activation)])
    slack = activation_error(y, activation) * ends.abs().amax(0)
    if activation in ("gelu", "silu"):
        slack = slack + VANISHED
    return (ends.amin(0) - slack).to(x.dtype), (ends.amax(0) + slack).to(x.dtype)


def assert_inside(got: Tensor, low: Tensor, high: Tensor, what: Any = "") -> None:
    assert got.shape == low.shape, what
    assert got.dtype == low.dtype, what
    assert torch.equal(got.isnan(), low.isnan()), f"NaN in other places: {what}"
    outside = ((got < low) | (got > high)).nonzero()
    if outside.numel():
        at = tuple(outside[0].tolist())
        raise AssertionError(
            f"{len(outside)} of {got.numel()} outside, first at {at}: got {got[at].item()!r}, "
            f"wanted [{low[at].item()!r}, {high[at].item()!r}]; {what}"
        )


def assert_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, *rest: Any, what: Any = "") -> None:
    got = ops.int8_linear(x, guarded(ops.pack(weight)), weight_scale, *rest)
    assert_inside(got, *linear_interval(x, weight, weight_scale, *rest), what)


def awkward_rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Ordinary rows, and between them all that a row can be."""
    x = torch.randn(m, k)
    huge = 6e4 if dtype == torch.float16 else 1e38
    for i in range(m):
        row, spot = x[i], int(torch.randint(max(k, 1), ()))
        if k == 0 or i % 2 == 0:
            continue
        match i // 2 % 8:
            case 0:
                row.zero_()
            case 1:
                row[spot] = float("nan")
            case 2:
                row[spot] = float("inf")
            case 3:
                row[spot] = -float("inf")
            case 4:  # denormal in float32 and bfloat16, or nearly: the scale is held at the smallest normal
                row.mul_(1e-39 if dtype != torch.float16 else 1e-7)
            case 5:
                row.clamp_(-1, 1).mul_(huge)
            case 6:
                row.mul_(1e-30)
            case 7:  # one value far above the others
                row[spot] = -1e4
    return x.to(dtype)


def quantization(mode: str) -> tuple[Tensor | None, Tensor | None]:
    """(x_scale, x_zero_point); normal values use most of the codes, and some saturate."""
    if mode == "dynamic":
        return None, None
    return torch.tensor(0.017), torch.tensor(-37, dtype=torch.int32) if mode == "affine" else None


# Rows, columns and k off every tile, across a block of 512 and of 1024, and down to one.
LINEAR_SHAPES = [(33, 61, 31), (17, 16, 4), (31, 67, 131), (17, 1, 515), (19, 33, 1027), (18, 2, 1), (1, 65, 64)]


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_linear(isa: str, dtype: torch.dtype, activation: str | None, mode: str, with_bias: bool) -> None:
    scale, zero_point = quantization(mode)
    for m, n, k in LINEAR_SHAPES:
        # Small weights: a row of 1e38 must still give numbers that float32 holds.
        weight_scale = torch.rand(n) * 1e-5 if m % 2 else torch.rand(n) * 1e-2 / math.sqrt(k)
        x = awkward_rows(m, k, dtype)
        if m % 2 == 0:
            x = torch.randn(m, k).to(dtype)
        bias = torch.randn(n) if with_bias else None
        with forced(isa):
            assert_linear(x, s8(n, k), weight_scale, bias, activation, scale, zero_point, what=(m, n, k))


@pytest.mark.parametrize("isa", isa_levels())
def test_linear_round_the_tiles_reads_nothing_outside(isa: str) -> None:
    with forced(isa):
        for m, n, k in around_tiles("int8_gemm"):
            x, w, scale, bias = torch.randn(m, k), s8(n, k), torch.rand(n), torch.randn(n)
            interval = linear_interval(x, w, scale, bias, "gelu")
            for side in ("end", "begin"):
                arguments = [guarded(t, side) for t in (x, ops.pack(w), scale, bias)]
                assert_inside(ops.int8_linear(*arguments, "gelu"), *interval, (m, n, k, side))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_linear_reads_no_half_or_scalar_outside(isa: str, dtype: torch.dtype) -> None:
    for k, side in itertools.product((1, 7, 15, 31, 33, 513), ("end", "begin")):
        x, w, weight_scale = torch.randn(3, k).to(dtype), s8(5, k), torch.rand(5)
        scale, zero_point = (guarded(t, side) for t in quantization("affine"))
        with forced(isa):
            for given_scale, given_zero in ((None, None), (scale, None), (scale, zero_point)):
                assert_linear(guarded(x, side), w, weight_scale, None, None, given_scale, given_zero, what=k)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("isa", isa_levels())
def test_activations_over_all_magnitudes(isa: str, activation: str) -> None:
    # One input, one weight of 1: what reaches the activation is x itself, to a rounding.
    magnitudes = torch.cat([torch.logspace(-40, 38, 2000), torch.linspace(0, 100, 3001)])
    x = torch.cat([magnitudes, -magnitudes])[:, None]
    with forced(isa):
        assert_linear(x, torch.ones(1, 1, dtype=torch.int8), torch.ones(1), None, activation)


@pytest.mark.parametrize("isa", isa_levels())
def test_overflow_gives_infinity_as_the_oracle_does(isa: str) -> None:
    x = torch.tensor([[3e38, 3e38], [-3e38, -3e38], [1.0, 1.0]])
    w, scale = torch.full((3, 2), 127, dtype=torch.int8), torch.ones(3)
    with forced(isa):
        for dtype, activation in itertools.product((torch.float32, torch.bfloat16), (None, "relu")):
            assert_linear(x.to(dtype), w, scale, None, activation)
        assert_linear(x.clamp(-6e4, 6e4).half(), w, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_leading_dimensions(isa: str, dtype: torch.dtype) -> None:
    n, k = 19, 23
    w, scale, bias = s8(n, k), torch.rand(n), torch.randn(n)
    with forced(isa):
        for shape in [(k,), (1, k), (5, k), (2, 3, k), (2, 1, 3, 2, k), (0, k), (2, 0, 3, k), (0, 0, k)]:
            x = torch.randn(shape).to(dtype)
            assert_linear(x, w, scale, bias, "relu", what=shape)
            assert ops.int8_linear(x, ops.pack(w), scale).shape == (*shape[:-1], n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_linear_takes_any_strides(isa: str, dtype: torch.dtype) -> None:
    w, scale, bias = s8(19, 23), torch.rand(19), torch.randn(19)
    x = torch.randn(5, 23).to(dtype)
    with forced(isa):
        for name, view in layouts(x).items():
            assert_linear(view, w, scale, bias, what=name)
        for name, view in {
            "transposed batch": torch.randn(3, 4, 23).to(dtype).transpose(0, 1),
            "permuted": torch.randn(23, 4, 3).to(dtype).permute(2, 1, 0),
            "strided rows": strided(torch.randn(3, 4, 23).to(dtype)),
            "broadcast batch": x.expand(3, 5, 23),
            "one column": torch.randn(5, 23).to(dtype)[:, :1].expand(5, 23),
        }.items():
            assert_linear(view, w, scale, bias, "silu", what=name)
        wide = torch.rand(38)
        assert_linear(x, w, wide[::2], wide[1::2], what="strided scale and bias")
        assert_linear(x, w, scale[:1].expand(19), bias[:1].expand(19), what="one scale for all")
        assert_linear(x, w, scale, bias, None, torch.full((1, 1), 0.02), torch.tensor([[3]], dtype=torch.int32))


@pytest.mark.parametrize("isa", isa_levels())
def test_no_input_columns_leave_the_bias(isa: str) -> None:
    x, pack, bias = torch.randn(7, 0), ops.pack(s8(19, 0)), torch.randn(19)
    with forced(isa):
        assert torch.equal(ops.int8_linear(x, pack, torch.rand(19), bias), bias.expand(7, 19))
        assert torch.equal(ops.int8_linear(x, pack, torch.rand(19)), torch.zeros(7, 19))
        assert ops.int8_linear(x, ops.pack(s8(0, 0)), torch.rand(0)).shape == (7, 0)


@pytest.mark.parametrize("isa", isa_levels())
def test_linear_is_exact_at_the_limit_of_k(isa: str) -> None:
    one = torch.ones(1)
    with forced(isa):
        for k, zero_point in ((MAX_K, None), (MAX_K_AFFINE, torch.tensor(127, dtype=torch.int32))):
            lowest = torch.full((1, k), -1e4)
            w = torch.full((1, k), -128, dtype=torch.int8)
            got = ops.int8_linear(lowest, ops.pack(w), one, None, None, one, zero_point)
            assert got.item() == (128 if zero_point is None else 255) * 128 * k
        # Dynamic codes end at 127; the sum has 31 bits, so float32 rounds it.
        assert_linear(torch.full((1, MAX_K), -1.0), torch.full((1, MAX_K), -128, dtype=torch.int8), one)


@given(data=st.data())
def test_linear_on_whatever(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(SEEDS))
    dtype = data.draw(st.sampled_from(DTYPES))
    m, n, k = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
    x = layouts(awkward_rows(m, k, dtype))[data.draw(LAYOUTS)]
    if x.shape != (m, k):  # an empty matrix has no first row or column to broadcast
        return
    if data.draw(st.booleans()):
        x = x.unflatten(0, (-1, 1)) if m else x[:, None]
    mode = data.draw(st.sampled_from(MODES))
    scale = zero_point = None
    if mode != "dynamic":
        scale = torch.tensor(data.draw(st.floats(2.0**-20, 2.0**20, width=32)))
    if mode == "affine":
        zero_point = torch.tensor(data.draw(st.integers(-128, 127)), dtype=torch.int32)
    bias = torch.randn(n) if data.draw(st.booleans()) else None
    with forced(data.draw(st.sampled_from(isa_levels()))):
        activation = data.draw(st.sampled_from(ACTIVATIONS))
        assert_linear(x, s8(n, k), torch.rand(n) * 1e-5, bias, activation, scale, zero_point)


# --- The codes, seen through weights that let them pass ---------------------------------------------------------------


def through_identity(x: Tensor, *quantization: Tensor | None) -> Tensor:
    """y[m, k] = (x_q - zero_point) * x_scale: with an identity for a weight, each output is one code."""
    k = x.shape[-1]
    return ops.int8_linear(x, ops.pack(torch.eye(k, dtype=torch.int8)), torch.ones(k), None, None, *quantization)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_dynamic_codes_and_scales_are_exact(isa: str, dtype: torch.dtype) -> None:
    for m, k in ((48, 37), (3, 1), (5, 64), (2, 700)):
        x = awkward_rows(m, k, dtype)
        codes, scale = quantize_rows(x)
        with forced(isa):
            got = through_identity(x)
        assert same_bits(got, (codes.float() * scale).to(dtype) + 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_dynamic_rounds_half_to_even(isa: str, dtype: torch.dtype) -> None:
    # The largest is 127 steps of 2^-3, so the scale is a power of two and every half is a tie.
    steps = torch.cat([torch.tensor([127.0, -127.0]), torch.arange(-126, 126) / 2])
    with forced(isa):
        got = through_identity((steps / 8).to(dtype)[None]) * 8
    assert torch.equal(got[0].float(), steps.round())


@pytest.mark.parametrize("zero_point", [None, 0, 5, -128, 127])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_static_codes_are_exact(isa: str, dtype: torch.dtype, zero_point: int | None) -> None:
    inf, nan = float("inf"), float("nan")
    edges = torch.tensor([0.0, -0.0, nan, inf, -inf, 6e4, -6e4, 1e-40, 63.75, -63.75, 64.0, -64.0, 64.25, -64.25])
    x = torch.cat([edges, torch.arange(-520, 520) / 8, torch.randn(500) * 30])[None].to(dtype)
    scale = torch.tensor(0.5)  # every odd quarter is a tie
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32)
    codes = quantize_static(x, scale, zero)
    assert codes[0, 3] == 127
    assert codes[0, 4] == -128
    assert codes[0, 2] == (zero_point or 0)
    with forced(isa):
        got = through_identity(x, scale, zero)
    # At most 9 bits with the zero point subtracted: bfloat16 holds 8, so 255 is the largest it must hold; it does.
    assert torch.equal(got, ((codes.int() - (zero_point or 0)) * 0.5).to(dtype))


@pytest.mark.parametrize("scale", [2.0**-126, 1e-30, 3e-5, 1.0, 1e30, 3.4e38])
@pytest.mark.parametrize("isa", isa_levels())
def test_static_codes_at_any_scale(isa: str, scale: float) -> None:
    x = torch.randn(4, 67) * scale * 60
    x[0, :4] = torch.tensor([3.4e38, -3.4e38, 1e-45, -1e-45])
    given_scale = torch.tensor(scale)
    wanted = quantize_static(x, given_scale, None).float() * given_scale
    with forced(isa):
        assert same_bits(through_identity(x, given_scale), wanted + 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", isa_levels())
def test_every_16_bit_value_is_read_and_written_right(isa: str, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[:, None].expand(-1, 33)
    codes, scale = quantize_rows(x)
    with forced(isa):
        assert same_bits(through_identity(x), (codes.float() * scale).to(dtype) + 0.0)
        given_scale = torch.tensor(0.37)
        wanted = (quantize_static(x, given_scale, None).float() * given_scale).to(dtype) + 0.0
        assert same_bits(through_identity(x, given_scale), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_output_is_rounded_once_half_to_even(isa: str, dtype: torch.dtype) -> None:
    # Scales are powers of two, so float32 holds every result and the rounding to the dtype is the only one; sums of up
    # to 2^22 meet ties of 8 and of 11 bits often. The last exponents are subnormal in float16.
    x, w = torch.randint(-127, 128, (40, 201)).to(dtype), s8(67, 201)
    sums = reference.int8_mm(x.to(torch.int8), w.t()).float()
    with forced(isa):
        for exponent in (0, -7, -30, -38):
            weight_scale = torch.full((67,), 2.0**exponent)
            got = ops.int8_linear(x, ops.pack(w), weight_scale, None, None, torch.ones(()))
            assert same_bits(got, (sums * 2.0**exponent).to(dtype))


# --- Chains: int8 in, residual, int8 out ------------------------------------------------------------------------------


def float_dtype_of(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (torch.float32 if x.dtype == torch.int8 else x.dtype)


@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("isa", isa_levels())
def test_codes_as_x_are_what_a_float_x_becomes(isa: str, dtype: torch.dtype | None) -> None:
    scale, zero_point = torch.tensor(0.017), torch.tensor(-37, dtype=torch.int32)
    for m, n, k in [*LINEAR_SHAPES, (130, 33, 9), (3, 0, 5), (0, 5, 3), (5, 7, 0)]:
        x, pack, weight_scale, bias = (
            awkward_rows(m, k, torch.float32),
            ops.pack(s8(n, k)),
            torch.rand(n),
            torch.randn(n),
        )

        def linear(x: Tensor, *quantization: Any) -> Tensor:
            return ops.int8_linear(x, pack, weight_scale, bias, "relu", *quantization, dtype=dtype)  # noqa: B023

        with forced(isa):
            codes = ops.quantize(x, scale, zero_point)
            wanted = linear(x, scale, zero_point)
            assert wanted.dtype == (dtype or torch.float32)
            for view in (codes, strided(codes), guarded(codes), guarded(codes, "begin"), codes[None]):
                assert same_bits(linear(view, scale, zero_point).reshape(wanted.shape), wanted), (m, n, k)
            assert same_bits(linear(codes, scale.item(), -37), wanted)
            codes, scales = ops.quantize_per_token(x)
            for per_row in (scales, guarded(scales), guarded(scales, "begin"), strided(scales)):
                assert same_bits(linear(codes, per_row), linear(x)), (m, n, k)
            assert same_bits(linear(codes[None], scales[None])[0], linear(x))


@pytest.mark.parametrize("isa", isa_levels())
def test_codes_as_x_are_exact_over_the_whole_range(isa: str) -> None:
    with forced(isa):
        for m, n, k in around_tiles("int8_gemm"):
            x, w = s8(m, k), s8(n, k)
            for side in ("end", "begin"):
                got = ops.int8_linear(guarded(x, side), guarded(ops.pack(w), side), torch.ones(n), x_scale=1.0)
                assert torch.equal(got, reference.int8_mm(x, w.t()).float()), (m, n, k)
        lowest = torch.full((1, MAX_K_AFFINE), -128, dtype=torch.int8)
        got = ops.int8_linear(lowest, ops.pack(lowest), torch.ones(1), None, None, 1.0, 127)
        assert got.item() == 255 * 128 * MAX_K_AFFINE


@pytest.mark.parametrize("mode", [*MODES, "codes"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_residual(isa: str, dtype: torch.dtype, activation: str | None, mode: str) -> None:
    scale, zero_point = quantization(mode.replace("codes", "affine"))
    for m, n, k in LINEAR_SHAPES:
        x, w, weight_scale = torch.randn(m, k).to(dtype), s8(n, k), torch.rand(n) * 1e-2 / math.sqrt(k)
        if mode == "codes":
            x = s8(m, k)
        bias = torch.randn(n) if m % 2 else None
        residual = awkward_rows(m, n, dtype)
        arguments = (x, ops.pack(w), weight_scale, bias, None, scale, zero_point)
        with forced(isa):
            plain = ops.int8_linear(*arguments, dtype=torch.float32)
            got = ops.int8_linear(*arguments[:4], activation, scale, zero_point, residual, dtype=dtype)
            # Through weights of nothing and the sum as a residual, the activation alone: what the kernel makes of it.
            alone = ops.int8_linear(
                torch.zeros(m, 1, dtype=torch.int8),
                ops.pack(torch.zeros(n, 1, dtype=torch.int8)),
                torch.ones(n),
                None,
                activation,
                1.0,
                residual=plain + residual.float(),
            )
            assert same_bits(got, alone.to(dtype)), (m, n, k)
            for view in (strided(residual), guarded(residual), guarded(residual, "begin"), residual.t().clone().t()):
                again = ops.int8_linear(*arguments[:4], activation, scale, zero_point, view, dtype=dtype)
                assert same_bits(again, got), (m, n, k)
        expected = reference.int8_linear(x, w, weight_scale, bias, None, scale, zero_point, residual)
        finite = residual.isfinite()
        if activation is None and dtype == torch.float32:
            product = reference.int8_linear(x, w, weight_scale, None, None, scale, zero_point)
            terms = product.abs() + (0 if bias is None else bias.abs()) + residual.abs()
            assert ((got.double() - expected).abs() <= 4 * U * terms)[finite].all()


@pytest.mark.parametrize("mode", [*MODES, "codes", "per row"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("isa", isa_levels())
def test_requantized_is_what_quantize_makes_of_the_float(isa: str, activation: str | None, mode: str) -> None:
    for (m, n, k), dtype, y_zero_point in zip(
        LINEAR_SHAPES, itertools.cycle(DTYPES), itertools.cycle((None, 5, -128, 127))
    ):
        x, pack, weight_scale, bias = awkward_rows(m, k, dtype), ops.pack(s8(n, k)), torch.rand(n) / 99, torch.randn(n)
        residual = awkward_rows(m, n, dtype) if m % 2 else None
        scale, zero_point = quantization(mode if mode in MODES else "affine")
        if mode == "codes":
            x = s8(m, k)
        if mode == "per row":
            x, scale = ops.quantize_per_token(x)
            zero_point = None
        arguments = (x, pack, weight_scale, bias, activation, scale, zero_point)
        with forced(isa):
            y = ops.int8_linear(*arguments, None if residual is None else residual.float(), dtype=torch.float32)
            for y_scale in (0.02, 1e-30, 3e38):
                zero = None if y_zero_point is None else torch.tensor(y_zero_point, dtype=torch.int32)
                given_scale = torch.tensor(y_scale)
                wanted = ops.quantize(y, given_scale, zero)
                got = ops.int8_linear(*arguments, residual, y_scale, y_zero_point, dtype=dtype)
                assert got.dtype == torch.int8
                assert torch.equal(got, wanted), (m, n, k)
                assert torch.equal(ops.int8_linear(*arguments, residual, given_scale, zero, dtype), wanted)


@pytest.mark.parametrize("isa", isa_levels())
def test_requantized_over_all_that_y_can_be(isa: str) -> None:
    inf, nan = float("inf"), float("nan")
    edges = torch.tensor([0.0, -0.0, nan, inf, -inf, 3e38, -3e38, 1e-40, 63.75, -63.75, 64.25, -64.25])
    y = torch.cat([edges, torch.arange(-520, 520) / 8])[None]
    pack, ones = ops.pack(torch.zeros(y.shape[1], 1, dtype=torch.int8)), torch.ones(y.shape[1])
    nothing = torch.zeros(1, 1, dtype=torch.int8)
    with forced(isa):
        for zero_point in (0, 5, -128, 127):
            got = ops.int8_linear(nothing, pack, ones, None, None, 1.0, None, y, 0.5, zero_point)
            assert torch.equal(got, quantize_static(y, torch.tensor(0.5), zero_point))
            assert got[0, 2] == zero_point
            assert got[0, 3] == 127
            assert got[0, 4] == -128


@pytest.mark.parametrize("isa", isa_levels())
def test_requantized_round_the_tiles_touches_nothing_outside(isa: str) -> None:
    with forced(isa):
        for m, n, k in around_tiles("int8_gemm"):
            x, w, weight_scale = s8(m, k), s8(n, k), torch.full((n,), 2.0**-6)
            residual = torch.randn(m, n)
            sums = reference.int8_mm(x, w.t()).float() * 2.0**-8
            for side in ("end", "begin"):
                got = ops.int8_linear(
                    *(guarded(t, side) for t in (x, ops.pack(w), weight_scale)),
                    x_scale=0.25,
                    residual=guarded(residual, side),
                    y_scale=8.0,
                    y_zero_point=3,
                )
                assert torch.equal(got, quantize_static(sums + residual, torch.tensor(8.0), 3)), (m, n, k, side)


@given(data=st.data())
def test_chains_on_whatever(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(SEEDS))
    m, n, k = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
    x = layouts(s8(m, k))[data.draw(LAYOUTS)]
    dtype = data.draw(st.sampled_from(DTYPES))
    residual = layouts(torch.randn(m, n).to(dtype))[data.draw(LAYOUTS)]
    if x.shape != (m, k) or residual.shape != (m, n):  # an empty matrix has no first row or column to broadcast
        return
    x_scale, y_scale = (data.draw(st.floats(2.0**-20, 2.0**20, width=32)) for _ in range(2))
    x_zero, y_zero = data.draw(st.integers(-128, 127)), data.draw(st.integers(-128, 127))
    w, weight_scale, bias = s8(n, k), torch.rand(n), torch.randn(n)
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    arguments = (x, ops.pack(w), weight_scale, bias, activation, x_scale, x_zero)
    y = ops.int8_linear(*arguments, residual.float())
    with forced(data.draw(st.sampled_from(isa_levels()))):
        got = ops.int8_linear(*arguments, residual, y_scale, y_zero, dtype)
        assert torch.equal(got, ops.quantize(y, torch.tensor(y_scale), torch.tensor(y_zero, dtype=torch.int32)))
        assert same_bits(ops.int8_linear(*arguments, residual, dtype=dtype), y.to(dtype))
    # The oracle's float64 may round the other way where float32 meets a tie, never further.
    expected = reference.int8_linear(x, w, weight_scale, bias, activation, x_scale, x_zero, residual, y_scale, y_zero)
    assert ((got.int() - expected.int()).abs() <= 1 + 1e-6 * y.abs() / y_scale).all()


def test_a_chain_agrees_on_every_level_and_number_of_threads() -> None:
    for m, n, k in SPLIT_ROWS + SPLIT_COLUMNS:
        x, pack, weight_scale, bias = s8(m, k), ops.pack(s8(n, k)), torch.rand(n) / 1000, torch.randn(n)
        residual, scales = torch.randn(m, n), torch.rand(m, 1)
        results = []
        for isa, count in itertools.product(isa_levels(), (1, 2, 3)):
            with forced(isa), threads(count):
                y = ops.int8_linear(x, pack, weight_scale, bias, "gelu", scales, 7, residual)
                codes = ops.int8_linear(x, pack, weight_scale, bias, "gelu", scales, 7, residual, 0.1, -3)
                results.append((y, codes))
        for y, codes in results:
            assert same_bits(y, results[0][0])
            assert torch.equal(codes, results[0][1])


def test_gradients_of_a_chain() -> None:
    w, weight_scale = s8(5, 7), torch.rand(5)
    pack = ops.pack(w)
    for x_dtype, y_dtype in itertools.product([torch.int8, *DTYPES], [None, *DTYPES]):
        x = s8(3, 7) if x_dtype == torch.int8 else torch.randn(3, 7).to(x_dtype).requires_grad_()
        bias = torch.randn(5).requires_grad_()
        residual = torch.randn(3, 5).to(float_dtype_of(x, y_dtype)).requires_grad_()
        y = ops.int8_linear(x, pack, weight_scale, bias, None, 0.1, None, residual, dtype=y_dtype)
        assert y.dtype == residual.dtype
        y.backward(torch.ones_like(y))
        assert torch.equal(residual.grad, torch.ones_like(residual))
        assert torch.equal(bias.grad, torch.full((5,), 3.0))
        if x_dtype != torch.int8:
            assert same_bits(x.grad, (weight_scale @ w.float()).expand(3, 7).to(x_dtype))
        codes = ops.int8_linear(x, pack, weight_scale, bias, None, 0.1, None, residual, 0.1, dtype=y_dtype)
        assert codes.dtype == torch.int8
        assert not codes.requires_grad
    # Where only the residual asks, it alone gets one; its activation comes first.
    residual = torch.tensor([[-1e9, 1e9]]).requires_grad_()
    pack = ops.pack(s8(2, 7))
    ops.int8_linear(torch.randn(1, 7), pack, torch.rand(2), None, "relu", residual=residual).sum().backward()
    assert torch.equal(residual.grad, torch.tensor([[0.0, 1.0]]))


# --- Bits do not depend on the level, the threads, or the callers ----------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_agree_to_the_bit(dtype: torch.dtype, activation: str | None, mode: str) -> None:
    scale, zero_point = quantization(mode)
    for (m, n, k), weight_size in itertools.product(LINEAR_SHAPES, (1e-5, 1e-2, 1e30)):
        x, pack, weight_scale = awkward_rows(m, k, dtype), ops.pack(s8(n, k)), torch.randn(n) * weight_size
        bias = torch.randn(n)
        results = {}
        for isa in isa_levels():
            with forced(isa):
                results[isa] = ops.int8_linear(x, pack, weight_scale, bias, activation, scale, zero_point)
        for isa, y in results.items():
            assert same_bits(y, results["scalar"]), (isa, m, n, k, weight_size)


# Rows are shared from 128 rows on, or from 16 with small weights; columns otherwise; nothing below 2^17 products.
SPLIT_ROWS = [(128, 17, 67), (257, 40, 33), (17, 100, 100), (301, 16, 70), (131, 9, 1030)]
SPLIT_COLUMNS = [(1, 1031, 131), (3, 200, 257), (15, 129, 100), (1, 2048, 601), (16, 1100, 1024)]


@pytest.mark.parametrize("isa", isa_levels())
def test_thread_count_changes_no_bit(isa: str) -> None:
    with forced(isa):
        for m, n, k in SPLIT_ROWS + SPLIT_COLUMNS:
            x, w, weight_scale, bias = awkward_rows(m, k, torch.float32), s8(n, k), torch.rand(n), torch.randn(n)
            pack, a = ops.pack(w), s8(m, k)
            results = []
            for count in (1, 2, 3):
                with threads(count):
                    results.append((ops.int8_linear(x, pack, weight_scale, bias, "silu"), ops.int8_mm(a, w.t())))
            for y, c in results:
                assert same_bits(y, results[0][0]), (m, n, k)
                assert torch.equal(c, reference.int8_mm(a, w.t())), (m, n, k)


@pytest.mark.parametrize("isa", isa_levels())
def test_rows_do_not_depend_on_their_neighbours(isa: str) -> None:
    # Row i of a batch has the bits of row i alone, whichever tile, chunk or thread it falls to.
    x, pack, weight_scale = awkward_rows(141, 75, torch.float32), ops.pack(s8(83, 75)), torch.rand(83)
    with forced(isa):
        whole = ops.int8_linear(x, pack, weight_scale, None, "gelu")
        for i in range(0, 141, 7):
            assert same_bits(ops.int8_linear(x[i], pack, weight_scale, None, "gelu"), whole[i])


# Few rows read weights from L3 or DRAM in another way than from L2, and short column panels in another than long ones.
@pytest.mark.parametrize(("n", "k"), [(1104, 2052), (1100, 2052), (600, 4100)])
def test_few_rows_of_weights_beyond_l2_agree_on_every_level(n: int, k: int) -> None:
    w, weight_scale, bias = s8(n, k), torch.rand(n) / 1000, torch.randn(n)
    pack = ops.pack(w)
    for m, activation in itertools.product((1, 2, 3, 5), (None, "relu", "gelu")):
        x = torch.randn(m, k)
        results = []
        for isa in isa_levels():
            with forced(isa):
                results.append(ops.int8_linear(x, pack, weight_scale, bias, activation))
        assert all(same_bits(y, results[-1]) for y in results), (m, activation)
        if activation is None:
            assert_linear(x, w, weight_scale, bias, None, None, None, what=(m, n, k))


def test_many_python_threads_at_once() -> None:
    jobs: list[tuple[Callable[[], Tensor], Tensor]] = []
    for m, n, k in [*SPLIT_ROWS, *SPLIT_COLUMNS, (1, 1, 1), (5, 33, 7), (64, 64, 600)]:
        x, w, weight_scale = torch.randn(m, k), s8(n, k), torch.rand(n)
        pack, a = ops.pack(w), s8(m, k)
        for call in (
            lambda x=x, pack=pack, s=weight_scale: ops.int8_linear(x, pack, s),
            lambda a=a, w=w: ops.int8_mm(a, w.t()),
            lambda w=w: ops.unpack(ops.pack(w)),
        ):
            jobs.append((call, call()))
    with ThreadPoolExecutor(6) as pool:
        futures = [(pool.submit(call), wanted) for call, wanted in jobs * 6]
        for future, wanted in futures:
            assert torch.equal(future.result(), wanted)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("isa", isa_levels())
def test_warm_calls_allocate_no_scratch(isa: str, count: int) -> None:
    calls = []
    for m, n, k in [(1, 64, 64), (1, 4160, 40), (64, 64, 600), SPLIT_ROWS[0], SPLIT_COLUMNS[0], (300, 96, 700)]:
        x, pack, weight_scale = torch.randn(m, k), ops.pack(s8(n, k)), torch.rand(n)
        codes, residual, a, b = s8(m, k), torch.randn(m, n), s8(m, k), s8(k, n)
        w = b.t().contiguous()
        calls += [
            lambda x=x, pack=pack, s=weight_scale: ops.int8_linear(x, pack, s),
            lambda x=x, pack=pack, s=weight_scale: ops.int8_linear(x, pack, s, None, "gelu"),
            lambda x=codes, pack=pack, s=weight_scale, r=residual: ops.int8_linear(
                x, pack, s, None, None, 0.1, 3, r, 0.1, 3
            ),
            lambda a=a, b=b: ops.int8_mm(a, b),
            lambda a=a, w=w: ops.int8_mm(a, w.t()),
        ]
    with forced(isa), threads(count):
        for call in calls * 2:
            call()
        before = _C.scratch_allocations()
        for call in calls * 5:
            call()
        assert _C.scratch_allocations() == before


# --- Packs ------------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<4sHHIIqqqQ16s")
FIELDS = ("magic", "format", "version", "dtype", "block", "n", "k", "nonzeros", "bytes", "zero")


def pack_restated(weight: np.ndarray) -> np.ndarray:
    """The layout of csrc/int8_gemm/formats/vnni16.h once more, from its index formula."""
    rows, columns = weight.shape
    rows_padded, columns_padded = -(-rows // 16) * 16, -(-columns // 4) * 4
    body = np.zeros(rows_padded * columns_padded, dtype=np.int8)
    n, k = np.indices(weight.shape)
    body[((n // 16) * (columns_padded // 4) + k // 4) * 64 + (n % 16) * 4 + k % 4] = weight
    assert body.size % 64 == 0
    sums = np.zeros(rows_padded, dtype="<i4")
    sums[:rows] = weight.sum(axis=1, dtype=np.int64)
    tail = sums.tobytes() + bytes(-sums.nbytes % 64)
    size = 64 + body.size + len(tail)
    nonzeros = int(np.count_nonzero(weight))
    header = HEADER.pack(b"fspk", 1, 1, 1, 16, rows, columns, nonzeros, size, bytes(16))
    return np.frombuffer(header + body.tobytes() + tail, dtype=np.uint8)


def edited(pack: Tensor, **fields: Any) -> Tensor:
    """The pack with some fields of its header replaced."""
    values = dict(zip(FIELDS, HEADER.unpack(bytes(pack[:64].tolist())), strict=True)) | fields
    header = torch.frombuffer(bytearray(HEADER.pack(*values.values())), dtype=torch.uint8)
    return torch.cat([header, pack[64:]])


PACK_SHAPES = [(0, 0), (0, 5), (5, 0), (1, 1), (1, 4), (16, 4), (17, 5), (15, 3), (16, 8), (31, 61), (67, 130)]


@pytest.mark.parametrize(("n", "k"), PACK_SHAPES)
def test_pack_is_as_documented_to_the_byte(n: int, k: int) -> None:
    w = s8(n, k)
    w[torch.rand(n, k) < 0.3] = 0
    pack = ops.pack(w)
    assert pack.numpy().tobytes() == pack_restated(w.numpy()).tobytes()
    header = ops.describe(pack)
    assert header == {
        "format": "vnni16",
        "version": 1,
        "dtype": "int8",
        "n": n,
        "k": k,
        "block": 16,
        "nonzeros": int(w.count_nonzero()),
        "bytes": pack.numel(),
    }


@pytest.mark.parametrize(("n", "k"), PACK_SHAPES)
def test_unpack_gives_the_weight_back(n: int, k: int) -> None:
    w = s8(n, k)
    assert torch.equal(ops.unpack(guarded(ops.pack(guarded(w)))), w)
    assert torch.equal(_by_views(ops.pack(w), n, k), w)  # what a gradient on CUDA takes
    for format in ("auto", "vnni16"):
        assert torch.equal(ops.unpack(ops.pack(w, format, rows=8)), w)
    if n and k:
        for name, view in layouts(w).items():
            assert torch.equal(ops.unpack(ops.pack(view)), view), name


def test_packs_hold_every_value() -> None:
    w = torch.arange(-128, 128, dtype=torch.int8).repeat(3, 1)
    assert torch.equal(ops.unpack(ops.pack(w)), w)


def test_a_large_pack_asks_for_huge_pages() -> None:
    w = s8(2048, 4096)
    pack = ops.pack(w)
    assert asks_for_huge_pages(pack)
    assert torch.equal(ops.unpack(pack), w)


@pytest.mark.parametrize("isa", isa_levels())
def test_pack_at_any_multiple_of_8(isa: str) -> None:
    # A memory-mapped file promises no more.
    x, w, weight_scale = torch.randn(7, 61), s8(33, 61), torch.rand(33)
    pack = ops.pack(w)
    with forced(isa):
        wanted = ops.int8_linear(x, pack, weight_scale)
        for offset in (8, 24, 56):
            moved = torch.cat([torch.zeros(offset, dtype=torch.uint8), pack])[offset:]
            assert torch.equal(ops.int8_linear(x, moved, weight_scale), wanted)
            assert torch.equal(ops.unpack(moved), w)


def refused_by_all_readers(pack: Tensor, n: int, k: int) -> None:
    for read in (
        lambda: ops.describe(pack),
        lambda: ops.unpack(pack),
        lambda: raw.int8_unpack(pack, n, k),
        lambda: ops.int8_linear(torch.zeros(1, k), pack, torch.ones(n)),
    ):
        with pytest.raises(ValueError, match="pack"):
            read()


NONZEROS = range(32, 40)  # any count from 0 to N * K is as good as another, to who reads the header alone


@given(
    changes=st.dictionaries(
        st.integers(0, 63).filter(lambda at: at not in NONZEROS), st.integers(1, 255), min_size=1, max_size=6
    )
)
def test_a_damaged_header_is_refused(changes: dict[int, int]) -> None:
    pack = ops.pack(torch.ones(17, 5, dtype=torch.int8))
    for at, flip in changes.items():
        pack[at] ^= flip
    refused_by_all_readers(guarded(pack), 17, 5)


@pytest.mark.parametrize("nonzeros", [-1, 17 * 5 + 1, 2**62])
def test_an_impossible_count_of_nonzeros_is_refused(nonzeros: int) -> None:
    refused_by_all_readers(edited(ops.pack(s8(17, 5)), nonzeros=nonzeros), 17, 5)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    pack = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    refused_by_all_readers(guarded(pack), 1, 1)


def test_a_truncated_or_longer_pack_is_refused() -> None:
    pack = ops.pack(s8(17, 5))
    for size in (0, 1, 63, 64, 65, 128, pack.numel() - 64, pack.numel() - 1):
        refused_by_all_readers(guarded(pack[:size].clone()), 17, 5)
    refused_by_all_readers(torch.cat([pack, pack[:64]]), 17, 5)


@pytest.mark.parametrize("fill", [255, 128, 127, None])
@pytest.mark.parametrize("isa", isa_levels())
def test_packs_of_garbage_give_numbers_and_read_nothing_outside(isa: str, fill: int | None) -> None:
    for n, k in ((3, 5), (40, 600), (300, 9)):
        pack = ops.pack(s8(n, k))
        pack[64:] = torch.randint(0, 256, (pack.numel() - 64,)) if fill is None else fill
        pack, scale = guarded(pack), torch.ones(n)
        with forced(isa):
            for m in (1, 3, 20, 130):
                assert ops.int8_linear(guarded(torch.randn(m, k)), pack, scale).shape == (m, n)
        assert ops.unpack(pack).shape == (n, k)


def test_sizes_that_would_overflow_are_refused() -> None:
    # Crafted so that 64-bit arithmetic on them wraps to a size that is there.
    empty = ops.pack(s8(0, 0))
    for n, k in ((2**62, 4), (2**60, 16), (2**63 - 1, 2**63 - 1), (-5, 5), (5, -5), (-16, -4), (2**32, 2**32)):
        pack = edited(empty, n=n, k=k)
        with pytest.raises(ValueError, match="pack"):
            ops.describe(pack)
        with pytest.raises(ValueError, match="pack"):
            raw.int8_unpack(pack, n, k)


# --- torch.library, torch.compile, autograd ---------------------------------------------------------------------------


def linear_arguments(dtype: torch.dtype, mode: str, with_bias: bool, grad: bool = False) -> tuple[Any, ...]:
    scale, zero_point = quantization(mode)
    x = torch.randn(2, 3, 9).to(dtype).requires_grad_(grad)
    bias = torch.randn(5).requires_grad_(grad) if with_bias else None
    return x, ops.pack(s8(5, 9)), torch.rand(5), bias, scale, zero_point


# Every mode with and without a bias, and on the way every dtype and activation.
OPCHECKS = list(zip(itertools.product(MODES, (False, True)), itertools.cycle(DTYPES), itertools.cycle(range(4))))


@pytest.mark.parametrize(("mode_bias", "dtype", "activation"), OPCHECKS)
def test_opcheck_linear(mode_bias: tuple[str, bool], dtype: torch.dtype, activation: int) -> None:
    x, weight, weight_scale, bias, scale, zero_point = linear_arguments(dtype, *mode_bias)
    torch.library.opcheck(raw.int8_linear.default, (x, weight, weight_scale, bias, activation, scale, zero_point))
    train = linear_arguments(dtype, *mode_bias, grad=True)
    torch.library.opcheck(raw.int8_linear_train.default, train)
    torch.library.opcheck(raw.int8_linear_plain.default, (x, weight, weight_scale, bias, activation))


@pytest.mark.parametrize("y_dtype", [None, 0, 1, 2])
def test_opcheck_chains(y_dtype: int | None) -> None:
    x, weight, weight_scale, bias = s8(2, 3, 9), ops.pack(s8(5, 9)), torch.rand(5), torch.randn(5)
    dtype = DTYPES[y_dtype or 0]
    residual, zero_point = torch.randn(2, 3, 5).to(dtype), torch.tensor(3, dtype=torch.int32)
    for x_scale in (torch.tensor(0.1), torch.rand(2, 3, 1)):
        arguments = (x, weight, weight_scale, bias, 1, x_scale, zero_point, residual)
        torch.library.opcheck(raw.int8_linear.default, (*arguments, None, None, y_dtype))
        torch.library.opcheck(raw.int8_linear.default, (*arguments, torch.tensor(0.5), zero_point, y_dtype))
        train = (x, weight, weight_scale, bias.clone().requires_grad_(), x_scale, zero_point)
        torch.library.opcheck(raw.int8_linear_train.default, (*train, residual.clone().requires_grad_(), y_dtype))


def test_opcheck_the_others() -> None:
    w = s8(5, 9)
    torch.library.opcheck(raw.int8_mm.default, (s8(3, 9), w.t()))
    torch.library.opcheck(raw.int8_mm.default, (s8(0, 9), s8(9, 1)))
    torch.library.opcheck(raw.int8_pack.default, (w,))
    torch.library.opcheck(raw.int8_unpack.default, (ops.pack(w), 5, 9))


def layer(activation: str | None, mode: str, n: int = 19, k: int = 23) -> Callable[[Tensor, Tensor | None], Tensor]:
    scale, zero_point = quantization(mode)
    pack, weight_scale = ops.pack(s8(n, k)), torch.rand(n) / 50

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.int8_linear(x * 1.5, pack, weight_scale, bias, activation, scale, zero_point) * 2

    return run


def forward_backward(
    run: Callable[..., Tensor], x: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = x.detach().clone().requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    y = run(x, bias)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    assert x.grad is not None
    return y.detach(), x.grad, None if bias is None else bias.grad


@pytest.mark.parametrize(
    ("activation", "mode", "with_bias"),
    [
        (None, "dynamic", False),
        (None, "affine", True),
        ("relu", "static", False),
        ("gelu", "dynamic", True),
        ("silu", "affine", False),
    ],
)
def test_compile_gives_the_same_bits(activation: str | None, mode: str, with_bias: bool) -> None:
    torch._dynamo.reset()
    run = layer(activation, mode)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 5, 8):  # one graph for all
        x, bias = torch.randn(m, 23), torch.randn(19) if with_bias else None
        assert same_bits(compiled(x, bias), run(x, bias))
        for got, wanted in zip(forward_backward(compiled, x, bias), forward_backward(run, x, bias), strict=True):
            assert (got is None and wanted is None) or same_bits(got, wanted)


def test_compile_a_chain() -> None:
    torch._dynamo.reset()
    first, second, third = ops.pack(s8(19, 23)), ops.pack(s8(7, 19)), ops.pack(s8(19, 7))
    scales = torch.rand(19) / 50, torch.rand(7) / 50

    def run(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = ops.int8_linear(x, first, scales[0], None, "gelu", y_scale=0.05, y_zero_point=-20)
        y = ops.int8_linear(codes, second, scales[1], None, "relu", 0.05, -20, residual, dtype=torch.bfloat16)
        row_codes, row_scales = ops.quantize_per_token(y)
        return codes, y, ops.int8_linear(row_codes, third, scales[0], None, None, row_scales)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 5, 8):
        x, residual = torch.randn(m, 23), torch.randn(m, 7).bfloat16()
        for got, wanted in zip(compiled(x, residual), run(x, residual), strict=True):
            assert same_bits(got, wanted)


def test_compile_the_other_ops() -> None:
    torch._dynamo.reset()

    def run(a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        pack = raw.int8_pack(w)
        return ops.int8_mm(a, w.t()), raw.int8_unpack(pack, w.shape[0], w.shape[1])

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for m, n, k in ((3, 5, 7), (4, 6, 9)):
        a, w = s8(m, k), s8(n, k)
        product, unpacked = compiled(a, w)
        assert torch.equal(product, reference.int8_mm(a, w.t()))
        assert torch.equal(unpacked, w)


@pytest.mark.inductor
def test_inductor_forward_and_backward() -> None:
    torch._dynamo.reset()
    run = layer("gelu", "dynamic")
    compiled = torch.compile(run, fullgraph=True)
    x, bias = torch.randn(6, 23), torch.randn(19)
    for got, wanted in zip(forward_backward(compiled, x, bias), forward_backward(run, x, bias), strict=True):
        # Inductor has its own erf.
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=4e-6)


def eager_gradients(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, grad: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Of the dequantized formula, in `dtype`, straight through the rounding of x, which the activation sees."""
    codes, scale = quantize_rows(x)
    rounded = (codes.double() * scale.double()).to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    bias = None if bias is None else bias.detach().to(dtype).requires_grad_()
    y = torch.nn.functional.linear(x + (rounded - x).detach(), weight.to(dtype), bias)
    if activation is not None:
        y = getattr(torch.nn.functional, activation)(y)
    y.backward(grad.to(dtype))
    assert x.grad is not None
    return x.grad.double(), None if bias is None or bias.grad is None else bias.grad.double()


@pytest.mark.parametrize("magnitude", [1.0, 1e-4])
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype, activation: str | None, with_bias: bool, magnitude: float) -> None:
    n, k = 67, 61
    for shape in ((k,), (9, k), (2, 5, k)):
        w, weight_scale = s8(n, k), torch.rand(n) * 2e-4 + 1e-4  # weights of up to 0.04
        x, bias = torch.randn(shape).to(dtype), torch.randn(n) if with_bias else None
        grad = (torch.randn(*shape[:-1], n) * magnitude).to(dtype)

        leaf_x = x.clone().requires_grad_()
        leaf_bias = None if bias is None else bias.clone().requires_grad_()
        y = ops.int8_linear(leaf_x, ops.pack(w), weight_scale, leaf_bias, activation)
        y.backward(grad)
        assert leaf_x.grad is not None
        assert leaf_x.grad.dtype == dtype

        weight = w.double() * weight_scale.double()[:, None]
        wanted = eager_gradients(x, weight, bias, activation, grad, torch.float64)
        eager = eager_gradients(x, weight, bias, activation, grad, dtype)
        got = (leaf_x.grad, None if leaf_bias is None else leaf_bias.grad)
        for ours, exact, theirs in zip(got, wanted, eager, strict=True):
            if exact is None:
                assert ours is None
                continue
            # At most twice the error of eager torch in the same dtype, as root mean square, relative to the gradient;
            # the one rounding of the result itself (half an eps) is allowed in any case.
            size = exact.square().mean().sqrt()
            error = (ours.double() - exact).square().mean().sqrt() / size
            allowed = 2 * (theirs - exact).square().mean().sqrt() / size
            assert error <= max(allowed.item(), torch.finfo(dtype).eps / 2), (shape, error.item(), allowed.item())


def test_gradients_flow_to_what_asks_for_them() -> None:
    pack, weight_scale = ops.pack(s8(5, 7)), torch.rand(5)
    for x_asks, bias_asks in itertools.product((False, True), repeat=2):
        x, bias = torch.randn(3, 7).requires_grad_(x_asks), torch.randn(5).requires_grad_(bias_asks)
        y = ops.int8_linear(x, pack, weight_scale, bias)
        assert y.requires_grad == (x_asks or bias_asks)
        if y.requires_grad:
            y.sum().backward()
        assert (x.grad is not None) == x_asks
        assert (bias.grad is not None) == bias_asks
        if bias_asks:
            assert torch.equal(bias.grad, torch.full((5,), 3.0))


def test_no_graph_without_grad_mode() -> None:
    pack, weight_scale, bias = ops.pack(s8(5, 7)), torch.rand(5), torch.randn(5).requires_grad_()
    x = torch.randn(3, 7).requires_grad_()
    wanted = ops.int8_linear(x.detach(), pack, weight_scale, bias.detach(), "relu")
    with torch.no_grad():
        y = ops.int8_linear(x, pack, weight_scale, bias, "relu")
    assert not y.requires_grad
    assert y.grad_fn is None
    assert torch.equal(y, wanted)
    with torch.inference_mode():
        y = ops.int8_linear(x, pack, weight_scale, bias, "relu")
        inner = ops.int8_linear(torch.ones(2, 7), ops.pack(s8(5, 7)), torch.ones(5))
        w = s8(2, 3)
        assert torch.equal(ops.unpack(ops.pack(w)), w)
        assert torch.equal(ops.int8_mm(w, w.t()), reference.int8_mm(w, w.t()))
    assert y.is_inference()
    assert inner.is_inference()
    assert torch.equal(y.clone(), wanted)


def test_training_and_inference_give_the_same_values() -> None:
    # To the bit without gelu and silu; in training those are torch's own, applied to the rounded output, and torch's
    # gelu is off by up to 3.2 eps of its input where it has AVX-512.
    pack, weight_scale, bias = ops.pack(s8(33, 45)), torch.rand(33) / 100, torch.randn(33)
    for dtype, activation in itertools.product(DTYPES, ACTIVATIONS):
        x = torch.randn(7, 45).to(dtype)
        plain = ops.int8_linear(x, pack, weight_scale, bias, activation)
        train = ops.int8_linear(x.requires_grad_(), pack, weight_scale, bias, activation).detach()
        if activation in (None, "relu"):
            assert same_bits(train, plain)
        else:
            before = ops.int8_linear(x.detach(), pack, weight_scale, bias)
            assert ((train - plain).abs() <= 5 * torch.finfo(dtype).eps * before.abs()).all()


# --- Bad input --------------------------------------------------------------------------------------------------------

N, K = 5, 7
X, W, SCALE, BIAS = torch.ones(3, K), torch.ones(N, K, dtype=torch.int8), torch.ones(N), torch.ones(N)
PACK = torch.from_numpy(pack_restated(W.numpy()).copy())
ONE, ZERO = torch.ones(()), torch.zeros((), dtype=torch.int32)
INF, NAN = float("inf"), float("nan")


def linear(**changed: Any) -> Callable[[], Any]:
    arguments = {"x": X, "weight": PACK, "weight_scale": SCALE, "bias": BIAS} | changed
    return lambda: ops.int8_linear(**arguments)


def linear_k(k: int, **rest: Any) -> Callable[[], Any]:
    pack = torch.from_numpy(pack_restated(np.zeros((1, k), dtype=np.int8)).copy())
    return lambda: ops.int8_linear(torch.zeros(1, k), pack, torch.ones(1), **rest)


def mm(a: Tensor, b: Any) -> Callable[[], Any]:
    return lambda: ops.int8_mm(a, b)


def describe(pack: Any) -> Callable[[], Any]:
    return lambda: ops.describe(pack)


def unpack(pack: Tensor, n: int = N, k: int = K) -> Callable[[], Any]:
    return lambda: raw.int8_unpack(pack, n, k)


def spoiled(i: int, value: float) -> Tensor:
    scale = torch.ones(N)
    scale[i] = value
    return scale


A, B = torch.ones(2, K, dtype=torch.int8), torch.ones(K, 3, dtype=torch.int8)
MATCHES = "int8_linear: weight must be a vnni16 pack that matches x and weight_scale: "

# what is tried: (call, what the message must hold: argument and what was expected, what came)
BAD_INPUT: dict[str, tuple[Callable[[], Any], str, str]] = {
    # int8_linear, in the order of its checks
    "activation name": (
        linear(activation="tanh"),
        "int8_linear: activation must be None, 'relu', 'gelu' or 'silu'",
        "got 'tanh'",
    ),
    "activation number": (linear(activation=1), "int8_linear: activation must be None, 'relu'", "got 1"),
    "activation list": (linear(activation=["relu"]), "int8_linear: activation must be None, 'relu'", "got ['relu']"),
    "x float64": (linear(x=X.double()), "int8_linear: x must be float32, bfloat16, float16 or int8", "got float64"),
    "x uint8": (linear(x=X.byte()), "int8_linear: x must be float32, bfloat16, float16 or int8", "got uint8"),
    "x int8 without a scale": (linear(x=X.char()), "int8_linear: x_scale must be given with an int8 x", "got none"),
    "x None": (linear(x=None), "int8_linear: x must be a tensor", "got NoneType"),
    "x list": (linear(x=[1.0]), "int8_linear: x must be a tensor", "got list"),
    "weight None": (linear(weight=None), "int8_linear: weight must be a tensor", "got None"),
    "weight_scale None": (linear(weight_scale=None), "int8_linear: weight_scale must be a tensor", "got NoneType"),
    "weight_scale float": (linear(weight_scale=0.5), "int8_linear: weight_scale must be a tensor", "got float"),
    "bias list": (linear(bias=[0.0]), "int8_linear: bias must be a tensor", "got list"),
    "residual float": (linear(residual=1.0), "int8_linear: residual must be a tensor", "got float"),
    "x None, no gradients": (torch.no_grad()(linear(x=None)), "int8_linear: x must be a tensor", "got None"),
    "x scalar": (linear(x=torch.tensor(1.0)), "int8_linear: x must have at least one dimension", "got x[]"),
    "weight_scale matrix": (
        linear(weight_scale=torch.ones(N, 1)),
        "int8_linear: weight_scale must have shape [N]",
        "got weight_scale[5, 1]",
    ),
    "weight int8": (linear(weight=PACK.char()), "int8_linear: weight must be uint8", "got int8"),
    "weight unpacked": (linear(weight=W), "int8_linear: weight must be uint8", "got int8"),
    "weight matrix": (
        linear(weight=PACK[None]),
        "int8_linear: weight must be a pack, a contiguous uint8 vector made by ops.pack()",
        f"got weight[1, {PACK.numel()}]",
    ),
    "weight strided": (
        linear(weight=PACK.repeat_interleave(2)[::2]),
        "int8_linear: weight must be a pack, a contiguous uint8 vector",
        f"got weight[{PACK.numel()}]",
    ),
    "weight short": (linear(weight=PACK[:63]), MATCHES, "got 63 bytes, a header alone has 64"),
    "weight magic": (linear(weight=edited(PACK, magic=b"GGUF")), MATCHES, 'got bytes that do not begin with "fspk"'),
    "weight format": (linear(weight=edited(PACK, format=7)), MATCHES, "got format 7, expected 1 (vnni16)"),
    "weight version": (
        linear(weight=edited(PACK, version=2)),
        MATCHES,
        "got vnni16 version 2, this build reads version 1",
    ),
    "weight dtype code": (
        linear(weight=edited(PACK, dtype=3)),
        MATCHES,
        "got dtype code 3 and block 16, expected 1 and 16",
    ),
    "weight block": (linear(weight=edited(PACK, block=8)), MATCHES, "got dtype code 1 and block 8, expected 1 and 16"),
    "x columns": (
        linear(x=torch.ones(3, K + 1)),
        "int8_linear: x must have K=7 columns to match the packed weight",
        "got x[3, 8]",
    ),
    "weight_scale rows": (
        linear(weight_scale=torch.ones(N + 1)),
        MATCHES,
        "got a pack of [N=5, K=7], expected [N=6, K=7]",
    ),
    "weight truncated": (
        linear(weight=PACK[:-1].clone()),
        MATCHES,
        f"got {PACK.numel() - 1} bytes (the header says {PACK.numel()}), expected {PACK.numel()}",
    ),
    "weight bytes field": (
        linear(weight=edited(PACK, bytes=1)),
        MATCHES,
        f"got {PACK.numel()} bytes (the header says 1), expected {PACK.numel()}",
    ),
    "weight_scale float64": (
        linear(weight_scale=SCALE.double()),
        "int8_linear: weight_scale must be float32",
        "got float64",
    ),
    "weight_scale with a gradient": (
        linear(weight_scale=torch.ones(N, requires_grad=True)),
        "int8_linear: weight_scale must not require a gradient",
        "",
    ),
    "x_scale with a gradient": (
        linear(x_scale=torch.ones((), requires_grad=True)),
        "int8_linear: x_scale must not require a gradient",
        "",
    ),
    "y_scale with a gradient": (
        linear(y_scale=torch.ones((), requires_grad=True)),
        "int8_linear: y_scale must not require a gradient",
        "",
    ),
    "weight_scale NaN": (linear(weight_scale=spoiled(4, NAN)), "int8_linear: weight_scale must be finite", "NaN"),
    "weight_scale inf": (linear(weight_scale=spoiled(0, INF)), "int8_linear: weight_scale must be finite", "infinity"),
    "weight_scale -inf": (
        linear(weight_scale=spoiled(2, -INF)),
        "int8_linear: weight_scale must be finite",
        "infinity",
    ),
    "bias bfloat16": (linear(bias=BIAS.bfloat16()), "int8_linear: bias must be float32", "got bfloat16"),
    "bias longer": (linear(bias=torch.ones(N + 1)), "int8_linear: bias must have shape [5]", "got bias[6]"),
    "bias matrix": (linear(bias=torch.ones(1, N)), "int8_linear: bias must have shape [5]", "got bias[1, 5]"),
    "activation code 4": (
        lambda: raw.int8_linear(X, PACK, SCALE, None, 4),
        "int8_linear: activation must be 0 (none), 1 (relu), 2 (gelu) or 3 (silu)",
        "got 4",
    ),
    "activation code -1": (
        lambda: raw.int8_linear(X, PACK, SCALE, None, -1),
        "int8_linear: activation must be",
        "got -1",
    ),
    "x_scale float64": (linear(x_scale=ONE.double()), "int8_linear: x_scale must be float32", "got float64"),
    "x_scale two": (linear(x_scale=torch.ones(2)), "int8_linear: x_scale must have one element", "got x_scale[2]"),
    "x_scale none": (linear(x_scale=torch.ones(0)), "int8_linear: x_scale must have one element", "got x_scale[0]"),
    "x_scale zero": (linear(x_scale=ONE * 0), "int8_linear: x_scale must be finite and at least 1.2e-38", "got 0"),
    "x_scale negative": (linear(x_scale=-ONE), "int8_linear: x_scale must be finite and at least", "got -1"),
    "x_scale subnormal": (linear(x_scale=ONE * 1e-39), "int8_linear: x_scale must be finite and at least", "got "),
    "x_scale NaN": (linear(x_scale=ONE * NAN), "int8_linear: x_scale must be finite and at least", "got nan"),
    "x_scale inf": (linear(x_scale=ONE * INF), "int8_linear: x_scale must be finite and at least", "got inf"),
    "x_zero_point alone": (linear(x_zero_point=ZERO), "int8_linear: x_zero_point needs x_scale", "dynamic"),
    "x_zero_point int64": (
        linear(x_scale=ONE, x_zero_point=ZERO.long()),
        "int8_linear: x_zero_point must be int32",
        "got int64",
    ),
    "x_zero_point two": (
        linear(x_scale=ONE, x_zero_point=ZERO.expand(2)),
        "int8_linear: x_zero_point must have one element",
        "got x_zero_point[2]",
    ),
    "x_zero_point 128": (
        linear(x_scale=ONE, x_zero_point=ZERO + 128),
        "int8_linear: x_zero_point must be in [-128, 127]",
        "got 128",
    ),
    "x_zero_point -129": (
        linear(x_scale=ONE, x_zero_point=ZERO - 129),
        "int8_linear: x_zero_point must be in [-128, 127]",
        "got -129",
    ),
    "x_scale of a wrong number of rows": (
        linear(x=X.char(), x_scale=torch.ones(2, 1)),
        "int8_linear: x_scale must have one element, or one for each row of an int8 x[3, 7]",
        "got x_scale[2, 1]",
    ),
    "x_scale of rows without a last dimension": (
        linear(x=X.char(), x_scale=torch.ones(3)),
        "int8_linear: x_scale must have one element, or one for each row",
        "got x_scale[3]",
    ),
    "x_scale of rows with a float x": (
        linear(x_scale=torch.ones(3, 1)),
        "int8_linear: x_scale must have one element",
        "got x_scale[3, 1]",
    ),
    "x_scale of rows float64": (
        linear(x=X.char(), x_scale=torch.ones(3, 1).double()),
        "int8_linear: x_scale must be float32",
        "got float64",
    ),
    "x_scale text": (linear(x_scale="1"), "int8_linear: x_scale must be a float or a float32 tensor", "got '1'"),
    "x_scale bool": (linear(x_scale=True), "int8_linear: x_scale must be a float or a float32 tensor", "got True"),
    "x_scale -0.5": (linear(x_scale=-0.5), "int8_linear: x_scale must be finite and at least", "got -0.5"),
    "x_zero_point int 128": (
        linear(x_scale=0.5, x_zero_point=128),
        "int8_linear: x_zero_point must be an int in [-128, 127]",
        "got 128",
    ),
    "x_zero_point float": (
        linear(x_scale=0.5, x_zero_point=1.0),
        "int8_linear: x_zero_point must be an int in [-128, 127]",
        "got 1.0",
    ),
    "residual columns": (
        linear(residual=torch.ones(3, N + 1)),
        "int8_linear: residual must have y's shape, N=5 columns for the rows of x[3, 7]",
        "got residual[3, 6]",
    ),
    "residual rows": (linear(residual=torch.ones(N)), "int8_linear: residual must have y's shape", "got residual[5]"),
    "residual bfloat16": (
        linear(residual=torch.ones(3, N).bfloat16()),
        "int8_linear: residual must be float32",
        "got bfloat16",
    ),
    "residual float32": (
        linear(residual=torch.ones(3, N), dtype=torch.float16),
        "int8_linear: residual must be float16",
        "got float32",
    ),
    "y_scale float64": (linear(y_scale=ONE.double()), "int8_linear: y_scale must be float32", "got float64"),
    "y_scale rows": (linear(y_scale=torch.ones(3, 1)), "int8_linear: y_scale must have one element", "[3, 1]"),
    "y_scale zero": (linear(y_scale=0.0), "int8_linear: y_scale must be finite and at least 1.2e-38", "got 0"),
    "y_scale NaN": (linear(y_scale=NAN), "int8_linear: y_scale must be finite and at least", "got nan"),
    "y_scale inf": (linear(y_scale=INF), "int8_linear: y_scale must be finite and at least", "got inf"),
    "y_zero_point alone": (linear(y_zero_point=1), "int8_linear: y_zero_point needs y_scale", "float"),
    "y_zero_point -129": (
        linear(y_scale=1.0, y_zero_point=-129),
        "int8_linear: y_zero_point must be an int in [-128, 127]",
        "got -129",
    ),
    "y_zero_point tensor": (
        linear(y_scale=1.0, y_zero_point=ZERO + 200),
        "int8_linear: y_zero_point must be in [-128, 127]",
        "got 200",
    ),
    "dtype float64": (
        linear(dtype=torch.float64),
        "int8_linear: dtype must be torch.float32, torch.bfloat16 or torch.float16",
        "got torch.float64",
    ),
    "dtype code": (
        lambda: raw.int8_linear(X, PACK, SCALE, None, 0, None, None, None, None, None, 3),
        "int8_linear: dtype must be 0 (float32), 1 (bfloat16) or 2 (float16)",
        "got 3",
    ),
    "K beyond the limit": (
        linear_k(MAX_K + 1),
        "int8_linear: x must have at most K=131071 columns",
        "got x[1, 131072]",
    ),
    "K beyond the affine limit": (
        linear_k(MAX_K_AFFINE + 1, x_scale=ONE, x_zero_point=ZERO + 1),
        "int8_linear: x must have at most K=65793 columns",
        "got x[1, 65794]",
    ),
    # int8_mm
    "b None": (mm(A, None), "int8_mm: b must be a tensor", "got None"),
    "a uint8": (mm(A.byte(), B), "int8_mm: a must be int8", "got uint8"),
    "b float32": (mm(A, B.float()), "int8_mm: b must be int8", "got float32"),
    "a vector": (mm(A[0], B), "int8_mm: a must be a matrix", "got a[7]"),
    "b batch": (mm(A, B[None]), "int8_mm: b must be a matrix", "got b[1, 7, 3]"),
    "a b mismatch": (mm(A, A), "int8_mm: b must have K=7 rows to match a[2, 7]", "got b[2, 7]"),
    "K beyond the limit of mm": (
        mm(torch.zeros(1, MAX_K + 1, dtype=torch.int8), torch.zeros(MAX_K + 1, 1, dtype=torch.int8)),
        "int8_mm: K must be at most 131071",
        "got a[1, 131072]",
    ),
    # pack
    "pack float64": (lambda: ops.pack(W.double()), "pack: weight must be int8", "got float64"),
    "pack vector": (lambda: ops.pack(W[0]), "int8_pack: weight must be a matrix [N, K]", "got weight[7]"),
    "pack K": (
        lambda: ops.pack(torch.zeros(1, MAX_K + 1, dtype=torch.int8)),
        "int8_pack: K must be at most 131071",
        "got weight[1, 131072]",
    ),
    "pack format": (
        lambda: ops.pack(W, "bitmap"),
        "pack: format must be 'auto', 'vnni16', 'u4', 'bitmap_u4', 'bitmap_s8'",
        "got 'bitmap'",
    ),
    "pack rows": (lambda: ops.pack(W, rows=-1), "pack: rows must be None or at least 0", "got -1"),
    # unpack, the op: N and K come from the caller
    "unpack int8": (unpack(PACK.char()), "int8_unpack: pack must be uint8", "got int8"),
    "unpack other N": (
        unpack(PACK, N + 1),
        "int8_unpack: pack must be a vnni16 pack",
        "got a pack of [N=5, K=7], expected [N=6, K=7]",
    ),
    "unpack short": (unpack(PACK[:10]), "int8_unpack: pack must be a vnni16 pack", "got 10 bytes"),
    # describe, and with it unpack, the function
    "describe list": (describe([1, 2]), "describe: pack must be a uint8 vector made by ops.pack()", "got list"),
    "describe int8": (describe(W), "describe: pack must be a uint8 vector", "got torch.int8 [5, 7]"),
    "describe matrix": (describe(PACK[None]), "describe: pack must be a uint8 vector", "got torch.uint8 [1, "),
    "describe short": (describe(PACK[:63]), "describe: pack must have at least its header of 64 bytes", "got 63"),
    "describe magic": (describe(edited(PACK, magic=b"GGUF")), "describe: pack must begin with b'fspk'", "got b'GGUF'"),
    "describe format": (describe(edited(PACK, format=99)), "describe: pack has format 99", "this build reads"),
    "describe version": (
        describe(edited(PACK, version=3)),
        "describe: pack has vnni16 version 3",
        "this build reads version 1",
    ),
    "describe dtype": (describe(edited(PACK, dtype=2)), "describe: pack has a damaged header", "dtype 2"),
    "describe block": (describe(edited(PACK, block=32)), "describe: pack has a damaged header", "block 32"),
    "describe n": (describe(edited(PACK, n=-1)), "describe: pack has a damaged header", "N=-1"),
    "describe k": (describe(edited(PACK, k=2**31)), "describe: pack has a damaged header", "K=2147483648"),
    "describe truncated": (
        describe(PACK[:-64].clone()),
        f"describe: pack of [N=5, K=7] must have {PACK.numel()} bytes",
        f"got {PACK.numel() - 64}",
    ),
    "unpack truncated": (lambda: ops.unpack(PACK[:100]), "pack of [N=5, K=7] must have", "got 100"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    call, wanted, got = BAD_INPUT[case]
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert wanted in message
    assert got in message
    assert "/" not in message, "no path of the build in a user's message"


def test_linear_finds_any_scale_that_is_not_finite() -> None:
    n = 37  # more than are looked at side by side, and a remainder
    pack, x = ops.pack(s8(n, K)), torch.ones(1, K)
    largest = torch.finfo(torch.float32).max
    for i in range(n):
        for bad in (NAN, -NAN, INF, -INF):
            scale = torch.full((n,), -largest)
            ops.int8_linear(x, pack, scale)
            scale[i] = bad
            with pytest.raises(ValueError, match="weight_scale must be finite"):
                ops.int8_linear(x, pack, scale)


@pytest.mark.parametrize(
    "argument", ["weight", "weight_scale", "bias", "x_scale", "x_zero_point", "residual", "y_scale", "y_zero_point"]
)
def test_linear_refuses_another_device(argument: str) -> None:
    # meta is the one other device that every machine has.
    arguments = {"weight": PACK, "weight_scale": SCALE, "bias": BIAS, "x_scale": ONE, "x_zero_point": ZERO}
    arguments |= {"residual": torch.ones(3, N), "y_scale": ONE, "y_zero_point": ZERO}
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(ValueError, match=rf"(?i)int8_linear: {argument} must be on .*cpu.*got .*meta"):
        ops.int8_linear(X, **arguments)


def test_mm_refuses_another_device() -> None:
    with pytest.raises(ValueError, match="int8_mm: b must be on "):
        ops.int8_mm(A, B.to("meta"))
    with pytest.raises(ValueError, match=r"int8_mm: .* must be on "):
        ops.int8_mm(A.to("meta"), B)


def test_refused_calls_change_nothing() -> None:
    wanted = linear()()
    for call, _, _ in BAD_INPUT.values():
        with pytest.raises(ValueError):
            call()
    assert torch.equal(linear()(), wanted)


def test_bias_gradient_of_no_outputs() -> None:
    x, scale = torch.randn(3, 8, requires_grad=True), torch.ones(0)
    codes = torch.zeros(0, 8, dtype=torch.int8)
    nibbles = ops.pack(codes, "u4", scale=torch.zeros(0, 1, dtype=torch.float16), group_size=32)
    for layer in (
        lambda bias: ops.int8_linear(x, ops.pack(codes), scale, bias),
        lambda bias: ops.weight_only_linear(x, nibbles, bias),
        lambda bias: ops.sparse_int8_linear(x, ops.pack(codes, "blocks4x4"), scale, bias),
        lambda bias: ops.sparse_linear(x, ops.pack(codes.float(), "panels128"), bias),
    ):
        bias = torch.randn(0, requires_grad=True)
        layer(bias).sum().backward()
        assert bias.grad is not None
        assert bias.grad.shape == (0,)


def test_gradients_of_batches_of_gradients() -> None:
    codes, scale, bias = torch.randint(-9, 10, (8, 32), dtype=torch.int8), torch.rand(8), torch.randn(8)
    nibbles = ops.pack(codes.clamp(-8, 7), "u4", scale=torch.rand(8, 1).half(), group_size=32)
    structure, values = ops.sparse_structure(codes.float())
    panels = ops.pack(codes.float(), "panels128")
    for layer in (
        lambda x, bias: ops.int8_linear(x, ops.pack(codes), scale, bias),
        lambda x, bias: ops.weight_only_linear(x, nibbles, bias),
        lambda x, bias: ops.sparse_int8_linear(x, ops.pack(codes, "blocks4x4"), scale, bias),
        lambda x, bias: ops.sparse_linear(x, panels, bias, "gelu"),
        lambda x, bias: ops.sparse_linear(x, structure, bias, "gelu", values=values),
    ):
        inputs = [torch.randn(2, 3, 32, requires_grad=True), bias.clone().requires_grad_()]
        y, grads = layer(*inputs), torch.randn(4, 2, 3, 8)
        batch = torch.autograd.grad(y, inputs, grads, is_grads_batched=True, retain_graph=True)
        single = [torch.autograd.grad(y, inputs, grad, retain_graph=True) for grad in grads]
        for got, wanted in zip(batch, zip(*single, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-4, atol=1e-4)
