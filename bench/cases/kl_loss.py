"""kl_loss against torch.compile and eager torch: kl_div and distill_loss, forward and backward, float32.

One call is the loss and the gradient of the student's logits. Figures count the bytes that must move, 12 a logit: both
logits read, the gradient written. As `weight_bytes` they also decide the level the logits lie in, and how many copies
rotate. The student's logits are the teacher's and noise, KL about 0.5 at T = 2: rows below 0.1 would be summed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from bench.registry import Call, Check, case, peer

SHAPES = [{"m": m, "c": c} for m, c in ((1024, 1000), (4096, 1000), (32, 32000), (128, 32000))]
TEMPERATURE, ALPHA = 2.0, 0.5
CHECKED_ROWS = 32  # of the gradient; the loss is that of all rows
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 1e-5
PEER_LOSS_TOLERANCE = 1e-4  # float32 sums, as torch makes them

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # student, teacher, target


class Logits(NamedTuple):
    student: Tensor  # f32[M, C]
    teacher: Tensor
    target: Tensor  # s64[M]


def quick(m: int, c: int) -> bool:
    return m in (1024, 32)


def moved(m: int, c: int) -> int:
    return 12 * m * c


@functools.lru_cache(maxsize=1)
def logits(m: int, c: int) -> Logits:
    g = torch.Generator().manual_seed(m + c)
    teacher = 3 * torch.randn(m, c, generator=g)
    student = teacher + 2 * torch.randn(m, c, generator=g)
    return Logits(student, teacher, torch.randint(0, c, (m,), generator=g))


def fastsparse_missing() -> str | None:
    try:
        from fastsparse import ops  # noqa: F401
    except Exception as e:
        return f"fastsparse can't be imported: {e}"
    return None


# ---- what a user writes in torch ----


def plain_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    log_p = functional.log_softmax(student / TEMPERATURE, -1)
    p = functional.softmax(teacher / TEMPERATURE, -1)
    return functional.kl_div(log_p, p, reduction="batchmean") * TEMPERATURE**2


def log_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The same with log_target, which torch.compile makes faster code of."""
    log_p = functional.log_softmax(student / TEMPERATURE, -1)
    log_q = functional.log_softmax(teacher / TEMPERATURE, -1)
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * TEMPERATURE**2


def plain_distill(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return ALPHA * plain_kl(student, teacher, target) + (1 - ALPHA) * functional.cross_entropy(student, target)


def log_distill(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return ALPHA * log_kl(student, teacher, target) + (1 - ALPHA) * functional.cross_entropy(student, target)


# ---- checks ----


@functools.lru_cache(maxsize=1)
def _oracle(loss: Loss, m: int, c: int) -> tuple[float, Tensor]:
    """The loss, and the first rows of its gradient, in float64."""
    o = logits(m, c)
    total = 0.0
    gradients: list[Tensor] = []
    for begin in range(0, m, CHECKED_ROWS):  # a few rows at a time: float64 of all would be much memory
        rows = slice(begin, begin + CHECKED_ROWS)
        student = o.student[rows].double().requires_grad_(not gradients)
        part = loss(student, o.teacher[rows].double(), o.target[rows]) * (len(student) / m)
        if not gradients:
            gradients += torch.autograd.grad(part, student)
        total += float(part.detach())
    return total, gradients[0]


def _check(loss: Loss, loss_tolerance: float) -> Callable[..., Check]:
    """The loss, relative to float64. A gradient that is off makes it wrong, whatever the loss."""

    def check(got: tuple[Tensor, Tensor], m: int, c: int) -> Check:
        want, gradient = _oracle(loss, m, c)
        off = float((got[1][:CHECKED_ROWS].double() - gradient).norm() / gradient.norm())
        if not off <= GRADIENT_TOLERANCE:
            return Check(off, GRADIENT_TOLERANCE, "gradient relative to float64, Frobenius norm")
        return Check(abs(float(got[0].detach()) - want) / want, loss_tolerance, "loss relative to float64")

    return check


# ---- builders ----


def both_ways(loss: Loss, m: int, c: int) -> Call:
    """Called twice before it is timed: torch.compile compiles in its first call, which is no figure."""
    o = logits(m, c)
    student, teacher = o.student.clone().requires_grad_(), o.teacher.clone()

    def call() -> tuple[Tensor, Tensor]:
        student.grad = None
        value = loss(student, teacher, o.target)
        value.backward()
        assert student.grad is not None
        return value, student.grad

    call()
    call()
    return call


def ours_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    from fastsparse import ops

    return ops.kl_div(student, teacher, TEMPERATURE)


def ours_distill(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    from fastsparse import ops

    loss = ops.distill_loss(student, teacher, target, TEMPERATURE, ALPHA)
    assert isinstance(loss, Tensor)
    return loss


@functools.lru_cache(maxsize=1)
def _compiled(loss: Loss, m: int, c: int) -> Loss:
    """One for all copies of a shape."""
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def _compiled_both_ways(loss: Loss, m: int, c: int) -> Call:
    return both_ways(_compiled(loss, m, c), m, c)


for _name, _ours, _plain, _log in (
    ("kl_div both ways", ours_kl, plain_kl, log_kl),
    ("distill_loss both ways", ours_distill, plain_distill, log_distill),
):
    case(
        _name,
        shapes=SHAPES,
        unit="GB/s",
        work=moved,
        quick=quick,
        weight_bytes=moved,
        check=_check(_plain, LOSS_TOLERANCE),
        available=fastsparse_missing,
    )(functools.partial(both_ways, _ours))
    _right = _check(_plain, PEER_LOSS_TOLERANCE)
    peer(_name, "torch.compile", weight_bytes=moved, check=_right)(functools.partial(_compiled_both_ways, _plain))
    peer(_name, "torch.compile, log_target", weight_bytes=moved, check=_right)(
        functools.partial(_compiled_both_ways, _log)
    )
    peer(_name, "torch eager", kind="bare", weight_bytes=moved, check=_right)(functools.partial(both_ways, _plain))
