"""weight_only_linear and the u4 packs: against the oracle within derived bounds, between levels to the bit."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsparse import _C, ops, reference
from fastsparse.ops._packs import repack
from fastsparse.ops.int8_gemm import u4_bytes
from fastsparse.reference.int8_gemm import quantize_groups_of_rows
from support import forced, guarded, isa_levels, same_bits, strided, threads

raw = torch.ops.fastsparse
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "gelu", "silu"]
BITMAPS = ["g32 bitmap", "g64 bitmap", "g128 bitmap"]  # bitmap_u4: u4 without its zeros
KINDS = ["s8", "g32", "g64", "g128", "g32 affine", "g64 affine", "g128 affine", *BITMAPS]
# (N, K): empty, less than a panel, round panels of 16 and tiles of 32 and 64, groups and blocks with a remainder
SHAPES = [(3, 0), (1, 1), (5, 3), (16, 32), (17, 31), (31, 129), (33, 64), (64, 128), (65, 260), (100, 516), (129, 97)]


class Weight:
    """A weight of full range, packed, and as the oracle takes it."""

    def __init__(self, kind: str, n: int, k: int, fill: str = "random") -> None:
        self.group = None if kind == "s8" else int(kind.split()[0][1:])
        self.zero_point: Tensor | None = None
        self.scale_argument: Tensor | None = None
        if self.group is None:
            low, high = {"random": (-128, 127), "min": (-128, -128), "max": (127, 127)}[fill]
            self.codes = torch.randint(low, high + 1, (n, k), dtype=torch.int8)
            self.scale = self.scale_argument = (torch.rand(n) + 0.5) / 100
            self.pack = ops.pack(self.codes)
            return
        groups = -(-k // self.group)
        self.scale = (torch.randn(n, groups) / 10).half()
        if "affine" in kind:
            low, high = {"random": (0, 15), "min": (0, 0), "max": (15, 15)}[fill]
            self.codes = torch.randint(low, high + 1, (n, k), dtype=torch.uint8)
            point = {"random": (0, 15), "min": (15, 15), "max": (0, 0)}[fill]
            self.zero_point = torch.randint(point[0], point[1] + 1, (n, groups), dtype=torch.uint8)
        else:
            low, high = {"random": (-8, 7), "min": (-8, -8), "max": (7, 7)}[fill]
            self.codes = torch.randint(low, high + 1, (n, k), dtype=torch.int8)
        self.format = "bitmap_u4" if "bitmap" in kind else "u4"
        if self.format == "bitmap_u4" and fill == "random":  # columns of no zeros, of half, of nine in ten, and of none
            self.codes *= torch.rand(n, k) * 10 >= torch.tensor([0, 5, 5, 9, 10])[torch.arange(n) % 5, None]
        self.pack = self.packed(self.format)

    def packed(self, format: str) -> Tensor:
        return ops.pack(self.codes, format, scale=self.scale, zero_point=self.zero_point, group_size=self.group)

    def run(self, x: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
        return ops.weight_only_linear(x, self.pack, bias, activation, self.scale_argument)

    def oracle(self, x: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
        return reference.weight_only_linear(x, self.codes, self.scale, bias, activation, self.zero_point, self.group)

    def dense(self) -> Tensor:
        """The weight in float64."""
        k = self.codes.shape[1]
        if self.group is None:
            return self.codes.double() * self.scale.double()[:, None]
        spread = [t.double().repeat_interleave(self.group, 1)[:, :k] for t in (self.scale, self.point())]
        return (self.codes.double() - spread[1]) * spread[0]

    def point(self) -> Tensor:
        return torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point

    def bound(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """How far float32 may be from the oracle before the activation: a rounding each group, one for the bias."""
        size = self.group or 128
        codes, x_scale = quantize_groups_of_rows(x, size)
        values = (codes.double() * x_scale.double()).flatten(1)[:, : x.shape[-1]]
        terms = values.abs() @ self.dense().abs().t()
        if bias is not None:
            terms = terms + bias.double().abs()
        return (codes.shape[1] + 3) * 2.0**-24 * terms


ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_right(w: Weight, x: Tensor, bias: Tensor | None, activation: str | None, got: Tensor, what: Any) -> None:
    wanted = w.oracle(x, bias, activation)
    assert (got.shape, got.dtype) == (wanted.shape, x.dtype), what
    nan = wanted.isnan()
    assert torch.equal(got.isnan(), nan), what
    allowed = 1.2 * w.bound(x, bias) + 3e-6 * wanted.abs() + 2 * ROUNDING[x.dtype] * wanted.abs()
    allowed = allowed + (1e-7 if x.dtype == torch.float16 else 1e-30)  # its subnormals
    assert ((got.double() - wanted).abs() <= allowed)[~nan].all(), what


def awkward(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Rows of many sizes, zeros, groups of zeros, one spike, a NaN, an infinity."""
    x = torch.randn(m, k) * 10.0 ** torch.randint(-3, 3, (m, 1))
    if m > 2 and k > 0:
        x[1] = 0
        x[2, : k // 2] = 0
    if m > 4 and k > 0:
        x[3, k // 2] = 300
        x[4, -1] = float("nan")
    if m > 5 and k > 0:
        x[5, 0] = float("inf")
    return x.to(dtype)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", isa_levels())
def test_against_the_oracle(isa: str, kind: str) -> None:
    with forced(isa):
        for n, k in SHAPES:
            w, bias = Weight(kind, n, k), torch.randn(n)
            for m in (0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 31, 50):
                x = awkward(m, k, torch.float32)
                assert_right(w, x, bias, None, w.run(x, bias), (n, k, m))


@pytest.mark.parametrize("kind", BITMAPS)
@pytest.mark.parametrize("isa", isa_levels())
def test_a_bitmap_gives_the_bits_of_u4(isa: str, kind: str) -> None:
    with forced(isa):
        for n, k in (*SHAPES, (200, 4160)):
            w, bias = Weight(kind, n, k), torch.randn(n)
            dense = w.packed("u4")
            for m in (0, 1, 2, 3, 4, 5, 9, 50):
                x = awkward(m, k, DTYPES[m % 3])
                assert same_bits(w.run(x, bias), ops.weight_only_linear(x, dense, bias)), (n, k, m)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["s8", "g32", "g128 affine", "g64 bitmap"])
@pytest.mark.parametrize("isa", isa_levels())
def test_types_and_activations(isa: str, kind: str, dtype: torch.dtype, activation: str | None) -> None:
    w, bias = Weight(kind, 37, 150), torch.randn(37)
    with forced(isa):
        for m in (1, 4, 9):
            for b in (None, bias):
                x = awkward(m, 150, dtype)
                assert_right(w, x, b, activation, w.run(x, b, activation), (m, b is None))


@pytest.mark.parametrize("fill", ["min", "max"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", isa_levels())
def test_extreme_codes_are_exact(isa: str, kind: str, fill: str) -> None:
    """Every product at its largest: a sum that saturates or leaves 16 bits shows."""
    w = Weight(kind, 35, 384, fill)
    for sign in (1.0, -1.0):
        x = torch.full((5, 384), sign)
        x[1, ::2] *= -1
        with forced(isa):
            assert_right(w, x, None, None, w.run(x), sign)


@pytest.mark.parametrize("fill", ["min", "max"])
@pytest.mark.parametrize("kind", ["s8", "g32", "g128 affine", "g64 bitmap"])
@pytest.mark.parametrize("isa", isa_levels())
def test_extreme_codes_at_the_limit_of_k(isa: str, kind: str, fill: str) -> None:
    k = 131071
    w = Weight(kind, 17, k, fill)
    for m in (1, 5):
        x = torch.full((m, k), -1.0)
        results = []
        for count in (1, 2):
            with forced(isa), threads(count):
                results.append(w.run(x))
        assert_right(w, x, None, None, results[0], m)
        assert same_bits(*results), m


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_levels_agree_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        w, bias = Weight(kind, n, k), torch.randn(n)
        for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 26):
            x = awkward(m, k, dtype)
            for activation in ACTIVATIONS if m < 3 else (None,):
                results = []
                for isa in isa_levels():
                    with forced(isa):
                        results.append(w.run(x, bias, activation))
                assert all(same_bits(result, results[-1]) for result in results), (n, k, m, activation)


@pytest.mark.parametrize("kind", ["s8", "g32", "g128 affine", "g64 bitmap"])
@pytest.mark.parametrize("isa", isa_levels())
def test_rows_and_threads_change_no_bit(isa: str, kind: str) -> None:
    w, bias, x = Weight(kind, 300, 700), torch.randn(300), torch.randn(61, 700)
    with forced(isa):
        whole = w.run(x, bias, "gelu")
        for m in (1, 2, 5, 6, 13):
            assert same_bits(w.run(x[:m], bias, "gelu"), whole[:m]), m
        with threads(2):
            assert same_bits(w.run(x, bias, "gelu"), whole)
            assert same_bits(w.run(x[:1], bias, "gelu"), whole[:1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", isa_levels())
def test_nothing_outside_is_read(isa: str, kind: str) -> None:
    with forced(isa):
        for n, k in ((1, 1), (5, 31), (17, 33), (64, 128), (65, 260)):
            w, bias = Weight(kind, n, k), torch.randn(n)
            scale = w.scale_argument
            for m, side, dtype in ((1, "end", torch.float32), (3, "begin", torch.bfloat16), (7, "end", torch.float16)):
                x = torch.randn(m, k).to(dtype)
                wanted = w.run(x, bias)
                inner = [guarded(t, side) for t in (x, w.pack, bias)]  # type: ignore[arg-type]
                got = ops.weight_only_linear(
                    *inner,
                    None,
                    None if scale is None else guarded(scale, side),  # type: ignore[arg-type]
                )
                assert same_bits(got, wanted), (n, k, m)
                rows = strided(x)
                assert same_bits(w.run(rows, bias), wanted), (n, k, m)


def test_leading_dimensions_and_strides() -> None:
    w = Weight("g64", 19, 70)
    x = torch.randn(2, 3, 5, 70)
    assert same_bits(w.run(x).reshape(-1, 19), w.run(x.reshape(-1, 70)))
    assert same_bits(w.run(x.transpose(0, 2)), w.run(x.transpose(0, 2).contiguous()))
    assert w.run(x[0, 0, 0]).shape == (19,)
    assert w.run(x[:, :0]).shape == (2, 0, 5, 19)


def test_no_input_columns_leave_the_bias() -> None:
    for kind in ("s8", "g32", "g64 affine", "g64 bitmap"):
        w, bias = Weight(kind, 5, 0), torch.randn(5)
        assert torch.equal(w.run(torch.empty(3, 0), bias), bias.expand(3, 5))
        assert torch.equal(w.run(torch.empty(3, 0)), torch.zeros(3, 5))


def test_x_brings_less_error_than_the_weight() -> None:
    weight, x = torch.randn(256, 1024), torch.randn(16, 1024)
    exact = x.double() @ weight.double().t()
    for group in (32, 64, 128):
        codes, scale, zero_point = ops.quantize_groups(weight, group)
        pack = ops.pack(codes, "u4", scale=scale, zero_point=zero_point, group_size=group)
        dense = raw.u4_dequantize(pack, 256, 1024).double()
        of_weight = (x.double() @ dense.t() - exact).norm()
        of_x = (ops.weight_only_linear(x, pack).double() - x.double() @ dense.t()).norm()
        assert of_x < 0.15 * of_weight


@given(data=st.data())
def test_on_whatever(data: st.DataObject) -> None:
    draw = data.draw
    kind, isa = draw(st.sampled_from(KINDS)), draw(st.sampled_from(isa_levels()))
    n, k, m = draw(st.integers(0, 140)), draw(st.integers(0, 300)), draw(st.integers(0, 20))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    w, bias = Weight(kind, n, k), torch.randn(n) if draw(st.booleans()) else None
    x = awkward(m, k, draw(st.sampled_from(DTYPES)))
    activation = draw(st.sampled_from(ACTIVATIONS))
    with forced(isa):
        got = w.run(x, bias, activation)
    assert_right(w, x, bias, activation, got, kind)
    with forced("scalar"):
        assert same_bits(w.run(x, bias, activation), got)


@pytest.mark.parametrize("kind", ["g32", "g64", "g128 affine", "g128 bitmap"])
def test_few_rows_of_weights_beyond_l2_agree_on_every_level(kind: str) -> None:
    w, bias = Weight(kind, 1040, 4160), torch.randn(1040)
    for m in (1, 2, 3):
        x = torch.randn(m, 4160)
        results = []
        for isa in isa_levels():
            with forced(isa):
                results.append(w.run(x, bias))
        assert all(same_bits(result, results[-1]) for result in results), m
        assert_right(w, x, bias, None, results[0], m)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("isa", isa_levels())
def test_warm_calls_allocate_no_scratch(isa: str, count: int) -> None:
    calls = [(Weight(kind, 300, 500), torch.randn(m, 500)) for kind in KINDS[::3] for m in (1, 5, 60)]
    with forced(isa), threads(count):
        for w, x in calls * 2:
            w.run(x)
        before = _C.scratch_allocations()
        for w, x in calls * 5:
            w.run(x)
        assert _C.scratch_allocations() == before


# --- Packs ------------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<4sHHIIqqqQ16s")


def restated(w: Weight) -> np.ndarray[Any, Any]:
    """The layout of csrc/int8_gemm/formats/u4.h once more, from its index formulas."""
    assert w.group is not None
    n, k = w.codes.shape
    groups = -(-k // w.group)
    np_, kp = -(-n // 16) * 16, groups * w.group
    affine = w.zero_point is not None
    codes = w.codes.numpy().astype(int) + (0 if affine else 8)
    points = w.point().numpy().astype(int) if affine else np.full((n, groups), 8)
    cells = np.zeros(np_ * kp // 2, dtype=np.uint8)
    scales = np.zeros(np_ * groups, dtype=np.float16)
    zeros = np.zeros(np_ * groups // 2, dtype=np.uint8)
    for i in range(n):
        for j in range(kp):
            code = codes[i, j] if j < k else points[i, j // w.group]
            cells[((i // 16) * (kp // 8) + j // 8) * 64 + i % 16 * 4 + j % 4] |= code << (0 if j % 8 < 4 else 4)
        for g in range(groups):
            scales[((i // 16) * groups + g) * 16 + i % 16] = w.scale[i, g].item()
            zeros[((i // 16) * groups + g) * 8 + i % 8] |= points[i, g] << (0 if i % 16 < 8 else 4)
    runs = [cells.tobytes(), scales.tobytes(), zeros.tobytes() if affine else b""]
    payload = b"".join(run + bytes(-len(run) % 64) for run in runs)
    nonzeros = int((codes != np.repeat(points, w.group, axis=1)[:, :k]).sum())
    header = HEADER.pack(b"fspk", 6, 1, 6 if affine else 5, w.group, n, k, nonzeros, 64 + len(payload), bytes(16))
    return np.frombuffer(header + payload, dtype=np.uint8)


def restated_bitmap(w: Weight) -> np.ndarray[Any, Any]:
    """The layout of csrc/int8_gemm/formats/bitmap_u4.h once more."""
    assert w.group is not None
    n, k = w.codes.shape
    panels, groups = -(-n // 16), -(-k // w.group)
    cells = groups * w.group // 8
    values = np.zeros((panels * 16, groups * w.group), dtype=np.int8)
    values[:n, :k] = w.codes.numpy()
    # panel, cell, half, then the bits of a mask: column, k
    values = values.reshape(panels, 16, cells, 2, 4).transpose(0, 2, 3, 1, 4).reshape(panels, cells, 2, 64)
    masks = np.packbits(values != 0, axis=-1, bitorder="little")
    offset, codes = [0], bytearray()
    for panel in values:
        for low, high in panel:
            halves = [half[half != 0].astype(int) & 15 for half in (low, high)]
            row = np.zeros((2, max(map(len, halves))), dtype=np.uint8)
            for h in range(2):
                row[h, : len(halves[h])] = halves[h]
            codes += (row[0] | row[1] << 4).tobytes()
        offset.append(len(codes))
    scales = np.zeros((panels * 16, groups), dtype=np.float16)
    scales[:n] = w.scale.numpy()
    scales = scales.reshape(panels, 16, groups).transpose(0, 2, 1)
    runs = [np.array(offset, dtype=np.uint64).tobytes(), masks.tobytes(), scales.tobytes(), bytes(codes), bytes(256)]
    payload = b"".join(run + bytes(-len(run) % 64) for run in runs)
    nonzeros = int(w.codes.count_nonzero())
    header = HEADER.pack(b"fspk", 18, 1, 5, w.group, n, k, nonzeros, 64 + len(payload), bytes(16))
    return np.frombuffer(header + payload, dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_pack_is_as_documented_to_the_byte(kind: str) -> None:
    for n, k in ((0, 5), *SHAPES):
        w = Weight(kind, n, k)
        if kind in BITMAPS:
            assert np.array_equal(w.pack.numpy(), restated_bitmap(w)), (n, k)
            continue
        assert np.array_equal(w.pack.numpy(), restated(w)), (n, k)
        assert w.pack.numel() == u4_bytes(n, k, int(kind.split()[0][1:]), "affine" in kind)


def test_a_bitmap_is_as_small_as_its_zeros_let_it_be() -> None:
    sizes = []
    for zeros in (0.5, 0.7):
        codes = torch.randint(1, 8, (512, 2048), dtype=torch.int8) * (torch.rand(512, 2048) >= zeros)
        scale = torch.ones(512, 16).half()
        sparse, dense = (ops.pack(codes, f, scale=scale, group_size=128).numel() for f in ("bitmap_u4", "u4"))
        sizes.append(sparse / dense)
    assert sizes[0] < 0.81
    assert sizes[1] < 0.62


@pytest.mark.parametrize("kind", KINDS[1:])
def test_unpack_gives_everything_back(kind: str) -> None:
    for n, k in SHAPES:
        w = Weight(kind, n, k)
        assert w.zero_point is None or w.codes.dtype == torch.uint8
        assert torch.equal(ops.unpack(w.pack), w.codes)
        scale, zero_point = ops.unpack_scales(w.pack)
        assert same_bits(scale, w.scale)
        assert (zero_point is None) == (w.zero_point is None)
        assert zero_point is None or (w.zero_point is not None and torch.equal(zero_point, w.zero_point))
        header = ops.describe(w.pack)
        assert (header["format"], header["block"], header["n"], header["k"]) == (w.format, w.group, n, k)
        assert header["dtype"] == ("uint4" if "affine" in kind else "int4")
        assert torch.equal(raw.u4_dequantize(w.pack, n, k).double(), w.dense().float().double())
        assert torch.equal(repack(w.pack), w.pack)


def test_codes_may_be_strided() -> None:
    codes = torch.randint(-8, 8, (70, 21), dtype=torch.int8).t()
    scale = torch.rand(3, 21).half().t()
    pack = ops.pack(codes, "u4", scale=scale, group_size=32)
    assert torch.equal(ops.unpack(pack), codes)
    assert torch.equal(ops.unpack_scales(pack)[0], scale)


@given(st.integers(0, 2**31), st.sampled_from(KINDS[1:]), st.data())
def test_damage_is_seen(seed: int, kind: str, data: st.DataObject) -> None:
    """Every byte that is not as pack() writes it is either seen by describe() or a code, scale or zero point."""
    torch.manual_seed(seed)
    w = Weight(kind, 17, 70)
    pack = w.pack.clone()
    place, change = data.draw(st.integers(0, pack.numel() - 1)), data.draw(st.integers(1, 255))
    pack[place] ^= change
    with contextlib.suppress(ValueError):
        ops.describe(pack)
        assert place >= 64
        assert torch.equal(repack(pack), pack)


@given(st.integers(0, 2**31), st.sampled_from(BITMAPS), st.sampled_from(isa_levels()), st.data())
def test_damaged_bitmaps_give_numbers_and_read_nothing_outside(seed: int, kind: str, isa: str, data: Any) -> None:
    """One changed byte behind the header: masks and codes that no longer fit, offsets that lead anywhere."""
    torch.manual_seed(seed)
    w = Weight(kind, 33, 300)
    place, change = data.draw(st.integers(64, w.pack.numel() - 1)), data.draw(st.integers(1, 255))
    w.pack[place] ^= change
    inner = guarded(w.pack)
    with forced(isa):
        for m in (1, 3, 6):
            assert ops.weight_only_linear(torch.randn(m, 300), inner).shape == (m, 33)  # type: ignore[arg-type]
    with contextlib.suppress(ValueError):
        assert torch.equal(repack(w.pack), w.pack)


@pytest.mark.parametrize("change", [{0: 1}, {4: 1}, {6: 2}, {8: 1}, {12: 48}, {16: 1}, {24: 1}, {40: 1}, {50: 1}])
@pytest.mark.parametrize("kind", ["g64", "g64 bitmap"])
def test_a_damaged_header_is_refused(kind: str, change: dict[int, int]) -> None:
    w = Weight(kind, 16, 64)
    pack = w.pack.clone()
    for place, value in change.items():
        pack[place] = value
    with pytest.raises(ValueError, match="describe: pack"):
        ops.describe(pack)
    if 40 not in change:  # the length is whole, and the op counts nothing
        with pytest.raises(ValueError, match=r"weight must be a u4 pack|x must have K"):
            ops.weight_only_linear(torch.randn(1, 64), pack)
    for length in (0, 10, 64, pack.numel() - 1):
        with pytest.raises(ValueError, match="describe: pack"):
            ops.describe(w.pack[:length])
        with pytest.raises(ValueError, match="weight must be a u4 pack"):
            ops.weight_only_linear(torch.randn(1, 64), w.pack[:length])


@pytest.mark.parametrize("fill", [255, 128, 127, None])
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("isa", isa_levels())
def test_packs_of_garbage_give_numbers_and_read_nothing_outside(isa: str, kind: str, fill: int | None) -> None:
    for n, k in ((1, 1), (40, 600), (300, 9)):
        w = Weight(kind, n, k)
        w.pack[64:] = torch.randint(0, 256, (w.pack.numel() - 64,)) if fill is None else fill
        w.pack = guarded(w.pack)
        with forced(isa):
            for m in (1, 3, 20):
                assert w.run(guarded(torch.randn(m, k))).shape == (m, n)
        for read in (ops.unpack, ops.unpack_scales):
            with contextlib.suppress(ValueError):
                read(w.pack)


# --- quantize_groups --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantize_groups(group: int, symmetric: bool) -> None:
    weight = torch.randn(33, 150)
    weight[torch.rand(33, 150) < 0.5] = 0
    weight[5] = 0
    weight[6] = 1e-9  # its scale underflows in float16
    codes, scale, zero_point = ops.quantize_groups(weight, group, symmetric)
    assert codes.shape == weight.shape
    assert scale.dtype == torch.float16
    point = torch.zeros_like(scale) if zero_point is None else zero_point
    spread = [t.double().repeat_interleave(group, 1)[:, :150] for t in (scale, point)]
    dense = (codes.double() - spread[1]) * spread[0]
    assert (dense[weight == 0] == 0).all()
    # Half a step, a whole one where the extreme or the zero point was rounded too; float16 scales add 2^-11 of 15.
    error = (dense - weight.double()).abs()
    assert (error <= spread[0].abs() * 1.02 + 1e-7).all()
    assert (error.mean() / spread[0].abs().mean()) < 0.3
    for dtype in (torch.float16, torch.bfloat16):
        half = weight.to(dtype)
        for a, b in zip(ops.quantize_groups(half, group), ops.quantize_groups(half.float(), group), strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_quantize_groups_of_nothing() -> None:
    for n, k in ((0, 5), (3, 0)):
        codes, scale, zero_point = ops.quantize_groups(torch.empty(n, k), 32, symmetric=False)
        assert zero_point is not None
        assert codes.shape == (n, k)
        assert scale.shape == zero_point.shape == (n, -(-k // 32))


# --- Torch: opcheck, compile, gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["s8", "g32", "g64 affine", "g64 bitmap"])
def test_opcheck(kind: str) -> None:
    w, x, bias = Weight(kind, 9, 40), torch.randn(3, 40), torch.randn(9)
    torch.library.opcheck(raw.weight_only_linear.default, (x, w.pack, w.scale_argument, 9, bias, 2))
    torch.library.opcheck(raw.weight_only_linear.default, (x.half(), w.pack, w.scale_argument, 9))
    grads = x.clone().requires_grad_(), bias.clone().requires_grad_()
    torch.library.opcheck(raw.weight_only_linear_train.default, (grads[0], w.pack, w.scale_argument, 9, grads[1]))
    torch.library.opcheck(raw.weight_only_linear_train.default, (grads[0], w.pack, w.scale_argument, 9))


@pytest.mark.parametrize("kind", ["g32", "g64 affine", "g64 bitmap"])
def test_opcheck_the_packs(kind: str) -> None:
    w = Weight(kind, 9, 70)
    assert w.group is not None
    torch.library.opcheck(raw.u4_pack.default, (w.codes, w.scale, w.zero_point, w.group))
    torch.library.opcheck(raw.u4_unpack.default, (w.pack, 9, 70, w.group, "affine" in kind))
    torch.library.opcheck(raw.u4_dequantize.default, (w.pack, 9, 70))


def both_ways(run: Callable[..., Tensor], x: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    x = x.detach().clone().requires_grad_()
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    y = run(x, bias)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))
    assert x.grad is not None
    return (y.detach(), x.grad) if bias is None or bias.grad is None else (y.detach(), x.grad, bias.grad)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["s8", "g32", "g64 affine", "g64 bitmap"])
def test_compile_gives_the_same_bits(kind: str, with_bias: bool) -> None:
    torch._dynamo.reset()
    w = Weight(kind, 19, 40)

    def run(x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.weight_only_linear(x * 1.5, w.pack, bias, "silu", w.scale_argument, 19) * 2

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 5):
        x, bias = torch.randn(m, 40), torch.randn(19) if with_bias else None
        assert same_bits(compiled(x, bias), run(x, bias))
        for got, wanted in zip(both_ways(compiled, x, bias), both_ways(run, x, bias), strict=True):
            assert same_bits(got, wanted)


def test_compile_asks_for_out_features_where_it_must() -> None:
    torch._dynamo.reset()
    w = Weight("g32", 19, 40)
    compiled = torch.compile(lambda x: ops.weight_only_linear(x, w.pack), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="out_features must be given"):
        compiled(torch.randn(3, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["s8", "g32", "g128 affine", "g64 bitmap"])
def test_gradients(kind: str, activation: str | None, dtype: torch.dtype) -> None:
    w, x, bias = Weight(kind, 19, 150), torch.randn(4, 150).to(dtype), torch.randn(19)
    y, grad_x, grad_bias = both_ways(lambda x, b: w.run(x, b, activation), x, bias)
    assert grad_x.dtype == dtype
    assert grad_bias.dtype == torch.float32
    assert torch.allclose(y.float(), w.run(x, bias, activation).float(), rtol=1e-2, atol=1e-2)
    dense, exact = w.dense(), w.oracle(x, bias).detach().requires_grad_()
    f = {None: lambda t: t, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}
    f[activation](exact).backward(torch.linspace(-1, 1, y.numel()).view(y.shape).double())
    assert exact.grad is not None
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    wanted = exact.grad @ dense
    assert (grad_x.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (grad_bias.double() - exact.grad.sum(0)).abs().max() <= tolerance * exact.grad.abs().sum(0).max()


def test_gradients_flow_to_what_asks_for_them() -> None:
    w, x, bias = Weight("g32", 5, 40), torch.randn(3, 40), torch.randn(5, requires_grad=True)
    w.run(x, bias).sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        assert not w.run(x.clone().requires_grad_(), bias).requires_grad
    assert not w.run(x).requires_grad


# --- Errors -----------------------------------------------------------------------------------------------------------


def weight_only(kind: str = "g32", **changed: Any) -> Callable[[], Any]:
    w = Weight(kind, 5, 40)
    given: dict[str, Any] = {"x": torch.randn(3, 40), "weight": w.pack, "weight_scale": w.scale_argument}
    return lambda: ops.weight_only_linear(**{**given, **changed})


def packing(dtype: torch.dtype = torch.int8, **changed: Any) -> Callable[[], Any]:
    given: dict[str, Any] = {"format": "u4", "scale": torch.ones(5, 2).half(), "group_size": 32}
    return lambda: ops.pack(changed.pop("weight", torch.zeros(5, 40, dtype=dtype)), **{**given, **changed})


POINTS = torch.zeros(5, 2, dtype=torch.uint8)
BAD_INPUT: dict[str, tuple[Callable[[], Any], str]] = {
    "x dtype": (weight_only(x=torch.zeros(3, 40, dtype=torch.float64)), "x must be float32, bfloat16 or float16, got"),
    "x dims": (weight_only(x=torch.tensor(1.0)), "x must have at least one dimension"),
    "x columns": (
        weight_only(x=torch.randn(3, 41)),
        "x must have K=40 columns to match the packed weight, got x[3, 41]",
    ),
    "s8 columns": (weight_only("s8", x=torch.randn(3, 41)), "x must have K=40 columns to match the packed weight, got"),
    "x None": (weight_only(x=None), "weight_only_linear: x must be a tensor, got NoneType"),
    "weight None": (weight_only(weight=None), "weight_only_linear: weight must be a tensor, got None"),
    "scale float": (weight_only("s8", weight_scale=0.5), "weight_scale must be a tensor, got float"),
    "bias list": (weight_only(bias=[0.0]), "weight_only_linear: bias must be a tensor, got list"),
    "x None, no gradients": (torch.no_grad()(weight_only(x=None)), "weight_only_linear: x must be a tensor, got None"),
    "weight dtype": (weight_only(weight=torch.zeros(64)), "weight must be uint8, got float32"),
    "weight dims": (weight_only(weight=torch.zeros(8, 8, dtype=torch.uint8)), "weight must be a pack, a contiguous"),
    "weight foreign": (weight_only(weight=torch.zeros(64, dtype=torch.uint8)), 'do not begin with "fspk"'),
    "s8 without scale": (weight_only("s8", weight_scale=None), "(a vnni16 pack needs one): got format 1, expected 6"),
    "u4 with scale": (weight_only(weight_scale=torch.ones(5)), "(a u4 pack has its own scales): got format 6"),
    "scale dtype": (weight_only("s8", weight_scale=torch.ones(5).half()), "weight_scale must be float32, got float16"),
    "scale dims": (weight_only("s8", weight_scale=torch.ones(5, 1)), "weight_scale must have shape [N], got"),
    "scale length": (weight_only("s8", weight_scale=torch.ones(6)), "expected [N=6, K=40]"),
    "bias dtype": (weight_only(bias=torch.ones(5).half()), "bias must be float32, got float16"),
    "bias length": (weight_only(bias=torch.ones(6)), "bias must have shape [5], got bias[6]"),
    "activation": (weight_only(activation="tanh"), "activation must be None, 'relu', 'gelu' or 'silu', got 'tanh'"),
    "out_features": (weight_only(out_features=6), "out_features must be N=5 of the packed weight, got 6"),
    "scale grad": (
        weight_only("s8", weight_scale=torch.ones(5, requires_grad=True)),
        "weight_scale must not require a gradient",
    ),
    "pack without scale": (packing(scale=None), "pack: scale must be given for the format 'u4', got None"),
    "pack without group": (packing(group_size=None), "pack: group_size must be given for the format 'u4', got None"),
    "pack group": (packing(group_size=16), "pack: group_size must be 32, 64 or 128, got 16"),
    "pack dims": (
        packing(weight=torch.zeros(5, dtype=torch.int8)),
        "pack: weight must be a matrix [N, K], got weight[5]",
    ),
    "pack scale dtype": (packing(scale=torch.ones(5, 2)), "pack: scale must be float16, got float32"),
    "pack scale shape": (
        packing(scale=torch.ones(5, 3).half()),
        "pack: scale must have shape [5, 2], one for each row",
    ),
    "pack scale inf": (packing(scale=torch.full((5, 2), float("inf")).half()), "pack: scale must be finite"),
    "pack code": (packing(weight=torch.full((5, 40), 8, dtype=torch.int8)), "codes in [-8, 7], got others"),
    "pack affine code": (
        packing(weight=torch.full((5, 40), 16, dtype=torch.uint8), zero_point=POINTS),
        "codes in [0, 15] where there is a zero_point",
    ),
    "pack point": (packing(torch.uint8, zero_point=POINTS + 16), "zero_point must be in [0, 15], got others"),
    "pack point shape": (packing(torch.uint8, zero_point=POINTS[:, :1]), "zero_point must have shape [5, 2]"),
    "pack no point": (packing(torch.uint8), "pack: weight must be int8, got uint8"),
    "pack signed and point": (packing(zero_point=POINTS), "pack: weight must be uint8, got int8"),
    "pack bitmap without scale": (packing(format="bitmap_u4", scale=None), "must be given for the format 'bitmap_u4'"),
    "pack bitmap and point": (
        packing(format="bitmap_u4", zero_point=POINTS),
        "pack: zero_point must be None for the format 'bitmap_u4'",
    ),
    "bitmap of affine": (
        lambda: raw.bitmap_u4_pack(Weight("g32 affine", 5, 40).pack),
        "bitmap_u4_pack: pack must be symmetric (int4), got one with zero points",
    ),
    "bitmap with scale": (weight_only("g32 bitmap", weight_scale=torch.ones(5)), "got format 18"),
    "pack scale for vnni16": (
        packing(format="vnni16"),
        "pack: scale is for the formats 'u4' and 'bitmap_u4' alone, got one for 'vnni16'",
    ),
    "pack format": (
        packing(torch.uint8, format="vnni16"),
        "pack: format must be 'auto' or 'u4' for uint8, got 'vnni16'",
    ),
    "scales of another": (
        lambda: ops.unpack_scales(Weight("s8", 5, 40).pack),
        "unpack_scales: pack must be of the format u4 or bitmap_u4, got vnni16",
    ),
    "groups": (lambda: ops.quantize_groups(torch.ones(3, 40), 33), "group_size must be 32, 64 or 128, got 33"),
    "groups dims": (lambda: ops.quantize_groups(torch.ones(40), 32), "weight must be a matrix [N, K], got weight[40]"),
    "groups NaN": (
        lambda: ops.quantize_groups(torch.full((3, 4), float("nan")), 32),
        "weight must be finite, got a NaN",
    ),
    "groups large": (lambda: ops.quantize_groups(torch.full((3, 4), 1e6), 32), "one beyond 65504"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    call, message = BAD_INPUT[case]
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_another_device_is_refused() -> None:
    w = Weight("g32", 5, 40)
    with pytest.raises(ValueError, match="weight must be on cpu like the first argument, got meta"):
        ops.weight_only_linear(torch.randn(3, 40), w.pack.to("meta"), out_features=5)
