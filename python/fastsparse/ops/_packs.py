"""pack, unpack, describe: one face for the packed formats of all families."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsparse.ops import int8_gemm, sparse_int8, sparse_matmul, sparse_training
from fastsparse.ops._pack import SHAPED, Rows, read_header

_SPARSE_INT8 = (*sparse_int8.FORMATS, "sparse")
_INT8 = ("vnni16", *int8_gemm.FORMATS_4BIT, *_SPARSE_INT8)
_FLOAT32 = (*sparse_matmul.FORMATS, *SHAPED)


def pack(
    weight: Any,
    format: str = "auto",
    rows: Rows = None,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """Packs a weight once, for all calls to come.

    Args:
        weight: int8 [N, K] for `int8_linear` and `sparse_int8_linear`; float32 [N, K] for `sparse_linear`; float16 or
            bfloat16 [N, K], for `sparse_linear` on CUDA (of bfloat16 bitmap32, sell8 and panels128 on the CPU, too).
            Each of these dense, torch.sparse_csr, sparse_csc, sparse_coo or a scipy.sparse matrix, of which exactly
            what is zero is left out (a zero that is stored explicitly, too). 4-bit codes [N, K] for
            `weight_only_linear`, dense: int8 in [-8, 7], or uint8 in [0, 15] with a zero_point (`quantize_groups`).
        format: "auto", or by the weight (layouts: csrc/<family>/formats):
            int8: "vnni16", dense; "bitmap_s8", "windows_s8", "blocks1x4" or "blocks4x4" for `sparse_int8_linear`, or
            "sparse", that of the four which is the fastest for zeros and `rows` (larger blocks: "blocks4x4", which
            stores no more of them).
            4-bit codes: "u4", or without their zeros "bitmap_u4" (few rows, from about 50% zeros on).
            float32: "bitmap32", "sell16", "sell8", "sell8x32", "sell8x16", "sell4" or "panels128"; for zeros in blocks
            of outputs x k "blocks1x4", "blocks4x4", "blocks8x8", "blocks16x16" or "blocks16x1" (any weight can be
            packed so, whole blocks with something in them are stored); for at most N of every M consecutive k not zero
            "nm1:4", "nm2:4" or "nm4:8" (other weights are refused).
            bfloat16 on the CPU: "bitmap32", "sell8", "sell8x32" or "panels128".
            float16 and bfloat16 on CUDA: "bitmap32" for few rows; for many "nm24", where at most 2 of every 4
            consecutive k are not zero, or "blocks16", squares of 32 or 64, whichever suits.
            "auto" is "vnni16" of int8, "u4" of uint8, "nm24" of float16 and, where there is a GPU, of bfloat16 that is
            2:4 (more than 16 rows). Else, as "sparse", it is what was measured to be the fastest for the weight's size,
            zeros and `rows` on this machine: some milliseconds, and remembered (docs/kernels/sparse_matmul.md, "auto";
            FASTSPARSE_CACHE=off takes a rule of thumb).
        rows: rows of x to be expected; None: many. Every format serves any number, at its own speed. (few, many), for
            float32 and "auto": two formats may be kept in one pack, "pair", and each call takes the one for its rows;
            of other weights one format is kept, the one for many.
        scale: u4, bitmap_u4: float16 [N, ceil(K / group_size)]. zero_point: u4 of uint8 codes: uint8 of the same shape.
        group_size: u4, bitmap_u4: 32, 64 or 128.

    Returns:
        uint8 [bytes]: a plain tensor for state_dict, safetensors, deepcopy and torch.compile, same on every machine.

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    if sparse_training.is_foreign(weight) or (isinstance(weight, Tensor) and weight.layout != torch.strided):
        weight = sparse_training.to_dense(weight, "pack")
    _check_weight(weight)
    sparse = weight.dtype == torch.float32
    half = weight.dtype in (torch.float16, torch.bfloat16)
    nibbles = weight.dtype == torch.uint8
    floats = _FLOAT32 if sparse else sparse_matmul.half_formats(weight.dtype)
    known = ("auto", *(floats if sparse or half else ("u4",) if nibbles else _INT8))
    if format not in known:
        names = ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}"
        of = f" for {str(weight.dtype).removeprefix('torch.')}" if sparse or half or nibbles else ""
        raise ValueError(f"pack: format must be {names}{of}, got {format!r}")
    check_rows(rows)
    if format in int8_gemm.FORMATS_4BIT or nibbles:
        return int8_gemm.pack_u4(weight, scale, zero_point, group_size, "u4" if format == "auto" else format)
    for name, value in (("scale", scale), ("zero_point", zero_point), ("group_size", group_size)):
        if value is not None:
            raise ValueError(f"pack: {name} is for the formats 'u4' and 'bitmap_u4' alone, got one for {format!r}")
    if half:
        return sparse_matmul.pack_half(weight, format, rows)
    if format in _SPARSE_INT8 and not sparse:
        return sparse_int8.pack_sparse_int8(weight, format, rows[1] if isinstance(rows, tuple) else rows)
    return sparse_matmul.pack_float(weight, format, rows) if sparse else int8_gemm.pack_int8(weight)


