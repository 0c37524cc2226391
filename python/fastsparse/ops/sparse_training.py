"""The family sparse_matmul, training: products of a weight whose zeros stay where they are while its values change.

A *structure* (uint8, csrc/sparse_matmul/formats/structure.h) says where the weight is not zero; `values` float32
[nonzeros] lie beside it, by row, then column, as in CSR: a plain tensor, so an optimiser, a state_dict and
torch.compile see nothing unusual. The gradient to `values` is as long as they are; a dense gradient is never made.
The contract of the kernels is csrc/sparse_matmul/training.h, the float64 oracle fastsparse.reference.sparse_training.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsparse.ops._call import as_matrix, whole
from fastsparse.ops.int8_gemm import _ACTIVATE, ACTIVATIONS, _check_devices

_product_plain = torch.ops.fastsparse.sparse_values_linear.default
_product_train = torch.ops.fastsparse.sparse_values_linear_train.default
_sddmm_plain = torch.ops.fastsparse.sparse_sddmm.default
_sddmm_train = torch.ops.fastsparse.sparse_sddmm_train.default
_activation_grad = torch.ops.fastsparse.sparse_activation_grad.default
_structure = torch.ops.fastsparse.sparse_structure.default
_indices = torch.ops.fastsparse.sparse_structure_indices.default
_check_csr = torch.ops.fastsparse.sparse_check_csr.default
_csr_to_dense = torch.ops.fastsparse.csr_to_dense.default


# --- Matrices in other layouts ---------------------------------------------------------------------------------------

_EXACT = (torch.int8, torch.float32, torch.float16, torch.bfloat16)  # in float32


class Csr(NamedTuple):
    """A float32 matrix [n, k] in CSR, its indices int64 and checked: in range, ascending, without duplicates."""

    crow: Tensor
    col: Tensor
    values: Tensor
    n: int
    k: int

    def dense(self) -> Tensor:
        return _csr_to_dense(self.crow, self.col, self.values, self.n, self.k)


def is_foreign(weight: Any) -> bool:
    """Whether it is a scipy.sparse matrix or array, by what it can do: scipy itself is not imported."""
    return not isinstance(weight, Tensor) and hasattr(weight, "tocsr") and hasattr(weight, "nnz")


def to_csr(weight: Any, where: str) -> Csr:
    """CSR of a float32 matrix: dense, torch.sparse_csr, sparse_csc or sparse_coo, or from scipy.sparse."""
    if is_foreign(weight):
        matrix = weight.tocsr()
        if str(matrix.dtype) != "float32":
            raise ValueError(f"{where}: weight must be float32, got {matrix.dtype} (weight.astype('float32'))")
        if len(matrix.shape) != 2:
            raise ValueError(f"{where}: weight must be a matrix [N, K], got weight{list(matrix.shape)}")
        n, k = matrix.shape
        crow, col = (torch.from_numpy(each.astype("int64")) for each in (matrix.indptr, matrix.indices))
        return _checked(crow, col, torch.from_numpy(matrix.data.copy()), n, k, where)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{where}: weight must be a tensor or a scipy.sparse matrix, got {type(weight).__name__}")
    weight = weight.detach()
    if weight.dtype != torch.float32:
        raise ValueError(f"{where}: weight must be float32, got {str(weight.dtype).removeprefix('torch.')}")
    if weight.dim() != 2:
        raise ValueError(f"{where}: weight must be a matrix [N, K], got weight{list(weight.shape)}")
    if weight.device.type != "cpu":
        raise ValueError(f"{where}: weight must be on the CPU, got {weight.device}")
    n, k = weight.shape
    if weight.layout == torch.strided:
        rows, col = weight.nonzero(as_tuple=True)
        return Csr(_starts(rows, n), col, weight[rows, col], n, k)
    if weight.layout == torch.sparse_csr:
        return _checked(weight.crow_indices(), weight.col_indices(), weight.values(), n, k, where)
    if weight.layout == torch.sparse_csc:
        by_column = _checked(weight.ccol_indices(), weight.row_indices(), weight.values(), k, n, where, "csc: ")
        columns = torch.arange(k).repeat_interleave(by_column.crow.diff())
        order = by_column.col.argsort(stable=True)
        return Csr(_starts(by_column.col, n), columns[order], by_column.values[order], n, k)
    if weight.layout == torch.sparse_coo:
        weight = weight.coalesce()
        rows, columns = weight.indices()
        if rows.numel() > 0 and not 0 <= int(rows.min()) <= int(rows.max()) < n:
            got = f"{int(rows.min())} .. {int(rows.max())}"
            raise ValueError(f"{where}: the rows of a coo weight must be in 0 .. N-1={n - 1}, got {got}")
        return _checked(_starts(rows, n), columns, weight.values(), n, k, where)
    raise ValueError(
        f"{where}: weight must be dense, torch.sparse_csr, sparse_csc or sparse_coo, or from scipy.sparse, "
        f"got layout {weight.layout}"
    )


def to_dense(weight: Any, where: str) -> Tensor:
    """What `to_csr` takes, of int8, float16 and bfloat16, too: these pass through float32, which holds them exactly."""
    if is_foreign(weight):
        if str(weight.dtype) == "int8":
            return to_csr(weight.astype("float32"), where).dense().to(torch.int8)
        return to_csr(weight, where).dense()
    if weight.dtype not in _EXACT:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in (*_EXACT, weight.dtype))
        wanted = f"{', '.join(names[:-1])} or {names[-1]} where it is not dense"
        raise ValueError(f"{where}: weight must be {wanted}, got {last}")
    return to_csr(weight.float(), where).dense().to(weight.dtype)


def _starts(rows: Tensor, n: int) -> Tensor:
    counts = torch.bincount(rows, minlength=n)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _checked(crow: Tensor, col: Tensor, values: Tensor, n: int, k: int, where: str, of: str = "") -> Csr:
    crow, col = crow.long().contiguous(), col.long().contiguous()
    try:
        _check_csr(crow, col, n, k)
    except ValueError as error:
        what = str(error).removeprefix("sparse_check_csr: ")
        raise ValueError(f"{where}: weight has damaged indices: {of}{what}") from None
    if values.shape != col.shape:
        raise ValueError(f"{where}: weight must have a value for each of {col.numel()} columns, got {values.numel()}")
    return Csr(crow, col, values.clone(), n, k)


def to_layout(csr: Csr, layout: torch.layout | str, where: str) -> Any:
    if layout == torch.strided:
        return csr.dense()
    if layout == torch.sparse_csr:
        return torch.sparse_csr_tensor(csr.crow, csr.col, csr.values, (csr.n, csr.k), check_invariants=False)
    if layout == "scipy":
        try:
            from scipy.sparse import csr_matrix
        except ImportError as error:
            raise ValueError(f"{where}: layout 'scipy' needs scipy, which is not installed") from error
        parts = (csr.values.detach().numpy(), csr.col.numpy(), csr.crow.numpy())
        return csr_matrix(parts, shape=(csr.n, csr.k))
    raise ValueError(f"{where}: layout must be torch.strided, torch.sparse_csr or 'scipy', got {layout!r}")


# --- Structures ------------------------------------------------------------------------------------------------------


def sparse_structure(weight: Any) -> tuple[Tensor, Tensor]:
    """Takes a sparse weight apart for training: where it is not zero, and its values there.

    Args:
        weight: float32 [N, K]: a dense tensor, of which what is zero is left out; or torch.sparse_csr, sparse_csc,
            sparse_coo or a scipy.sparse matrix, of which everything that is stored counts, explicit zeros too.

    Returns:
        structure: uint8 [bytes], for `sparse_linear(..., values=...)`, `spmm` and `sddmm`; the same on every machine.
        values: float32 [nonzeros], by row, then column; shares no memory with `weight`.

    Raises:
        ValueError: names the argument, what came and what was expected; indices out of range or order, or twice.
    """
    csr = to_csr(weight, "sparse_structure")
    return _structure(csr.crow, csr.col, csr.n, csr.k), csr.values


def structure_to_csr(structure: Tensor, header: dict[str, Any], values: Tensor, where: str) -> Csr:
    crow, col = read_indices(structure, where)
    if values.dtype != torch.float32 or values.shape != col.shape:
        got = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        raise ValueError(f"{where}: values must be float32 [{col.numel()}], got {got}")
    return Csr(crow, col, values, header["n"], header["k"])


def read_indices(structure: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """crow and col of a structure, of which every byte is checked."""
    try:
        return _indices(structure)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix('sparse_structure_indices: ')}") from None


def repack_structure(structure: Tensor, header: dict[str, Any]) -> Tensor:
    return _structure(*_indices(structure), header["n"], header["k"])


# --- Products --------------------------------------------------------------------------------------------------------


def _product(
    x: Tensor, structure: Tensor, values: Tensor, n: int, transposed: bool, bias: Tensor | None = None, code: int = 0
) -> Tensor:
    wants = x.requires_grad or values.requires_grad or (bias is not None and bias.requires_grad)
    if wants and torch.is_grad_enabled():
        if x.is_cuda:
            return _ACTIVATE[code](_product_train(x, structure, values, n, transposed, bias)[0])
        y: Tensor = _product_train(x, structure, values, n, transposed, bias, code)[0]
        return y
    return _product_plain(x, structure, values, n, transposed, bias, code)


def _sddmm(p: Tensor, q: Tensor, structure: Tensor, nonzeros: int) -> Tensor:
    if torch.is_grad_enabled() and (p.requires_grad or q.requires_grad):
        return _sddmm_train(p, q, structure, nonzeros)
    return _sddmm_plain(p, q, structure, nonzeros)


def values_linear(
    x: Tensor, structure: Tensor, values: Tensor, bias: Tensor | None, code: int, out_features: int | None
) -> Tensor:
    """`sparse_linear` of a structure and live values."""
    return _product(x, structure, values, -1 if out_features is None else out_features, False, bias, code)


def spmm(structure: Tensor, values: Tensor, dense: Tensor, rows: int | None = None) -> Tensor:
    """A sparse matrix times a dense one: W [N, K] @ dense [K, M], as torch.sparse.mm, differentiable in both.

    Args:
        structure, values: W, from `sparse_structure`; values float32 [nonzeros].
        dense: float32 [K, M], any strides.
        rows: N. Needed under torch.compile (the structure's bytes can't be read there).

    Returns:
        float32 [N, M]. Bits depend neither on the level nor on the number of threads.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    if dense.dim() != 2:
        raise ValueError(f"spmm: dense must be a matrix [K, M], got dense{list(dense.shape)}")
    try:
        return _product(dense.t(), structure, values, -1 if rows is None else rows, False).t()
    except ValueError as error:
        what = str(error).removeprefix("sparse_linear: ").replace("x must have", "dense.t() must have")
        what = what.replace("got x[", "got dense.t()[")
        raise ValueError(f"spmm: {what}") from None


