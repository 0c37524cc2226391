"""Distiller: a student learns from a teacher through the fused loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsparse import ops, select


class DistillOutput(NamedTuple):
    """What one call of a Distiller gives; float32 numbers, of which only `loss` carries a gradient."""

    loss: Tensor
    kl: Tensor  # T^2 * KL(teacher || student)
    cross_entropy: Tensor | None  # None without a target
    logits: Tensor  # the student's


class Distiller:
    """The loss of a student that learns from a teacher (Hinton et al., 2015, "Distilling the Knowledge").

    loss = alpha * T^2 * KL(teacher || student at temperature T) + (1 - alpha) * cross_entropy(student, target),
    computed with its gradient in one pass (`ops.distill_loss`).

        distiller = Distiller(teacher, student, temperature=4.0, alpha=0.9)
        optimizer = torch.optim.AdamW(student.parameters())
        distiller(images, labels).loss.backward()

    The teacher runs in evaluation mode under no_grad; its parameters, flags and training modes are left as they are.
    The student runs as it is.

    Attributes:
        teacher, student, temperature, alpha, ignore_index: as given.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        temperature: float = 1.0,
        alpha: float = 0.5,
        ignore_index: int = -100,
    ) -> None:
        """
        Args:
            teacher, student: called with the same inputs, give logits of the same shape and dtype [..., C].
            temperature: in [1e-6, 1e6].
            alpha: the weight of the teacher's part, in [0, 1].
            ignore_index: rows with this target count in neither part.

        Raises:
            TypeError: a model is no nn.Module.
            ValueError: a number out of range; or teacher and student share a parameter or a buffer: what the student
                learns would change the teacher.
        """
        for name, model in (("teacher", teacher), ("student", student)):
            if not isinstance(model, nn.Module):
                raise TypeError(f"Distiller: {name} must be an nn.Module, got {type(model).__name__}")
        if not 1e-6 <= temperature <= 1e6:
            raise ValueError(f"Distiller: temperature must be in [1e-6, 1e6], got {temperature}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"Distiller: alpha must be in [0, 1], got {alpha}")
        shared = _shared(teacher, student)
        if shared is not None:
            raise ValueError(
                f"Distiller: teacher and student must not share memory, got teacher.{shared[0]} = student.{shared[1]}: "
                "training the student would change the teacher (copy.deepcopy makes one of its own)"
            )
        self.teacher = teacher
        self.student = student
        self.temperature = temperature
        self.alpha = alpha
        self.ignore_index = ignore_index

    def __call__(self, inputs: Any, target: Tensor | None = None) -> DistillOutput:
        """
        Args:
            inputs: a tensor, or a tuple or mapping of the arguments of both models.
            target: int64 [...], classes; may be missing only if alpha is 1.

        Raises:
            ValueError: no target though alpha is below 1; inputs or logits that do not fit.
        """
        if target is None and self.alpha != 1:
            raise ValueError(f"Distiller: target must be given unless alpha is 1, got None with alpha={self.alpha}")
        args, kwargs = select.first_batch(inputs)
        with torch.no_grad(), select.evaluating(self.teacher):
            taught = self.teacher(*args, **kwargs)
        logits = self.student(*args, **kwargs)
        for name, value in (("teacher", taught), ("student", logits)):
            if not isinstance(value, Tensor):
                raise ValueError(f"Distiller: {name} must give a tensor of logits, got {type(value).__name__}")
        if target is None:
            # Each row counts, as in distill_loss: a mean over rows, not over the first dimension.
            flat = [value.reshape(-1, value.shape[-1]) for value in (logits, taught)]
            loss = ops.kl_div(flat[0], flat[1], self.temperature)
            return DistillOutput(loss, loss.detach(), None, logits)
        loss, kl, cross_entropy = ops.distill_loss(
            logits, taught, target, self.temperature, self.alpha, self.ignore_index, return_parts=True
        )
        return DistillOutput(loss, kl, cross_entropy, logits)


def _shared(teacher: nn.Module, student: nn.Module) -> tuple[str, str] | None:
    """The names of a parameter or buffer that lies in the same memory in both, or None."""
    known: dict[object, str] = {}
    for name, value in _tensors(teacher):
        known.setdefault(_memory(value), name)
    for name, value in _tensors(student):
        other = known.get(_memory(value))
        if other is not None:
            return other, name
    return None


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def _memory(value: Tensor) -> object:
    """The whole storage: views of one memory are shared memory too."""
    if nn.parameter.is_lazy(value) or value.is_meta or value.numel() == 0:
        return id(value)
    return value.device, value.untyped_storage().data_ptr()
