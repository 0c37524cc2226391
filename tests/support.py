"""What the tests of all families share: ISA levels, shapes round the tiles, guarded tensors, comparisons of bits."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from fastsparse import _library

_C = _library.load()

PRIMES = (31, 61)


def isa_levels() -> list[str]:
    """Every level that this CPU reaches, best first."""
    return list(_C.isa_available())


def cpu_rows(family: str) -> list[dict[str, Any]]:
    """The family's part of the table of kernels, best first, without those of other devices."""
    rows = [row for row in _C.kernels() if row["family"] == family and row["level"] != "cuda"]
    assert rows, f"no kernel of {family}"
    return rows


def selected_level(family: str) -> str:
    """The level of the row that the family's next call runs."""
    (row,) = [row for row in cpu_rows(family) if row["selected"]]
    return str(row["level"])


@contextlib.contextmanager
def forced(isa: str, family: str = "int8_gemm") -> Iterator[None]:
    """Caps the level, and makes sure by name that the row meant is the one that runs.

    A level without a row of its own (no kernel was worth writing for it) runs the next row below that the CPU has.
    """
    _C.set_isa(isa)
    try:
        levels = isa_levels()
        with_row = {row["level"] for row in cpu_rows(family)}
        wanted = next(level for level in levels[levels.index(isa) :] if level in with_row)
        assert selected_level(family) == wanted
        yield
        assert selected_level(family) == wanted
    finally:
        _C.set_isa("")


def tiles(family: str) -> tuple[set[int], set[int]]:
    """(rows, columns) of the tiles of the family's rows that this CPU runs; the table has them as "6x16, 3x64"."""
    found = [
        (int(rows), int(columns))
        for row in cpu_rows(family)
        if row["level"] in isa_levels()
        for rows, columns in re.findall(r"(\d+)x(\d+)", row["tile"])
    ]
    return {rows for rows, _ in found}, {columns for _, columns in found}


def around(sizes: set[int]) -> list[int]:
    """0, 1, each size and its neighbours, primes."""
    return sorted({0, 1, *PRIMES, *(size + d for size in sizes for d in (-1, 0, 1))})


def around_tiles(family: str, k_sizes: tuple[int, ...] = (4, 32)) -> list[tuple[int, int, int]]:
    """(m, n, k) round the tile sizes of the table; `k_sizes` are the steps that K is padded to or unrolled by.

    Each axis takes all its values while the others stay at few; the corners of a tile meet in full.
    """
    rows, columns = tiles(family)
    ms, ns, ks = around(rows), around(columns), around(set(k_sizes))
    shapes = {(m, n, k) for m in ms for n, k in ((17, 31), (16, 4))}
    shapes |= {(m, n, k) for n in ns for m, k in ((1, 5), (7, 31))}
    shapes |= {(m, n, k) for k in ks for m, n in ((1, 16), (7, 17))}
    corners = [[size + d for d in (0, 1)] for size in (max(rows), max(columns), max(k_sizes))]
    return sorted(shapes | set(itertools.product(*corners)))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0


def guarded(tensor: Tensor, side: Literal["end", "begin"] = "end") -> Tensor:
    """A copy, same strides where they are dense rows, that borders on an unreadable page: a read beyond it crashes.

    side "end": the last byte lies right before the page; "begin": the first byte lies right behind one.
    A strided tensor (overlap free) is copied with its strides, so that its last element borders, not its last row.
    """
    if tensor.numel() == 0:
        return tensor.clone()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    size = span * tensor.element_size()
    page = mmap.PAGESIZE
    room = -(-size // page) * page
    region = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for guard in (address, address + page + room):
        if _libc.mprotect(guard, page, _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (room - size if side == "end" else 0)
    # The tensor holds the region, which goes when the tensor does.
    flat = torch.frombuffer(region, dtype=tensor.dtype, count=span, offset=offset)
    return torch.as_strided(flat, tensor.shape, tensor.stride()).copy_(tensor)


def strided(tensor: Tensor, gap: int = 3) -> Tensor:
    """The same values in the left columns of a wider matrix; what lies between the rows would spoil any result."""
    wide = torch.empty((*tensor.shape[:-1], tensor.shape[-1] + gap), dtype=tensor.dtype)
    wide.fill_(float("nan") if tensor.is_floating_point() else 101)
    view = wide[..., : tensor.shape[-1]]
    view.copy_(tensor)
    return view


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    """Equal shape, dtype and bits (so -0.0 is not 0.0); any NaN equals any NaN."""
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return False
    if got.is_floating_point():
        nan = got.isnan()
        if not torch.equal(nan, wanted.isnan()):
            return False
        got, wanted = got.masked_fill(nan, 0), wanted.masked_fill(nan, 0)
    bits = _BITS[got.element_size()]
    return torch.equal(got.contiguous().view(bits), wanted.contiguous().view(bits))


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def asks_for_huge_pages(tensor: Tensor) -> bool:
    """The middle of its memory; skips the test where the system has none or does not say."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no transparent huge pages")
    address, inside = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2, False
    smaps = Path("/proc/self/smaps")
    for line in smaps.read_text().splitlines() if smaps.exists() else []:
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    pytest.skip("this system does not say how memory is mapped")
