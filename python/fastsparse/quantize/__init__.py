"""Quantization of whole models, in place, where it was measured to help, and training for it."""

from fastsparse.quantize.api import quantize_
from fastsparse.quantize.config import Int4WeightOnly, Int8Dynamic, Int8Static, Int8WeightOnly
from fastsparse.quantize.qat import finalize_qat_, prepare_qat_

__all__ = [
    "Int4WeightOnly",
    "Int8Dynamic",
    "Int8Static",
    "Int8WeightOnly",
    "finalize_qat_",
    "prepare_qat_",
    "quantize_",
]
