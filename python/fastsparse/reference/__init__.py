"""The float64 oracles, in plain torch: what the tests and `fastsparse check` hold every kernel against."""

from fastsparse.reference.int8_gemm import int8_linear, int8_mm, quantize_weight
from fastsparse.reference.sparse_matmul import sparse_linear, sparse_linear_bound

__all__ = ["int8_linear", "int8_mm", "quantize_weight", "sparse_linear", "sparse_linear_bound"]
