"""The oracle of qdq: codes by the float32 arithmetic whose roundings the contract fixes, the rest in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsparse.reference.int8_gemm import quantize_rows

quantize_per_token = quantize_rows


def _aligned(parameter: Tensor | None, x: Tensor, axis: int | None) -> Tensor | None:
    """Shaped so that it broadcasts against x."""
    if parameter is None:
        return None
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        return parameter.reshape(shape)
    return parameter.reshape(()) if parameter.numel() == 1 else parameter


def _unclamped(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None) -> Tensor:
    """round(x * (1 / scale)) + zero_point as float64, NaN as the zero point; beyond +-256 steps it is clamped."""
    aligned = _aligned(scale, x, axis)
    assert aligned is not None
    t = (x.float() * (1.0 / aligned.float())).nan_to_num(0.0, posinf=256.0, neginf=-256.0).clamp(-256, 256).double()
    zero = _aligned(zero_point, x, axis)
    return t.round() + (0 if zero is None else zero.double())


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    return _unclamped(x, scale, zero_point, axis).clamp(-128, 127).to(torch.int8)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The product is exact in float64 (9 bits times 24), so rounding it to float32 is what a float32 product does."""
    aligned, zero = _aligned(scale, codes, axis), _aligned(zero_point, codes, axis)
    assert aligned is not None
    return ((codes.double() - (0 if zero is None else zero.double())) * aligned.double()).float().to(dtype)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    """(y, where the gradient passes)."""
    q = _unclamped(x, scale, zero_point, axis)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    y = dequantize(q.clamp(low, high), scale, zero_point, axis, x.dtype)
    return y, (low <= q) & (q <= high) & ~x.isnan()
