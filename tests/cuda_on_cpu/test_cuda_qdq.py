"""The CUDA kernels of qdq on the CPU stand-in: equal to the oracle to the bit, at every shape, order and alignment."""

from __future__ import annotations

import pytest
import torch
from standin import SEEDS, StandIn

from fastsparse import reference
from ops.test_qdq import DTYPES, LAYOUTS, parameters, values
from support import same_bits, strided

# Round a group of 8, a warp's pass of 256, and where a block takes over from a warp (2048).
LENGTHS = [0, 1, 7, 8, 9, 31, 64, 255, 256, 257, 1027, 2048, 2049, 2056, 4100]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token(kernels: StandIn, dtype: torch.dtype, seed: int) -> None:
    for k in LENGTHS:
        x = torch.randn(9, k).to(dtype)
        if k:
            x[1] = 0
            x[2, -1], x[3, 0], x[4, k // 2] = float("nan"), float("inf"), -float("inf")
            x[5] = (x[5].double() * 1e-39).to(dtype)
            x[6, 0] = torch.finfo(dtype).max
        wanted = reference.quantize_per_token(x)
        for offset, rows in ((0, x), (1, x), (0, strided(x))):
            with kernels.launches(seed, offset):
                codes, scale = kernels.quantize_per_token(rows)
            assert same_bits(codes, wanted[0]), (k, offset)
            assert same_bits(scale, wanted[1]), (k, offset)


def test_per_token_of_more_rows_than_one_share(kernels: StandIn) -> None:
    x = torch.randn(70, 40)
    with kernels.launches():
        codes, scale = kernels.quantize_per_token(x)
    wanted = reference.quantize_per_token(x)
    assert same_bits(codes, wanted[0])
    assert same_bits(scale, wanted[1])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise(kernels: StandIn, dtype: torch.dtype, layout: str, seed: int) -> None:
    shape, axis, scale_shape = LAYOUTS[layout]
    for affine, offset in ((False, 0), (True, 0), (True, 3)):
        x = values(*shape, dtype=dtype)
        scale, zero = parameters(*scale_shape, affine=affine)
        wanted = reference.quantize(x, scale, zero, axis)
        with kernels.launches(seed, offset):
            codes = kernels.quantize(x, scale, zero, axis)
            y = kernels.dequantize(codes, scale, zero, axis, dtype)
            fake, _ = kernels.fake_quantize(x, scale, zero, axis=axis, with_mask=False)
        assert same_bits(codes, wanted)
        assert same_bits(y, reference.dequantize(wanted, scale, zero, axis, dtype))
        assert same_bits(fake, y)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [2, 8])
def test_gradient_is_straight_through(kernels: StandIn, bits: int, layout: str, seed: int) -> None:
    shape, axis, scale_shape = LAYOUTS[layout]
    for dtype in DTYPES:
        x = values(*shape, dtype=dtype)
        scale, zero = parameters(*scale_shape, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1)
        grad = torch.randn(shape).to(dtype)
        with kernels.launches(seed):
            y, mask = kernels.fake_quantize(x, scale, zero, bits, axis)
            assert mask is not None
            got = kernels.fake_quantize_backward(grad, mask)
        wanted, passes = reference.fake_quantize(x, scale, zero, bits, axis)
        assert same_bits(y, wanted)
        assert same_bits(got, torch.where(passes, grad, torch.zeros_like(grad)))


def test_the_mask_is_that_of_the_cpu(kernels: StandIn) -> None:
    for shape, axis, scale_shape in LAYOUTS.values():
        x = values(*shape)
        scale, zero = parameters(*scale_shape)
        with kernels.launches():
            _, mask = kernels.fake_quantize(x, scale, zero, axis=axis)
        assert mask is not None
        assert torch.equal(mask, torch.ops.fastsparse.fake_quantize_train(x, scale, zero, 8, axis)[1])
