"""sparse_linear of weights pruned in a pattern: blocks of 4 x 4, 75% of them zero, and 2:4.

Beside dense float32 (MKL) stand the formats for any zeros, with the same weight. Figures count dense work: 2 M N K
operations. bench/cases/sparse_matmul.py calls register().
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench.registry import Call, Check, case, peer

DEFAULT = ("default",)
WEIGHTS = ((768, 768), (4096, 4096))  # (K, N)
SHAPES = [{"m": m, "k": k, "n": n} for k, n in WEIGHTS for m in (1, 16, 128)]
PATTERNS = (("sparse_linear, 4x4 at 75%", "blocks4x4"), ("sparse_linear, 2:4", "nm2:4"))  # the case, and its format
OTHERS = (("panels128", 128), ("bitmap32", 16))  # and the most rows of x at which it is measured
CHECKED = 4  # rows held against float64


@functools.lru_cache(maxsize=1)
def weight_of(format: str, k: int, n: int) -> Tensor:
    g = torch.Generator().manual_seed(k * 1_009 + n)
    weight = torch.randn(n, k, generator=g)
    if format == "nm2:4":
        return weight * (torch.rand(n, k // 4, 4, generator=g).argsort(-1).reshape(n, k) < 2)
    live = torch.rand(n // 4, k // 4, generator=g) >= 0.75
    return weight * live.repeat_interleave(4, 0).repeat_interleave(4, 1)


@functools.lru_cache(maxsize=1)
def row_operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """x f32[M, K], bias f32[N]."""
    g = torch.Generator().manual_seed(m * 1_000_003 + k * 1_009 + n)
    return torch.randn(m, k, generator=g), torch.randn(n, generator=g)


@functools.lru_cache(maxsize=1)
def packed(pattern: str, format: str, k: int, n: int) -> Tensor:
    from fastsparse import ops

    return ops.pack(weight_of(pattern, k, n), format)


def work(m: int, k: int, n: int) -> float:
    return 2.0 * m * n * k


def quick(m: int, k: int, n: int) -> bool:
    return (k, n) == (768, 768) and m == 128


def missing() -> str | None:
    try:
        from fastsparse import ops  # noqa: F401
    except Exception as e:
        return f"fastsparse can't be imported: {e}"
    return None


def ours(pattern: str, format: str) -> tuple[Callable[..., Call], dict[str, Any]]:
    """A builder, and what `case` and `peer` take beside it."""

    def build(m: int, k: int, n: int) -> Call:
        from fastsparse import ops

        x, bias = row_operands(m, k, n)
        pack = packed(pattern, format, k, n).clone()
        return lambda: ops.sparse_linear(x, pack, bias)

    def weight_bytes(m: int, k: int, n: int) -> int:
        return packed(pattern, format, k, n).numel()

    return build, {**checked(pattern), "weight_bytes": weight_bytes, "available": missing}


def dense(pattern: str) -> tuple[Callable[..., Call], dict[str, Any]]:
    def build(m: int, k: int, n: int) -> Call:
        x, bias = row_operands(m, k, n)
        weight = weight_of(pattern, k, n).clone()
        return lambda: functional.linear(x, weight, bias)

    return build, {**checked(pattern), "weight_bytes": lambda m, k, n: 4 * n * k, "compute": "fp32"}


def checked(pattern: str) -> dict[str, Any]:
    def check(got: Tensor, m: int, k: int, n: int) -> Check:
        x, bias = row_operands(m, k, n)
        want = x[:CHECKED].double() @ weight_of(pattern, k, n).double().t() + bias.double()
        error = float((got[:CHECKED].double() - want).norm() / want.norm())
        return Check(error, 1e-5, "relative to float64, Frobenius norm")

    return {"check": check, "mallocs": DEFAULT, "share": 0.3}


def register() -> None:
    """Called by the family's file at each import of it: registering is what an import is for."""
    for name, format in PATTERNS:
        build, arguments = ours(format, format)
        case(name, shapes=SHAPES, unit="GOP/s", work=work, quick=quick, **arguments)(build)
        for other, most in OTHERS:
            build, arguments = ours(format, other)
            peer(name, f"fastsparse {other}", kind="ours", wants=lambda m, k, n, most=most: m <= most, **arguments)(
                build
            )
        build, arguments = dense(format)
        peer(name, "torch fp32", kind="fp32", **arguments)(build)
