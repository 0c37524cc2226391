"""What `quantize_` can be asked for."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fastsparse import ops
from fastsparse.convert import Conversion
from fastsparse.nn import Int8Linear, WeightOnlyLinear
from fastsparse.nn.int8_linear import MAX_K
from fastsparse.nn.weight_only_linear import DEFAULT_GROUP_SIZE
from fastsparse.ops._pack import Rows
from fastsparse.ops.int8_gemm import GROUP_SIZES


def _too_wide(linear: nn.Linear) -> str | None:
    if linear.in_features > MAX_K:
        return f"K={linear.in_features} is more than the {MAX_K} that are exact in int32"
    return None


@dataclass(frozen=True)
class Int8Dynamic(Conversion):
    """W8A8: int8 weights with one scale per output, activations quantized per token as they come (`nn.Int8Linear`).

    The attributes are those of `convert.Conversion`.
    """

    name: ClassVar[str] = "int8"
    title: ClassVar[str] = "int8, dynamic per token"

    def why_not(self, linear: nn.Linear) -> str | None:
        return _too_wide(linear)

    def build(self, linear: nn.Linear, rows: Rows) -> nn.Module:
        return Int8Linear.from_linear(linear)


@dataclass(frozen=True)
class Int8Static(Conversion):
    """W8A8 with one fixed scale for each layer's input: the largest |x| that it saw in the data, over 127.

    Symmetric; what lies beyond the range saturates. A layer that `data` did not reach, or that saw a NaN or an infinity
    there, stays dense. Faster than dynamic by the pass over x that finds a row's scale, and less exact where rows
    differ much. The other attributes are those of `convert.Conversion`.

    Attributes:
        batches: how many of the batches of `data` are looked at.
    """

    batches: int = 8

    name: ClassVar[str] = "int8 static"
    title: ClassVar[str] = "int8, static per layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.batches) is not int or self.batches < 1:
            raise ValueError(f"Int8Static: batches must be an int of at least 1, got {self.batches!r}")

    def why_not(self, linear: nn.Linear) -> str | None:
        return _too_wide(linear)

    def batches_wanted(self) -> int:
        return self.batches

    def build_for_range(self, linear: nn.Linear, rows: Rows, largest: float) -> nn.Module:
        scale = max(largest / 127, torch.finfo(torch.float32).tiny) if largest > 0 else 1.0
        return Int8Linear.from_linear(linear, x_scale=scale)


@dataclass(frozen=True)
class Int8WeightOnly(Conversion):
    """int8 weights with one scale per output, for few rows; x is rounded in groups of 128 (`nn.WeightOnlyLinear`).

    The attributes are those of `convert.Conversion`.
    """

    name: ClassVar[str] = "int8 weights"
    title: ClassVar[str] = "int8 weights"

    def why_not(self, linear: nn.Linear) -> str | None:
        return _too_wide(linear)

    def build(self, linear: nn.Linear, rows: Rows) -> nn.Module:
        return WeightOnlyLinear.from_linear(linear, 8)


@dataclass(frozen=True)
class Int4WeightOnly(Conversion):
    """4-bit weights with one scale per output and group of inputs, for few rows (`nn.WeightOnlyLinear`).

    Attributes:
        group_size: 32, 64 or 128 inputs share a scale: smaller is more accurate, larger is faster.
        symmetric: False gives each group a zero point beside its scale.
        sparse: True leaves out what is zero, or rounds to zero: the same y; only symmetric.

    The others are those of `convert.Conversion`.
    """

    group_size: int = DEFAULT_GROUP_SIZE
    symmetric: bool = True
    sparse: bool = False

    name: ClassVar[str] = "int4 weights"
    title: ClassVar[str] = "int4 weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise ValueError(f"Int4WeightOnly: group_size must be 32, 64 or 128, got {self.group_size!r}")
        if type(self.symmetric) is not bool:
            raise ValueError(f"Int4WeightOnly: symmetric must be True or False, got {self.symmetric!r}")
        if type(self.sparse) is not bool or (self.sparse and not self.symmetric):
            wanted = "True or False" if self.symmetric else "False with zero points"
            raise ValueError(f"Int4WeightOnly: sparse must be {wanted}, got {self.sparse!r}")

    def why_not(self, linear: nn.Linear) -> str | None:
        if linear.weight.detach().abs().max() > 65504 * (8 if self.symmetric else 7.5):
            return "its weights need scales beyond the 65504 of float16"
        return None

    def kind(self, linear: nn.Linear) -> Hashable:
        if not self.sparse:
            return None
        codes = ops.quantize_groups(linear.weight.detach().float().cpu(), self.group_size)[0]
        return round(100 * int(torch.count_nonzero(codes)) / max(codes.numel(), 1))  # per cent, rounding included

    def build(self, linear: nn.Linear, rows: Rows) -> nn.Module:
        return WeightOnlyLinear.from_linear(linear, 4, self.group_size, symmetric=self.symmetric, sparse=self.sparse)
