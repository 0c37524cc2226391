"""The oracle of sparse_matmul: a dense product in float64, and what may be lost in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsparse.reference.int8_gemm import int8_linear


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """As ops.sparse_linear, but `weight` is the dense f32[N, K] and the result is float64."""
    y = x.double() @ weight.double().t()
    if bias is not None:
        y = y + bias.double()
    if activation == "relu":
        y = y.relu()
    elif activation == "gelu":
        y = 0.5 * y * torch.special.erfc(-y * 0.5**0.5)  # as in reference/int8_gemm.py
    elif activation == "silu":
        y = torch.nn.functional.silu(y)
    return y


def sparse_linear_bound(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a chain of float32 sums may be off, before the activation: a rounding per term, each of all magnitudes."""
    magnitude = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        magnitude = magnitude + bias.double().abs()
    terms = weight.ne(0).sum(1) + 1
    return magnitude * terms * 2.0**-24 * 1.01


def sparse_int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """As ops.sparse_int8_linear, but `weight` is the dense s8[N, K] and the result is float64."""
    return int8_linear(x, weight, weight_scale, bias, activation)
