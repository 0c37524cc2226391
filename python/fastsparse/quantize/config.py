"""What `quantize_` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastsparse.convert import Conversion
from fastsparse.nn import Int8Linear
from fastsparse.nn.int8_linear import MAX_K


@dataclass(frozen=True)
class Int8Dynamic(Conversion):
    """W8A8: int8 weights with one scale per output, activations quantized per token as they come (`nn.Int8Linear`).

    The attributes are those of `convert.Conversion`.
    """

    name: ClassVar[str] = "int8"
    title: ClassVar[str] = "int8, dynamic per token"

    def why_not(self, linear: nn.Linear) -> str | None:
        if linear.in_features > MAX_K:
            return f"K={linear.in_features} is more than the {MAX_K} that are exact in int32"
        return None

    def build(self, linear: nn.Linear, rows: int | None) -> nn.Module:
        return Int8Linear.from_linear(linear)
