"""`quantize_`: int8 and 4-bit layers in the place of dense ones, where that was measured to be faster."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastsparse import select
from fastsparse.convert import convert_
from fastsparse.quantize.config import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from fastsparse.report import Report


def quantize_(
    model: nn.Module,
    config: Int8Dynamic | Int8Static | Int8WeightOnly | Int4WeightOnly,
    data: Any = None,
    *,
    measure: select.Measure | None = None,
) -> Report:
    """Converts `nn.Linear` layers to int8 or 4-bit ones, in place, where that was measured to be faster.

    This is `convert.convert_` with one conversion; what is measured, what stays dense and why is said there.

    Args:
        model: any module; float32, bfloat16 or float16 linear layers are considered.
        config: `Int8Dynamic(...)` or `Int8Static(...)` (`nn.Int8Linear`), or, for few rows, `Int8WeightOnly(...)` or
            `Int4WeightOnly(...)` (`nn.WeightOnlyLinear`).
        data: a tensor, a tuple or mapping of the model's inputs, or an iterable of these (a DataLoader), of which the
            first is used: its batch size is the one that the choice holds for. `Int8Static` takes ranges from more.
        measure: seconds for one `select.Candidate`; the default is the real clock.

    Returns:
        A Report with one row per linear layer: layer, shape, microseconds dense and converted, speed-up, chosen, why.

    Raises:
        TypeError: `model` or `config` is of another type.
        ValueError: no data to measure with, or a weight or bias that is not finite.
        RuntimeError: the converted model can't run on `data`.
    """
    if not isinstance(config, (Int8Dynamic, Int8Static, Int8WeightOnly, Int4WeightOnly)):
        raise TypeError(
            "quantize_: config must be an Int8Dynamic, Int8Static, Int8WeightOnly or Int4WeightOnly, "
            f"got {type(config).__name__}"
        )
    return convert_(model, [config], data, measure=measure, where="quantize_")
