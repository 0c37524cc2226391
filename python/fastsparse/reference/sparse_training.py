"""The oracle of sparse training: dense products in float64 under a mask, and what may be lost in float32."""

from __future__ import annotations

from torch import Tensor


def spmm(weight: Tensor, dense: Tensor) -> Tensor:
    """As ops.spmm, but `weight` is the dense f32[N, K] and the result is float64."""
    return weight.double() @ dense.double()


def sddmm(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """As ops.sddmm, but the places are those where `mask` [N, K] is True, and the result is float64."""
    return (a.double() @ b.double())[mask]


def sddmm_bound(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What the order of csrc/sparse_matmul/training.h may be off: a rounding per term, each of all magnitudes."""
    magnitude = (a.double().abs() @ b.double().abs())[mask]
    return magnitude * (a.shape[1] + 5) * 2.0**-24 * 1.01
