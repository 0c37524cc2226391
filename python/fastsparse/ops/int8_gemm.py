"""The family int8_gemm: exact int8 matrix products, with quantization before and an epilogue behind.

The contract of the kernels is csrc/int8_gemm/int8_gemm.h, the float64 oracle fastsparse.reference.int8_gemm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.compiler import is_compiling, is_dynamo_compiling

from fastsparse.ops._call import as_matrix, direct, eager, no_tensor
from fastsparse.ops._pack import HEADER, read_header

ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "gelu": 2, "silu": 3}

_int8_linear = torch.ops.fastsparse.int8_linear.default
_int8_linear_plain_now = eager(torch.ops.fastsparse.int8_linear_plain.default)
_int8_linear_direct = direct("int8_linear")
_int8_linear_train = torch.ops.fastsparse.int8_linear_train.default
_int8_mm = torch.ops.fastsparse.int8_mm.default
_int8_mm_direct = direct("int8_mm")
_int8_pack = torch.ops.fastsparse.int8_pack.default
_int8_unpack = torch.ops.fastsparse.int8_unpack.default
_weight_only_linear = torch.ops.fastsparse.weight_only_linear.default
_weight_only_linear_now = eager(_weight_only_linear)
_weight_only_linear_direct = direct("weight_only_linear")
_weight_only_linear_train = torch.ops.fastsparse.weight_only_linear_train.default
_u4_pack = torch.ops.fastsparse.u4_pack.default
_u4_unpack = torch.ops.fastsparse.u4_unpack.default
_u4_validate = torch.ops.fastsparse.u4_validate.default
_u4_dequantize = torch.ops.fastsparse.u4_dequantize.default
_bitmap_u4_pack = torch.ops.fastsparse.bitmap_u4_pack.default

FORMATS_4BIT = ("u4", "bitmap_u4")
GROUP_SIZES = (32, 64, 128)  # of 4-bit weights: u4::is_group in csrc/int8_gemm/formats/u4.h


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
    plain = x_scale is None and x_zero_point is None and residual is None and y_scale is None and y_zero_point is None
    if plain and dtype is None and not is_dynamo_compiling():
        y = _int8_linear_direct(x, weight, weight_scale, bias, code)
        if y is not None:
            return y
    try:
        wants_grad = is_grad_enabled() and (
            x.requires_grad
            or weight_scale.requires_grad
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        )
    except AttributeError:
        raise no_tensor("int8_linear", x=x, weight_scale=weight_scale, bias=bias, residual=residual) from None
    if plain and dtype is None and not wants_grad:
        if is_dynamo_compiling():
            return _int8_linear(x, weight, weight_scale, bias, code)
        if code == 0:  # an argument less costs less, also where it is None
            if bias is None:
                return _int8_linear_plain_now(x, weight, weight_scale)
            return _int8_linear_plain_now(x, weight, weight_scale, bias)
        return _int8_linear_plain_now(x, weight, weight_scale, bias, code)
    y_dtype = None if dtype is None else _dtype_code(dtype)
    x_scale, y_scale = _as_scale("x_scale", x_scale), _as_scale("y_scale", y_scale)
    x_zero_point = _as_zero_point("x_zero_point", x_zero_point)
    y_zero_point = _as_zero_point("y_zero_point", y_zero_point)
    if is_grad_enabled():
        for name, scale in (("weight_scale", weight_scale), ("x_scale", x_scale), ("y_scale", y_scale)):
            if scale is not None and scale.requires_grad:
                raise ValueError(f"int8_linear: {name} must not require a gradient: there is none for it")
    if wants_grad and y_scale is None:
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
    if not is_dynamo_compiling():
        c = _int8_mm_direct(a, b)
        if c is not None:
            return c
    return _int8_mm(a, b)


def weight_only_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    weight_scale: Tensor | None = None,
    out_features: int | None = None,
) -> Tensor:
    """A linear layer whose weight has 4 bits (in groups) or 8 bits (per channel), for few rows of x.

    y = activation(sum_g(isum_g * x_scale_g * w_scale_g) + bias), g over groups of consecutive k: the weight's own (32,
    64, 128) for 4 bits, of 128 for 8 bits. In each group x is rounded to int8 per row by the rules of `int8_linear`
    (scale = absmax / 127; a row with a NaN or an infinity gives a row of NaN) and isum is the exact integer sum; the
    groups are added in float32, in order. So the bits of y are the same on every level, for every number of rows and
    threads, and the error that x brings lies far below that of the weight. Right for any number of rows, made for 1 to
    16: for more, `int8_linear` is faster.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        weight: a u4 pack of [N, K], which carries its scales and zero points; a bitmap_u4 pack, the same without its
            zeros (the same bits of y; faster from about 50% zeros on, for up to 4 rows; on the CPU alone); or a vnni16
            pack of s8[N, K].
        bias: float32 [N].
        activation: None, "relu", "gelu" (the exact one) or "silu".
        weight_scale: float32 [N], finite, for a vnni16 pack; None for a 4-bit pack.
        out_features: N. Needed under torch.compile and on CUDA where a 4-bit pack comes without a bias (its bytes are
            not read there).

    Returns:
        [..., N] in x's dtype. Differentiable in `x` and `bias`; the gradient to x is that of the dequantized weight
        (straight through the rounding of x).

    Raises:
        ValueError: names the argument, what came and what was expected.
        RuntimeError: x is on CUDA, and this build has no CUDA kernels.

    The 4-bit scheme follows Frantar et al., 2022 ("GPTQ", group-wise scales) and llama.cpp's Q4_0 / Q4_1 (integer
    products with activations in blocks of int8); the code is our own.
    """
    try:
        code = ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"weight_only_linear: activation must be None, 'relu', 'gelu' or 'silu', got {activation!r}"
        ) from None
    n = -1 if out_features is None else out_features
    if not is_dynamo_compiling():
        y = _weight_only_linear_direct(x, weight, weight_scale, bias, n, code)
        if y is not None:
            return y
    if torch.is_grad_enabled():
        try:
            wants_grad = x.requires_grad or (bias is not None and bias.requires_grad)
            scale_wants_grad = weight_scale is not None and weight_scale.requires_grad
        except AttributeError:
            raise no_tensor("weight_only_linear", x=x, weight_scale=weight_scale, bias=bias) from None
        if scale_wants_grad:
            raise ValueError("weight_only_linear: weight_scale must not require a gradient: there is none for it")
        if wants_grad:
            return _ACTIVATE[code](_weight_only_linear_train(x, weight, weight_scale, n, bias))
    call = _weight_only_linear if is_compiling() else _weight_only_linear_now
    return call(x, weight, weight_scale, n, bias, code)


def unpack_scales(pack: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a u4 or bitmap_u4 pack holds beside its codes.

    Returns:
        (scale float16 [N, ceil(K / group_size)], zero_point uint8 of the same shape, or None if it is symmetric).

    Raises:
        ValueError: not such a pack.
    """
    _, scale, zero_point = _unpack_u4(pack, _u4_header("unpack_scales", pack))
    return scale, zero_point


