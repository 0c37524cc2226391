"""The format nm24 on the CPU: bytes, there and back, damage, errors. Its kernel is tested in tests/cuda_on_cpu."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fastsparse import ops
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
def test_layout_to_the_byte(dtype: torch.dtype) -> None:
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
    with pytest.raises(ValueError, match=r"^pack: format must be 'auto' or 'nm24' for float16, got 'bitmap32'$"):
        ops.pack(torch.zeros(4, 4).half(), "bitmap32")
    with pytest.raises(ValueError, match=r"^pack: weight must be a matrix \[N, K\], got weight\[4\]$"):
        ops.pack(torch.zeros(4).half(), "nm24")
    pack = ops.pack(sparse24(4, 8))
    with pytest.raises(ValueError, match=r"^sparse_linear: weight must be .*: got nm24, which runs on CUDA only$"):
        ops.sparse_linear(torch.randn(2, 8), pack)


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
    opcheck(torch.ops.fastsparse.nm24_pack.default, (w,))
    opcheck(torch.ops.fastsparse.nm24_unpack.default, (pack, 5, 9, False))
    with FakeTensorMode():
        assert torch.ops.fastsparse.nm24_pack(torch.empty(5, 9).half()).shape == pack.shape
