"""What `prune_` and `to_sparse_` can be asked for."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastsparse.convert import Conversion
from fastsparse.nn import SparseLinear
from fastsparse.ops._pack import Rows


def check_fraction(where: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{where}: {name} must be a number in [0, 1], got {value!r}")


def _zeros(weight: Tensor) -> float:
    return 1 - int(torch.count_nonzero(weight)) / weight.numel()


@dataclass(frozen=True)
class Magnitude:
    """The weights of the smallest magnitude go (Han et al., 2015, "Learning both Weights and Connections").

    Attributes:
        sparsity: the part of the weights that becomes zero, in [0, 1].
        scope: "layer": so much of every layer; "global": so much of all layers together, wherever it falls.
        min_weights: layers with fewer weights stay as they are.
        skip: names of layers that stay as they are, as in `named_modules()`; `*` and `?` match as in file names.
    """

    sparsity: float
    scope: str = "layer"
    min_weights: int = 0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_fraction("Magnitude", "sparsity", self.sparsity)
        if self.scope not in ("layer", "global"):
            raise ValueError(f"Magnitude: scope must be 'layer' or 'global', got {self.scope!r}")
        if self.min_weights < 0:
            raise ValueError(f"Magnitude: min_weights must be at least 0, got {self.min_weights}")
        if isinstance(self.skip, str):
            raise ValueError(f"Magnitude: skip must be a tuple of names, got the string {self.skip!r}")


@dataclass(frozen=True)
class Sparse(Conversion):
    """float32 weights without their zeros (`nn.SparseLinear`).

    Attributes:
        format: as for `ops.pack`; "auto" chooses for the zeros and for the rows that the layer sees.
        min_sparsity: layers with a smaller part of zeros are not considered, in [0, 1].
        margin, min_weights, skip, measure: see `convert.Conversion`.
    """

    format: str = "auto"
    min_sparsity: float = 0.2

    name: ClassVar[str] = "sparse"
    title: ClassVar[str] = "sparse float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("Sparse", "min_sparsity", self.min_sparsity)

    def why_not(self, linear: nn.Linear) -> str | None:
        weight = linear.weight
        if weight.dtype != torch.float32:
            return f"its weight is {weight.dtype}, and the sparse kernels are float32"
        zeros = _zeros(weight)
        if zeros < self.min_sparsity:
            return f"has {100 * zeros:.0f}% zeros, fewer than min_sparsity={self.min_sparsity:g}"
        return None

    def kind(self, linear: nn.Linear) -> Hashable:
        return round(100 * _zeros(linear.weight))  # per cent

    def build(self, linear: nn.Linear, rows: Rows) -> nn.Module:
        return SparseLinear.from_linear(linear, self.format, rows)