def quantize_groups(weight: Tensor, group_size: int, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight in 4 bits, one scale per row and group of `group_size` consecutive k; zeros stay exact zeros.

    Symmetric: scale = (the value of the largest magnitude) / -8, so that this value is met exactly by the code -8.
    Affine: scale = (max - min) / 15 over the values and zero, zero_point = round(-min / scale). The scale is rounded to
    float16 first; codes are those nearest to weight / scale.

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite.
        group_size: 32, 64 or 128. The last group of a row may be shorter.
        symmetric: False for zero points.

    Returns:
        What `pack(codes, "u4", scale=..., zero_point=..., group_size=...)` takes: codes int8 in [-8, 7] (uint8 in
        [0, 15] if affine) [N, K], scale float16 [N, groups], zero_point uint8 [N, groups] or None.

    Raises:
        ValueError: another group size, a NaN or an infinity in the weight, or a value whose scale float16 can't hold.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"quantize_groups: group_size must be 32, 64 or 128, got {group_size!r}")
    if weight.dim() != 2:
        raise ValueError(f"quantize_groups: weight must be a matrix [N, K], got weight{list(weight.shape)}")
    weight = weight.detach().float()
    n, k = weight.shape
    groups = -(-k // group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - k)).reshape(n, groups, group_size)
    if not bool(torch.isfinite(padded).all()):
        raise ValueError("quantize_groups: weight must be finite, got a NaN or an infinity in it")
    if groups == 0 or n == 0:
        lowest = highest = padded.new_zeros(n, groups)
    else:
        lowest, highest = padded.amin(-1).clamp_max(0), padded.amax(-1).clamp_min(0)
    extreme = torch.where(highest > -lowest, highest, lowest)
    scale = (extreme / -8.0 if symmetric else (highest - lowest) / 15.0).half()
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("quantize_groups: weight must have scales that float16 holds, got one beyond 65504")
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale.float())
    if symmetric:
        codes = (padded * inverse[..., None]).round_().clamp_(-8, 7)
        return codes.to(torch.int8).flatten(1)[:, :k].contiguous(), scale, None
    zero_point = (-lowest * inverse).round_().clamp_(0, 15)
    codes = ((padded * inverse[..., None]).round_() + zero_point[..., None]).clamp_(0, 15)
    return codes.to(torch.uint8).flatten(1)[:, :k].contiguous(), scale, zero_point.to(torch.uint8)


def pack_u4(
    weight: Tensor, scale: Tensor | None, zero_point: Tensor | None, group_size: int | None, format: str = "u4"
) -> Tensor:
    """`ops.pack` for 4-bit codes."""
    if scale is None or group_size is None:
        missing = "scale" if scale is None else "group_size"
        raise ValueError(f"pack: {missing} must be given for the format {format!r}, got None")
    sparse = format == "bitmap_u4"
    if sparse and zero_point is not None:
        raise ValueError("pack: zero_point must be None for the format 'bitmap_u4', whose zeros are codes of 0")
    try:
        dense = _u4_pack(weight, scale, zero_point, group_size)
        return _bitmap_u4_pack(dense) if sparse else dense
    except ValueError as error:
        raise ValueError(f"pack: {str(error).removeprefix('u4_pack: ')}") from None


def _u4_header(op: str, pack: Tensor) -> dict[str, Any]:
    try:
        header = read_header(pack)
    except ValueError as error:
        raise ValueError(f"{op}: {str(error).removeprefix('describe: ')}") from None
    if header["format"] not in FORMATS_4BIT:
        raise ValueError(f"{op}: pack must be of the format u4 or bitmap_u4, got {header['format']}")
    return header


def _unpack_u4(pack: Tensor, header: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    affine = header["dtype"] == "uint4"
    codes, scale, zero_point = _u4_unpack(pack, header["n"], header["k"], header["block"], affine)
    return codes, scale, zero_point if affine else None


def unpack_u4(pack: Tensor, header: dict[str, Any]) -> Tensor:
    return _unpack_u4(pack, header)[0]


def describe_u4(pack: Tensor, header: dict[str, Any]) -> dict[str, Any]:
    """Validates every byte: sizes, finite scales, padding, the count of non-zeros."""
    try:
        _u4_validate(pack)
    except ValueError as error:
        raise ValueError(f"describe: {str(error).removeprefix('u4_validate: ')}") from None
    return header


def u4_bytes(n: int, k: int, group_size: int, affine: bool) -> int:
    """The length of a u4 pack (csrc/int8_gemm/formats/u4.h)."""
    panels, groups = -(-n // 16), -(-k // group_size)
    size = 64 + panels * groups * group_size * 8 + -(-panels * groups * 32 // 64) * 64
    return size + (-(-panels * groups * 8 // 64) * 64 if affine else 0)


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


@torch.library.register_fake("fastsparse::int8_linear_plain")
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, activation: int = 0) -> Tensor:
    return _linear_shape(x, weight, weight_scale, bias)


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


def _by_views(pack: Tensor, n: int, k: int) -> Tensor:
    """The int8 weight of a vnni16 pack (csrc/int8_gemm/formats/vnni16.h) by torch's own means, wherever it lies."""
    panels, cells = -(-n // 16), -(-k // 4)
    codes = pack[64 : 64 + panels * cells * 64].view(torch.int8).view(panels, cells, 16, 4)
    return codes.transpose(1, 2).reshape(panels * 16, cells * 4)[:n, :k]


def _dense(pack: Tensor, n: int, k: int) -> Tensor:
    """The float32 weight of a vnni16 pack without its scales; on CUDA without waiting for the device."""
    return (_by_views if pack.is_cuda else _int8_unpack)(pack, n, k).float()


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = grad_residual = None
    if ctx.needs_input_grad[0]:
        # In float32, autocast or not: gradient times scale underflows in half precision. The scales go to the rows of
        # the gradient, M * N products instead of N * K.
        with torch.autocast(grad.device.type, enabled=False):
            values = _dense(weight, weight_scale.shape[0], ctx.k)
            grad_x = ((grad.float() * weight_scale) @ values).to(ctx.x_dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = as_matrix(grad).sum(0, dtype=ctx.bias_dtype)
    if ctx.has_residual and ctx.needs_input_grad[6]:
        grad_residual = grad
    return grad_x, None, None, grad_bias, None, None, grad_residual, None


torch.library.register_autograd("fastsparse::int8_linear_train", _linear_backward, setup_context=_save_for_backward)


def _weight_only_shape(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, n: int, bias: Tensor | None = None
) -> Tensor:
    _check_devices("weight_only_linear", x, weight=weight, weight_scale=weight_scale, bias=bias)
    if n < 0:
        known = weight_scale if weight_scale is not None else bias
        if known is None:
            raise ValueError(
                "weight_only_linear: out_features must be given where bias is None and the pack can't be read "
                "(compiled)"
            )
        n = known.shape[0]
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("fastsparse::weight_only_linear")
def _(
    x: Tensor, weight: Tensor, weight_scale: Tensor | None, n: int, bias: Tensor | None = None, activation: int = 0
) -> Tensor:
    return _weight_only_shape(x, weight, weight_scale, n, bias)


torch.library.register_fake("fastsparse::weight_only_linear_train")(_weight_only_shape)


@torch.library.register_fake("fastsparse::u4_pack")
def _(weight: Tensor, scale: Tensor, zero_point: Tensor | None, group_size: int) -> Tensor:
    n, k = weight.shape
    return weight.new_empty(u4_bytes(n, k, group_size, zero_point is not None), dtype=torch.uint8)


@torch.library.register_fake("fastsparse::u4_unpack")
def _(pack: Tensor, n: int, k: int, group_size: int, affine: bool) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-k // group_size)
    codes = pack.new_empty((n, k), dtype=torch.uint8 if affine else torch.int8)
    return codes, pack.new_empty((n, groups), dtype=torch.float16), pack.new_empty((n if affine else 0, groups))


@torch.library.register_fake("fastsparse::u4_dequantize")
def _(pack: Tensor, n: int, k: int) -> Tensor:
    return pack.new_empty((n, k), dtype=torch.float32)


@torch.library.register_fake("fastsparse::bitmap_u4_pack")
def _(pack: Tensor) -> Tensor:
    return pack.new_empty(torch.library.get_ctx().new_dynamic_size(min=HEADER.size))


def _save_for_weight_only(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale, _n, bias = (*inputs, None)[:5]
    ctx.save_for_backward(weight, weight_scale)
    ctx.n, ctx.k = output.shape[-1], x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _weight_only_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        with torch.autocast(grad.device.type, enabled=False):  # as for int8_linear
            if weight_scale is None:
                # By way of the CPU, where these packs are taken apart.
                values = _u4_dequantize(weight.cpu(), ctx.n, ctx.k).to(grad.device)
                grad_x = (grad.float() @ values).to(grad.dtype)
            else:
                values = _dense(weight, ctx.n, ctx.k)
                grad_x = ((grad.float() * weight_scale) @ values).to(grad.dtype)
    # The dispatcher drops trailing arguments that have their default, and needs_input_grad with them.
    if ctx.bias_dtype is not None and ctx.needs_input_grad[4]:
        grad_bias = as_matrix(grad).sum(0, dtype=ctx.bias_dtype)
    return grad_x, None, None, None, grad_bias


torch.library.register_autograd(
    "fastsparse::weight_only_linear_train", _weight_only_backward, setup_context=_save_for_weight_only
)
