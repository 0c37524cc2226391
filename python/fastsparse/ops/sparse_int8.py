"""sparse_int8_linear, of the family sparse_matmul: W8A8 linear layers whose weight is mostly zeros.

The contract of the kernels is csrc/sparse_matmul/int8.h, the packed layouts are formats/{bitmap,windows,blocks}_s8.h
there, the float64 oracle fastsparse.reference.sparse_int8_linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from fastsparse.ops import _auto
from fastsparse.ops._call import as_matrix, direct, eager
from fastsparse.ops._pack import HEADER
from fastsparse.ops.int8_gemm import _ACTIVATE, ACTIVATIONS, _check_devices

# And the outputs of a block, or what sparse_int8_pack takes in its place.
FORMATS = {"bitmap_s8": 0, "windows_s8": 32, "blocks1x4": 1, "blocks4x4": 4}
# The rule of thumb, where nothing is measured (docs/kernels/sparse_matmul.md). Rows of x up to which a bitmap may be
# the fastest, and how many times its bytes windows may have there: where LAYERS of them lie in half a common L3, and
# beyond. How much more a stored weight of 1x4 blocks and of windows costs than one of 4x4 blocks.
BITMAP_ROWS = 4
LAYERS = 8  # a model has more than one of a size: large ones come from DRAM, where the bytes of a pack decide
CACHED_BYTES = (16 << 20) // LAYERS
WINDOWS_OVER_CACHED_BITMAP, WINDOWS_OVER_BITMAP = 1.8, 1.55
COST_1X4 = 1.6
COST_WINDOWS = 1.8
WINDOWS_DENSITY = 0.6  # denser: windows lose, whatever the rows

_sparse_int8_linear = torch.ops.fastsparse.sparse_int8_linear.default
_sparse_int8_linear_now = eager(_sparse_int8_linear)
_sparse_int8_linear_direct = direct("sparse_int8_linear")
_sparse_int8_linear_train = torch.ops.fastsparse.sparse_int8_linear_train.default
_sparse_int8_pack = torch.ops.fastsparse.sparse_int8_pack.default
_sparse_int8_unpack = torch.ops.fastsparse.sparse_int8_unpack.default
_sparse_int8_validate = torch.ops.fastsparse.sparse_int8_validate.default


def sparse_int8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """A linear layer in W8A8 with a sparse weight: y = activation(x_q W^T * x_scale * weight_scale + bias).

    x is quantized dynamically per token (row), and y computed, as in `int8_linear` without an x_scale: y has the bits
    that `int8_linear` gives for the dense weight, whatever the format of the pack, the level, the threads and the rows.

    Args:
        x: float32, bfloat16 or float16 [..., K]; any strides.
        weight: a pack of s8[N, K] in one of the formats bitmap_s8 (few rows of x), windows_s8, blocks1x4, blocks4x4
            (many), from `pack`.
        weight_scale: float32 [N], finite; the weight is `s8 * weight_scale[:, None]`.
        bias: float32 [N].
        activation: None, "relu", "gelu" (the exact one) or "silu".

    Returns:
        [..., N] in x's dtype. Differentiable in `x` and `bias`; the gradient to x is that of the dequantized weight
        (straight through the rounding of x).

    Raises:
        ValueError: names the argument, what came and what was expected. K is at most 131071, so that the sums are exact
            in int32.
        RuntimeError: x is on CUDA, where there is no kernel yet.
    """
    try:
        code = ACTIVATIONS[activation]
    except (KeyError, TypeError):
        raise ValueError(
            f"sparse_int8_linear: activation must be None, 'relu', 'gelu' or 'silu', got {activation!r}"
        ) from None
    if not is_dynamo_compiling():
        y = _sparse_int8_linear_direct(x, weight, weight_scale, bias, code)
        if y is not None:
            return y
    if torch.is_grad_enabled():
        if weight_scale.requires_grad:
            raise ValueError("sparse_int8_linear: weight_scale must not require a gradient: there is none for it")
        if x.requires_grad or (bias is not None and bias.requires_grad):
            return _ACTIVATE[code](_sparse_int8_linear_train(x, weight, weight_scale, bias))
    call = _sparse_int8_linear if is_compiling() else _sparse_int8_linear_now
    return call(x, weight, weight_scale, bias, code)


def _blocks(weight: Tensor, rows: int) -> int:
    """How many blocks of `rows` x 4 have a weight that is not zero."""
    n, k = weight.shape
    live = torch.nn.functional.pad(weight != 0, (0, -k % 4, 0, -n % rows))
    return int(live.view(live.shape[0] // rows, rows, live.shape[1] // 4, 4).any(3).any(1).count_nonzero())


def windows_are_fast() -> bool:
    """The row in force permutes 64 bytes at once; the others read windows_s8 place by place."""
    from fastsparse import _C

    try:
        rows = _C.kernels()
    except ValueError:  # FASTSPARSE_ISA names a level that is not here: the first call will say so
        return False
    return any(row["selected"] and (row["family"], row["name"]) == ("sparse_int8", "avx512vbmi2") for row in rows)


CANDIDATES = (
    _auto.Candidate("bitmap_s8", most_rows=BITMAP_ROWS),
    _auto.Candidate("windows_s8", fits=lambda weight, density: density <= WINDOWS_DENSITY and windows_are_fast()),
    _auto.Candidate("blocks1x4"),
    _auto.Candidate("blocks4x4"),
)


def _linear_of(n: int) -> Callable[[Tensor, Tensor], Tensor]:
    scale = torch.ones(n, dtype=torch.float32, device="cpu")
    return lambda x, pack: _sparse_int8_linear(x, pack, scale)


def _pack_as(weight: Tensor, format: str) -> Tensor:
    return _sparse_int8_pack(weight, FORMATS[format])


def _choose(weight: Tensor, rows: int | None) -> Tensor:
    """What "sparse" means: what is the fastest for the rows of x to be expected (None: many)."""
    live, most = int(weight.count_nonzero()), max(weight.numel(), 1)
    few = rows is not None and rows <= BITMAP_ROWS
    blocks = {r: _blocks(weight, r) for r in (1, 4)}  # by their outputs
    packs: dict[str, Tensor] = {}  # what the rule had to pack

    def rule(rows: int | None) -> str:
        """By what the zeros leave to store, and the CPU."""
        if few:
            best, size = "bitmap_s8", live + weight.numel() / 8
            bound = max(WINDOWS_OVER_BITMAP * size, min(WINDOWS_OVER_CACHED_BITMAP * size, CACHED_BYTES)) / 2
        else:
            costs = {"blocks4x4": 16 * blocks[4], "blocks1x4": COST_1X4 * 4 * blocks[1]}
            best = min(costs, key=lambda name: costs[name])
            bound = costs[best] / COST_WINDOWS
        if live < bound and windows_are_fast():  # more than that: lost, however few of their places stay empty
            if "windows_s8" not in packs:
                packs["windows_s8"] = _pack_as(weight, "windows_s8")
            if packs["windows_s8"].numel() / 2 < bound:
                return "windows_s8"
        return best

    whole = _auto.Weight(
        weight,
        live / most,
        _pack_as,
        rule,
        candidates=CANDIDATES,
        linear=_linear_of,
        layers=LAYERS if few else 1,
        stored=tuple(4 * r * count / most for r, count in blocks.items()),
    )
    format = _auto.choose(whole, rows)
    return packs[format] if format in packs else _pack_as(weight, format)


def pack_sparse_int8(weight: Tensor, format: str, rows: int | None) -> Tensor:
    """`ops.pack` for int8 weights without their zeros."""
    if weight.dim() != 2:
        raise ValueError(f"pack: weight must be a matrix [N, K], got weight{list(weight.shape)}")
    try:
        return _choose(weight, rows) if format == "sparse" else _pack_as(weight, format)
    except ValueError as error:
        raise ValueError(f"pack: {str(error).removeprefix('sparse_int8_pack: ')}") from None


def unpack_sparse_int8(pack: Tensor, header: dict[str, Any]) -> Tensor:
    return _sparse_int8_unpack(pack, header["n"], header["k"])


def describe_sparse_int8(pack: Tensor, header: dict[str, Any]) -> dict[str, Any]:
    """Validates every byte: a kernel trusts none of them, but a reader should know."""
    try:
        _sparse_int8_validate(pack)
    except ValueError as error:
        raise ValueError(f"describe: {str(error).removeprefix('sparse_int8_validate: ')}") from None
    return header


def _linear_shape(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    _check_devices("sparse_int8_linear", x, weight=weight, weight_scale=weight_scale, bias=bias)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


@torch.library.register_fake("fastsparse::sparse_int8_linear")
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, activation: int = 0) -> Tensor:
    return _linear_shape(x, weight, weight_scale, bias)


torch.library.register_fake("fastsparse::sparse_int8_linear_train")(_linear_shape)


@torch.library.register_fake("fastsparse::sparse_int8_pack")
def _(weight: Tensor, block: int) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size(min=HEADER.size)
    return weight.new_empty(size, dtype=torch.uint8)


@torch.library.register_fake("fastsparse::sparse_int8_unpack")
def _(pack: Tensor, n: int, k: int) -> Tensor:
    return pack.new_empty((n, k), dtype=torch.int8)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # The dispatcher drops trailing arguments that have their default, here and in needs_input_grad.
    x, weight, weight_scale, bias = (*inputs, None)[:4]
    ctx.save_for_backward(weight, weight_scale)
    ctx.k = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        # In float32, autocast or not: gradient times scale underflows in half precision.
        with torch.autocast(grad.device.type, enabled=False):
            values = _sparse_int8_unpack(weight, weight_scale.shape[0], ctx.k).float()
            grad_x = ((grad.float() * weight_scale) @ values).to(grad.dtype)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = as_matrix(grad).sum(0, dtype=ctx.bias_dtype)
    return grad_x, None, None, grad_bias


torch.library.register_autograd(
    "fastsparse::sparse_int8_linear_train", _linear_backward, setup_context=_save_for_backward
)
