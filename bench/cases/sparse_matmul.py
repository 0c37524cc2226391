"""sparse_matmul: sparse_linear against dense float32 (MKL); sparse_int8_linear is in _sparse_int8.py.

Figures count dense work: 2 M N K operations."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from bench.cases import _sparse_int8
from bench.registry import Call, Check, case, peer

WEIGHTS = ((768, 768), (768, 3072), (4096, 4096))  # (K, N)
SHAPES = [{"m": m, "k": k, "n": n, "zeros": z} for k, n in WEIGHTS for z in (50, 80, 90) for m in (1, 4, 16, 64)]


@functools.lru_cache(maxsize=1)
def operands(m: int, k: int, n: int, zeros: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(m * 1_000_003 + k * 1_009 + n + zeros)
    weight = torch.randn(n, k, generator=g)
    weight *= torch.rand(n, k, generator=g) * 100 >= zeros
    return torch.randn(m, k, generator=g), weight, torch.randn(n, generator=g)


def work(m: int, k: int, n: int, zeros: int) -> float:
    return 2.0 * m * n * k


def packed_bytes(m: int, k: int, n: int, zeros: int) -> int:
    """Of the format that "auto" takes: bitmap32 4 d + 1/8 bytes a weight, sell16 6 and panels128 5 a non-zero."""
    density = (100 - zeros) / 100
    if m <= 4 and density >= 0.4:
        return int(n * k * (density * 4 + 1 / 8))
    return int(n * k * density * (6 if m <= 2 else 5))


def csr_bytes(m: int, k: int, n: int, zeros: int) -> int:
    return int(n * k * (100 - zeros) / 100 * 12)  # a float32 and an int64


def dense_bytes(m: int, k: int, n: int, zeros: int) -> int:
    return 4 * n * k


def check(got: Tensor, m: int, k: int, n: int, zeros: int) -> Check:
    x, weight, bias = operands(m, k, n, zeros)
    want = x.double() @ weight.double().t() + bias.double()
    return Check(float((got.double() - want).norm() / want.norm()), 1e-5, "relative to float64, Frobenius norm")


def missing() -> str | None:
    try:
        from fastsparse import ops  # noqa: F401
    except Exception as e:
        return f"fastsparse can't be imported: {e}"
    return None


@case(
    "sparse_linear",
    shapes=SHAPES,
    unit="GOP/s",
    work=work,
    quick=lambda m, k, n, zeros: (k, n) == (768, 768) and m in (1, 64),
    weight_bytes=packed_bytes,
    check=check,
    available=missing,
)
def ours(m: int, k: int, n: int, zeros: int) -> Call:
    from fastsparse import ops

    x, weight, bias = operands(m, k, n, zeros)
    pack = ops.pack(weight, rows=m)
    return lambda: ops.sparse_linear(x, pack, bias)


@peer("sparse_linear", "torch fp32", kind="fp32", compute="fp32", weight_bytes=dense_bytes, check=check)
def dense(m: int, k: int, n: int, zeros: int) -> Call:
    x, weight, bias = operands(m, k, n, zeros)
    weight = weight.clone()
    return lambda: functional.linear(x, weight, bias)


@peer("sparse_linear", "torch csr", kind="bare", weight_bytes=csr_bytes, check=check)
def csr(m: int, k: int, n: int, zeros: int) -> Call:
    x, weight, bias = operands(m, k, n, zeros)
    sparse = weight.to_sparse_csr()
    return lambda: functional.linear(x, sparse, bias)


_sparse_int8.register()
