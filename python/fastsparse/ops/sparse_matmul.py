"""The family sparse_matmul: linear layers whose weight is mostly zeros.

The contract of the kernels is csrc/sparse_matmul/sparse_matmul.h, the packed layouts are in formats/ there,
the float64 oracle fastsparse.reference.sparse_matmul.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from fastsparse.ops import _auto
from fastsparse.ops._call import as_matrix, direct, eager, whole
from fastsparse.ops._pack import FORMATS as NAMES
from fastsparse.ops._pack import HEADER, PAIR, SHAPED, Rows, kind_of, read_header
from fastsparse.ops.int8_gemm import _ACTIVATE, ACTIVATIONS, _check_devices
from fastsparse.ops.sparse_training import before_activation, fake_z, kept_of, values_linear

FORMATS = {"bitmap32": 2, "sell16": 3, "panels128": 4, "sell8": 8, "sell4": 17}
# Of float16 and bfloat16 weights, for CUDA; bitmap32 of bfloat16 runs on the CPU, too, sell8 and panels128 there alone.
HALF_FORMATS = {"nm24": 5, "blocks16": 14, "bitmap32": 2, "sell8": 8, "sell8x32": 8, "panels128": 4}
BF16_FORMATS = ("bitmap32", "sell8", "sell8x32", "panels128")  # on the CPU
BF16_ROWS = 16  # up to which "auto" takes one of these for 2:4 weights, too
MAX_SELL_K = 65536  # kMaxSellK in csrc/sparse_matmul/sparse_matmul.h
# Measured: docs/kernels/sparse_matmul.md. Rows of x up to which a few-rows format is the fastest, below AVX-512 sell4,
# and the density from which that is bitmap32; on AVX-512 the rows from which sell8x32 is faster than sell8.
FEW_ROWS = 4
SELL4_ROWS = 2
BITMAP_DENSITY = 0.4
SELL8X32_ROWS = 2
PAIR_WEIGHTS_PER_BYTE = 171  # kPairWeightsPerByte in csrc/sparse_matmul/formats/pair.h

# Looked up here and not in torch at each call: 0.2 of 3.1 us.
_FLOAT32, _HALVES = torch.float32, (torch.bfloat16, torch.float16)
_is_grad_enabled = torch.is_grad_enabled

_sparse_linear = torch.ops.fastsparse.sparse_linear.default
_sparse_linear_now = eager(_sparse_linear)
_sparse_linear_direct = direct("sparse_linear")
_sparse_linear_train = torch.ops.fastsparse.sparse_linear_train.default
_sparse_pack = torch.ops.fastsparse.sparse_pack.default
_sparse_unpack = torch.ops.fastsparse.sparse_unpack.default
_sparse_validate = torch.ops.fastsparse.sparse_validate.default
_half_pack = torch.ops.fastsparse.half_pack.default
_half_unpack = torch.ops.fastsparse.half_unpack.default
_half_validate = torch.ops.fastsparse.half_validate.default


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    out_features: int | None = None,
    values: Tensor | None = None,
    header: dict[str, Any] | None = None,
) -> Tensor:
    """A linear layer with a sparse float32 weight: y = activation(x W^T + bias).

    The bits of y are the same for every format of the pack, every level, number of threads and number of rows, while x
    is finite. A NaN or an infinity in x reaches the outputs whose weights are not zero; whether it reaches the others
    depends on the format.

    On CUDA (off until a GPU has run it) the formats bitmap32, nm24 and blocks16 have kernels. There the bits of y
    depend neither on the rows of x nor on the launch; those of a float32 weight are the CPU's for K <= 32; beyond, sums
    have another order.

    Args:
        x: float32 [..., K]; any strides. bfloat16 and float16 are computed in float32 and rounded at the end. For a
            weight of 16 bits on CUDA: of the weight's dtype.
        weight: a pack of f32[N, K], from `pack`, or a bitmap32, sell8 or panels128 of bfloat16, which gives the bits of
            the float32 pack of the same values; on CUDA any of float16 or bfloat16. It is a plain tensor without a
            gradient. Or, with `values`, a structure from `sparse_structure`.
        bias: float32 [N].
        activation: None, "relu", "gelu" (the exact one) or "silu"; inside the kernel, forward and backward, but on CUDA
            where gradients are recorded torch's own op behind it: gelu and silu then differ by rounding.
        out_features: N. Needed under torch.compile where there is no bias (the pack's bytes can't be read there).
        values: float32 [nonzeros], for training: the weight's values at the structure's places, by row, then column.
        header: what `describe(weight)` says, for CUDA, where a call without it copies the header from the device: the
            host waits, and a CUDA graph can't be captured. Where it is not the pack's, y is NaN. A structure's is not
            needed: where out_features is given, the sizes of x and values say the same.

    Returns:
        [..., N] in x's dtype. Differentiable in `x`, `bias` and `values`; a pack is fixed. The gradient to `values` is
        as long as they are: a dense one is never made.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    try:
        code = ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"sparse_linear: activation must be None, 'relu', 'gelu' or 'silu', got {activation!r}"
        ) from None
    n = -1 if out_features is None else out_features
    if values is None and not is_dynamo_compiling():
        y = _sparse_linear_direct(x, weight, bias, n, code)
        if y is not None:
            return y
    if x.dtype is not _FLOAT32 and x.dtype in _HALVES and (values is not None or not x.is_cuda):
        return sparse_linear(x.float(), weight, bias, activation, out_features, values).to(x.dtype)
    if values is not None:
        return values_linear(x, weight, values, bias, code, out_features)
    if _is_grad_enabled():
        if weight.requires_grad:
            raise ValueError(
                "sparse_linear: weight must not require a gradient: a pack has none (sparse_structure's values may)"
            )
        if x.requires_grad or (bias is not None and bias.requires_grad):
            if x.is_cuda:
                return _ACTIVATE[code](_sparse_linear_train(x, weight, n, bias)[0])
            y = _sparse_linear_train(x, weight, n, bias, code)[0]
            return y
    linear = _sparse_linear if is_dynamo_compiling() else _sparse_linear_now
    if header is not None and x.is_cuda:
        return linear(x, weight, header["n"] if n < 0 else n, bias, code, kind_of(header))
    if code == 0:  # an argument less costs less, also where it has its default
        return linear(x, weight, n) if bias is None else linear(x, weight, n, bias)
    return linear(x, weight, n, bias, code)