def _check_weight(weight: Any) -> None:
    dtypes = (torch.int8, torch.uint8, torch.float32, torch.float16, torch.bfloat16)
    if not isinstance(weight, Tensor):
        raise ValueError(f"pack: weight must be a tensor or a scipy.sparse matrix, got {type(weight).__name__}")
    if weight.dtype not in dtypes:
        *names, last = (str(dtype).removeprefix("torch.") for dtype in (*dtypes, weight.dtype))
        raise ValueError(f"pack: weight must be {', '.join(names[:-1])} or {names[-1]}, got {last}")


def check_rows(rows: Any) -> None:
    """Raises ValueError for what `pack` does not take as rows."""
    two = isinstance(rows, tuple)
    numbers = rows if two else (rows,)
    good = all(each is None or (type(each) is int and each >= 0) for each in numbers)
    if two and good:
        good = len(rows) == 2 and rows[0] is not None and (rows[1] is None or rows[0] <= rows[1])
    if not good:
        raise ValueError(f"pack: rows must be None or at least 0, or two of these, (few, many), got {rows!r}")


def unpack(pack: Tensor, layout: torch.layout | str = torch.strided, values: Tensor | None = None) -> Any:
    """The inverse of `pack`, and of `sparse_structure`.

    Args:
        pack: a pack or, with `values` float32 [nonzeros], a structure.
        layout: torch.strided; of all but packs of 4-bit codes also torch.sparse_csr, or (not of bfloat16 and float16,
            which scipy lacks) "scipy": a scipy.sparse.csr_matrix, which shares the memory of `values`.

    Returns:
        [N, K] of the weight's dtype; of u4 and bitmap_u4 packs the codes (`unpack_scales` the rest).

    Raises:
        ValueError: not a pack, a damaged one, or a layout or values that do not go with it.
    """
    header = read_header(pack)
    structure = header["format"] == "structure"
    if structure != (values is not None):
        raise ValueError(f"unpack: values must be given for a structure and for nothing else, got {header['format']}")
    if structure:
        assert values is not None
        return sparse_training.to_layout(
            sparse_training.structure_to_csr(pack, header, values.detach(), "unpack"), layout, "unpack"
        )
    if layout != torch.strided:
        of = header["dtype"]
        codes = header["format"] in int8_gemm.FORMATS_4BIT
        if codes or (layout == "scipy" and of in ("bfloat16", "float16")):
            more = "" if codes else " or torch.sparse_csr"
            raise ValueError(f"unpack: layout must be torch.strided{more} for {of}, got {layout!r}")
        dense = unpack(pack)
        csr = sparse_training.to_csr(dense.float(), "unpack")
        return sparse_training.to_layout(csr._replace(values=csr.values.to(dense.dtype)), layout, "unpack")
    header = describe(pack)
    if header["format"] in int8_gemm.FORMATS_4BIT:
        return int8_gemm.unpack_u4(pack, header)
    if header["dtype"] != "int8":
        return sparse_matmul.unpack_float(pack, header)
    if header["format"] in sparse_int8.FORMATS:
        return sparse_int8.unpack_sparse_int8(pack, header)
    return int8_gemm.unpack_int8(pack, header)


def repack(packed: Tensor) -> Tensor:
    """The pack of what a pack holds: there is one way to pack a weight, so its bytes are those of a whole pack."""
    header = describe(packed)
    if header["format"] == "pair":
        return sparse_matmul.repack_pair(packed, header)
    if header["format"] == "structure":
        return sparse_training.repack_structure(packed, header)
    if header["format"] not in int8_gemm.FORMATS_4BIT:
        return pack(unpack(packed), header["format"])
    scale, zero_point = int8_gemm.unpack_scales(packed)
    return int8_gemm.pack_u4(unpack(packed), scale, zero_point, header["block"], header["format"])


def describe(pack: Tensor) -> dict[str, Any]:
    """What a pack holds: format, version, dtype, n, k, block, nonzeros, bytes; of a pair also `formats`, and `block` is
    the most rows of x that the first of them serves.

    Reads and checks the header, and of a sparse float32 pack everything but the values (every index is in range), of an
    nm24, blocks16, u4, bitmap_u4 or sparse int8 pack and of a structure every byte. Of u4 and bitmap_u4, `block` is the
    group size and dtype "int4" (symmetric) or "uint4" (zero points).

    Raises:
        ValueError: not a pack, of another version or format, truncated or damaged; the message says which.
    """
    header = read_header(pack)
    if header["format"] == "structure":
        sparse_training.read_indices(pack, "describe")
        return header
    if header["format"] in int8_gemm.FORMATS_4BIT:
        return int8_gemm.describe_u4(pack, header)
    if header["dtype"] != "int8":
        return sparse_matmul.describe_float(pack, header)
    if header["format"] in sparse_int8.FORMATS:
        return sparse_int8.describe_sparse_int8(pack, header)
    return int8_gemm.describe_int8(pack, header)
