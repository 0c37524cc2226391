"""sparse_matmul: every level and format against float64, bits against each other, packs to the byte, damage, errors."""

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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fastsparse import _C, ops, reference
from fastsparse.ops.sparse_matmul import choose_format
from tests.support import forced, guarded, isa_levels, same_bits, strided, threads

FORMATS = ("bitmap32", "sell16", "panels128", "sell8", "sell8x32", "sell8x16", "sell4")
BF16_FORMATS = ("bitmap32", "sell8", "sell8x32", "panels128")
ACTIVATIONS = (None, "relu", "gelu", "silu")
# Round the tiles: 4 rows a pass, panels of 8, 16, 32 and twice 32 rows; 8, 16, 32 and 256 outputs; 8 and 192 k.
SHAPES = [
    (1, 1, 1), (1, 16, 8), (2, 17, 7), (3, 31, 9), (4, 32, 127), (5, 33, 128), (8, 64, 191), (9, 255, 31),
    (16, 256, 61), (17, 257, 192), (33, 61, 400), (50, 520, 20), (65, 31, 193), (130, 40, 64),
]  # fmt: skip
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (3, 0, 0)]
SIZES = st.integers(0, 70) | st.sampled_from([127, 191, 193, 257])


def sparse(n: int, k: int, zeros: float = 0.7) -> Tensor:
    """Uneven on purpose: one row full, one column full, one row empty."""
    w = torch.randn(n, k) * (torch.rand(n, k) >= zeros)
    if n > 2 and k > 2 and 0 < zeros < 1:
        w[n // 2], w[:, k // 2], w[-1] = torch.randn(k), torch.randn(n), 0
    return w


def assert_close(got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None, what: Any = "") -> None:
    assert got.dtype == torch.float32, what
    error = (got.double() - reference.sparse_linear(x, w, bias)).abs()
    assert (error <= reference.sparse_linear_bound(x, w, bias) + 1e-45).all(), (what, error.max())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", isa_levels())
def test_linear(isa: str, format: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in SHAPES + EMPTY:
            for zeros in (0.0, 0.8):
                w, x, bias = sparse(n, k, zeros), torch.randn(m, k), torch.randn(n)
                pack = ops.pack(w, format)
                assert_close(ops.sparse_linear(x, pack), x, w, None, (m, n, k, zeros))
                assert_close(ops.sparse_linear(x, pack, bias), x, w, bias, (m, n, k, zeros))


def test_all_formats_levels_threads_and_row_counts_give_the_same_bits() -> None:
    m, n, k = 67, 270, 203
    w, x, bias = sparse(n, k, 0.8), torch.randn(m, k), torch.randn(n)
    for activation in ACTIVATIONS:
        expected = None
        for isa in isa_levels():
            for format in FORMATS:
                pack = ops.pack(w, format)
                for count in (1, 2):
                    with forced(isa, "sparse_matmul"), threads(count):
                        y = ops.sparse_linear(x, pack, bias, activation)
                        one = ops.sparse_linear(x[5], pack, bias, activation)
                        ten = ops.sparse_linear(x[:10], pack, bias, activation)
                    expected = y if expected is None else expected
                    assert same_bits(y, expected), (isa, format, count, activation)
                    assert same_bits(one, expected[5]), (isa, format, count, activation)
                    assert same_bits(ten, expected[:10]), (isa, format, count, activation)


@pytest.mark.parametrize("isa", isa_levels())
def test_panels_of_rows_of_uneven_length_and_of_far_rows_of_y(isa: str) -> None:
    """Groups with a few long rows, which go row by row, a denormal weight in one of them; y with rows 4 KB apart."""
    with forced(isa, "sparse_matmul"):
        for n, k in ((64, 400), (1024, 20), (2048, 200)):
            w = sparse(n, k, 0.97)
            w[3::16] *= torch.rand(k) < 0.1
            w[5], w[7, ::2] = torch.randn(k), 1.5
            w[5, k // 2] = 1e-40
            for m in (4, 8, 13, 16, 31, 64):
                x, bias = torch.randn(m, k), torch.randn(n)
                for activation in ACTIVATIONS:
                    expected = ops.sparse_linear(x, ops.pack(w, "bitmap32"), bias, activation)
                    assert same_bits(ops.sparse_linear(x, ops.pack(w, "panels128"), bias, activation), expected)
                structure, values = ops.sparse_structure(w)
                values[::3] = 0  # as training may leave them: no padding
                got = ops.sparse_linear(x, structure, values=values)
                dense = ops.unpack(structure, values=values)
                assert same_bits(got, ops.sparse_linear(x, ops.pack(dense, "bitmap32")))
                got = ops.sparse_linear(x, ops.pack(w.bfloat16(), "panels128"))
                assert same_bits(got, ops.sparse_linear(x, ops.pack(w.bfloat16().float(), "bitmap32")))
        if torch.set_flush_denormal(True):
            try:
                got = ops.sparse_linear(x, ops.pack(w, "panels128"), bias)
                assert same_bits(got, ops.sparse_linear(x, ops.pack(w, "bitmap32"), bias))
            finally:
                torch.set_flush_denormal(False)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("isa", isa_levels())
def test_activations(isa: str, activation: str) -> None:
    x = torch.linspace(-30, 30, 4001)[:, None]
    with forced(isa, "sparse_matmul"):
        for format in FORMATS:
            got = ops.sparse_linear(x, ops.pack(torch.ones(1, 1), format), None, activation)
            expected = reference.sparse_linear(x, torch.ones(1, 1), None, activation)
            assert torch.allclose(got.double(), expected, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", isa_levels())
def test_nothing_is_read_outside(isa: str, format: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in SHAPES:
            for zeros in (0.0, 0.8):
                w, x, bias = sparse(n, k, zeros), torch.randn(m, k), torch.randn(n)
                expected = ops.sparse_linear(x, ops.pack(w, format), bias)
                for side in ("end", "begin"):
                    arguments = [guarded(t, side) for t in (x, ops.pack(w, format), bias)]  # type: ignore[arg-type]
                    assert same_bits(ops.sparse_linear(*arguments), expected), (m, n, k, side)


@pytest.mark.parametrize("format", FORMATS)
def test_shapes_and_strides(format: str) -> None:
    w, bias = sparse(19, 23), torch.randn(38)[::2]
    pack = ops.pack(w, format)
    for shape in [(23,), (1, 23), (2, 3, 23), (0, 23), (2, 0, 3, 23)]:
        x = torch.randn(shape)
        got = ops.sparse_linear(x, pack, bias)
        assert got.shape == (*shape[:-1], 19)
        assert_close(got, x, w, bias)
    for x in (
        torch.randn(23, 5).t(),
        strided(torch.randn(5, 23)),
        torch.randn(1, 23).expand(5, 23),
        torch.randn(5, 46)[:, ::2],
    ):
        assert_close(ops.sparse_linear(x, pack, bias), x, w, bias)
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.randn(5, 23).to(dtype)
        assert same_bits(ops.sparse_linear(half, pack), ops.sparse_linear(half.float(), pack).to(dtype))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", isa_levels())
def test_nan_and_infinity_reach_what_meets_them(isa: str, format: str) -> None:
    w = sparse(40, 150)
    x = torch.randn(3, 150)
    x[0, 3], x[1, 7], x[2, 149] = float("nan"), float("inf"), -float("inf")
    with forced(isa, "sparse_matmul"):
        y = ops.sparse_linear(x, ops.pack(w, format))
    for row, k in ((0, 3), (1, 7), (2, 149)):
        assert not torch.isfinite(y[row][w[:, k] != 0]).any()


@pytest.mark.parametrize("format", BF16_FORMATS)
@pytest.mark.parametrize("isa", isa_levels())
def test_bfloat16_weights_give_the_bits_of_their_float32_pack(isa: str, format: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in [*SHAPES, *EMPTY, (4, 97, 40)]:
            for zeros in (0.0, 0.6):
                w, x, bias = sparse(n, k, zeros).bfloat16(), torch.randn(m, k), torch.randn(n)
                expected = ops.sparse_linear(x, ops.pack(w.float(), "bitmap32"), bias)
                pack = ops.pack(w, format)
                assert same_bits(ops.sparse_linear(x, pack, bias), expected), (m, n, k, zeros)
                if isa == "avx512":  # the row without VBMI2, which the other one hides
                    _C.pin_sparse_matmul(isa)
                    got = ops.sparse_linear(x, guarded(pack), bias)
                    _C.pin_sparse_matmul("")
                    assert same_bits(got, expected), (m, n, k, zeros)
                for side in ("end", "begin"):
                    arguments = [guarded(t, side) for t in (x, pack, bias)]  # type: ignore[arg-type]
                    assert same_bits(ops.sparse_linear(*arguments), expected), (m, n, k, side)


@pytest.mark.parametrize("format", BF16_FORMATS)
def test_bfloat16_weights_train_and_are_guarded_like_others(format: str) -> None:
    w, bias = sparse(40, 70).bfloat16(), torch.randn(40)
    pack = ops.pack(w, format)
    x = torch.randn(3, 70).bfloat16().requires_grad_()
    y = ops.sparse_linear(x, pack, bias, "relu")
    assert same_bits(y, ops.sparse_linear(x.float(), pack, bias, "relu").bfloat16())
    y.sum().backward()
    dense = x.detach().clone().requires_grad_()
    torch.relu(dense.float() @ w.float().t() + bias).sum().backward()
    assert torch.allclose(x.grad.float(), dense.grad.float(), rtol=1e-2, atol=1e-3)
    for fill in (255, 127, 1):
        garbage = pack.clone()
        garbage[64:] = fill
        refused_or_harmless(garbage, 40, 70)
    for _ in range(20):
        garbage[64:] = torch.randint(0, 256, (pack.numel() - 64,), dtype=torch.uint8)
        refused_or_harmless(garbage, 40, 70)
    with pytest.raises(ValueError, match="bitmap32 of float16, which runs on CUDA only"):
        ops.sparse_linear(torch.randn(3, 70), ops.pack(w.half(), "bitmap32"))


@pytest.mark.parametrize("isa", isa_levels())
def test_every_index_of_the_sell_formats(isa: str) -> None:
    w = sparse(17, ops.sparse_matmul.MAX_SELL_K, 0.999)
    x = torch.randn(5, w.shape[1])
    with forced(isa, "sparse_matmul"):
        expected = ops.sparse_linear(x, ops.pack(w, "bitmap32"))
        for format in ("sell16", "sell8", "sell8x32", "sell8x16", "sell4"):
            assert same_bits(ops.sparse_linear(x, ops.pack(w, format)), expected), format


@pytest.mark.parametrize("format", ["bitmap32", "sell16", "sell8", "sell8x32", "sell8x16", "sell4"])
def test_threads_get_equal_shares_of_skewed_weights(format: str) -> None:
    w = torch.randn(520, 200) * (torch.rand(520, 200) < torch.linspace(1, 0, 520)[:, None] ** 3)
    w[::2, :120] = 0
    pack = ops.pack(w, format)
    for rows in (1, 3):
        x = torch.randn(rows, 200)
        with threads(1):
            expected = ops.sparse_linear(x, pack)
        for count in (2, 3, 16):
            with threads(count):
                assert same_bits(ops.sparse_linear(x, pack), expected)


@given(data=st.data())
def test_linear_on_whatever(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    m, n, k = data.draw(SIZES), data.draw(SIZES), data.draw(SIZES)
    w = sparse(n, k, data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 1.0])))
    x = torch.randn(m, k)
    if data.draw(st.booleans()):
        x = strided(x)
    bias = torch.randn(n) if data.draw(st.booleans()) else None
    pack = ops.pack(w.t().contiguous().t() if data.draw(st.booleans()) else w, data.draw(st.sampled_from(FORMATS)))
    with forced(data.draw(st.sampled_from(isa_levels())), "sparse_matmul"):
        assert_close(ops.sparse_linear(x, pack, bias), x, w, bias)


# --- Packs ------------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<4sHHIIqqqQ16s")
NUMBERS = {"bitmap32": (2, 32), "sell16": (3, 16), "panels128": (4, 192), "sell8": (8, 64)}
NUMBERS |= {"sell8x32": (8, 32), "sell8x16": (8, 16), "sell4": (17, 16)}


def pad(data: bytes, room: int = 0) -> bytes:
    return data + b"\0" * (room + -(len(data) + room) % 64)


def pairs_of_bf16(values: np.ndarray) -> bytes:
    """The values of a step of a bfloat16 sell8: lanes j and 16 + j of every 32 beside each other."""
    return (values.view("<u4") >> 16).astype("<u2").reshape(-1, 2, 16).transpose(0, 2, 1).tobytes()


def slices_restated(
    w: np.ndarray, order: list[int], block: int, window: int, bf16: bool = False
) -> tuple[list[int], bytes, bytes, bytes]:
    """Slices of `block` of these outputs, of a sell8: the offsets, the rows, the bases and the groups."""
    offset, middle = [0], b""
    bases = groups = b""
    for s in range(0, len(order), block):
        lanes = order[s : s + block]
        middle += struct.pack(f"<{block}I", *lanes, *[2**32 - 1] * (block - len(lanes)))
        left = [list(np.flatnonzero(w[r])) for r in lanes]
        steps = []
        while any(left):
            base = min(c[0] for c in left if c) // 16
            values, ks = np.zeros(block, "<f4"), np.zeros(block, np.uint8)
            for lane, c in enumerate(left):
                if c and c[0] < 16 * base + window:
                    values[lane], ks[lane] = w[lanes[lane], c[0]], c[0] - 16 * base
                    del c[0]
            steps.append((base, ks, values))
        while len(steps) % 4:
            steps.append((0, np.zeros(block, np.uint8), np.zeros(block, "<f4")))
        for g in range(0, len(steps), 4):
            four = steps[g : g + 4]
            bases += struct.pack("<4H", *(base for base, _, _ in four))
            groups += np.stack([ks for _, ks, _ in four], 1).tobytes()
            groups += b"".join(pairs_of_bf16(values) if bf16 else values.tobytes() for _, _, values in four)
        offset.append(len(groups) // ((12 if bf16 else 20) * block))
    return offset, middle, bases, groups


def mixed_restated(w: np.ndarray) -> bytes:
    """sell8x16 of formats/sell8.h."""
    n, k = w.shape
    order = sorted(range(n), key=lambda r: -np.count_nonzero(w[r]))
    counts = [np.count_nonzero(w[r]) for r in order]
    costs = [7 * sum(counts[: 16 * j : 16]) + 16 * sum(counts[16 * j :: 64]) for j in range(n // 16 + 1)]
    narrow = costs.index(min(costs))
    parts = [slices_restated(w, order[: 16 * narrow], 16, 32), slices_restated(w, order[16 * narrow :], 64, 64)]
    offsets = parts[0][0] + parts[1][0]
    body = pad(struct.pack(f"<{1 + len(offsets)}Q", narrow, *offsets))
    rows, bases, groups = (b"".join(part[i] for part in parts) for i in (1, 2, 3))
    body += pad(rows) + pad(bases) + groups
    return HEADER.pack(b"fspk", 8, 1, 2, 16, n, k, sum(counts), 64 + len(body), bytes(16)) + body


def pack_restated(w: np.ndarray, format: str, bf16: bool = False) -> bytes:
    """formats/{bitmap32,sell16,panels128,sell8,sell4}.h again, in Python; bf16: of sell8, where w holds such values."""
    n, k = w.shape
    number, block = NUMBERS[format]
    offset, middle, value, index = [0], b"", b"", b""
    if format == "bitmap32":
        for b in range(0, n, 32):
            for column in w[b : b + 32].T:
                middle += struct.pack("<I", sum(1 << j for j, v in enumerate(column) if v != 0))
                value += column[column != 0].astype("<f4").tobytes()
            offset.append(len(value) // 4)
        tail = pad(middle) + pad(value, 2048)
    elif format == "sell16":
        order = sorted(range(n), key=lambda r: -np.count_nonzero(w[r]))
        steps = b""
        for s in range(0, n, 16):
            lanes = order[s : s + 16]
            middle += struct.pack("<16I", *lanes, *[2**32 - 1] * (16 - len(lanes)))
            columns = [np.flatnonzero(w[r]) for r in lanes]
            for i in range(len(columns[0])):
                values, ks = np.zeros(16, "<f4"), np.zeros(16, "<u2")
                for lane, c in enumerate(columns):
                    if i < len(c):
                        values[lane], ks[lane] = w[lanes[lane], c[i]], c[i]
                steps += values.tobytes() + ks.tobytes()
            offset.append(len(steps) // 96)
        tail = pad(middle) + pad(steps)
    elif format == "sell8x16":
        return mixed_restated(w)
    elif format.startswith("sell8"):
        order = sorted(range(n), key=lambda r: -np.count_nonzero(w[r]))
        offset, rows, bases, groups = slices_restated(w, order, block, block, bf16)
        tail = pad(rows) + pad(bases) + groups
    elif format == "sell4":
        order = sorted(range(n), key=lambda r: -np.count_nonzero(w[r]))
        bases = groups = b""
        for s in range(0, n, 16):
            lanes = order[s : s + 16]
            middle += struct.pack("<16I", *lanes, *[2**32 - 1] * (16 - len(lanes)))
            left = [list(np.flatnonzero(w[r])) for r in lanes]
            steps = []
            while any(left):
                base = min(c[0] for c in left if c)
                values, ks = np.zeros(16, "<f4"), np.zeros(16, "<u4")
                for lane, c in enumerate(left):
                    if c and c[0] < base + 16:
                        values[lane], ks[lane] = w[lanes[lane], c[0]], c[0] - base
                        del c[0]
                steps.append((base, ks, values))
            while len(steps) % 8:
                steps.append((0, np.zeros(16, "<u4"), np.zeros(16, "<f4")))
            for g in range(0, len(steps), 8):
                places = np.zeros(16, "<u4")
                for j, (base, ks, _) in enumerate(steps[g : g + 8]):
                    bases += struct.pack("<H", base)
                    places |= (ks & 7) << np.uint32(3 * j) | (ks >> 3) << np.uint32(31 - j)
                groups += places.tobytes() + b"".join(values.tobytes() for _, _, values in steps[g : g + 8])
            offset.append(len(groups) // 576)
        tail = pad(middle) + pad(bases) + groups
    else:
        chunks = 2 * ((n + 511) // 512)
        width = ((n + chunks - 1) // chunks + 7) // 8 * 8 if n else 8
        for c in range(0, n, width):
            for b in range(0, k, 192):
                part = np.zeros((width, 192), np.float32)
                inside = w[c : c + width, b : b + 192]
                part[: inside.shape[0], : inside.shape[1]] = inside
                count = np.count_nonzero(part, axis=1)
                order = sorted(range(width), key=lambda r: -count[r])
                middle += bytes(order) + bytes(int(count[r]) for r in order[::8])
                for g in range(0, width, 8):
                    ks, values = np.zeros((count[order[g]], 8), np.uint8), np.zeros((count[order[g]], 8), "<f4")
                    for lane, r in enumerate(order[g : g + 8]):
                        found = np.flatnonzero(part[r])
                        ks[: len(found), lane], values[: len(found), lane] = found, part[r][found]
                        ks[len(found) :, lane] = found[-1] if len(found) else 0
                    index += ks.tobytes()
                    value += values.tobytes()
            offset.append(len(index) // 8)
        tail = pad(middle) + pad(index) + pad(value)
    body = pad(struct.pack(f"<{len(offset)}Q", *offset)) + tail
    nonzeros = int(np.count_nonzero(w))
    dtype = 4 if bf16 else 2
    return HEADER.pack(b"fspk", number, 1, dtype, block, n, k, nonzeros, 64 + len(body), bytes(16)) + body


@pytest.mark.parametrize("format", FORMATS)
def test_pack_is_as_documented_to_the_byte_and_back(format: str) -> None:
    for n, k in [(1, 1), (3, 5), (16, 32), (33, 129), (257, 200), (0, 4), (4, 0)]:
        for zeros in (0.0, 0.6, 1.0):
            w = sparse(n, k, zeros)
            pack = ops.pack(w, format)
            assert pack.numpy().tobytes() == pack_restated(w.numpy(), format), (n, k, zeros)
            assert same_bits(ops.unpack(pack), w + 0.0)
            header = ops.describe(pack)
            assert (header["format"], header["dtype"], header["n"], header["k"]) == (format, "float32", n, k)
            assert (header["nonzeros"], header["bytes"]) == (int(w.count_nonzero()), pack.numel())


def uneven(n: int, k: int) -> Tensor:
    """A few outputs have most of the weights."""
    return torch.randn(n, k) * (torch.rand(n, k) < torch.linspace(1, 0, n)[:, None] ** 8 * 0.9 + 0.03)


def test_sell8x16_of_uneven_outputs_is_as_documented_to_the_byte_and_back() -> None:
    for n, k in [(15, 40), (16, 40), (17, 40), (80, 100), (257, 70)]:
        w = uneven(n, k)
        pack = ops.pack(w, "sell8x16")
        assert pack.numpy().tobytes() == pack_restated(w.numpy(), "sell8x16"), (n, k)
        assert (n < 16) == (int.from_bytes(pack[64:72].numpy().tobytes(), "little") == 0), "narrow slices"
        assert same_bits(ops.unpack(pack), w + 0.0)
        assert ops.describe(pack)["format"] == "sell8x16"


def test_damage_of_sell8x16_is_found() -> None:
    clean = ops.pack(uneven(100, 70), "sell8x16")
    x = torch.randn(2, 70)
    for at in range(64, clean.numel(), 5):
        damaged = clean.clone()
        damaged[at] ^= 0x41
        with contextlib.suppress(ValueError):
            ops.sparse_linear(x, damaged)  # wrong numbers or an error
        try:
            weight = ops.unpack(damaged)
        except ValueError:
            continue
        assert torch.equal(ops.pack(weight, "sell8x16"), damaged), at  # the pack of another weight


@pytest.mark.parametrize("isa", isa_levels())
def test_the_sell_formats_of_uneven_outputs(isa: str) -> None:
    w = uneven(333, 300)
    with forced(isa, "sparse_matmul"):
        for rows in (1, 2, 3, 4, 7):
            x, bias = torch.randn(rows, 300), torch.randn(333)
            expected = ops.sparse_linear(x, ops.pack(w, "bitmap32"), bias, "relu")
            for format in ("sell8", "sell8x32", "sell8x16"):
                assert same_bits(ops.sparse_linear(x, ops.pack(w, format), bias, "relu"), expected), (format, rows)


@pytest.mark.parametrize("format", ["sell8", "sell8x32"])
def test_sell8_of_bfloat16_is_as_documented_to_the_byte_and_back(format: str) -> None:
    for n, k in [(1, 1), (3, 5), (16, 32), (33, 129), (100, 200), (0, 4), (4, 0)]:
        for zeros in (0.0, 0.6, 1.0):
            w = sparse(n, k, zeros).bfloat16()
            pack = ops.pack(w, format)
            assert pack.numpy().tobytes() == pack_restated(w.float().numpy(), format, bf16=True), (n, k, zeros)
            assert torch.equal(ops.pack(w.t().contiguous().t(), format), pack), "other strides"
            assert same_bits(ops.unpack(pack), w + 0.0)
            header = ops.describe(pack)
            assert (header["format"], header["dtype"], header["n"], header["k"]) == (format, "bfloat16", n, k)
            assert (header["nonzeros"], header["bytes"]) == (int(w.count_nonzero()), pack.numel())


def test_sell8_of_bfloat16_says_what_is_wrong() -> None:
    clean = sparse(40, 70).bfloat16()
    for format, block in (("sell8", 64), ("sell8x32", 32)):
        pack = ops.pack(clean, format)
        for at in range(0, pack.numel(), 7):
            damaged = pack.clone()
            damaged[at] ^= 0x41
            try:
                weight = ops.unpack(damaged)
            except ValueError:
                continue
            assert at >= 64  # what is left is the pack of another weight
            assert torch.equal(ops.pack(weight, format), damaged), at
        with pytest.raises(ValueError, match=r"^half_validate: pack must be a bfloat16 sell8 pack: got .* float32$"):
            torch.ops.fastsparse.half_validate(ops.pack(clean.float(), format))
        with pytest.raises(ValueError, match=r"^half_unpack: pack must be of \[N=40, K=71\] .* got \[N=40, K=70\]$"):
            torch.ops.fastsparse.half_unpack(pack, 40, 71, True)
        with pytest.raises(ValueError, match=r"^pack: format must be .* for float16, got 'sell8"):
            ops.pack(clean.half(), format)
        with pytest.raises(ValueError, match=r"^pack: weight must have at most K=65536 columns for sell8"):
            ops.pack(torch.zeros(1, 65537, dtype=torch.bfloat16), format)
        with pytest.raises(ValueError, match=r"^half_pack: weight must be bfloat16 or .* for sell8.*, got float16$"):
            torch.ops.fastsparse.half_pack(clean.half(), 8, block)
        opcheck(torch.ops.fastsparse.half_pack.default, (clean, 8, block))
    with pytest.raises(
        ValueError, match=r"^half_pack: block must be 64 \(sell8\), 32 \(sell8x32\) or 192 \(panels128\), got 16$"
    ):
        torch.ops.fastsparse.half_pack(clean, 8, 16)


@pytest.mark.parametrize("format", FORMATS)
def test_pack_keeps_every_value(format: str) -> None:
    w = torch.tensor([[float("nan"), -0.0, 1e-45, float("-inf")], [3.4e38, 0.0, -1e-45, 1.0]])
    assert same_bits(ops.unpack(ops.pack(w, format)), torch.where(w == 0, torch.zeros(()), w))


@pytest.mark.parametrize("format", FORMATS)
def test_pack_from_csr(format: str) -> None:
    w = sparse(37, 41)
    assert torch.equal(ops.pack(w.to_sparse_csr(), format), ops.pack(w, format))


@pytest.mark.parametrize("isa", isa_levels())
def test_auto_chooses_by_rows_and_density(isa: str) -> None:
    wide = isa in ("avx512", "amx")
    for zeros, rows, format in [
        (0.5, 1, "bitmap32"),
        (0.95, 1, "sell8" if wide else "sell4"),
        (0.95, 2, "sell8x32" if wide else "sell4"),
        (0.5, 4, "bitmap32"),
        (0.95, 4, "sell8x32" if wide else "panels128"),
        (0.5, 5, "panels128"),
        (0.95, 5, "panels128"),
        (0.5, 64, "panels128"),
        (0.95, None, "panels128"),
    ]:
        w = torch.ones(64, 100) * (torch.rand(64, 100) >= zeros)
        with forced(isa, "sparse_matmul"):
            assert ops.describe(ops.pack(w, rows=rows))["format"] == format
            assert choose_format(0.1, 65537, rows) == ("bitmap32" if rows in (1, 2) else "panels128")


@pytest.mark.parametrize("isa", isa_levels())
@pytest.mark.parametrize("gpu", [False, True])
def test_auto_of_bfloat16_has_formats_of_the_cpu_unless_2_of_4(
    isa: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    wide = isa in ("avx512", "amx")
    for zeros, rows, format in [
        (0.5, 1, "bitmap32"),
        (0.95, 1, "sell8" if wide else "bitmap32"),
        (0.95, 4, "sell8x32" if wide else "panels128"),
        (0.95, 16, "panels128"),
        (0.3, None, "panels128"),
        (0.3, (1, 64), "panels128"),
        (1.0, None, "nm24" if gpu else "panels128"),
        (1.0, 17, "nm24" if gpu else "panels128"),
        (1.0, (1, 64), "nm24" if gpu else "panels128"),
    ]:
        w = (torch.ones(60, 64) * (torch.rand(60, 64) >= zeros)).bfloat16()
        with forced(isa, "sparse_matmul"):
            assert ops.describe(ops.pack(w, rows=rows))["format"] == format, (zeros, rows)
    w = (torch.randn(256, 256) * (torch.rand(256, 256) < 0.05)).bfloat16()
    pack = ops.pack(w, rows=2)  # large enough to be measured
    assert ops.describe(pack)["format"] in BF16_FORMATS
    assert same_bits(ops.unpack(pack), w + 0.0)


def refused_or_harmless(pack: Tensor, n: int, k: int) -> None:
    """Whatever the bytes are: a ValueError, or numbers; on guarded memory, so that an access outside is a crash."""
    x = guarded(torch.randn(5, k))
    weight = guarded(pack)
    for isa in isa_levels():
        with forced(isa, "sparse_matmul"), contextlib.suppress(ValueError):
            ops.sparse_linear(x, weight)
    with contextlib.suppress(ValueError):
        ops.unpack(weight)


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_damaged_packs_never_read_outside(format: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    n, k = data.draw(st.sampled_from([(3, 5), (40, 200), (300, 9)]))
    pack = ops.pack(sparse(n, k), format).clone()
    tables = min(pack.numel(), 2000)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, tables - 1) | st.integers(0, pack.numel() - 1))
        pack[at] = data.draw(st.integers(0, 255) | st.just(255))
    refused_or_harmless(pack, n, k)


@pytest.mark.parametrize("fill", [255, 128, 127, 1])
@pytest.mark.parametrize("format", FORMATS)
def test_packs_of_garbage_never_read_outside(format: str, fill: int) -> None:
    for n, k in ((3, 5), (40, 200), (300, 9)):
        good = ops.pack(sparse(n, k), format)
        whole = good.clone()
        whole[64:] = fill
        refused_or_harmless(whole, n, k)
        if format.startswith("sell"):  # the last offset is the number of steps: with it right, the rest is read
            groups = -(-n // NUMBERS[format][1])
            whole[64 + 8 * groups : 72 + 8 * groups] = good[64 + 8 * groups : 72 + 8 * groups]
            refused_or_harmless(whole, n, k)
        random = good.clone()
        random[64:] = torch.randint(0, 256, (good.numel() - 64,), dtype=torch.uint8)
        if format.startswith("sell"):
            random[64 + 8 * groups : 72 + 8 * groups] = good[64 + 8 * groups : 72 + 8 * groups]
        refused_or_harmless(random, n, k)


@pytest.mark.parametrize("format", FORMATS)
def test_validate_sees_every_damaged_table(format: str) -> None:
    w = sparse(18, 20)
    good = ops.pack(w, format)
    for at in range(good.numel()):
        pack = good.clone()
        pack[at] ^= 0x41
        try:
            got = ops.unpack(pack)
        except ValueError:
            continue
        # What passes is another weight's pack, to the last byte.
        assert torch.equal(ops.pack(got, format), pack)


@given(st.binary(max_size=200), st.sampled_from(sorted(NUMBERS.values())))
def test_foreign_bytes_are_refused(data: bytes, number: tuple[int, int]) -> None:
    header = HEADER.pack(b"fspk", number[0], 1, 2, number[1], 3, 5, 2, 64 + len(data), bytes(16))
    pack = torch.frombuffer(bytearray(header + data), dtype=torch.uint8)
    with pytest.raises(ValueError, match="describe: pack"):
        ops.describe(pack)
    with pytest.raises(ValueError, match="sparse_linear: weight must be a sparse float32 pack"):
        ops.sparse_linear(torch.randn(1, 5), pack)


def test_truncated_and_overflowing_packs_are_refused() -> None:
    for format in FORMATS:
        pack = ops.pack(sparse(9, 11), format)
        for bad in (pack[:-1], pack[:64], pack[:10], torch.cat([pack, pack[:64]])):
            with pytest.raises(ValueError, match="sparse_linear: weight must be a sparse float32 pack"):
                ops.sparse_linear(torch.randn(1, 11), bad.contiguous())
            with pytest.raises(ValueError, match="describe"):
                ops.describe(bad.contiguous())
        fields = list(HEADER.unpack(bytes(pack[:64].tolist())))
        for place, value in (
            (5, 2**31 - 1),
            (6, 2**31 - 1),
            (5, -1),
            (6, 2**40),
            (7, 2**62),
            (7, -1),
            (8, 2**63),
            (4, 7),
            (3, 1),
        ):
            changed = fields.copy()
            changed[place] = value
            bad = pack.clone()
            bad[:64] = torch.frombuffer(bytearray(HEADER.pack(*changed)), dtype=torch.uint8)
            with pytest.raises(ValueError, match="sparse_linear"):
                ops.sparse_linear(torch.randn(1, 11), bad)
            with pytest.raises(ValueError, match="describe"):
                ops.describe(bad)


# --- The dispatcher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias: bool) -> None:
    w, bias = sparse(19, 23), torch.randn(19) if with_bias else None
    pack, x = ops.pack(w, "panels128"), torch.randn(5, 23)
    opcheck(torch.ops.fastsparse.sparse_linear.default, (x, pack, 19, bias, 2))
    bias = None if bias is None else bias.requires_grad_()
    opcheck(torch.ops.fastsparse.sparse_linear_train.default, (x.requires_grad_(), pack, 19, bias))
    opcheck(torch.ops.fastsparse.sparse_unpack.default, (pack, 19, 23))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compile_and_gradients(activation: str | None, with_bias: bool) -> None:
    w = sparse(19, 23)
    pack = ops.pack(w, "bitmap32")

    def layer(x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.sparse_linear(x, pack, bias, activation, 19)

    def run(f: Callable[[Tensor, Tensor | None], Tensor], dtype: torch.dtype) -> list[Tensor]:
        x = torch.arange(4 * 23).reshape(4, 23).sin().to(dtype).requires_grad_()
        bias = torch.arange(19).cos().to(dtype).requires_grad_() if with_bias else None
        y = f(x, bias)
        (y * torch.arange(19).to(dtype)).sum().backward()
        return [t for t in (y.detach(), x.grad, None if bias is None else bias.grad) if t is not None]

    eager = run(layer, torch.float32)
    torch._dynamo.reset()
    compiled = run(torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.float32)
    assert all(same_bits(a, b) for a, b in zip(eager, compiled, strict=True))
    oracle = run(lambda x, b: reference.sparse_linear(x, w, b, activation), torch.float64)
    for got, wanted in zip(eager, oracle, strict=True):
        assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    with torch.no_grad():
        x = torch.randn(3, 23)
        plain = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert same_bits(plain(x, None), layer(x, None))


def test_gradients_flow_only_to_what_asks() -> None:
    pack, x = ops.pack(sparse(19, 23), "sell16"), torch.randn(2, 3, 23)
    bias = torch.randn(19, requires_grad=True)
    ops.sparse_linear(x, pack, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((19,), 6.0))
    x.requires_grad_()
    assert ops.sparse_linear(x, pack).requires_grad
    with torch.no_grad():
        assert ops.sparse_linear(x, pack).grad_fn is None
    half = torch.randn(2, 23, dtype=torch.bfloat16, requires_grad=True)
    ops.sparse_linear(half, pack).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_cuda_says_in_a_sentence_that_there_is_no_kernel() -> None:
    with FakeTensorMode():
        x, pack = torch.empty(2, 3, device="meta"), torch.empty(100, dtype=torch.uint8, device="meta")
    kernels = ("sparse_linear", "sparse_linear_train")
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsparse::{name}", "CUDA") for name in kernels)
    del x, pack


# --- Errors -----------------------------------------------------------------------------------------------------------

X, W = torch.randn(2, 23), sparse(19, 23)
PACK = ops.pack(W, "panels128")
BAD_INPUT: dict[str, tuple[Callable[[], Any], str]] = {
    "K": (lambda: ops.sparse_linear(torch.randn(2, 22), PACK), r"x must have K=23 columns .* got x\[2, 22\]"),
    "no dimension": (lambda: ops.sparse_linear(torch.tensor(1.0), PACK), r"at least one dimension, got x\[\]"),
    "x dtype": (lambda: ops.sparse_linear(X.double(), PACK), "x must be float32, got float64"),
    "a dense weight": (lambda: ops.sparse_linear(X, W), "weight must be uint8, got float32"),
    "a matrix of bytes": (lambda: ops.sparse_linear(X, PACK[None]), r"must be a pack, .* got weight\[1, "),
    "an int8 pack": (lambda: ops.sparse_linear(X, ops.pack(W.to(torch.int8))), "got format 1, expected 2"),
    "bias length": (lambda: ops.sparse_linear(X, PACK, torch.randn(18)), r"bias must have shape \[19\], got bias"),
    "bias dtype": (lambda: ops.sparse_linear(X, PACK, torch.randn(19).double()), "bias must be float32, got float64"),
    "activation": (lambda: ops.sparse_linear(X, PACK, None, "tanh"), "activation must be None, 'relu'.*got 'tanh'"),
    "activation type": (lambda: ops.sparse_linear(X, PACK, None, []), "activation must be None"),
    "out_features": (lambda: ops.sparse_linear(X, PACK, out_features=18), "must be the pack's N=19, got 18"),
    "pack format": (lambda: ops.pack(W, "vnni16"), "pack: format must be 'auto', 'bitmap32'.* got 'vnni16'"),
    "pack rows": (lambda: ops.pack(W, rows=-1), "rows must be None or at least 0, or two .* got -1"),
    "pack vector": (lambda: ops.pack(W[0], "sell16"), r"weight must be a matrix \[N, K\], got weight\[23\]"),
    "pack layout": (lambda: ops.pack(W[:, :19].to_sparse_bsr(19)), "must be dense, .* got layout torch.sparse_bsr"),
    "pack dtype": (lambda: ops.pack(W.double()), "weight must be int8, .* or bfloat16, got float64"),
    "sell16 K": (lambda: ops.pack(torch.zeros(1, 65537), "sell16"), "at most K=65536 columns for sell16"),
    "unpack": (lambda: ops.unpack(PACK[:-1].contiguous()), "describe: pack must be a sparse float32 pack: got"),
    "unpack n": (lambda: torch.ops.fastsparse.sparse_unpack(PACK, 18, 23), r"must be of \[N=18, K=23\], got \[N=19"),
    "op format": (lambda: torch.ops.fastsparse.sparse_pack(W, 1), "format must be 2 .* got 1"),
    "op activation": (lambda: torch.ops.fastsparse.sparse_linear(X, PACK, 19, None, 4), "must be 0 .* got 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    call, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_other_devices_are_refused() -> None:
    meta = torch.device("meta")
    with pytest.raises(ValueError, match="weight must be on cpu"):
        ops.sparse_linear(X, PACK.to(meta), out_features=19)
    with pytest.raises(ValueError, match="bias must be on cpu"):
        ops.sparse_linear(X, PACK, torch.empty(19, device=meta))
    with pytest.raises(ValueError, match="out_features must be given"):
        ops.sparse_linear(X.to(meta), PACK.to(meta))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_warm_calls_allocate_no_scratch(format: str, count: int) -> None:
    pack = ops.pack(sparse(300, 260), format)
    inputs = [torch.randn(m, 260) for m in (1, 3, 17, 130)]
    with threads(count):
        for x in inputs * 2:
            ops.sparse_linear(x, pack)
        before = _C.scratch_allocations()
        for x in inputs * 5:
            ops.sparse_linear(x, pack)
        assert _C.scratch_allocations() == before
