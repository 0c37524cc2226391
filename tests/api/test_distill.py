"""Distiller: the loss against its formula in float64, what is refused, and that the teacher stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsparse.distill import Distiller

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 4, 2, -100, 1, 3])


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 5), nn.Dropout(0.5)), nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))


def formula(student: Tensor, teacher: Tensor, target: Tensor | None, t: float, alpha: float) -> Tensor:
    s, q = student.double(), teacher.double()
    kl = F.kl_div(F.log_softmax(s / t, -1), F.log_softmax(q / t, -1), reduction="none", log_target=True).sum(-1) * t**2
    if target is None:
        return kl.mean()
    return alpha * kl[target != -100].mean() + (1 - alpha) * F.cross_entropy(s, target)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (4.0, 0.9), (2.0, 0.0), (2.0, 1.0)])
def test_the_loss_and_its_gradient(temperature: float, alpha: float) -> None:
    teacher, student = networks()
    output = Distiller(teacher, student, temperature, alpha)(X, TARGET)
    output.loss.backward()
    taught = teacher.eval()(X).detach()
    wanted = formula(student(X), taught, TARGET, temperature, alpha)
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.logits, student(X))
    (gradient,) = torch.autograd.grad(wanted, student[0].weight)
    torch.testing.assert_close(student[0].weight.grad, gradient, rtol=1e-4, atol=1e-6)
    assert output.cross_entropy is not None
    parts = alpha * output.kl + (1 - alpha) * output.cross_entropy
    torch.testing.assert_close(parts, output.loss.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
def test_without_a_target_only_the_teacher_counts(shape: tuple[int, ...]) -> None:
    teacher, student = networks()
    output = Distiller(teacher, student, 3.0, alpha=1.0)(X.reshape(shape))
    wanted = formula(student(X), teacher.eval()(X), None, 3.0, 1.0)
    torch.testing.assert_close(output.loss.double(), wanted, rtol=1e-5, atol=1e-6)
    assert output.cross_entropy is None
    output.loss.backward()
    assert student[0].weight.grad is not None


def test_the_teacher_stays_as_it_is() -> None:
    teacher, student = networks()
    teacher.train()
    teacher[0].eval()
    before = copy.deepcopy(teacher.state_dict())
    random = torch.get_rng_state()
    Distiller(teacher, student, 2.0)(X, TARGET).loss.backward()
    assert torch.equal(torch.get_rng_state(), random)  # no dropout
    assert [module.training for module in teacher.modules()] == [True, False, True]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_inputs_as_tuple_and_mapping() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 5)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a + b)

    distiller = Distiller(Sum(), Sum())
    first = distiller((X, X), TARGET).loss
    assert torch.equal(first, distiller({"a": X, "b": X}, TARGET).loss)


# Refused


def tied(kind: str) -> tuple[nn.Module, nn.Module]:
    teacher, student = networks()
    if kind == "parameter":
        student[2].bias = teacher[0].bias
    elif kind == "module":
        student = nn.Sequential(teacher[0], nn.Linear(5, 5))
    elif kind == "view":
        student[2].bias = nn.Parameter(teacher[0].weight.detach()[0, :5])
    elif kind == "buffer":
        teacher.register_buffer("table", torch.ones(3))
        student.register_buffer("table", teacher.table)
    elif kind == "itself":
        student = teacher
    return teacher, student


@pytest.mark.parametrize("kind", ["parameter", "module", "view", "buffer", "itself"])
def test_shared_memory(kind: str) -> None:
    with pytest.raises(ValueError, match=r"Distiller: teacher and student must not share memory, got teacher\."):
        Distiller(*tied(kind))


def test_a_copy_is_not_shared() -> None:
    teacher, _ = networks()
    Distiller(teacher, copy.deepcopy(teacher))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, r"temperature must be in \[1e-6, 1e6\], got 0"),
        ({"temperature": float("nan")}, r"temperature must be in \[1e-6, 1e6\], got nan"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Distiller: {message}"):
        Distiller(*networks(), **arguments)


def test_other_errors() -> None:
    teacher, student = networks()
    with pytest.raises(TypeError, match=r"Distiller: student must be an nn\.Module, got function"):
        Distiller(teacher, lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"target must be given unless alpha is 1, got None with alpha=0\.5"):
        Distiller(teacher, student)(X)
    with pytest.raises(ValueError, match=r"distill_loss: teacher_logits must .*\[6, 4\]"):
        Distiller(nn.Linear(16, 4), student)(X, TARGET)
    with pytest.raises(ValueError, match="Distiller: student must give a tensor of logits, got tuple"):
        Distiller(teacher, _Pair())(X, TARGET)


class _Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x
