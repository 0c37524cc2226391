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
            exactly what is zero is left out (a zero that a csr tensor holds explicitly, too); float16 or bfloat16
            [N, K] with at most 2 of every 4 consecutive k not zero (2:4), for `sparse_linear` on CUDA.
        format: int8: "vnni16" (csrc/int8_gemm/formats/vnni16.h). float32: "bitmap32", "sell16" or "panels128"
            (csrc/sparse_matmul/formats/sparse.h). float16, bfloat16: "nm24" (formats/nm24.h there). "auto": vnni16,
            nm24, or what was measured to be the fastest for the density and `rows`.
        rows: rows of x to be expected; None: many. Every format serves any number, at its own speed.

    Returns:
        uint8 [bytes]: a plain tensor for state_dict, safetensors, deepcopy and torch.compile, same on every machine.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    sparse = weight.dtype == torch.float32
    half = weight.dtype in (torch.float16, torch.bfloat16)
    known = ("auto", *(sparse_matmul.FORMATS if sparse else ("nm24",) if half else ("vnni16",)))
    if format not in known:
        names = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        of = f" for {str(weight.dtype).removeprefix('torch.')}" if sparse or half else ""
        raise ValueError(f"pack: format must be {names}{of}, got {format!r}")
    if rows is not None and rows < 0:
        raise ValueError(f"pack: rows must be None or at least 0, got {rows}")
    if half:
        return sparse_matmul.pack_nm24(weight)
    return sparse_matmul.pack_float(weight, format, rows) if sparse else int8_gemm.pack_int8(weight)


def unpack(pack: Tensor) -> Tensor:
    """The inverse of `pack`: [N, K] of the weight's dtype, dense. Raises ValueError for anything that is not a pack."""
    header = describe(pack)
    if header["dtype"] != "int8":
        return sparse_matmul.unpack_float(pack, header)
    return int8_gemm.unpack_int8(pack, header)


def describe(pack: Tensor) -> dict[str, Any]:
    """What a pack holds: format, version, dtype, n, k, block, nonzeros, bytes.

    Reads and checks the header, and of a sparse float32 pack everything but the values (every index is in range), of an
    nm24 pack every byte.

    Raises:
        ValueError: not a pack, of another version or format, truncated or damaged; the message says which.
    """
    header = read_header(pack)
    if header["dtype"] != "int8":
        return sparse_matmul.describe_float(pack, header)
    return int8_gemm.describe_int8(pack, header)
