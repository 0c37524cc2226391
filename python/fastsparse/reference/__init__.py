"""The float64 oracles, in plain torch: what the tests and `fastsparse check` hold every kernel against."""

from fastsparse.reference.int8_gemm import int8_linear, int8_mm, quantize_weight

__all__ = ["int8_linear", "int8_mm", "quantize_weight"]
