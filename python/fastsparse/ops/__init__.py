"""The public tensor functions, one module per family. Each is a torch custom op with a fake kernel."""

from fastsparse import _library

_library.load()

from fastsparse.ops._packs import describe, pack, unpack  # noqa: E402
from fastsparse.ops.int8_gemm import int8_linear, int8_mm  # noqa: E402
from fastsparse.ops.sparse_matmul import sparse_linear  # noqa: E402

__all__ = ["describe", "int8_linear", "int8_mm", "pack", "sparse_linear", "unpack"]
