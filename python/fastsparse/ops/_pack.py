"""The header that all packs begin with (csrc/runtime/pack.h), as far as it is common to all formats."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor

HEADER = struct.Struct("<4sHHIIqqqQ16s")
FORMATS = {1: "vnni16", 2: "bitmap32", 3: "sell16", 4: "panels128", 5: "nm24", 6: "u4", 8: "sell8"}
FORMATS |= {9: "blocks", 10: "nm", 11: "bitmap_s8", 12: "blocks_s8", 13: "pair", 14: "blocks16", 15: "structure"}
FORMATS |= {16: "windows_s8", 17: "sell4", 18: "bitmap_u4"}
DTYPES = {1: "int8", 2: "float32", 3: "float16", 4: "bfloat16", 5: "int4", 6: "uint4"}
DTYPES_OF = {1: (1,), 2: (2, 3, 4), 3: (2,), 4: (2, 4), 5: (3, 4), 6: (5, 6), 8: (2, 4), 9: (2,), 10: (2,)}  # by format
DTYPES_OF |= {11: (1,), 12: (1,), 13: (2,), 14: (3, 4), 15: (2,), 16: (1,), 17: (2,), 18: (5,)}
# float32 formats of one code whose block says a shape, which is part of their name: 256 * outputs + k, 256 * N + M.
SHAPED = {f"blocks{n}x{k}": (9, 256 * n + k) for n, k in ((1, 4), (4, 4), (8, 8), (16, 16), (16, 1))}
SHAPED |= {f"nm{n}:{m}": (10, 256 * n + m) for n, m in ((1, 4), (2, 4), (4, 8))}
SHAPED |= {"sell8x32": (8, 32), "sell8x16": (8, 16)}  # outputs of a slice, of the narrow ones; "sell8" has 64
BLOCKS = {1: (16,), 2: (32,), 3: (16,), 4: (192,), 5: (4,), 6: (32, 64, 128)}
BLOCKS |= {8: (64, 32, 16), 11: (16,), 12: (260, 1028), 14: (32, 64), 15: (128,), 16: (32,), 17: (16,)}
BLOCKS |= {18: (32, 64, 128)}
BLOCKS |= {format_: tuple(b for f, b in SHAPED.values() if f == format_) for format_ in (9, 10)}
# What blocks_s8 and the float32 formats above are called by their block.
_SHAPED_NAMES = {(12, 260): "blocks1x4", (12, 1028): "blocks4x4"} | {code: name for name, code in SHAPED.items()}
PAIR = 13  # its block is a number of rows, at least 1
LARGEST_SIDE = 2**31
Rows = int | tuple[int, int | None] | None  # of x to be expected: many (None), so many, or (few, many)


_FORMAT_CODES = {name: code for code, name in FORMATS.items()}
_DTYPE_CODES = {name: code for code, name in DTYPES.items()}


def kind_of(header: dict[str, Any]) -> int:
    """What `sparse_linear` on CUDA wants to know of a pack: `kind` in its schema (csrc/sparse_matmul/ops.cpp)."""
    format_ = header["format"]
    code = SHAPED[format_][0] if format_ in SHAPED else _FORMAT_CODES[format_]
    return code | _DTYPE_CODES[header["dtype"]] << 16 | int(header["block"]) << 32


def read_header(pack: Tensor) -> dict[str, Any]:
    """What `ops.describe` returns. Raises ValueError; the format's own sizes and contents are not checked here."""
    if not isinstance(pack, Tensor) or pack.dtype != torch.uint8 or pack.dim() != 1:
        got = f"{pack.dtype} {list(pack.shape)}" if isinstance(pack, Tensor) else type(pack).__name__
        raise ValueError(f"describe: pack must be a uint8 vector made by ops.pack(), got {got}")
    if pack.numel() < HEADER.size:
        raise ValueError(f"describe: pack must have at least its header of {HEADER.size} bytes, got {pack.numel()}")
    raw = bytes(pack[: HEADER.size].tolist())
    magic, format_, version, dtype, block, n, k, nonzeros, size, reserved = HEADER.unpack(raw)
    if magic != b"fspk":
        raise ValueError(f"describe: pack must begin with b'fspk', got {magic!r}; make one with ops.pack()")
    if format_ not in FORMATS:
        raise ValueError(f"describe: pack has format {format_}, this build reads {FORMATS}")
    if version != 1:
        raise ValueError(f"describe: pack has {FORMATS[format_]} version {version}, this build reads version 1")
    sides_fit = 0 <= n < LARGEST_SIDE and 0 <= k < LARGEST_SIDE
    block_fits = block > 0 if format_ == PAIR else block in BLOCKS[format_]
    damaged = dtype not in DTYPES_OF[format_] or not block_fits or any(reserved)
    if damaged or not sides_fit or not 0 <= nonzeros <= n * k:
        raise ValueError(
            f"describe: pack has a damaged header: dtype {dtype}, block {block}, N={n}, K={k}, {nonzeros} non-zeros, "
            f"reserved bytes {reserved.hex()}"
        )
    return {
        "format": _SHAPED_NAMES.get((format_, block), FORMATS[format_]),
        "version": version,
        "dtype": DTYPES[dtype],
        "n": n,
        "k": k,
        "block": block,
        "nonzeros": nonzeros,
        "bytes": size,
    }
