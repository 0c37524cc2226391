"""sparse_matmul, training: forward, gradient to x, gradient to the live values, and the refresh of both packs.

Beside them the dense three (MKL), without a mask. Figures count dense work: 3 * 2 M N K operations, whatever is zero.
bench/cases/sparse_matmul.py calls register().
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from bench.registry import Call, Check, case, peer
from bench.sparse_bars import WEIGHTS

NAME = "sparse training"
SHAPES = [{"m": 512, "k": k, "n": n, "zeros": zeros} for k, n in WEIGHTS for zeros in (80, 90, 95)]
CHECKED = 16  # rows and outputs held against float64: all of them would take longer than the bench


@functools.lru_cache(maxsize=1)
def operands(m: int, k: int, n: int, zeros: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K], the gradient [M, N], W [N, K] and the bias [N]."""
    g = torch.Generator().manual_seed(m * 1_000_003 + k * 1_009 + n + zeros)
    weight = torch.randn(n, k, generator=g)
    weight *= torch.rand(n, k, generator=g) * 100 >= zeros
    bias = torch.randn(n, generator=g)
    return torch.randn(m, k, generator=g), torch.randn(m, n, generator=g), weight, bias


def work(m: int, k: int, n: int, zeros: int) -> float:
    return 6.0 * m * n * k


def sparse_bytes(m: int, k: int, n: int, zeros: int) -> int:
    return int(n * k * (100 - zeros) / 100 * 18)  # the structure, values and their gradient


def dense_bytes(m: int, k: int, n: int, zeros: int) -> int:
    return 8 * n * k


def check(got: tuple[Tensor, ...], m: int, k: int, n: int, zeros: int) -> Check:
    x, grad, weight, bias = operands(m, k, n, zeros)
    y, grad_x, grad_values = got
    few = slice(0, CHECKED)
    live = weight[few] != 0
    pairs = [
        (y[few], x[few].double() @ weight.double().t() + bias.double()),
        (grad_x[few], grad[few].double() @ weight.double()),
        (
            grad_values[few][live] if grad_values.dim() == 2 else grad_values[: int(live.sum())],
            (grad[:, few].double().t() @ x.double())[live],
        ),
    ]
    errors = [float((a.detach().double() - b).norm() / b.norm()) for a, b in pairs]
    return Check(max(errors), 1e-5, "relative to float64, Frobenius norm, the worst of the three")


def missing() -> str | None:
    try:
        from fastsparse import ops
    except Exception as e:
        return f"fastsparse can't be imported: {e}"
    return None if hasattr(ops, "sparse_structure") else "this fastsparse has no sparse training"


def ours(m: int, k: int, n: int, zeros: int) -> Call:
    from fastsparse import ops

    x, grad, weight, bias = operands(m, k, n, zeros)
    x = x.detach().requires_grad_()
    structure, values = ops.sparse_structure(weight)
    values.requires_grad_()

    def call() -> tuple[Tensor, ...]:
        y = ops.sparse_linear(x, structure, bias, values=values)
        return (y, *torch.autograd.grad(y, (x, values), grad))

    return call


def dense(m: int, k: int, n: int, zeros: int) -> Call:
    x, grad, weight, bias = operands(m, k, n, zeros)
    x, weight = x.detach().requires_grad_(), weight.clone().requires_grad_()

    def call() -> tuple[Tensor, ...]:
        y = functional.linear(x, weight, bias)
        return (y, *torch.autograd.grad(y, (x, weight), grad))

    return call


def register() -> None:
    case(
        NAME,
        shapes=SHAPES,
        unit="GOP/s",
        work=work,
        quick=lambda m, k, n, zeros: (k, n, zeros) == (768, 768, 90),
        over="zeros",
        weight_bytes=sparse_bytes,
        check=check,
        available=missing,
    )(ours)
    peer(NAME, "torch fp32", kind="fp32", compute="fp32", weight_bytes=dense_bytes, check=check)(dense)
    peer(NAME, "fastsparse, two threads", kind="threads", threads=2, check=check, available=missing)(ours)