def choose_format(density: float, k: int, rows: int | None) -> str:
    """What "auto" means where nothing is measured (`_auto`): by the rows of x to be expected (None: many) and the part
    of the weights that is not zero."""
    if rows is None or rows > FEW_ROWS:
        return "panels128"
    if density >= BITMAP_DENSITY:
        return "bitmap32"
    if k <= MAX_SELL_K and _auto.avx512():
        return "sell8" if rows < SELL8X32_ROWS else "sell8x32"
    if rows > SELL4_ROWS:
        return "panels128"
    return "sell4" if k <= MAX_SELL_K else "bitmap32"


def pack_float(weight: Tensor, format: str, rows: Rows) -> Tensor:
    """`ops.pack` for float32 weights; `rows` has been checked."""
    if weight.dim() != 2:
        raise ValueError(f"pack: weight must be a matrix [N, K], got weight{list(weight.shape)}")
    weight = weight.detach()
    if format == "auto":
        density = int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
        rule = functools.partial(choose_format, density, weight.shape[1])
        whole = _auto.Weight(weight, density, _pack_as, rule)
        if isinstance(rows, tuple):
            return _pack_two(weight, *_auto.choose_two(whole, *rows))
        format = _auto.choose(whole, rows)
    return _pack_as(weight, format)


def _pack_as(weight: Tensor, format: str) -> Tensor:
    code, block = SHAPED.get(format) or (FORMATS[format], 0)
    try:
        return _sparse_pack(weight, code, block)
    except ValueError as error:
        raise ValueError(f"pack: {str(error).removeprefix('sparse_pack: ')}") from None


def _pack_two(weight: Tensor, first: str, second: str, rows: int) -> Tensor:
    """A pair (csrc/sparse_matmul/formats/pair.h): up to so many rows the first format serves, beyond the second."""
    many = _pack_as(weight, second)
    if first == second:
        return many
    few = _pack_as(weight, first)
    n, k = weight.shape
    size = HEADER.size + few.numel() + many.numel()
    if n * k > PAIR_WEIGHTS_PER_BYTE * size:
        return many
    nonzeros = read_header(many)["nonzeros"]
    header = HEADER.pack(b"fspk", PAIR, 1, 2, rows, n, k, nonzeros, size, bytes(16))
    return torch.cat([torch.frombuffer(bytearray(header), dtype=torch.uint8), few, many])


def halves(pack: Tensor) -> tuple[Tensor, Tensor]:
    """The two packs of a pair that has been validated."""
    first = read_header(pack[HEADER.size :])["bytes"]
    return pack[HEADER.size : HEADER.size + first], pack[HEADER.size + first :]


def repack_pair(pack: Tensor, header: dict[str, Any]) -> Tensor:
    """The pair of what a validated pair holds."""
    first, second = header["formats"]
    return _pack_two(unpack_float(pack, header), first, second, header["block"])


def half_formats(dtype: torch.dtype) -> tuple[str, ...]:
    on_cpu_alone = ("sell8", "sell8x32", "panels128")
    return tuple(name for name in HALF_FORMATS if dtype == torch.bfloat16 or name not in on_cpu_alone)


def pack_half(weight: Tensor, format: str, rows: Rows) -> Tensor:
    """`ops.pack` for float16 and bfloat16 weights; "auto" is nm24, or for bfloat16 what the CPU has."""
    weight = weight.detach()
    if format == "auto":
        format = _choose_half(weight, rows)
    return _half_pack_as(weight, format)


