"""The public tensor functions, one module per family. Each is a torch custom op with a fake kernel."""

from fastsparse import _library

_library.load()

from fastsparse.ops.int8_gemm import describe, int8_linear, int8_mm, pack, unpack  # noqa: E402
from fastsparse.ops.kl_loss import distill_loss, kl_div  # noqa: E402

__all__ = ["describe", "distill_loss", "int8_linear", "int8_mm", "kl_div", "pack", "unpack"]
