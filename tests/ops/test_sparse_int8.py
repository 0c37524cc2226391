"""sparse_int8_linear: every row and format bit-equal to int8_linear, packs to the byte, damage, errors."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from fastsparse import _C, ops, reference
from fastsparse.ops import sparse_int8
from tests.support import cpu_rows, forced, guarded, isa_levels, same_bits, strided, threads

FORMATS = ("bitmap_s8", "windows_s8", "blocks1x4", "blocks4x4")
ACTIVATIONS = (None, "relu", "gelu", "silu")
# (M, N, K) round 1 to 4 rows of a pass, 8 to 64 of a panel; tiles of 16, quads, chunks of 256 outputs; 4 and 512 k.
SHAPES = [
    (1, 1, 1), (2, 16, 4), (3, 17, 7), (4, 15, 9), (5, 33, 31), (8, 64, 129), (9, 255, 61), (16, 256, 33),
    (17, 257, 130), (33, 61, 511), (65, 31, 513), (3, 5, 1030), (130, 40, 64),
]  # fmt: skip
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0), (3, 0, 0)]


def rows() -> list[str]:
    """Every row that this CPU runs, those that a better one of their level hides, too."""
    return [row["name"] for row in cpu_rows("sparse_int8") if row["usable"]]


@contextlib.contextmanager
def running(row: str) -> Iterator[None]:
    """This row, and what int8_linear runs at its level."""
    (level,) = [r["level"] for r in cpu_rows("sparse_int8") if r["name"] == row]
    _C.pin_sparse_int8(row)
    try:
        with forced(level, "sparse_int8"):
            assert [r["name"] for r in cpu_rows("sparse_int8") if r["selected"]] == [row]
            yield
    finally:
        _C.pin_sparse_int8("")


def sparse(n: int, k: int, zeros: float = 0.7) -> Tensor:
    """Full range, uneven on purpose: one row full, one column full, one row empty."""
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    mask = torch.rand(n, k) >= zeros
    if n > 2 and k > 2 and 0 < zeros < 1:
        mask[n // 2], mask[:, k // 2], mask[-1] = True, True, False
    return w * mask


def operands(m: int, n: int, k: int, zeros: float = 0.7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with rows of different sizes, one of zeros; the weight, its scale, a bias."""
    x = torch.randn(m, k) * torch.logspace(-3, 3, m)[:, None]
    x[m // 3] = 0
    return x, sparse(n, k, zeros), torch.rand(n) + 0.01, torch.randn(n)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", rows())
def test_bits_are_those_of_the_dense_weight(row: str, format: str) -> None:
    with running(row):
        for i, (m, n, k) in enumerate(SHAPES + EMPTY):
            for zeros in (0.0, 0.5, 0.95, 1.0):
                x, w, scale, bias = (
                    operands(m, n, k, zeros) if m else (torch.empty(0, k), sparse(n, k), *[torch.ones(n)] * 2)
                )
                activation = ACTIVATIONS[i % 4]
                x = x.to((torch.float32, torch.bfloat16, torch.float16)[i % 3])
                wanted = ops.int8_linear(x, ops.pack(w), scale, bias, activation)
                pack = ops.pack(w, format)
                got = ops.sparse_int8_linear(x, pack, scale, bias, activation)
                assert same_bits(got, wanted), (m, n, k, zeros, activation)
                without = ops.int8_linear(x, ops.pack(w), scale)
                assert same_bits(ops.sparse_int8_linear(x, pack, scale), without), (m, n, k, zeros)


@pytest.mark.parametrize("fill", [(-128, -127), (127, 128)])
@pytest.mark.parametrize("row", rows())
def test_corners_of_the_range_at_the_limit_of_k(row: str, fill: tuple[int, int]) -> None:
    """|sum| = 127 * 128 * K, where int32 ends; beside the oracle, which knows nothing of our kernels."""
    k = 131071
    w = torch.randint(*fill, (17, k), dtype=torch.int8)
    x = torch.ones(2, k) * torch.tensor([[3.0], [-0.25]])
    scale = torch.full((17,), 2.0**-12)
    wanted = reference.sparse_int8_linear(x, w, scale)
    with running(row):
        for format in FORMATS:
            got = ops.sparse_int8_linear(x, ops.pack(w, format), scale).double()
            assert ((got - wanted).abs() <= 2.0**-22 * wanted.abs()).all(), format


@pytest.mark.parametrize("row", rows())
def test_against_the_oracle(row: str) -> None:
    x, w, scale, bias = operands(6, 70, 200)
    with running(row):
        for format in FORMATS:
            for activation in ACTIVATIONS:
                got = ops.sparse_int8_linear(x, ops.pack(w, format), scale, bias, activation).double()
                wanted = reference.sparse_int8_linear(x, w, scale, bias, activation)
                assert ((got - wanted).abs() <= 1e-6 * wanted.abs().amax(1, keepdim=True) + 1e-30).all(), activation


def test_threads_and_row_counts_give_the_same_bits() -> None:
    x, w, scale, bias = operands(133, 530, 640, 0.8)
    for format in FORMATS:
        pack = ops.pack(w, format)
        wanted = ops.sparse_int8_linear(x, pack, scale, bias, "silu")
        for count in (1, 2, 3):
            with threads(count):
                for part in (slice(0, 133), slice(5, 6), slice(7, 20), slice(60, 110)):
                    assert same_bits(ops.sparse_int8_linear(x[part], pack, scale, bias, "silu"), wanted[part]), (
                        format,
                        count,
                    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", rows())
def test_nothing_is_read_outside(row: str, format: str) -> None:
    with running(row):
        for m, n, k in SHAPES:
            for zeros in (0.0, 0.8):
                x, w, scale, bias = operands(m, n, k, zeros)
                wanted = ops.int8_linear(x, ops.pack(w), scale, bias)
                for side in ("end", "begin"):
                    arguments = [guarded(t, side) for t in (x, ops.pack(w, format), scale, bias)]  # type: ignore[arg-type]
                    assert same_bits(ops.sparse_int8_linear(*arguments), wanted), (m, n, k, side)


@pytest.mark.parametrize("format", FORMATS)
def test_shapes_and_strides(format: str) -> None:
    w, scale, bias = sparse(19, 23), (torch.rand(38) + 0.1)[::2], torch.randn(38)[::2]
    pack, dense = ops.pack(w, format), ops.pack(w)
    inputs = [torch.randn(shape) for shape in [(23,), (1, 23), (2, 3, 23), (0, 23), (2, 0, 3, 23)]]
    inputs += [torch.randn(23, 5).t(), strided(torch.randn(5, 23)), torch.randn(1, 23).expand(5, 23)]
    for x in (*inputs, torch.randn(5, 46)[:, ::2]):
        got = ops.sparse_int8_linear(x, pack, scale, bias)
        assert same_bits(got, ops.int8_linear(x, dense, scale, bias))


@pytest.mark.parametrize("row", rows())
def test_a_broken_row_of_x_is_nan_and_the_others_are_not(row: str) -> None:
    w, scale = sparse(20, 30), torch.ones(20)
    x = torch.randn(6, 30)
    x[1, 3], x[4, 29] = float("nan"), float("inf")
    with running(row):
        for format in FORMATS:
            y = ops.sparse_int8_linear(x, ops.pack(w, format), scale)
            assert y.isnan().all(1).tolist() == [False, True, False, False, True, False]
            assert torch.isfinite(y[[0, 2, 3, 5]]).all()


@given(data=st.data())
def test_on_whatever(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    sizes = st.integers(1, 70) | st.sampled_from([255, 257, 511, 515])
    m, n, k = data.draw(st.integers(1, 70)), data.draw(sizes), data.draw(sizes)
    x, w, scale, bias = operands(m, n, k, data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.99, 1.0])))
    x = strided(x) if data.draw(st.booleans()) else x
    pack = ops.pack(w.t().contiguous().t() if data.draw(st.booleans()) else w, data.draw(st.sampled_from(FORMATS)))
    with running(data.draw(st.sampled_from(rows()))):
        assert same_bits(ops.sparse_int8_linear(x, pack, scale, bias), ops.int8_linear(x, ops.pack(w), scale, bias))


