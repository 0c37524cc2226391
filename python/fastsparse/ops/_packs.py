"""pack, unpack, describe: one face for the packed formats of all families."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsparse.ops import int8_gemm, sparse_matmul
from fastsparse.ops._pack import read_header


def pack(weight: Tensor, format: str = "auto", rows: int | None = None) -> Tensor:
    """Packs a weight once, for all calls to come.

    Args:
        weight: int8 [N, K] for `int8_linear`; float32 [N, K], dense or torch.sparse_csr, for `sparse_linear`, of which
            exactly what is zero is left out (a zero that a csr tensor holds explicitly, too).
        format: int8: "vnni16" (csrc/int8_gemm/formats/vnni16.h). float32: "bitmap32", "sell16" or "panels128"
            (csrc/sparse_matmul/formats/sparse.h). "auto": vnni16, or what was measured to be the fastest for the
            density and `rows`.
        rows: rows of x to be expected; None: many. Every format serves any number, at its own speed.

    Returns:
        uint8 [bytes]: a plain tensor for state_dict, safetensors, deepcopy and torch.compile, same on every machine.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    sparse = weight.dtype == torch.float32
    known = ("auto", *sparse_matmul.FORMATS) if sparse else ("auto", "vnni16")
    if format not in known:
        names = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        raise ValueError(f"pack: format must be {names}{' for float32' if sparse else ''}, got {format!r}")
    if rows is not None and rows < 0:
        raise ValueError(f"pack: rows must be None or at least 0, got {rows}")
    return sparse_matmul.pack_float(weight, format, rows) if sparse else int8_gemm.pack_int8(weight)


def unpack(pack: Tensor) -> Tensor:
    """The inverse of `pack`: int8 or float32 [N, K], dense. Raises ValueError for anything that is not a pack."""
    header = describe(pack)
    if header["dtype"] == "float32":
        return sparse_matmul.unpack_float(pack, header)
    return int8_gemm.unpack_int8(pack, header)


def describe(pack: Tensor) -> dict[str, Any]:
    """What a pack holds: format, version, dtype, n, k, block, nonzeros, bytes.

    Reads and checks the header, and of a sparse pack everything but the values: every index is in range.

    Raises:
        ValueError: not a pack, of another version or format, truncated or damaged; the message says which.
    """
    header = read_header(pack)
    if header["dtype"] == "float32":
        return sparse_matmul.describe_float(pack, header)
    return int8_gemm.describe_int8(pack, header)
