"""The packs of float16 and bfloat16 weights on the CPU: bytes, there and back, damage, errors.

Their kernels are tested in tests/cuda_on_cpu.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fastsparse import ops
from fastsparse.ops._pack import kind_of
from tests.support import same_bits

DTYPES = [torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (1, 4), (3, 5), (16, 64), (17, 65), (15, 63), (33, 130), (0, 8), (8, 0), (0, 0)]


def sparse24(n: int, k: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Two of every four at random, some of those zero too."""
    groups = -(-k // 4)
    places = torch.rand(n, groups, 4).argsort(-1).reshape(n, 4 * groups)[:, :k]
    return (torch.randn(n, k) * (places < 2) * (torch.rand(n, k) < 0.8)).to(dtype)


def by_the_book(w: Tensor) -> bytes:
    """The pack as formats/nm24.h states it, in loops."""
    n, k = w.shape
    np_, kp = -(-n // 16) * 16, -(-k // 64) * 64
    bits = np.zeros((np_, kp), dtype=np.uint16)
    bits[:n, :k] = w.view(torch.int16).numpy().view(np.uint16)
    value = np.zeros((np_, kp // 2), dtype=np.uint16)
    position = np.zeros((np_ // 16, kp // 64, 8, 4), dtype=np.uint32)
    for row in range(np_):
        for group in range(kp // 4):
            four = bits[row, 4 * group : 4 * group + 4]
            kept = [i for i in range(4) if four[i] & 0x7FFF]
            kept = sorted(kept + [i for i in range(4) if i not in kept][: 2 - len(kept)])
            for i, at in enumerate(kept):
                value[row, 2 * group + i] = four[at] if four[at] & 0x7FFF else 0
            shift = 16 * (row % 16 // 8) + 4 * (group % 4)
            position[row // 16, group // 16, row % 8, group // 4 % 4] |= (kept[0] | kept[1] << 2) << shift
    dtype = 3 if w.dtype == torch.float16 else 4
    size = 64 + value.nbytes + position.nbytes
    nonzeros = int(np.count_nonzero(bits & 0x7FFF))
    header = struct.pack("<4sHHIIqqqQ16s", b"fspk", 5, 1, dtype, 4, n, k, nonzeros, size, bytes(16))
    return header + value.tobytes() + position.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_to_the_byte(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # or "auto" takes a format of the CPU
    for n, k in SHAPES:
        w = sparse24(n, k, dtype)
        if w.numel():
            w[0, 0] = -0.0
        pack = ops.pack(w, "nm24")
        assert bytes(pack.numpy()) == by_the_book(w), (n, k)
        assert same_bits(pack, ops.pack(w)), "auto"
        assert same_bits(pack, ops.pack(w.t().contiguous().t(), "nm24")), "other strides"
        header = ops.describe(pack)
        assert header["format"] == "nm24"
        assert header["dtype"] == str(dtype).removeprefix("torch.")
        assert (header["n"], header["k"], header["nonzeros"]) == (n, k, int(w.count_nonzero()))
        unpacked = ops.unpack(pack)
        assert unpacked.dtype == dtype
        assert torch.equal(unpacked, w)


def test_special_values_are_kept() -> None:
    w = torch.tensor([[float("nan"), 0, 0, float("inf"), 0, -float("inf"), 6e-8, 0]], dtype=torch.float16)
    assert same_bits(ops.unpack(ops.pack(w)), w)


@given(st.integers(0, 20), st.integers(0, 70), st.integers(0, 2**31))
def test_there_and_back(n: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    w = sparse24(n, k)
    assert torch.equal(ops.unpack(ops.pack(w)), w)


def test_a_weight_that_is_not_sparse_enough() -> None:
    w = torch.zeros(7, 20, dtype=torch.bfloat16)
    w[5, 9:12] = 1
    with pytest.raises(ValueError, match=r"^pack: weight must have at most 2 of every 4 .* got 3 in row 5, k 8 to 11$"):
        ops.pack(w, "nm24")


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"^pack: format must be 'auto', .* for float32, got 'nm24'$"):
        ops.pack(torch.zeros(4, 4), "nm24")
    with pytest.raises(ValueError, match=r"^pack: format must be .* or 'bitmap32' for float16, got 'sell16'$"):
        ops.pack(torch.zeros(4, 4).half(), "sell16")
    with pytest.raises(ValueError, match=r"^pack: weight must be a matrix \[N, K\], got weight\[4\]$"):
        ops.pack(torch.zeros(4).half(), "nm24")
    w = sparse24(4, 8)
    for format, what in (("nm24", "nm24"), ("blocks16", "blocks16"), ("bitmap32", "a bitmap32 of float16")):
        expected = rf"^sparse_linear: weight must be .*: got {what}, which runs on CUDA only$"
        with pytest.raises(ValueError, match=expected):
            ops.sparse_linear(torch.randn(2, 8), ops.pack(w, format))
        assert torch.equal(ops.unpack(ops.pack(ops.unpack(ops.pack(w, format)), format)), w)
        header = ops.pack(w, format)[:16].numpy().tobytes()  # what a call on CUDA is told of it
        _, code, _, dtype, block = struct.unpack("<4sHHII", header)
        assert kind_of(ops.describe(ops.pack(w, format))) == code + (dtype << 16) + (block << 32)
    for format, what in (("nm24", "an nm24"), ("blocks16", "a blocks16"), ("bitmap32", "a 16-bit bitmap32")):
        with pytest.raises(ValueError, match=r"^half_unpack: pack must be of \[N=4, K=9\] .* got \[N=4, K=8\]$"):
            torch.ops.fastsparse.half_unpack(ops.pack(w, format), 4, 9, False)
        with pytest.raises(ValueError, match=rf"^half_validate: pack must be {what} pack: got 70 bytes"):
            torch.ops.fastsparse.half_validate(ops.pack(w, format)[:70])
    with pytest.raises(ValueError, match=r"^half_pack: format must be 2 .*, 4 .*, 5 .*, 8 .* or 14 .*, got 3$"):
        torch.ops.fastsparse.half_pack(w, 3)
    with pytest.raises(ValueError, match=r"^half_pack: weight must be float16 or bfloat16, got float32$"):
        torch.ops.fastsparse.half_pack(w.float(), 5)


def sparse_width(n: int) -> int:
    """Outputs of a chunk of panels128."""
    return 8 if n == 0 else 8 * math.ceil(math.ceil(n / (2 * math.ceil(n / 512))) / 8)


def test_panels128_of_bfloat16_is_the_float32_pack_with_halved_values() -> None:
    for n, k in [*SHAPES, (300, 400)]:
        w = (torch.randn(n, k) * (torch.rand(n, k) < 0.4)).bfloat16()
        pack, wide = ops.pack(w, "panels128"), ops.pack(w.float(), "panels128")
        assert same_bits(pack, ops.pack(w.t().contiguous().t(), "panels128")), "other strides"
        header, of_wide = ops.describe(pack), ops.describe(wide)
        assert header == {**of_wide, "dtype": "bfloat16", "bytes": pack.numel()}
        chunks = math.ceil(n / sparse_width(n))
        steps = int(wide[64 + 8 * chunks :][:8].view(torch.int64))
        at = wide.numel() - 64 * math.ceil(32 * steps / 64)  # where the values begin
        assert same_bits(pack[64:at], wide[64:at])
        assert pack.numel() == at + 64 * math.ceil(16 * steps / 64)
        values = pack[at : at + 16 * steps].view(torch.int16).int() << 16
        assert same_bits(values, wide[at : at + 32 * steps].view(torch.int32))
        assert not pack[at + 16 * steps :].any()
        assert same_bits(ops.unpack(pack), w + 0.0)
        opcheck(torch.ops.fastsparse.half_unpack.default, (pack, n, k, True))
    damaged = pack.clone()
    damaged[at + 1] ^= 0x80  # another value: another weight
    assert not torch.equal(ops.unpack(damaged), w)
    for place in (8, 12, 16, 32, 40, 64, 65):  # the header, the offsets
        damaged = pack.clone()
        damaged[place] ^= 0x41
        with pytest.raises(ValueError, match=r"^describe: "):
            ops.describe(damaged)
    with pytest.raises(ValueError, match=r"^half_unpack: pack must be of \[N=4, K=9\] and the dtype asked for"):
        torch.ops.fastsparse.half_unpack(pack, 4, 9, True)
    with pytest.raises(ValueError, match=r"^half_pack: weight must be bfloat16 or float32 for panels128, got float16$"):
        torch.ops.fastsparse.half_pack(w.half(), 4)
    with pytest.raises(ValueError, match=r"^pack: format must be .* for float16, got 'panels128'$"):
        ops.pack(w.half(), "panels128")


def test_auto_of_bfloat16_runs_on_the_cpu_unless_2_of_4_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.ones(16, 24).bfloat16()
    for rows, format in (
        (1, "bitmap32"),
        (4, "bitmap32"),
        (5, "panels128"),
        (None, "panels128"),
        ((1, 64), "panels128"),
    ):
        pack = ops.pack(w, rows=rows)
        assert ops.describe(pack)["format"] == format
        assert torch.equal(ops.sparse_linear(torch.ones(3, 24), pack), torch.full((3, 16), 24.0))
    w24 = sparse24(16, 24, torch.bfloat16)
    for gpu, format in ((True, "nm24"), (False, "panels128")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        assert ops.describe(ops.pack(w24, rows=64))["format"] == format
    with pytest.raises(ValueError, match="at most 2 of every 4"):
        ops.pack(w.half())


def test_damage_is_seen() -> None:
    clean = sparse24(18, 70)
    pack = ops.pack(clean)
    for at in range(len(pack)):
        damaged = pack.clone()
        damaged[at] ^= 0x41
        try:
            weight = ops.unpack(damaged)
        except ValueError:
            continue
        # What is left is the pack of another weight.
        assert at >= 64
        assert same_bits(ops.pack(weight), damaged), at
        assert not torch.equal(weight, clean), at
    for size in (0, 63, 64, len(pack) - 1, len(pack) + 1):
        with pytest.raises(ValueError, match=r"^describe: "):
            ops.describe(torch.cat([pack, pack])[:size])


def test_operators_have_fake_kernels() -> None:
    w = sparse24(5, 9)
    pack = ops.pack(w)
    opcheck(torch.ops.fastsparse.half_pack.default, (w, 5))
    opcheck(torch.ops.fastsparse.half_pack.default, (w, 14))
    opcheck(torch.ops.fastsparse.half_unpack.default, (pack, 5, 9, False))
    with FakeTensorMode():
        assert torch.ops.fastsparse.half_pack(torch.empty(5, 9).half(), 5).shape == pack.shape


# --- blocks16, bitmap32 ----------------------------------------------------------------------------------------------


def in_squares(n: int, k: int, block: int, part: float, dtype: torch.dtype = torch.float16) -> Tensor:
    """`part` of the squares at random, with some zeros in them."""
    kept = torch.rand(-(-n // block), -(-k // block)) < part
    spread = kept.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]
    return (torch.randn(n, k) * spread * (torch.rand(n, k) < 0.7)).to(dtype)


def section(array: np.ndarray) -> bytes:
    raw = array.tobytes()
    return raw + bytes(-len(raw) % 64)


def bits_of(w: Tensor) -> np.ndarray:
    bits = w.contiguous().view(torch.int16).numpy().view(np.uint16)
    return np.where(bits & 0x7FFF, bits, 0).astype(np.uint16)


def blocks_by_the_book(w: Tensor) -> bytes:
    """The pack as formats/blocks16.h states it."""
    n, k = w.shape
    found = {}
    for b in (32, 64):
        rows, columns = -(-n // b), -(-k // b)
        whole = np.zeros((rows * b, columns * b), dtype=np.uint16)
        whole[:n, :k] = bits_of(w)
        squares = whole.reshape(rows, b, columns, b).transpose(0, 2, 1, 3)
        found[b] = squares, squares.any((2, 3))
    b = 64 if found[64][1].sum() * 64 * 64 * 4 <= found[32][1].sum() * 32 * 32 * 5 else 32
    squares, used = found[b]
    count = used.sum(1)
    order = np.array(sorted(range(len(count)), key=lambda r: (-count[r], r)), dtype=np.uint32)
    offset = np.concatenate([[0], np.cumsum(count)]).astype(np.uint32)
    payload = (
        section(order) + section(offset) + section(np.nonzero(used)[1].astype(np.uint32)) + squares[used].tobytes()
    )
    dtype, nonzeros = 3 if w.dtype == torch.float16 else 4, int(w.count_nonzero())
    return (
        struct.pack("<4sHHIIqqqQ16s", b"fspk", 14, 1, dtype, b, n, k, nonzeros, 64 + len(payload), bytes(16)) + payload
    )


def bitmap_by_the_book(w: Tensor) -> bytes:
    """The pack as formats/bitmap16.h states it."""
    n, k = w.shape
    blocks = -(-n // 32)
    whole = np.zeros((blocks * 32, k), dtype=np.uint16)
    whole[:n] = bits_of(w)
    by_k = whole.reshape(blocks, 32, k).transpose(0, 2, 1)
    mask = ((by_k != 0).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(2).astype(np.uint32)
    offset = np.concatenate([[0], np.cumsum((by_k != 0).sum((1, 2)))]).astype(np.uint64)
    value = np.concatenate([by_k[by_k != 0], np.zeros(512, dtype=np.uint16)])
    payload = section(offset) + section(mask) + section(value)
    dtype, nonzeros = 3 if w.dtype == torch.float16 else 4, int(w.count_nonzero())
    return (
        struct.pack("<4sHHIIqqqQ16s", b"fspk", 2, 1, dtype, 32, n, k, nonzeros, 64 + len(payload), bytes(16)) + payload
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "by_book"), [("blocks16", blocks_by_the_book), ("bitmap32", bitmap_by_the_book)])
def test_layout_of_squares_and_bitmap(format: str, by_book: Any, dtype: torch.dtype) -> None:
    blocks = set()
    for i, (n, k) in enumerate([*SHAPES, (64, 64), (97, 200), (130, 129)]):
        for block, part in ((32, 0.4), (64, 0.5), (64, 1.0), (32, 0.0)):
            w = in_squares(n, k, block, part, dtype)
            if w.numel():
                w[0, 0] = -0.0
                w[-1, -1] = float("nan") if i % 2 else float("-inf")
            pack = ops.pack(w, format)
            assert bytes(pack.numpy()) == by_book(w), (n, k, block)
            assert same_bits(pack, ops.pack(w.t().contiguous().t(), format)), "other strides"
            header = ops.describe(pack)
            blocks.add(header["block"])
            assert (header["format"], header["n"], header["k"]) == (format, n, k)
            assert header["dtype"] == str(dtype).removeprefix("torch.")
            assert same_bits(ops.unpack(pack), w + 0), "but for -0"
    assert blocks == ({32, 64} if format == "blocks16" else {32})


@pytest.mark.parametrize("format", ["blocks16", "bitmap32"])
def test_damage_of_squares_and_bitmap_is_seen(format: str) -> None:
    for block in (32, 64):
        clean = in_squares(100, 110, block, 0.5 if block == 32 else 1.0)
        clean[0, 0] = clean[-1, -1] = clean[-1, 0] = 1
        pack = ops.pack(clean, format)
        assert format == "bitmap32" or ops.describe(pack)["block"] == block
        for at in [*range(1000), *range(1000, len(pack), 37)]:
            damaged = pack.clone()
            damaged[at] ^= 0x41
            try:
                ops.describe(damaged)
            except ValueError:
                continue
            # What is left is the pack of another weight; of one with more columns than squares reach, if of the header.
            if at < 64:
                assert (format, at // 8) == ("blocks16", 3)
                continue
            weight = ops.unpack(damaged)
            assert same_bits(ops.pack(weight, format), damaged), at
            assert not torch.equal(weight, clean), at
        for size in (0, 63, 64, len(pack) - 1, len(pack) + 1):
            with pytest.raises(ValueError, match=r"^describe: "):
                ops.describe(torch.cat([pack, pack])[:size])


def test_a_pack_may_say_that_its_weight_is_huge() -> None:
    """A header of 2^31 columns and no square: no memory of that size is asked for."""
    pack = ops.pack(torch.zeros(4, 40).half(), "blocks16")
    pack[24:32] = torch.tensor([0, 0, 0, 0x7F, 0, 0, 0, 0], dtype=torch.uint8)
    assert ops.describe(pack)["k"] == 0x7F << 24