# --- Packs ------------------------------------------------------------------------------------------------------------

HEADER = struct.Struct("<4sHHIIqqqQ16s")


def pad(data: bytes, room: int = 0) -> bytes:
    return data + b"\0" * (room + -(len(data) + room) % 64)


def bitmap_restated(w: np.ndarray) -> tuple[int, int, bytes]:
    """formats/bitmap_s8.h again, in Python."""
    n, k = w.shape
    panels, steps = -(-n // 16), -(-k // 4)
    whole = np.zeros((16 * panels, 4 * steps), np.int8)
    whole[:n, :k] = w
    offset, mask, value = [0], b"", b""
    for p in range(panels):
        for s in range(steps):
            tile = whole[16 * p : 16 * p + 16, 4 * s : 4 * s + 4].reshape(64)
            mask += struct.pack("<Q", sum(1 << bit for bit in range(64) if tile[bit] != 0))
            value += tile[tile != 0].tobytes()
        offset.append(len(value))
    sums = whole.sum(1, dtype=np.int64).astype("<i4").tobytes()
    return 11, 16, pad(struct.pack(f"<{len(offset)}Q", *offset)) + pad(mask) + pad(value, 512) + sums


def windows_restated(w: np.ndarray) -> tuple[int, int, bytes]:
    """formats/windows_s8.h again, in Python."""
    n = w.shape[0]
    offset, base, steps = [0], [], b""
    for first in range(0, n, 32):
        left = [np.flatnonzero(row).tolist() for row in w[first : first + 32]]
        while any(left):
            start = min(ks[0] for ks in left if ks) // 4 * 4
            index, value = np.zeros((32, 4), np.uint8), np.zeros((32, 4), np.int8)
            for j, ks in enumerate(left):
                taken = [k for k in ks[:4] if k < start + 64]
                del ks[: len(taken)]
                index[j, : len(taken)] = [k - start for k in taken]
                value[j, : len(taken)] = w[first + j, taken]
            base.append(start // 4)
            steps += index.tobytes() + value.tobytes()
        offset.append(len(base))
    sums = np.zeros(-(-n // 32) * 32, "<i4")
    sums[:n] = w.sum(1, dtype=np.int64)
    tables = pad(struct.pack(f"<{len(offset)}Q", *offset)) + pad(struct.pack(f"<{len(base)}H", *base))
    return 16, 32, tables + steps + sums.tobytes()


def blocks_restated(w: np.ndarray, r: int) -> tuple[int, int, bytes]:
    """formats/blocks_s8.h again, in Python."""
    n, k = w.shape
    chunks, k_blocks, units = -(-n // 256), -(-k // 512), 256 // r
    whole = np.zeros((256 * chunks, 512 * k_blocks), np.int8)
    whole[:n, :k] = w
    offset, order, index, value = [0], b"", b"", b""
    for c in range(chunks):
        for b in range(k_blocks):
            part = (
                whole[256 * c : 256 * c + 256, 512 * b : 512 * b + 512].reshape(units, r, 128, 4).transpose(0, 2, 1, 3)
            )
            live = (part != 0).any((2, 3))
            count = live.sum(1)
            by_count = sorted(range(units), key=lambda u: -count[u])
            order += bytes(by_count) + bytes(int(count[u]) for u in by_count)
            for u in by_count:
                index += bytes(np.flatnonzero(live[u]).astype(np.uint8))
                value += part[u][live[u]].tobytes()
        offset.append(len(index))
    sums = whole.sum(1, dtype=np.int64).astype("<i4").tobytes()
    tables = pad(struct.pack(f"<{len(offset)}Q", *offset)) + pad(order) + pad(index, 512)
    return 12, 256 * r + 4, tables + pad(value, 512) + sums


@pytest.mark.parametrize("format", FORMATS)
def test_pack_is_as_documented_to_the_byte_and_back(format: str) -> None:
    for n, k in [(1, 1), (3, 5), (16, 32), (33, 129), (257, 514), (0, 4), (4, 0)]:
        for zeros in (0.0, 0.6, 1.0):
            w = sparse(n, k, zeros)
            pack = ops.pack(w, format)
            restate = {"bitmap_s8": bitmap_restated, "windows_s8": windows_restated}.get(
                format, lambda w: blocks_restated(w, int(format[6]))
            )
            number, block, body = restate(w.numpy())
            nonzeros = int(w.count_nonzero())
            header = HEADER.pack(b"fspk", number, 1, 1, block, n, k, nonzeros, 64 + len(body), bytes(16))
            assert pack.numpy().tobytes() == header + body, (n, k, zeros)
            assert torch.equal(ops.unpack(pack), w)
            got = ops.describe(pack)
            assert (got["format"], got["dtype"], got["n"], got["k"]) == (format, "int8", n, k)
            assert (got["block"], got["nonzeros"], got["bytes"]) == (block, nonzeros, pack.numel())


def test_a_bitmap_of_half_zeros_has_its_bytes() -> None:
    w = sparse(768, 768, 0.5)
    assert ops.pack(w, "bitmap_s8").numel() <= 0.635 * w.numel()


def blocky(n: int, k: int, zeros: float, block: tuple[int, int]) -> Tensor:
    mask = (
        (torch.rand(n // block[0], k // block[1]) >= zeros)
        .repeat_interleave(block[0], 0)
        .repeat_interleave(block[1], 1)
    )
    return torch.where(mask, 1, 0).to(torch.int8)


@pytest.mark.parametrize("row", rows())
def test_sparse_chooses_by_rows_blocks_and_the_cpu(row: str) -> None:
    with running(row):
        choose_by_rows_and_blocks(fast=row == "avx512vbmi2")


def choose_by_rows_and_blocks(fast: bool) -> None:
    for block, zeros, rows_of_x, format in [
        ((1, 1), 0.3, 1, "bitmap_s8"),
        ((1, 1), 0.7, 1, "windows_s8" if fast else "bitmap_s8"),
        ((4, 4), 0.75, 4, "windows_s8" if fast else "bitmap_s8"),
        ((1, 1), 0.9, 1, "windows_s8" if fast else "bitmap_s8"),
        ((1, 1), 0.9, 64, "windows_s8" if fast else "blocks1x4"),
        ((1, 1), 0.7, None, "windows_s8" if fast else "blocks4x4"),
        ((1, 4), 0.75, None, "blocks1x4"),
        ((4, 4), 0.75, None, "blocks4x4"),
        ((4, 4), 0.75, 128, "blocks4x4"),
        ((1, 1), 0.0, None, "blocks4x4"),  # nothing is zero: no block is stored in vain
    ]:
        w = blocky(256, 256, zeros, block)
        assert ops.describe(ops.pack(w, "sparse", rows_of_x))["format"] == format, (block, zeros, rows_of_x)
    assert ops.describe(ops.pack(blocky(64, 128, 0.9, (1, 1))))["format"] == "vnni16"  # "auto" stays what it was


def test_sparse_takes_more_bytes_for_windows_where_a_cache_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    w = blocky(256, 256, 0.7, (1, 1))
    monkeypatch.setattr(sparse_int8, "CACHED_BYTES", 0)
    assert ops.describe(ops.pack(w, "sparse", 1))["format"] == "bitmap_s8"


def refused_or_harmless(pack: Tensor, n: int, k: int) -> None:
    """Whatever the bytes are: a ValueError, or numbers; on guarded memory, so that an access outside is a crash."""
    weight, scale = guarded(pack), torch.ones(n)
    for m in (2, 9):
        x = guarded(torch.randn(m, k))
        for row in rows():
            with running(row), contextlib.suppress(ValueError):
                ops.sparse_int8_linear(x, weight, scale)
    with contextlib.suppress(ValueError):
        ops.unpack(weight)


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_damaged_packs_never_read_outside(format: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    n, k = data.draw(st.sampled_from([(3, 5), (40, 140), (300, 9)]))
    pack = ops.pack(sparse(n, k), format).clone()
    tables = min(pack.numel(), 2000)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, tables - 1) | st.integers(0, pack.numel() - 1))
        pack[at] = data.draw(st.integers(0, 255) | st.just(255))
    refused_or_harmless(pack, n, k)


@pytest.mark.parametrize("fill", [255, 128, 127, 1, None])
@pytest.mark.parametrize("format", FORMATS)
def test_packs_of_garbage_never_read_outside(format: str, fill: int | None) -> None:
    for n, k in ((3, 5), (40, 600), (300, 9)):
        good = ops.pack(sparse(n, k), format)
        pack = good.clone()
        pack[64:] = torch.randint(0, 256, (good.numel() - 64,), dtype=torch.uint8) if fill is None else fill
        if format != "bitmap_s8":  # the last offset is the number of blocks or steps: with it right, the rest is read
            at = 64 + 8 * -(-n // (32 if format == "windows_s8" else 256))
            pack[at : at + 8] = good[at : at + 8]
        refused_or_harmless(pack, n, k)


@pytest.mark.parametrize("format", FORMATS)
def test_validate_sees_every_damaged_byte(format: str) -> None:
    good = ops.pack(sparse(18, 20), format)
    for at in range(good.numel()):
        pack = good.clone()
        pack[at] ^= 0x41
        try:
            got = ops.unpack(pack)
        except ValueError:
            continue
        # Other sides in the header: another weight's pack, to the last byte.
        assert at < 64
        assert torch.equal(ops.pack(got, format), pack)


def test_truncated_overflowing_and_foreign_packs_are_refused() -> None:
    scale = torch.ones(9)
    for format in FORMATS:
        pack = ops.pack(sparse(9, 11), format)
        changed = []
        fields = list(HEADER.unpack(bytes(pack[:64].tolist())))
        for place, value in (
            (5, 2**31 - 1), (6, 2**31 - 1), (5, -1), (6, 2**40), (7, 2**62), (7, -1), (8, 2**63), (4, 7), (3, 2),
            (2, 2), (1, 2),
        ):  # fmt: skip
            header = HEADER.pack(*fields[:place], value, *fields[place + 1 :])
            changed.append(torch.cat([torch.frombuffer(bytearray(header), dtype=torch.uint8), pack[64:]]))
        for bad in (pack[:-1], pack[:64], pack[:10], torch.cat([pack, pack[:64]]), *changed):
            with pytest.raises(ValueError, match="sparse_int8_linear: weight must be a sparse int8 pack: got"):
                ops.sparse_int8_linear(torch.randn(1, 11), bad.contiguous(), scale)
            with pytest.raises(ValueError, match="describe: "):
                ops.describe(bad.contiguous())


# --- The dispatcher ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(with_bias: bool) -> None:
    w, scale, bias = sparse(19, 23), torch.rand(19), torch.randn(19) if with_bias else None
    raw = torch.ops.fastsparse
    for format in ("bitmap_s8", "blocks4x4"):
        pack = ops.pack(w, format)
        opcheck(raw.sparse_int8_linear.default, (torch.randn(3, 23), pack, scale, bias, 2))
        for x in (torch.randn(3, 23), torch.randn(3, 23, requires_grad=True)):
            # Autograd on the integer buffers is not defined, and aot autograd compares only what has a gradient.
            utils = ("test_schema", "test_autograd_registration", "test_faketensor")
            opcheck(raw.sparse_int8_linear_train.default, (x, pack, scale, bias), test_utils=utils)
        opcheck(raw.sparse_int8_unpack.default, (pack, 19, 23))
        opcheck(raw.sparse_int8_validate.default, (pack,), test_utils=("test_schema",))
    opcheck(raw.sparse_int8_pack.default, (w, 1), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_int8_linear(format: str, activation: str | None) -> None:
    w, scale = sparse(19, 23), torch.rand(19)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        for op, pack in ((ops.int8_linear, ops.pack(w)), (ops.sparse_int8_linear, ops.pack(w, format))):
            torch.manual_seed(0)
            x, bias = torch.randn(5, 23).to(dtype).requires_grad_(), torch.randn(19, requires_grad=True)
            y = op(x, pack, scale, bias, activation)
            y.backward(torch.randn(5, 19).to(dtype))
            grads.append((y.detach(), x.grad, bias.grad))
        for got, wanted in zip(grads[-1], grads[-2], strict=True):
            assert got is not None
            assert wanted is not None
            assert same_bits(got, wanted)


def test_compile_fullgraph_and_fake_tensors() -> None:
    x, w, scale, _ = operands(4, 19, 23)
    pack = ops.pack(w, "blocks1x4")

    def layer(x: Tensor, pack: Tensor, scale: Tensor) -> Tensor:
        return ops.sparse_int8_linear(x, pack, scale, None, "gelu") * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(x, pack, scale), layer(x, pack, scale))
    x.requires_grad_()
    compiled(x, pack, scale).sum().backward()
    assert x.grad is not None
    with FakeTensorMode():
        y = ops.sparse_int8_linear(
            torch.empty(2, 3, 23, dtype=torch.bfloat16), torch.empty(999, dtype=torch.uint8), torch.empty(19)
        )
    assert (y.shape, y.dtype) == ((2, 3, 19), torch.bfloat16)


W, SCALE, X = sparse(19, 23), torch.ones(19), torch.randn(2, 23)
PACK = ops.pack(W, "bitmap_s8")
linear = ops.sparse_int8_linear
BAD_INPUT = {
    "x columns": (lambda: linear(X[:, 1:], PACK, SCALE), r"x must have K=23 columns .* got x\[2, 22\]"),
    "no dimension": (lambda: linear(torch.tensor(1.0), PACK, SCALE), r"at least one dimension, got x\[\]"),
    "x dtype": (lambda: linear(X.double(), PACK, SCALE), "x must be float32, bfloat16 or float16, got float64"),
    "x int8": (lambda: linear(X.to(torch.int8), PACK, SCALE), "x must be float32, .* got int8"),
    "a dense weight": (lambda: linear(X, W, SCALE), "weight must be uint8, got int8"),
    "a matrix of bytes": (lambda: linear(X, PACK[None], SCALE), r"must be a pack, .* got weight\[1, "),
    "a dense pack": (lambda: linear(X, ops.pack(W), SCALE), "got format 1, expected 11"),
    "a sparse pack there": (lambda: ops.int8_linear(X, PACK, SCALE), "got format 11, expected 1"),
    "scale length": (lambda: linear(X, PACK, SCALE[1:]), r"weight_scale must have shape \[19\], got"),
    "scale dtype": (lambda: linear(X, PACK, SCALE.double()), "weight_scale must be float32, got float64"),
    "scale finite": (lambda: linear(X, PACK, SCALE / 0), "weight_scale must be finite"),
    "scale gradient": (lambda: linear(X, PACK, SCALE.clone().requires_grad_()), "must not require a gradient"),
    "bias length": (lambda: linear(X, PACK, SCALE, SCALE[1:]), r"bias must have shape \[19\], got bias"),
    "bias dtype": (lambda: linear(X, PACK, SCALE, SCALE.double()), "bias must be float32, got float64"),
    "activation": (lambda: linear(X, PACK, SCALE, None, "tanh"), "activation must be None, .* got 'tanh'"),
    "pack format": (lambda: ops.pack(W, "blocks2x4"), "pack: format must be .*'blocks1x4'.* got 'blocks2x4'"),
    "pack rows": (lambda: ops.pack(W, "sparse", rows=-1), "rows must be None or at least 0, .* got -1"),
    "pack vector": (lambda: ops.pack(W[0], "sparse"), r"weight must be a matrix \[N, K\], got weight\[23\]"),
    "pack K": (lambda: ops.pack(torch.zeros(1, 131072, dtype=torch.int8), "blocks1x4"), "at most K=131071"),
    "pack layout": (lambda: ops.pack(W[:, :19].to_sparse_bsr(19), "bitmap_s8"), "must be dense, .* torch.sparse_bsr"),
    "float32": (lambda: ops.pack(W.float(), "bitmap_s8"), "must be .*'panels128'.* for float32, got 'bitmap_s8'"),
    "unpack n": (lambda: torch.ops.fastsparse.sparse_int8_unpack(PACK, 18, 23), r"must be of \[N=18, .* got \[N=19"),
    "op block": (lambda: torch.ops.fastsparse.sparse_int8_pack(W, 2), "block must be 0 .* got 2"),
    "op activation": (lambda: torch.ops.fastsparse.sparse_int8_linear(X, PACK, SCALE, None, 4), "must be 0 .* got 4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    call, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_other_devices_are_refused() -> None:
    meta = torch.device("meta")
    for arguments in ((X, PACK.to(meta), SCALE), (X, PACK, SCALE.to(meta)), (X, PACK, SCALE, SCALE.to(meta))):
        with pytest.raises(ValueError, match="must be on cpu like the first argument"):
            ops.sparse_int8_linear(*arguments)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("format", FORMATS)
def test_warm_calls_allocate_no_scratch(format: str, count: int) -> None:
    _, w, scale, _ = operands(1, 600, 260)
    pack = ops.pack(w, format)
    inputs = [torch.randn(m, 260) for m in (1, 3, 17, 130)]
    with threads(count):
        for x in inputs * 2:
            ops.sparse_int8_linear(x, pack, scale)
        before = _C.scratch_allocations()
        for x in inputs * 5:
            ops.sparse_int8_linear(x, pack, scale)
        assert _C.scratch_allocations() == before


def test_a_row_that_is_hidden_or_unknown() -> None:
    assert [row["level"] for row in cpu_rows("sparse_int8")][:2] == ["avx512", "avx512"] or "avx512" not in isa_levels()
    with pytest.raises(ValueError, match="pin_kernel: sparse_int8 has no kernel named sse9"):
        _C.pin_sparse_int8("sse9")
