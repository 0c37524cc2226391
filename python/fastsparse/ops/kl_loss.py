"""The family kl_loss: distillation losses over logits, loss and gradient in one pass.

The contract of the kernels is csrc/kl_loss/kl_loss.h, the float64 oracle fastsparse.reference.kl_loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

REDUCTIONS = {"batchmean": 0, "sum": 1, "mean": 2, "none": 3}

_kl_div = torch.ops.fastsparse.kl_div.default
_kl_div_train = torch.ops.fastsparse.kl_div_train.default
_distill_loss = torch.ops.fastsparse.distill_loss.default
_distill_loss_train = torch.ops.fastsparse.distill_loss_train.default


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    direction: str = "forward",
) -> Tensor:
    """KL(teacher || student) at a temperature, times temperature**2, from logits.

    With "batchmean", "sum" and "mean" this is
    `F.kl_div(log_softmax(s / T, -1), softmax(t / T, -1), reduction=reduction) * T**2`.

    Args:
        student_logits: float32, bfloat16 or float16 [..., C], C >= 1; any strides.
        teacher_logits: the same shape, dtype and device; must not require a gradient: there is none for it.
        temperature: in [1e-6, 1e6].
        reduction: over the row losses, L = temperature**2 * sum over classes:
            "batchmean": their sum / the size of the first dimension, as torch (so [B, S, C] is divided by B). Needs a
            batch dimension. "sum": their sum. "mean": their sum / all elements (rows * C), as torch. "none": the row
            losses themselves, [...]; torch's "none" keeps the classes apart, this one does not.
        direction: "forward"; others are not there yet.

    Returns:
        float32, whatever the logits' dtype: a number, or [...] for "none". Differentiable in `student_logits`, once.
        No rows: 0 for every reduction to a number (torch's means of nothing are NaN), and a gradient of no elements.
        A class with -inf in the teacher adds 0, also where the student has -inf too (torch: NaN); -inf in the student
        where the teacher is finite gives inf. A row with NaN or +inf, or of -inf only, gives NaN, and a gradient of
        NaN in that row alone.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    try:
        code = REDUCTIONS[reduction]
    except (KeyError, TypeError):
        raise ValueError(f"kl_div: reduction must be 'batchmean', 'sum', 'mean' or 'none', got {reduction!r}") from None
    if direction != "forward":
        raise ValueError(f"kl_div: direction must be 'forward' (others are not there yet), got {direction!r}")
    if torch.is_grad_enabled():
        _refuse_teacher_gradient("kl_div", teacher_logits)
        if student_logits.requires_grad:
            return _kl_div_train(student_logits, teacher_logits, temperature, code)[0]
    return _kl_div(student_logits, teacher_logits, temperature, code)


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
    return_parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """alpha * T**2 * KL(teacher || student at temperature T) + (1 - alpha) * cross_entropy(student, target).

    Both are means over the rows whose target is not `ignore_index`. The cross-entropy is at temperature 1.

    Args:
        student_logits: float32, bfloat16 or float16 [..., C], C >= 1; any strides.
        teacher_logits: the same shape, dtype and device; must not require a gradient: there is none for it.
        target: int64 [...]; in [0, C) or `ignore_index`. On CUDA another value is not refused (a look at it would wait
            for the device): it gives a loss of NaN, and a gradient of NaN in its row.
        temperature: in [1e-6, 1e6]. alpha: in [0, 1].
        ignore_index: rows with this target count in neither part; their logits are not read, their gradient is 0.
        return_parts: also give the two means.

    Returns:
        float32, a number; with `return_parts` (loss, T**2 * KL, cross-entropy), of which only the first is
        differentiable (in `student_logits`, once). No rows, or all of them ignored: 0, and a gradient of zeros: a batch
        of padding must not end a training run (torch's mean of nothing is NaN). Logits that are not finite: see
        `kl_div`; -inf at the target gives inf.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    if torch.is_grad_enabled():
        _refuse_teacher_gradient("distill_loss", teacher_logits)
        if student_logits.requires_grad:
            loss, kl, ce, _ = _distill_loss_train(
                student_logits, teacher_logits, target, temperature, alpha, ignore_index
            )
            return (loss, kl, ce) if return_parts else loss
    loss, kl, ce = _distill_loss(student_logits, teacher_logits, target, temperature, alpha, ignore_index)
    return (loss, kl, ce) if return_parts else loss


def _refuse_teacher_gradient(op: str, teacher_logits: Tensor) -> None:
    if teacher_logits.requires_grad:
        raise ValueError(
            f"{op}: teacher_logits must not require a gradient, got one that does: there is none for the teacher "
            "(compute it under torch.no_grad(), or detach it)"
        )


def _check(op: str, student: Tensor, teacher: Tensor, target: Tensor | None = None) -> None:
    """With one argument on another device the dispatcher may choose the fake kernel, past the checks in C++."""
    for name, tensor in (("teacher_logits", teacher), ("target", target)):
        if tensor is not None and tensor.device != student.device:
            raise ValueError(f"{op}: {name} must be on {student.device} like the first argument, got {tensor.device}")


def _grad_like(student: Tensor) -> Tensor:
    # Contiguous, as the kernel makes it; float32 for float16, which could not hold it unscaled.
    return student.new_empty(student.shape, dtype=torch.float32 if student.dtype == torch.float16 else student.dtype)


@torch.library.register_fake("fastsparse::kl_div")
def _(student: Tensor, teacher: Tensor, temperature: float, reduction: int) -> Tensor:
    _check("kl_div", student, teacher)
    shape = student.shape[:-1] if reduction == REDUCTIONS["none"] else ()
    return student.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("fastsparse::kl_div_train")
def _(student: Tensor, teacher: Tensor, temperature: float, reduction: int) -> tuple[Tensor, Tensor]:
    _check("kl_div", student, teacher)
    shape = student.shape[:-1] if reduction == REDUCTIONS["none"] else ()
    return student.new_empty(shape, dtype=torch.float32), _grad_like(student)


@torch.library.register_fake("fastsparse::distill_loss")
def _(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check("distill_loss", student, teacher, target)
    loss, kl, ce = (student.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, kl, ce


@torch.library.register_fake("fastsparse::distill_loss_train")
def _(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float, alpha: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check("distill_loss", student, teacher, target)
    loss, kl, ce = (student.new_empty((), dtype=torch.float32) for _ in range(3))
    return loss, kl, ce, _grad_like(student)


# The gradient comes out of the forward pass, and the first backward takes it and scales it where it lies: a copy would
# cost as much as the loss. So it is no saved tensor, and a second backward (retain_graph) computes it anew.


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.settings = tuple(value for value in inputs if not isinstance(value, Tensor))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.gradient = output[-1]


def _scaled(ctx: Any, again: Any, by: Tensor, dtype: torch.dtype) -> Tensor:
    if torch.is_grad_enabled():
        raise RuntimeError("kl_div and distill_loss have no second derivative: create_graph must be False")
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        gradient = again(*ctx.saved_tensors, *ctx.settings)[-1]
    if type(by) is not Tensor:  # being traced: no values to look at, and nothing to be changed in place
        return (gradient * by[..., None]).to(dtype) if by.dim() else (gradient * by).to(dtype)
    if by.dim():
        gradient.mul_(by[..., None])
    elif by.is_cuda or by.item() != 1:  # on CUDA a look at the value would wait for the device
        gradient.mul_(by)
    return gradient.to(dtype)


def _kl_backward(ctx: Any, by: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if by is None:
        return None, None, None, None
    return _scaled(ctx, _kl_div_train, by, ctx.saved_tensors[0].dtype), None, None, None


def _distill_backward(ctx: Any, by: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if by is None:
        return None, None, None, None, None, None
    return _scaled(ctx, _distill_loss_train, by, ctx.saved_tensors[0].dtype), None, None, None, None, None


torch.library.register_autograd("fastsparse::kl_div_train", _kl_backward, setup_context=_setup)
torch.library.register_autograd("fastsparse::distill_loss_train", _distill_backward, setup_context=_setup)
