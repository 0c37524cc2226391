"""The family int8_gemm: exact int8 matrix products, with quantization before and an epilogue behind.

The contract of the kernels is csrc/int8_gemm/int8_gemm.h, the float64 oracle fastsparse.reference.int8_gemm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "silu": 3}

_int8_linear = torch.ops.fastsparse.int8_linear.default
_int8_linear_train = torch.ops.fastsparse.int8_linear_train.default
_int8_mm = torch.ops.fastsparse.int8_mm.default
_int8_pack = torch.ops.fastsparse.int8_pack.default
_int8_unpack = torch.ops.fastsparse.int8_unpack.default


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
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A linear layer in W8A8: y = activation(x_q W^T * x_scale * weight_scale + bias + residual).

    A float x is quantized on the way in. Without `x_scale`, dynamically per token (row): scale = absmax / 127,
    symmetric. With it, statically: x_q = clamp(round(x / x_scale) + x_zero_point, -128, 127). Rounding is half to even,
    the integer sum exact, the epilogue computed in float32. A row that holds a NaN or an infinity gives a row of NaN
    (dynamic).

    An int8 x is taken as it is, x_q = x, and stands for (x - x_zero_point) * x_scale. With `y_scale`, y is int8 too:
    y_q = clamp(round(y / y_scale) + y_zero_point, -128, 127), what `quantize` makes of the float32 y, to the bit (NaN
    gives the zero point). So a chain of layers hands on int8: one layer's y_scale is the next layer's x_scale.

    Args:
        x: float32, bfloat16, float16 or int8 [..., K]; any strides.
        weight: a pack of s8[N, K], from `pack`.
        weight_scale: float32 [N], finite; the weight is `s8 * weight_scale[:, None]`.
        bias: float32 [N].
        activation: None, "relu", "gelu" (the exact one) or "silu".
        x_scale: a float, or float32 of one element on the CPU, > 0; needed with an int8 x, and there also float32
            [..., 1], a scale for each row, as from `quantize_per_token` (where a NaN makes the row NaN).
        x_zero_point: an int, or int32 of one element on the CPU, in [-128, 127]; needs `x_scale`.
        residual: [..., N] in the float dtype of y; any strides. Added before the activation.
        y_scale: as `x_scale` for a float x: makes y int8.
        y_zero_point: as `x_zero_point`; needs `y_scale`.
        dtype: float32, bfloat16 or float16: the float dtype of y, and of the residual also where `y_scale` makes y
            int8. None: x's, float32 for an int8 x.

    Returns:
        [..., N] in `dtype`, int8 with `y_scale`. A float y is differentiable in a float `x`, `bias` and `residual`; the
        gradient to x is that of the dequantized weight (straight through the rounding of x). Integers carry none.

    Raises:
        ValueError: names the argument, what came and what was expected. K is at most 131071 (65793 with a zero point),
            so that the sums are exact in int32.
    """
    try:
        code = ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"int8_linear: activation must be None, 'relu', 'gelu' or 'silu', got {activation!r}"
        ) from None
    y_dtype = None if dtype is None else _dtype_code(dtype)
    x_scale, y_scale = _as_scale("x_scale", x_scale), _as_scale("y_scale", y_scale)
    x_zero_point = _as_zero_point("x_zero_point", x_zero_point)
    y_zero_point = _as_zero_point("y_zero_point", y_zero_point)
    if torch.is_grad_enabled():
        if weight_scale.requires_grad:
            raise ValueError("int8_linear: weight_scale must not require a gradient: there is none for it")
        asked = x.requires_grad or (bias is not None and bias.requires_grad)
        if (asked or (residual is not None and residual.requires_grad)) and y_scale is None:
            y = _int8_linear_train(x, weight, weight_scale, bias, x_scale, x_zero_point, residual, y_dtype)
            return _ACTIVATE[code](y)
    return _int8_linear(
        x, weight, weight_scale, bias, code, x_scale, x_zero_point, residual, y_scale, y_zero_point, y_dtype
    )


