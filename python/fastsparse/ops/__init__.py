"""The public tensor functions, one module per family. Each is a torch custom op with a fake kernel."""

from fastsparse import _library

_library.load()

from fastsparse.ops._packs import describe, pack, unpack  # noqa: E402
from fastsparse.ops.int8_gemm import (  # noqa: E402
    int8_linear,
    int8_mm,
    quantize_groups,
    unpack_scales,
    weight_only_linear,
)
from fastsparse.ops.kl_loss import distill_loss, kl_div  # noqa: E402
from fastsparse.ops.qdq import dequantize, fake_quantize, quantize, quantize_per_token  # noqa: E402
from fastsparse.ops.sparse_int8 import sparse_int8_linear  # noqa: E402
from fastsparse.ops.sparse_matmul import sparse_linear  # noqa: E402
from fastsparse.ops.sparse_training import sddmm, sparse_structure, spmm  # noqa: E402

__all__ = [
    "dequantize",
    "describe",
    "distill_loss",
    "fake_quantize",
    "int8_linear",
    "int8_mm",
    "kl_div",
    "pack",
    "quantize",
    "quantize_groups",
    "quantize_per_token",
    "sddmm",
    "sparse_int8_linear",
    "sparse_linear",
    "sparse_structure",
    "spmm",
    "unpack",
    "unpack_scales",
    "weight_only_linear",
]
