"""convert_: several conversions compete for one layer. What one conversion does is in test_quantize and test_prune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fastsparse.convert import Conversion, convert_
from fastsparse.nn import Int8Linear, SparseLinear
from fastsparse.prune import Sparse
from fastsparse.quantize import Int8Dynamic
from fastsparse.select import Candidate

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
BOTH = (Int8Dynamic(), Sparse())


def mlp(zeros: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight *= torch.rand_like(layer.weight) >= zeros
    return model


def seconds(table: dict[tuple[str, str], float]) -> Any:
    """A clock that reads (layer, implementation) off a table; what is not in it takes 4 us."""
    return lambda candidate: table.get((candidate.layer, candidate.implementation), 4e-6)


def test_each_layer_gets_the_fastest() -> None:
    model = mlp()
    report = convert_(
        model, BOTH, X, measure=seconds({("0", "int8"): 2e-6, ("2", "int8"): 2e-6, ("2", "sparse"): 1e-6})
    )
    assert [type(layer) for layer in model[::2]] == [Int8Linear, SparseLinear, nn.Linear]
    assert [row["chosen"] for row in report.rows] == ["int8", "sparse", "dense"]
    assert [row["speed-up"] for row in report.rows] == [2, 4, 1]
    assert report.columns == ["layer", "shape", "dense us", "int8 us", "sparse us", "speed-up", "chosen", "why"]
    assert report.rows[1]["why"] == "sparse is 4.00x as fast"
    assert report.title == "int8, dynamic per token or sparse float32"


def test_layers_alike_are_decided_together_but_for_their_zeros() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    with torch.no_grad():
        for layer, zeros in zip(model, (8, 8, 8, 14), strict=True):
            layer.weight[:, :zeros] = 0
    table = {("0", "sparse"): 2e-6, ("1", "sparse"): 2e-6, ("2", "sparse"): 5e-6, ("3", "sparse"): 5e-6}
    convert_(model, [Sparse()], X, measure=seconds(table))
    assert [type(layer) for layer in model] == [SparseLinear] * 3 + [nn.Linear]


def test_the_margin_is_that_of_the_fastest() -> None:
    table = {("2", "int8"): 2.5e-6, ("2", "sparse"): 2e-6}
    model = mlp()
    convert_(model, (Int8Dynamic(margin=1.01), Sparse(margin=3)), X, measure=seconds(table))
    assert type(model[2]) is nn.Linear
    convert_(model, (Int8Dynamic(margin=3), Sparse(margin=1.01)), X, measure=seconds(table))
    assert type(model[2]) is SparseLinear


def test_a_conversion_that_cannot_leaves_the_layer_to_the_others() -> None:
    model = mlp(zeros=0)
    with torch.no_grad():
        model[2].weight[:, ::2] = 0
    tried: list[tuple[str, str]] = []

    def measure(candidate: Candidate) -> float:
        tried.append((candidate.layer, candidate.implementation))
        return 4e-6 if candidate.implementation == "dense" else 2e-6

    convert_(model, (Int8Dynamic(skip=("4",)), Sparse()), X, measure=measure)
    assert ("0", "sparse") not in tried
    assert ("2", "sparse") in tried
    assert [type(layer) for layer in model[::2]] == [Int8Linear, Int8Linear, nn.Linear]


def test_reasons_are_told_apart_where_they_differ() -> None:
    report = convert_(mlp(zeros=0), (Int8Dynamic(skip=("4",)), Sparse(skip=("0", "4"))), X, measure=seconds({}))
    assert report.rows[2]["why"] == "kept dense: is in skip"
    report = convert_(mlp(zeros=0), (Int8Dynamic(min_weights=999), Sparse()), X, measure=seconds({}))
    assert report.rows[0]["why"] == (
        "kept dense: int8: has 512 weights, fewer than min_weights=999; "
        "sparse: has 0% zeros, fewer than min_sparsity=0.2"
    )


def test_one_conversion_of_ones_own() -> None:
    @dataclass(frozen=True)
    class Half(Conversion):
        name: ClassVar[str] = "half"
        title: ClassVar[str] = "bfloat16"

        def why_not(self, linear: nn.Linear) -> str | None:
            return None if linear.bias is not None else "has no bias"

        def build(self, linear: nn.Linear, rows: int | None) -> nn.Module:
            assert rows == 3
            return nn.Sequential(Cast(torch.bfloat16), nn.Linear(*linear.weight.shape[::-1]).bfloat16())

    class Cast(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.to(self.dtype)

    model = nn.Sequential(mlp(), nn.Identity())
    report = convert_(model, [Half(skip=("0.0", "0.2"))], X, measure=seconds({("0.4", "half"): 1e-6}))
    assert [row["chosen"] for row in report.rows] == ["dense", "dense", "half"]
    assert model(X).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("conversions", "error", "message"),
    [
        ((), ValueError, "conversions must be at least one, and one of each kind at most, got"),
        ((Sparse(), Sparse()), ValueError, "conversions must be at least one, and one of each kind at most, got"),
        (("int8",), TypeError, "conversions must be of Conversion's kinds .* got str"),
        ((Int8Dynamic(measure=False), Sparse()), ValueError, "only measuring can choose between int8 and sparse"),
    ],
)
def test_refused(conversions: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"convert_: {message}"):
        convert_(mlp(), conversions, X)


def test_no_data() -> None:
    with pytest.raises(ValueError, match=r"convert_: without data nothing can be measured: .*Sparse\(measure=False\)"):
        convert_(mlp(), [Sparse()])
