"""What `prune_` and `to_sparse_` can be asked for."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastsparse.convert import Conversion
from fastsparse.nn import SparseInt8Linear, SparseLinear
from fastsparse.nn.int8_linear import MAX_K
from fastsparse.ops._pack import SHAPED, Rows


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
        pattern: None: single weights. "RxC", as in "4x4": whole blocks of R outputs x C inputs, those of the smallest
            mean magnitude; `ops.pack` has formats for 1x4, 4x4, 8x8, 16x16 and 16x1. "N:M", as in "2:4": in every M
            consecutive inputs the N largest stay; `sparsity` must be 1 - N/M and scope "layer". `ops.pack` has formats
            for 1:4, 2:4 and 4:8. The inputs of a convolution are its weight.flatten(1).
        min_weights: layers with fewer weights stay as they are.
        skip: names of layers that stay as they are, as in `named_modules()`; `*` and `?` match as in file names.
    """

    sparsity: float
    scope: str = "layer"
    min_weights: int = 0
    skip: tuple[str, ...] = ()
    pattern: str | None = None

    def __post_init__(self) -> None:
        check_fraction("Magnitude", "sparsity", self.sparsity)
        self._check_pattern()
        if self.scope not in ("layer", "global"):
            raise ValueError(f"Magnitude: scope must be 'layer' or 'global', got {self.scope!r}")
        if self.min_weights < 0:
            raise ValueError(f"Magnitude: min_weights must be at least 0, got {self.min_weights}")
        if isinstance(self.skip, str):
            raise ValueError(f"Magnitude: skip must be a tuple of names, got the string {self.skip!r}")

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        found = _PATTERN.fullmatch(self.pattern) if isinstance(self.pattern, str) else None
        if found is None:
            raise ValueError(
                f"Magnitude: pattern must be None, 'RxC' or 'N:M', as '4x4' or '2:4', got {self.pattern!r}"
            )
        n, m = self.shape
        if ":" not in self.pattern:
            return
        if n > m:
            raise ValueError(f"Magnitude: pattern must keep at most M of M, got {self.pattern!r}")
        if abs(self.sparsity - (1 - n / m)) > 1e-6:
            raise ValueError(f"Magnitude: sparsity must be {1 - n / m:g} for {self.pattern!r}, got {self.sparsity!r}")
        if self.scope != "layer":
            raise ValueError(f"Magnitude: scope must be 'layer' for {self.pattern!r}, got {self.scope!r}")

    @property
    def shape(self) -> tuple[int, int]:
        """The two numbers of the pattern; (1, 1) for single weights."""
        found = _PATTERN.fullmatch(self.pattern or "1x1")
        assert found is not None
        return int(found[1]), int(found[2])


_PATTERN = re.compile(r"([1-9][0-9]{0,5})[x:]([1-9][0-9]{0,5})")


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
            return f"its weight is {weight.dtype}, and only float32 is converted"
        zeros = _zeros(weight)
        if zeros < self.min_sparsity:
            return f"has {100 * zeros:.0f}% zeros, fewer than min_sparsity={self.min_sparsity:g}"
        if self.format.startswith("nm"):
            kept, of = divmod(SHAPED[self.format][1], 256)
            groups = nn.functional.pad(weight != 0, (0, -weight.shape[1] % of)).reshape(len(weight), -1, of)
            if int(groups.sum(-1).max()) > kept:
                return f"its zeros are not {kept}:{of}, as {self.format} wants them"
        return None

    def kind(self, linear: nn.Linear) -> Hashable:
        return round(100 * _zeros(linear.weight))  # per cent

    def build(self, linear: nn.Linear, rows: Rows) -> nn.Module:
        return SparseLinear.from_linear(linear, self.format, rows)


@dataclass(frozen=True)
class SparseInt8(Conversion):
    """W8A8 without the zeros of the weight (`nn.SparseInt8Linear`); fastest for zeros in blocks of 4x4 or 1x4.

    Attributes:
        format: as for `nn.SparseInt8Linear.from_linear`; "auto" chooses for the zeros and for the rows that the layer
            sees (where they vary, for the most).
        min_sparsity: layers with a smaller part of zeros are not considered, in [0, 1].
        margin, min_weights, skip, measure: see `convert.Conversion`.
    """

    format: str = "auto"
    min_sparsity: float = 0.4

    name: ClassVar[str] = "sparse int8"
    title: ClassVar[str] = "sparse int8, dynamic per token"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("SparseInt8", "min_sparsity", self.min_sparsity)

    def why_not(self, linear: nn.Linear) -> str | None:
        if linear.in_features > MAX_K:
            return f"K={linear.in_features} is more than the {MAX_K} that are exact in int32"
        zeros = _zeros(linear.weight)
        if zeros < self.min_sparsity:
            return f"has {100 * zeros:.0f}% zeros, fewer than min_sparsity={self.min_sparsity:g}"
        return None

    def kind(self, linear: nn.Linear) -> Hashable:
        blocks = nn.functional.pad(linear.weight != 0, (0, -linear.in_features % 4, 0, -linear.out_features % 4))
        live = blocks.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).any(3).any(1)
        return round(100 * _zeros(linear.weight)), round(100 * _zeros(live))  # per cent, of weights and of 4x4 blocks

    def build(self, linear: nn.Linear, rows: Rows) -> nn.Module:
        return SparseInt8Linear.from_linear(linear, self.format, rows[1] if isinstance(rows, tuple) else rows)
