"""Quantization of whole models, in place, where it was measured to help."""

from fastsparse.quantize.api import quantize_
from fastsparse.quantize.config import Int8Dynamic

__all__ = ["Int8Dynamic", "quantize_"]