def _choose_half(weight: Tensor, rows: Rows) -> str:
    most = rows[1] if isinstance(rows, tuple) else rows
    if weight.dtype != torch.bfloat16 or weight.dim() != 2:
        return "nm24"
    if torch.cuda.is_available() and (most is None or most > BF16_ROWS) and _auto.two_of_four(weight):
        return "nm24"
    density = int(torch.count_nonzero(weight)) / max(weight.numel(), 1)

    def rule(rows: int | None) -> str:
        format = choose_format(density, weight.shape[1], rows)
        return format if format in BF16_FORMATS else "bitmap32"

    return _auto.choose(_auto.Weight(weight, density, _half_pack_as, rule, BF16_FORMATS), most)


def _half_pack_as(weight: Tensor, format: str) -> Tensor:
    block = {"sell8": 64, "sell8x32": 32}.get(format, 0)
    try:
        return _half_pack(weight, HALF_FORMATS[format], block)
    except ValueError as error:
        raise ValueError(f"pack: {str(error).removeprefix('half_pack: ')}") from None


def unpack_float(pack: Tensor, header: dict[str, Any]) -> Tensor:
    if header["dtype"] != "float32":
        return _half_unpack(pack, header["n"], header["k"], header["dtype"] == "bfloat16")
    return _sparse_unpack(pack, header["n"], header["k"])


def describe_float(pack: Tensor, header: dict[str, Any]) -> dict[str, Any]:
    """Validates every byte that says where something is: a kernel trusts none of them, but a reader should know."""
    half = header["dtype"] != "float32"
    try:
        (_half_validate if half else _sparse_validate)(pack)
    except ValueError as error:
        what = str(error).removeprefix("half_validate: " if half else "sparse_validate: ")
        raise ValueError(f"describe: {what}") from None
    if header["format"] == NAMES[PAIR]:
        header["formats"] = tuple(read_header(half)["format"] for half in halves(pack))
    return header


def _linear_shape(x: Tensor, weight: Tensor, n: int, bias: Tensor | None = None) -> Tensor:
    _check_devices("sparse_linear", x, weight=weight, bias=bias)
    if n < 0:
        if bias is None:
            raise ValueError(
                "sparse_linear: out_features must be given where bias is None and the pack can't be read (compiled)"
            )
        n = bias.shape[0]
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("fastsparse::sparse_linear")
def _(x: Tensor, weight: Tensor, n: int, bias: Tensor | None = None, activation: int = 0, kind: int = -1) -> Tensor:
    return _linear_shape(x, weight, n, bias)


@torch.library.register_fake("fastsparse::sparse_linear_train")
def _(x: Tensor, weight: Tensor, n: int, bias: Tensor | None = None, activation: int = 0) -> tuple[Tensor, Tensor]:
    y = _linear_shape(x, weight, n, bias)
    return y, fake_z(y, activation)


@torch.library.register_fake("fastsparse::sparse_pack")
def _(weight: Tensor, format: int, block: int = 0) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size(min=HEADER.size)
    return weight.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("fastsparse::sparse_unpack")
def _(pack: Tensor, n: int, k: int) -> Tensor:
    return pack.new_empty((n, k), dtype=torch.float32)


@torch.library.register_fake("fastsparse::half_pack")
def _(weight: Tensor, format: int, block: int = 0) -> Tensor:
    n, k = weight.shape
    if format == HALF_FORMATS["nm24"]:
        return weight.new_empty(HEADER.size + -(-n // 16) * 16 * (-(-k // 64) * 64) * 9 // 8, dtype=torch.uint8)
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(min=HEADER.size), dtype=torch.uint8)


@torch.library.register_fake("fastsparse::half_unpack")
def _(pack: Tensor, n: int, k: int, bfloat16: bool) -> Tensor:
    return pack.new_empty((n, k), dtype=torch.bfloat16 if bfloat16 else torch.float16)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _n, bias, activation = whole(inputs, None, 0, count=5)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, kept_of(output, activation))
    ctx.n, ctx.k = output[0].shape[-1], x.shape[-1]
    ctx.has_bias, ctx.activation = bias is not None, activation


def _dense(weight: Tensor, n: int, k: int, grad: Tensor) -> Tensor:
    """The weight of a pack for a product with `grad`: by way of the CPU, where packs are taken apart."""
    if not weight.is_cuda:
        return _sparse_unpack(weight, n, k)
    there = weight.cpu()
    return unpack_float(there, read_header(there)).to(grad.device, grad.dtype)


def _linear_backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    weight, kept = ctx.saved_tensors
    grad_x = grad_bias = None
    grad = before_activation(grad_y, grad_z, kept, ctx.activation)
    if grad is None:
        return (None,) * 5
    if ctx.needs_input_grad[0]:
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = grad @ _dense(weight, ctx.n, ctx.k, grad)
    # The dispatcher drops trailing arguments that have their default, and needs_input_grad with them.
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = as_matrix(grad).sum(0)
    return grad_x, None, None, grad_bias, None


torch.library.register_autograd("fastsparse::sparse_linear_train", _linear_backward, setup_context=_save_for_backward)
