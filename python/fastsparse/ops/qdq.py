"""The family qdq: float tensors to int8 codes and back, and the rounding alone, with a gradient, for training.

The contract of the kernels is csrc/qdq/qdq.h, the oracle fastsparse.reference.qdq.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_quantize = torch.ops.fastsparse.quantize.default
_quantize_per_token = torch.ops.fastsparse.quantize_per_token.default
_quantize_per_token_out = torch.ops.fastsparse.quantize_per_token_out.default
_dequantize = torch.ops.fastsparse.dequantize.default
_fake_quantize = torch.ops.fastsparse.fake_quantize.default
_fake_quantize_train = torch.ops.fastsparse.fake_quantize_train.default
_fake_quantize_backward = torch.ops.fastsparse.fake_quantize_backward.default

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Static quantization: clamp(round(x / scale) + zero_point, -128, 127), in float32, half to even.

    NaN gives the zero point, infinities saturate. (x / scale is computed as x * (1 / scale), as everywhere here.)

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        scale: float32, finite, at least 1.2e-38: one element for all of x; or [C], one per index of `axis`; or, without
            `axis`, x's shape with 1 at the end: one per row, as `quantize_per_token` returns them.
        zero_point: int32 in [-128, 127], of scale's shape; None: 0 (symmetric).
        dtype: torch.int8, the only one so far.
        axis: the dimension of x that `scale` runs along.
        group_size: None, the only one so far.

    Returns:
        int8, contiguous, of x's shape. Integers carry no gradient; `fake_quantize` does.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if dtype != torch.int8:
        raise ValueError(f"quantize: dtype must be torch.int8, the only one that has kernels so far, got {dtype}")
    _no_groups("quantize", group_size)
    return _quantize(x, scale, zero_point, axis)


def quantize_per_token(x: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Dynamic quantization, symmetric, with a scale for each row: what `int8_linear` does to its x, to the bit.

    scale = absmax / 127 (at least 1.2e-38, the smallest normal float32), codes = round(x / scale), half to even. A row
    of zeros has scale 1. A row that holds a NaN or an infinity has scale NaN and codes 0, so that what is computed from
    it is NaN.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        out: contiguous tensors (int8 [..., K], float32 [..., 1]) to write to and return; they must not overlap x.

    Returns:
        (codes int8 [..., K], scale float32 [..., 1]), contiguous. Rows of K = 0 elements have scale 1.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    if out is None:
        return _quantize_per_token(x)
    _quantize_per_token_out(x, *out)
    return out


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    axis: int | None = None,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """(codes - zero_point) * scale, rounded once in float32 and once to `dtype`.

    Args:
        codes: int8, any shape and strides.
        scale, zero_point, axis: as for `quantize`; the scale may be any float32 (that of a broken row is NaN).
        group_size: None, the only one so far.
        dtype: float32, bfloat16 or float16.

    Returns:
        `dtype`, contiguous, of codes' shape.

    Raises:
        ValueError: names the argument, what was expected and what came; also if `scale` requires a gradient in grad
            mode, as there is none for it.
    """
    _no_groups("dequantize", group_size)
    _no_scale_gradient("dequantize", scale)
    if dtype not in _FLOATS:
        raise ValueError(f"dequantize: dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    return _dequantize(codes, scale, zero_point, axis, _FLOATS[dtype])


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    bits: int = 8,
    axis: int | None = None,
) -> Tensor:
    """dequantize(quantize(x)) in one pass: x as it looks after quantization to `bits`, for training with it.

    The codes go from -2^(bits-1) to 2^(bits-1) - 1. The gradient is straight through: that of the result where the
    rounded x is one of the codes, 0 where it had to be clamped, and 0 where x is NaN (which gives 0).

    Args:
        x: float32, bfloat16 or float16, any shape and strides.
        scale, axis: as for `quantize`.
        zero_point: int32, of scale's shape, one of the codes; None: 0.
        bits: 2 to 8.

    Returns:
        x's shape and dtype, contiguous. Differentiable in `x`.

    Raises:
        ValueError: names the argument, what was expected and what came; also if `scale` requires a gradient in grad
            mode, as there is none for it.
    """
    _no_scale_gradient("fake_quantize", scale)
    if torch.is_grad_enabled() and x.requires_grad:
        return _fake_quantize_train(x, scale, zero_point, bits, axis)[0]
    return _fake_quantize(x, scale, zero_point, bits, axis)


def _no_groups(op: str, group_size: int | None) -> None:
    if group_size is not None:
        raise ValueError(f"{op}: group_size must be None, there are no kernels for groups yet, got {group_size}")


def _no_scale_gradient(op: str, scale: Tensor) -> None:
    if scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: scale must not require a gradient: there is none for it")


def _check_devices(op: str, first: Tensor, **others: Tensor | None) -> None:
    """With one argument on another device the dispatcher may choose the fake kernel, past the checks in C++."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like the first argument, got {tensor.device}")


def _mask_shape(x: Tensor, scale: Tensor, axis: int | None) -> tuple[int, int]:
    """rows_of() and mask_bytes() of csrc/qdq/qdq.h."""
    if scale.numel() == 1:
        return 1, (x.numel() + 7) // 8
    if axis is None:
        outer, channels, inner = 1, scale.numel(), x.shape[-1]
    else:
        at = axis % x.dim()
        outer, channels = x.shape[:at].numel(), x.shape[at]
        inner = x.shape[at + 1 :].numel()
    if inner >= 64:
        return outer * channels, (inner + 7) // 8
    return outer, (channels * inner + 7) // 8


@torch.library.register_fake("fastsparse::quantize")
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None) -> Tensor:
    _check_devices("quantize", x, scale=scale, zero_point=zero_point)
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.register_fake("fastsparse::quantize_per_token")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("fastsparse::quantize_per_token_out")
def _(x: Tensor, codes: Tensor, scale: Tensor) -> None:
    _check_devices("quantize_per_token", x, codes=codes, scale=scale)


@torch.library.register_fake("fastsparse::dequantize")
def _(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None = None, axis: int | None = None, dtype: int = 0
) -> Tensor:
    _check_devices("dequantize", codes, scale=scale, zero_point=zero_point)
    return codes.new_empty(codes.shape, dtype=list(_FLOATS)[dtype])


@torch.library.register_fake("fastsparse::fake_quantize")
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8, axis: int | None = None) -> Tensor:
    _check_devices("fake_quantize", x, scale=scale, zero_point=zero_point)
    return x.new_empty(x.shape)


@torch.library.register_fake("fastsparse::fake_quantize_train")
def _(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, bits: int = 8, axis: int | None = None
) -> tuple[Tensor, Tensor]:
    _check_devices("fake_quantize", x, scale=scale, zero_point=zero_point)
    return x.new_empty(x.shape), x.new_empty(_mask_shape(x, scale, axis), dtype=torch.uint8)


@torch.library.register_fake("fastsparse::fake_quantize_backward")
def _(grad: Tensor, mask: Tensor) -> Tensor:
    _check_devices("fake_quantize_backward", grad, mask=mask)
    return grad.new_empty(grad.shape)


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _straight_through(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _fake_quantize_backward(grad, ctx.saved_tensors[0]), None, None, None, None


torch.library.register_autograd("fastsparse::fake_quantize_train", _straight_through, setup_context=_save_mask)


# The backward is linear in the gradient, with the same mask: its own derivative is itself.
def _save_same_mask(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _straight_through_again(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _fake_quantize_backward(grad, ctx.saved_tensors[0]), None


torch.library.register_autograd(
    "fastsparse::fake_quantize_backward", _straight_through_again, setup_context=_save_same_mask
)
