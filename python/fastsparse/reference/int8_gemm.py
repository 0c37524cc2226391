"""The oracle of int8_gemm: integers in int64, the epilogue in float64. Slow, plain, and right."""

from __future__ import annotations

import math

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


def quantize_groups_of_rows(x: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Per token and group of k, as `quantize_rows`: (codes s8[M, groups, group_size], scale f32[M, groups, 1])."""
    m, k = x.shape
    groups = -(-k // group_size)
    padded = torch.nn.functional.pad(x.float(), (0, groups * group_size - k))
    return quantize_rows(padded.reshape(m, groups, group_size))


def weight_only_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    zero_point: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """As ops.weight_only_linear, for a weight that is not packed; the result is float64.

    8 bits: codes s8[N, K], scale f32[N], group_size None. 4 bits: codes s8[N, K] in [-8, 7] or, with zero_point
    u8[N, groups], u8[N, K]; scale f16[N, groups]. The integer sums and the float32 product of the two scales are those
    of the contract; what follows is float64.
    """
    size = 128 if group_size is None else group_size
    n, k = codes.shape
    rows = x.reshape(math.prod(x.shape[:-1]), k)
    x_codes, x_scale = quantize_groups_of_rows(rows, size)
    groups = x_codes.shape[1]
    if group_size is None:
        scale = scale[:, None].expand(n, groups)
    values = codes.double()
    points = torch.zeros(n, groups) if zero_point is None else zero_point
    values = (
        torch.nn.functional.pad(values, (0, groups * size - k)).reshape(n, groups, size) - points.double()[..., None]
    )
    # What was padded to meets x codes of zero.
    sums = torch.einsum("mgk,ngk->mng", x_codes.double(), values)
    y = (sums * (x_scale.squeeze(-1)[:, None, :] * scale.float()[None]).double()).sum(-1)
    y = y.reshape(*x.shape[:-1], n)
    if bias is not None:
        y = y + bias.double()
    return _activate(y, activation)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return y.relu()
    if activation == "gelu":
        # torch's own float64 gelu is 0.5 y (1 + erf), which has lost more than a float32 can tell near y = -6
        return 0.5 * y * torch.special.erfc(-y * 0.5**0.5)
    if activation == "silu":
        return torch.nn.functional.silu(y)
    return y
