"""The oracle of kl_loss: the formulas in float64, plain torch, differentiable by torch's own autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_rows(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of each row, without the factor temperature**2; float64 [...].

    A class that the teacher masks with -inf adds 0, whatever the student has there.
    """
    student = torch.log_softmax(student_logits.double() / temperature, -1)
    teacher = torch.log_softmax(teacher_logits.double() / temperature, -1)
    masked = teacher_logits == -float("inf")
    # Masked before the product: 0 * inf would be NaN, and so would its gradient.
    difference = torch.where(masked, 0.0, teacher) - torch.where(masked, 0.0, student)
    return (teacher.exp() * difference).sum(-1)


def kl_div(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, reduction: str = "batchmean"
) -> Tensor:
    """As ops.kl_div, in float64."""
    rows = kl_rows(student_logits, teacher_logits, temperature) * temperature**2
    if reduction == "none":
        return rows
    divisors = {"batchmean": student_logits.shape[0], "sum": 1, "mean": student_logits.numel()}
    return rows.sum() / max(divisors[reduction], 1)


def distill_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    alpha: float = 0.5,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ops.distill_loss with return_parts, in float64: (loss, temperature**2 * KL, cross-entropy)."""
    classes = student_logits.shape[-1]
    valid = target.reshape(-1) != ignore_index
    student = student_logits.reshape(-1, classes)[valid]
    teacher = teacher_logits.reshape(-1, classes)[valid]
    count = max(int(valid.sum()), 1)
    kl = kl_rows(student, teacher, temperature).sum() * temperature**2 / count
    log_probabilities = torch.log_softmax(student.double(), -1)
    ce = -log_probabilities.gather(-1, target.reshape(-1)[valid][:, None]).sum() / count
    return alpha * kl + (1 - alpha) * ce, kl, ce
