"""The oracle of int8_gemm: integers in int64, the epilogue in float64. Slow, plain, and right."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """s8[M, K] x s8[K, N] -> s32[M, N], summed in int64 (exact, and equal in int32 while K <= 131071)."""
    return _exact_product(a, b).to(torch.int32)


def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    # float64 holds every sum exactly below 2^53 and multiplies far faster than int64.
    return (a.double() @ b.double()).to(torch.int64)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per token, symmetric: (codes s8[..., K], scale f32[..., 1]), in the float32 arithmetic of the contract.

    scale = max(absmax / 127, FLT_MIN), 1 for a row of zeros, NaN (and codes 0) for a row with a NaN or an infinity.
    """
    x = x.float()
    if x.shape[-1] == 0:
        return x.to(torch.int8), x.new_ones((*x.shape[:-1], 1))
    absmax = x.abs().amax(-1, keepdim=True)
    broken = ~torch.isfinite(absmax)
    scale = (absmax / 127.0).clamp_min(_TINY)
    scale = torch.where(absmax == 0, torch.ones_like(scale), scale)
    codes = torch.where(broken, torch.zeros_like(x), x * (1.0 / scale)).round()
    return codes.to(torch.int8), torch.where(broken, torch.full_like(scale, float("nan")), scale)


def quantize_static(x: Tensor, scale: Tensor, zero_point: Tensor | int | None) -> Tensor:
    """clamp(round(x * (1 / scale)) + zero_point, -128, 127) as s8; NaN gives the zero point, infinities saturate."""
    zero = 0 if zero_point is None else int(zero_point)
    t = (x.float() * (1.0 / scale.float())).nan_to_num(0.0, posinf=256.0, neginf=-256.0).clamp(-256, 256)
    return (t.round() + zero).clamp(-128, 127).to(torch.int8)


def int8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    x_scale: Tensor | float | None = None,
    x_zero_point: Tensor | int | None = None,
    residual: Tensor | None = None,
    y_scale: Tensor | float | None = None,
    y_zero_point: Tensor | int | None = None,
) -> Tensor:
    """As ops.int8_linear, but `weight` is s8[N, K] and the result is float64, or int8 with `y_scale`."""
    zero = 0 if x_zero_point is None else int(x_zero_point)
    if x_scale is None:
        codes, scale = quantize_rows(x)
    else:
        scale = torch.as_tensor(x_scale, dtype=torch.float32)
        codes = x if x.dtype == torch.int8 else quantize_static(x, scale, zero)
        scale = scale.reshape(1) if scale.numel() == 1 else scale
    sums = _exact_product(codes, weight.t()) - zero * weight.sum(1, dtype=torch.int64)
    y = sums.double() * scale.double() * weight_scale.double()
    if bias is not None:
        y = y + bias.double()
    if residual is not None:
        y = y + residual.double()
    if activation == "relu":
        y = y.relu()
    elif activation == "gelu":
        # torch's own float64 gelu is 0.5 y (1 + erf), which has lost more than a float32 can tell near y = -6
        y = 0.5 * y * torch.special.erfc(-y * 0.5**0.5)
    elif activation == "silu":
        y = torch.nn.functional.silu(y)
    if y_scale is None:
        return y
    return quantize_static(y, torch.as_tensor(y_scale, dtype=torch.float32), y_zero_point)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per output channel, symmetric: float[N, K] -> (s8[N, K], scale f32[N]), the same arithmetic as for tokens."""
    codes, scale = quantize_rows(weight.detach())
    return codes, scale.squeeze(-1)
