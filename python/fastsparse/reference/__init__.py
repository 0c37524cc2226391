"""The float64 oracles, in plain torch: what the tests and `fastsparse check` hold every kernel against."""

from fastsparse.reference.int8_gemm import int8_linear, int8_mm, quantize_weight, weight_only_linear
from fastsparse.reference.kl_loss import distill_loss, kl_div, kl_rows
from fastsparse.reference.qdq import dequantize, fake_quantize, quantize, quantize_per_token
from fastsparse.reference.sparse_matmul import sparse_int8_linear, sparse_linear, sparse_linear_bound
from fastsparse.reference.sparse_training import sddmm, sddmm_bound, spmm

__all__ = [
    "dequantize",
    "distill_loss",
    "fake_quantize",
    "int8_linear",
    "int8_mm",
    "kl_div",
    "kl_rows",
    "quantize",
    "quantize_per_token",
    "quantize_weight",
    "sddmm",
    "sddmm_bound",
    "sparse_int8_linear",
    "sparse_linear",
    "sparse_linear_bound",
    "spmm",
    "weight_only_linear",
]
