"""What `quantize_` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Int8Dynamic:
    """W8A8: int8 weights with one scale per output, activations quantized per token as they come.

    Attributes:
        margin: how many times faster than the dense layer the int8 layer must be to replace it; at least 1.
        min_weights: layers with fewer weights are not considered.
        skip: names of layers that stay dense, as in `named_modules()`; `*` and `?` match as in file names.
        measure: False converts every layer that can be converted, faster or not; then no data is needed.
    """

    margin: float = 1.05
    min_weights: int = 0
    skip: tuple[str, ...] = ()
    measure: bool = True

    def __post_init__(self) -> None:
        if not self.margin >= 1:
            raise ValueError(f"Int8Dynamic: margin must be at least 1, got {self.margin}")
        if self.min_weights < 0:
            raise ValueError(f"Int8Dynamic: min_weights must be at least 0, got {self.min_weights}")
        if isinstance(self.skip, str):
            raise ValueError(f"Int8Dynamic: skip must be a tuple of names, got the string {self.skip!r}")