_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _dtype_code(dtype: Any) -> int:
    if dtype not in _FLOATS:
        raise ValueError(f"int8_linear: dtype must be torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    return _FLOATS[dtype]


def _as_scale(name: str, value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if type(value) not in (float, int):
        raise ValueError(f"int8_linear: {name} must be a float or a float32 tensor, got {value!r}")
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _as_zero_point(name: str, value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    if type(value) is not int or not -128 <= value <= 127:
        raise ValueError(f"int8_linear: {name} must be an int in [-128, 127] or an int32 tensor, got {value!r}")
    return torch.tensor(value, dtype=torch.int32, device="cpu")


def int8_mm(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of two int8 matrices, over the whole range, -128 included.

    Args:
        a: int8 [M, K]. b: int8 [K, N]. Any shape (empty ones too) and strides; K at most 131071.

    Returns:
        int32 [M, N], as `torch._int_mm`.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    return _int8_mm(a, b)


def pack_int8(weight: Tensor) -> Tensor:
    """`ops.pack` for int8 weights."""
    return _int8_pack(weight)


def unpack_int8(pack: Tensor, header: dict[str, Any]) -> Tensor:
    return _int8_unpack(pack, header["n"], header["k"])


def describe_int8(pack: Tensor, header: dict[str, Any]) -> dict[str, Any]:
    """The size that the header promises is the one that is there."""
    n, k, size = header["n"], header["k"], header["bytes"]
    expected = _vnni16_bytes(n, k)
    if size != expected or pack.numel() != expected:
        raise ValueError(
            f"describe: pack of [N={n}, K={k}] must have {expected} bytes, got {pack.numel()} (its header says {size})"
        )
    return header


def _vnni16_bytes(n: int, k: int) -> int:
    padded_n, padded_k = -(-n // 16) * 16, -(-k // 4) * 4
    return 64 + padded_n * padded_k + -(-4 * padded_n // 64) * 64


_ACTIVATE = [
    lambda y: y,
    torch.nn.functional.relu,
    torch.nn.functional.gelu,
    torch.nn.functional.silu,
]


def _check_devices(op: str, first: Tensor, **others: Tensor | None) -> None:
    """With one argument on another device the dispatcher may choose the fake kernel, past the checks in C++."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like the first argument, got {tensor.device}")


@torch.library.register_fake("fastsparse::int8_linear")
def _linear_shape(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: int = 0,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    residual: Tensor | None = None,
    y_scale: Tensor | None = None,
    y_zero_point: Tensor | None = None,
    dtype: int | None = None,
) -> Tensor:
    _check_devices("int8_linear", x, weight=weight, weight_scale=weight_scale, bias=bias, residual=residual)
    scalars = {"x_scale": x_scale, "x_zero_point": x_zero_point, "y_scale": y_scale, "y_zero_point": y_zero_point}
    for name, scalar in scalars.items():
        if scalar is None or scalar.device.type == "cpu":
            continue
        if name == "x_scale" and x.dtype == torch.int8 and scalar.device == x.device and scalar.dim() == x.dim():
            continue  # one for each row
        raise ValueError(f"int8_linear: {name} must be on the CPU, got a tensor on {scalar.device}")
    if y_scale is not None:
        y_dtype = torch.int8
    elif dtype is not None:
        y_dtype = list(_FLOATS)[dtype]
    else:
        y_dtype = torch.float32 if x.dtype == torch.int8 else x.dtype
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=y_dtype)


@torch.library.register_fake("fastsparse::int8_linear_train")
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: int | None = None,
) -> Tensor:
    return _linear_shape(x, weight, weight_scale, bias, 0, x_scale, x_zero_point, residual, None, None, dtype)


@torch.library.register_fake("fastsparse::int8_mm")
def _(a: Tensor, b: Tensor) -> Tensor:
    _check_devices("int8_mm", a, b=b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32)


@torch.library.register_fake("fastsparse::int8_pack")
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(_vnni16_bytes(*weight.shape), dtype=torch.uint8)


@torch.library.register_fake("fastsparse::int8_unpack")
def _(pack: Tensor, n: int, k: int) -> Tensor:
    return pack.new_empty((n, k), dtype=torch.int8)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The dispatcher drops trailing arguments that have their default, here and in needs_input_grad.
    x, weight, weight_scale, bias, _, _, residual, *_ = *inputs, *(None,) * 4
    ctx.save_for_backward(weight, weight_scale)
    ctx.k = x.shape[-1]
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_residual = residual is not None


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = grad_residual = None
    if ctx.needs_input_grad[0]:
        # In float32, autocast or not: gradient times scale underflows in half precision. The scales go to the rows of
        # the gradient, M * N products instead of N * K.
        with torch.autocast(grad.device.type, enabled=False):
            values = _int8_unpack(weight, weight_scale.shape[0], ctx.k).float()
            grad_x = ((grad.float() * weight_scale) @ values).to(ctx.x_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
    if ctx.has_residual and ctx.needs_input_grad[6]:
        grad_residual = grad
    return grad_x, None, None, grad_bias, None, None, grad_residual, None


torch.library.register_autograd("fastsparse::int8_linear_train", _linear_backward, setup_context=_save_for_backward)