def sddmm(structure: Tensor, a: Tensor, b: Tensor, nonzeros: int | None = None) -> Tensor:
    """A dense product where a sparse matrix has a value: values of (a [N, M] @ b [M, K]) at the structure's places.

    As torch.sparse.sampled_addmm without its added part. Differentiable in `a` and `b`.

    Args:
        structure: of W [N, K], from `sparse_structure`.
        a, b: float32 [N, M] and [M, K], any strides.
        nonzeros: the number of values. Needed under torch.compile (the structure's bytes can't be read there).

    Returns:
        float32 [nonzeros], by row, then column: `values` as `spmm` and `sparse_linear` take them. Bits depend neither
        on the level nor on the number of threads (csrc/sparse_matmul/training.h has the order of the sum).

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    for name, value in (("a", a), ("b", b)):
        if value.dim() != 2:
            raise ValueError(f"sddmm: {name} must be a matrix, got {name}{list(value.shape)}")
    try:
        return _sddmm(a.t(), b, structure, -1 if nonzeros is None else nonzeros)
    except ValueError as error:
        what = str(error).removeprefix("sparse_sddmm: ")
        for inner, name in (("p", "a.t()"), ("q", "b")):
            what = what.replace(f"{inner} must", f"{name} must").replace(f"got {inner}[", f"got {name}[")
        raise ValueError(f"sddmm: {what}") from None


@torch.library.register_fake("fastsparse::sparse_values_linear")
def _(
    x: Tensor,
    structure: Tensor,
    values: Tensor,
    n: int,
    transposed: bool,
    bias: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    return _product_shape(x, structure, values, n, transposed, bias)


@torch.library.register_fake("fastsparse::sparse_values_linear_train")
def _(
    x: Tensor,
    structure: Tensor,
    values: Tensor,
    n: int,
    transposed: bool,
    bias: Tensor | None = None,
    activation: int = 0,
) -> tuple[Tensor, Tensor]:
    y = _product_shape(x, structure, values, n, transposed, bias)
    return y, fake_z(y, activation)


def _product_shape(
    x: Tensor, structure: Tensor, values: Tensor, n: int, transposed: bool, bias: Tensor | None = None
) -> Tensor:
    _check_devices("sparse_linear", x, structure=structure, values=values, bias=bias)
    if n < 0 and bias is None:
        raise ValueError(
            "sparse_linear: out_features (spmm: rows) must be given where the structure can't be read (compiled)"
        )
    return x.new_empty((*x.shape[:-1], bias.shape[0] if n < 0 and bias is not None else n))


@torch.library.register_fake("fastsparse::sparse_sddmm")
def _sddmm_shape(p: Tensor, q: Tensor, structure: Tensor, nonzeros: int) -> Tensor:
    _check_devices("sddmm", p, q=q, structure=structure)
    if nonzeros < 0:
        raise ValueError("sddmm: nonzeros must be given where the structure can't be read (compiled)")
    return p.new_empty((nonzeros,))


torch.library.register_fake("fastsparse::sparse_sddmm_train")(_sddmm_shape)


# --- The activation of a layer of which gradients are recorded -------------------------------------------------------

_RELU, _GELU, _SILU = (ACTIVATIONS[name] for name in ("relu", "gelu", "silu"))


def fake_z(y: Tensor, activation: int) -> Tensor:
    """The second result of a layer that trains: what stands before gelu and silu, [0] where nothing is kept."""
    return torch.empty_like(y) if activation in (_GELU, _SILU) else y.new_empty((0,))


@torch.library.register_fake("fastsparse::sparse_activation_grad")
def _(grad: Tensor, saved: Tensor, activation: int) -> Tensor:
    return grad.new_empty(grad.shape)


def kept_of(output: tuple[Tensor, Tensor], activation: int) -> Tensor:
    """What the gradient through the activation needs: y of relu, z of gelu and silu."""
    return output[0] if activation == _RELU else output[1]


def before_activation(grad: Tensor | None, grad_z: Tensor | None, kept: Tensor, activation: int) -> Tensor | None:
    """The gradient of what stands before the activation, of those of both results of a layer that trains.

    z is no one's but the second derivative's: there, torch's own ops are taken.
    """
    if grad is None or activation == 0:
        return grad if activation == 0 or grad_z is None else grad_z
    if torch.is_grad_enabled():
        if activation == _RELU:
            through = torch.ops.aten.threshold_backward(grad, kept, 0)
        elif activation == _GELU:
            through = torch.ops.aten.gelu_backward(grad, kept)
        else:  # of torch's silu_backward there is no derivative
            s = kept.sigmoid()
            through = grad * (s * (1 + kept * (1 - s)))
    else:
        through = _activation_grad(grad, kept, activation)
    return through if grad_z is None or activation == _RELU else through + grad_z


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, structure, values, _n, transposed, bias, activation = whole(inputs, None, 0, count=7)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, structure, values, kept_of(output, activation))
    ctx.transposed, ctx.has_bias, ctx.activation = transposed, bias is not None, activation


def _product_backward(ctx: Any, grad_y: Tensor | None, grad_z: Tensor | None) -> tuple[Tensor | None, ...]:
    x, structure, values, kept = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    grad = before_activation(grad_y, grad_z, kept, ctx.activation)
    if grad is None:
        return (None,) * 7
    if ctx.needs_input_grad[0]:
        grad_x = _product(grad, structure, values, x.shape[-1], not ctx.transposed)
    rows = as_matrix(grad)
    if ctx.needs_input_grad[2]:
        outer, inner = (as_matrix(x), rows) if ctx.transposed else (rows, as_matrix(x))
        grad_values = _sddmm(outer, inner, structure, values.numel())
    # The dispatcher drops trailing arguments that have their default, and needs_input_grad with them.
    if ctx.has_bias and ctx.needs_input_grad[5]:
        grad_bias = rows.sum(0)
    return grad_x, None, grad_values, None, None, grad_bias, None


def _save_sddmm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _sddmm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    p, q, structure = ctx.saved_tensors
    grad_p = _product(q, structure, grad, p.shape[1], False) if ctx.needs_input_grad[0] else None
    grad_q = _product(p, structure, grad, q.shape[1], True) if ctx.needs_input_grad[1] else None
    return grad_p, grad_q, None, None


torch.library.register_autograd(
    "fastsparse::sparse_values_linear_train", _product_backward, setup_context=_save_product
)
torch.library.register_autograd("fastsparse::sparse_sddmm_train", _sddmm_backward, setup_context=_save_sddmm)
