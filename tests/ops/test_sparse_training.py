"""Sparse training: products and sddmm on every level, gradients against masked float64, structures, conversions."""

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
from torch.library import opcheck

from fastsparse import _C, ops, reference
from tests.support import forced, guarded, isa_levels, same_bits, strided, threads

SHAPES = [
    (1, 1, 1), (2, 17, 7), (5, 33, 128), (15, 64, 129), (16, 255, 31), (17, 256, 61), (33, 257, 130), (64, 61, 300),
    (65, 31, 257), (130, 40, 64), (577, 35, 40),
]  # fmt: skip
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]
HEADER = struct.Struct("<4sHHIIqqqQ16s")
OPS = torch.ops.fastsparse


def sparse(n: int, k: int, zeros: float = 0.7) -> Tensor:
    """Uneven on purpose: one row full, one column full, one row empty."""
    w = torch.randn(n, k) * (torch.rand(n, k) >= zeros)
    if n > 2 and k > 2 and 0 < zeros < 1:
        w[n // 2], w[:, k // 2], w[-1] = torch.randn(k), torch.randn(n), 0
    return w


def quiet_csr(w: Tensor) -> Tensor:
    structure, values = ops.sparse_structure(w)
    return ops.unpack(structure, torch.sparse_csr, values)


@pytest.mark.parametrize("isa", isa_levels())
def test_products_have_the_bits_of_sparse_linear(isa: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in SHAPES + EMPTY:
            for zeros in (0.0, 0.8):
                w, x, grad, bias = sparse(n, k, zeros), torch.randn(m, k), torch.randn(m, n), torch.randn(n)
                structure, values = ops.sparse_structure(w)
                assert same_bits(values, w[w != 0])
                got = ops.sparse_linear(x, structure, bias, "gelu", values=values)
                assert same_bits(got, ops.sparse_linear(x, ops.pack(w, "panels128"), bias, "gelu")), (m, n, k, zeros)
                got = OPS.sparse_values_linear(grad, structure, values, k, True)
                wanted = ops.sparse_linear(grad, ops.pack(w.t().contiguous(), "panels128"))
                assert same_bits(got, wanted), (m, n, k, zeros)


@pytest.mark.parametrize("isa", isa_levels())
def test_sddmm(isa: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in SHAPES + EMPTY:
            for zeros in (0.0, 0.8, 1.0):
                mask, a, b = sparse(n, k, zeros) != 0, torch.randn(n, m), torch.randn(m, k)
                structure, _ = ops.sparse_structure(mask.float())
                got = ops.sddmm(structure, a, b)
                assert got.dtype == torch.float32
                error = (got.double() - reference.sddmm(mask, a, b)).abs()
                assert (error <= reference.sddmm_bound(mask, a, b) + 1e-45).all(), (m, n, k, zeros)


def test_all_levels_and_threads_give_the_same_bits() -> None:
    for m in (7, 70, 600):
        w, a, b = sparse(270, 139, 0.8), torch.randn(m, 270), torch.randn(m, 139)
        structure, values = ops.sparse_structure(w)
        expected = None
        for isa in isa_levels():
            for count in (1, 2):
                with forced(isa, "sparse_matmul"), threads(count):
                    got = [
                        OPS.sparse_sddmm(a, b, structure, -1),
                        OPS.sparse_values_linear(a, structure, values, -1, True),
                        ops.sparse_linear(b, structure, values=values),
                    ]
                expected = got if expected is None else expected
                assert all(same_bits(x, y) for x, y in zip(got, expected, strict=True)), (m, isa, count)


def test_the_order_of_the_sum_is_the_documented_one() -> None:
    # Sixteen lanes that differ wildly in size: any other order loses other bits.
    m = 70
    p, q = torch.randn(m) * 10.0 ** torch.randint(-4, 5, (m,)), torch.ones(m)
    structure, _ = ops.sparse_structure(torch.ones(1, 1))
    parts = []
    for panel in (p[:64], torch.cat([p[64:], torch.zeros(10)])):
        lane = panel[:16].clone()  # products with 1 are exact: no difference between fused and not
        for at in range(16, len(panel), 16):
            lane = lane + panel[at : at + 16]
        h = [(lane[j] + lane[j + 2]) + (lane[j + 1] + lane[j + 3]) for j in (0, 4, 8, 12)]
        parts.append((h[0] + h[2]) + (h[1] + h[3]))
    for isa in isa_levels():
        with forced(isa, "sparse_matmul"):
            assert ops.sddmm(structure, p[None], q[:, None]).item() == (parts[0] + parts[1]).item()


@pytest.mark.parametrize("isa", isa_levels())
def test_nothing_is_read_outside(isa: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in SHAPES[:-1]:
            w, x, grad = sparse(n, k, 0.8), torch.randn(m, k), torch.randn(m, n)
            structure, values = ops.sparse_structure(w)
            y, sampled = ops.sparse_linear(x, structure, values=values), OPS.sparse_sddmm(grad, x, structure, -1)
            for side in ("end", "begin"):
                gx, gs, gv, gg = (guarded(t, side) for t in (x, structure, values, grad))  # type: ignore[arg-type]
                assert same_bits(ops.sparse_linear(gx, gs, values=gv), y), (m, n, k, side)
                assert same_bits(OPS.sparse_sddmm(gg, gx, gs, -1), sampled), (m, n, k, side)


def test_strides() -> None:
    w = sparse(19, 23)
    structure, values = ops.sparse_structure(w)
    a, b, dense = torch.randn(19, 40), torch.randn(40, 23), torch.randn(23, 40)
    for change in (lambda t: t.t().contiguous().t(), strided, lambda t: t.repeat_interleave(2, 1)[:, ::2]):
        assert same_bits(ops.sddmm(structure, change(a), change(b)), ops.sddmm(structure, a, b))
        assert same_bits(ops.spmm(structure, values, change(dense)), ops.spmm(structure, values, dense))
    column, row = torch.randn(19, 1).expand(19, 40), torch.randn(1, 23).expand(40, 23)
    assert same_bits(ops.sddmm(structure, column, row), ops.sddmm(structure, column.clone(), row.clone()))
    twice = torch.stack([values, values], 1)[:, 0]
    assert same_bits(ops.spmm(structure, twice, dense), ops.spmm(structure, values, dense))
    x = torch.randn(2, 3, 23)
    assert same_bits(
        ops.sparse_linear(x, structure, values=values)[1], ops.sparse_linear(x[1], structure, values=values)
    )
    half = torch.randn(5, 23).bfloat16()
    got = ops.sparse_linear(half, structure, values=values)
    assert same_bits(got, ops.sparse_linear(half.float(), structure, values=values).bfloat16())


# --- Gradients --------------------------------------------------------------------------------------------------------


def layers(w: Tensor, activation: str | None) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A sparse layer over (x, values, bias), and the dense one under a mask."""
    structure, _ = ops.sparse_structure(w)
    mask = w != 0

    def ours(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return ops.sparse_linear(x, structure, bias, activation, w.shape[0], values)

    def oracle(x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        dense = torch.zeros(w.shape, dtype=values.dtype).masked_scatter(mask, values)
        y = torch.nn.functional.linear(x, dense, bias)
        return y if activation is None else getattr(torch.nn.functional, activation)(y)

    return ours, oracle


def run(f: Callable[..., Tensor], w: Tensor, dtype: torch.dtype, with_bias: bool = True) -> list[Tensor]:
    x = torch.arange(2 * 9 * 23).reshape(2, 9, 23).sin().to(dtype).requires_grad_()
    values = w[w != 0].to(dtype).requires_grad_()
    bias = torch.arange(19).cos().to(dtype).requires_grad_() if with_bias else None
    y = f(x, values, bias)
    (y * torch.arange(19).to(dtype)).sum().backward()
    return [t for t in (y.detach(), x.grad, values.grad, None if bias is None else bias.grad) if t is not None]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_compile_and_gradients(activation: str | None, with_bias: bool) -> None:
    w = sparse(19, 23)
    ours, oracle = layers(w, activation)
    eager = run(ours, w, torch.float32, with_bias)
    for got, wanted in zip(eager, run(oracle, w, torch.float64, with_bias), strict=True):
        assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(eager, run(compiled, w, torch.float32, with_bias), strict=True))
    with torch.no_grad():
        x, values = torch.randn(3, 23), w[w != 0]
        assert same_bits(compiled(x, values, None), ours(x, values, None))


def test_gradients_of_gradients() -> None:
    w = sparse(19, 23)
    found = []
    for f, dtype in zip(layers(w, None), (torch.float32, torch.float64), strict=True):
        x = torch.arange(5 * 23).reshape(5, 23).sin().to(dtype).requires_grad_()
        values = w[w != 0].to(dtype).requires_grad_()
        first = torch.autograd.grad(f(x, values, None).pow(3).sum(), (x, values), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, values))
        found.append([*first, *second])
    for got, wanted in zip(*found, strict=True):
        assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.detach().abs().max()))


def test_gradients_of_spmm_and_sddmm() -> None:
    w = sparse(19, 23)
    mask, (structure, values) = w != 0, ops.sparse_structure(w)

    def ours(v: Tensor, a: Tensor, b: Tensor, dense: Tensor) -> Tensor:
        sampled = ops.sddmm(structure, a, b, v.numel())
        return ops.spmm(structure, v * sampled, dense, 19).square()

    def oracle(v: Tensor, a: Tensor, b: Tensor, dense: Tensor) -> Tensor:
        weight = torch.zeros(19, 23, dtype=v.dtype).masked_scatter(mask, v * (a @ b)[mask])
        return (weight @ dense).square()

    given_ = [values, torch.randn(19, 6), torch.randn(6, 23), torch.randn(23, 7)]
    results = []
    torch._dynamo.reset()
    for f, dtype in (
        (ours, torch.float32),
        (oracle, torch.float64),
        (torch.compile(ours, fullgraph=True, backend="aot_eager"), torch.float32),
    ):
        inputs = [t.detach().to(dtype).clone().requires_grad_() for t in given_]
        y = f(*inputs)
        y.sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs)])
    for got, wanted, compiled in zip(*results, strict=True):
        assert torch.allclose(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert same_bits(got, compiled)


@pytest.mark.parametrize("shape", [(0,), (23,), (0, 23), (2, 0, 23), (4, 0)])
def test_gradients_of_odd_shapes(shape: tuple[int, ...]) -> None:
    w = sparse(19, shape[-1])
    structure, values = ops.sparse_structure(w)
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(19, requires_grad=True)
    y = ops.sparse_linear(x, structure, bias, values=values.requires_grad_())
    y.sum().backward()
    assert y.shape == (*shape[:-1], 19)
    m = x.numel() // max(shape[-1], 1) if shape[-1] else y.numel() // 19
    assert torch.equal(bias.grad, torch.full((19,), float(m)))
    wanted = (torch.ones(19, m) @ x.detach().reshape(m, shape[-1]))[w != 0]
    assert torch.allclose(values.grad, wanted)
    assert torch.allclose(x.grad, w.sum(0).expand(shape), atol=1e-5)


def test_gradients_flow_only_to_what_asks() -> None:
    structure, values = ops.sparse_structure(sparse(19, 23))
    x = torch.randn(4, 23)
    assert ops.sparse_linear(x, structure, values=values).grad_fn is None
    values.requires_grad_()
    y = ops.sparse_linear(x, structure, values=values)
    y.sum().backward()
    assert values.grad is not None
    with torch.no_grad():
        assert ops.sparse_linear(x, structure, values=values).grad_fn is None
    half = torch.randn(4, 23).bfloat16().requires_grad_()
    ops.sparse_linear(half, structure, values=values.detach()).sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


def test_opcheck() -> None:
    structure, values = ops.sparse_structure(sparse(19, 23))
    x, p, bias = torch.randn(5, 23), torch.randn(5, 19), torch.randn(19)
    opcheck(OPS.sparse_values_linear.default, (x, structure, values, 19, False, bias, 2))
    opcheck(OPS.sparse_sddmm.default, (p, x, structure, values.numel()))
    inputs = [t.clone().requires_grad_() for t in (x, values, bias, p)]
    opcheck(OPS.sparse_values_linear_train.default, (inputs[0], structure, inputs[1], 19, False, inputs[2]))
    opcheck(OPS.sparse_values_linear_train.default, (inputs[3], structure, inputs[1], 23, True))
    opcheck(OPS.sparse_sddmm_train.default, (inputs[3], inputs[0], structure, values.numel()))


# --- Structures -------------------------------------------------------------------------------------------------------


def pad(data: bytes, room: int = 0) -> bytes:
    return data + b"\0" * (room + -(len(data) + room) % 64)


def restated(w: np.ndarray) -> bytes:
    """formats/structure.h again, in Python; the packs in it have tests of their own."""
    n, k = w.shape
    place = np.full((n, k), -1, np.int64)
    place[w != 0] = np.arange(np.count_nonzero(w))
    label = np.where(w != 0, (0x00800000 + place).astype("<u4").view("<f4"), np.float32(0))
    packs = [pad(ops.pack(torch.from_numpy(np.ascontiguousarray(each)), "panels128").numpy().tobytes())
             for each in (label, label.T)]  # fmt: skip
    order, start = b"", b""
    for c in range(0, n, 256):
        for b in range(0, k, 128):
            inside = place[c : c + 256, b : b + 128]
            count = np.zeros(256, np.int64)
            count[: len(inside)] = (inside >= 0).sum(1)
            rows = sorted(range(256), key=lambda r, count=count: -count[r])
            order += bytes(rows) + bytes(int(count[r]) for r in rows)
            firsts = [int(inside[r][inside[r] >= 0][0]) if count[r] else 0 for r in rows]
            start += struct.pack("<256I", *firsts)
    index = bytes((np.nonzero(w)[1] % 128).astype(np.uint8))
    body = pad(struct.pack("<2Q", *map(len, packs))) + pad(order) + pad(start) + pad(index, 512) + b"".join(packs)
    nonzeros = int(np.count_nonzero(w))
    return HEADER.pack(b"fspk", 15, 1, 2, 128, n, k, nonzeros, 64 + len(body), bytes(16)) + body


def test_structure_is_as_documented_to_the_byte() -> None:
    for n, k in [(1, 1), (3, 5), (33, 129), (257, 130), (0, 4), (4, 0)]:
        for zeros in (0.0, 0.6, 1.0):
            w = sparse(n, k, zeros)
            structure, values = ops.sparse_structure(w)
            assert structure.numpy().tobytes() == restated(w.numpy()), (n, k, zeros)
            assert same_bits(ops.unpack(structure, values=values), w + 0.0)
            header = ops.describe(structure)
            assert (header["format"], header["n"], header["k"]) == ("structure", n, k)
            assert (header["nonzeros"], header["bytes"]) == (values.numel(), structure.numel())


def refused_or_harmless(structure: Tensor, n: int, k: int, nonzeros: int) -> None:
    """Whatever the bytes are: a ValueError, or numbers; on guarded memory, so that an access outside is a crash."""
    x, grad, values = guarded(torch.randn(5, k)), guarded(torch.randn(5, n)), guarded(torch.randn(nonzeros))
    bad = guarded(structure)
    for isa in isa_levels():
        with forced(isa, "sparse_matmul"), contextlib.suppress(ValueError):
            ops.sparse_linear(x, bad, values=values)
            OPS.sparse_values_linear(grad, bad, values, k, True)
            OPS.sparse_sddmm(grad, x, bad, nonzeros)
    with contextlib.suppress(ValueError):
        ops.unpack(bad, values=values)


@given(data=st.data())
def test_damaged_structures_never_read_outside(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    n, k = data.draw(st.sampled_from([(3, 5), (40, 140), (300, 9)]))
    structure, values = ops.sparse_structure(sparse(n, k))
    bad = structure.clone()
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(64, 2000) | st.integers(0, bad.numel() - 1))
        bad[at] = data.draw(st.integers(0, 255) | st.just(255))
    refused_or_harmless(bad, n, k, values.numel())


@pytest.mark.parametrize("fill", [255, 128, 1, "random"])
def test_structures_of_garbage_never_read_outside(fill: Any) -> None:
    for n, k in ((3, 5), (40, 140), (300, 9)):
        structure, values = ops.sparse_structure(sparse(n, k))
        first, second = struct.unpack("<2Q", bytes(structure[64:80].tolist()))
        end = structure.numel()
        spans = [(80, end - first - second - 128), (end - first - second, end - second), (end - second, end)]
        for begin, stop in (*spans, (128, end)):
            for keep in (0, 64, 128):  # the packs' headers and tables of offsets, so that what follows is read
                bad = structure.clone()
                part = bad[begin + keep : stop]
                part.copy_(torch.randint(0, 256, part.shape) if fill == "random" else torch.full(part.shape, fill))
                refused_or_harmless(bad, n, k, values.numel())


def test_every_damaged_byte_is_seen() -> None:
    structure, _ = ops.sparse_structure(sparse(18, 20))
    for at in (*range(0, 128), *range(128, structure.numel(), 11)):
        bad = structure.clone()
        bad[at] ^= 0x41
        with pytest.raises(ValueError, match="describe: "):
            ops.describe(bad)
    for bad in (structure[:-1], structure[:100], structure[:10], torch.cat([structure, structure[:64]])):
        with pytest.raises(ValueError, match="describe: "):
            ops.describe(bad.contiguous())
        with pytest.raises(ValueError, match="sparse_linear: structure must be a sparse structure: got"):
            ops.sparse_linear(torch.randn(1, 20), bad.contiguous(), values=torch.randn(1))


# --- Conversions ------------------------------------------------------------------------------------------------------


def test_conversions_from_and_to_other_layouts() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    for w in (sparse(37, 41), torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(4, 0)):
        structure, values = ops.sparse_structure(w)
        csr = ops.unpack(structure, torch.sparse_csr, values)
        matrix = scipy_sparse.csr_matrix(w.numpy())
        crow, col = csr.crow_indices(), csr.col_indices()
        columns = ops.unpack(ops.sparse_structure(w.t().contiguous())[0], torch.sparse_csr, w.t()[w.t() != 0])
        csc = torch.sparse_csc_tensor(columns.crow_indices(), columns.col_indices(), columns.values(), w.shape)
        shuffled = torch.randperm(values.numel())
        rows = torch.arange(w.shape[0]).repeat_interleave(crow.diff())
        coo = torch.sparse_coo_tensor(torch.stack([rows, col])[:, shuffled], values[shuffled], w.shape)
        narrow = torch.sparse_csr_tensor(crow.int(), col.int(), values, w.shape)
        for other in (csr, narrow, csc, coo, matrix, matrix.tocsc(), matrix.tocoo(), scipy_sparse.csr_array(matrix)):
            got, got_values = ops.sparse_structure(other)
            assert torch.equal(got, structure)
            assert same_bits(got_values, values)
            for format in ("bitmap32", "sell16", "panels128"):
                assert torch.equal(ops.pack(other, format), ops.pack(w, format))
        pack = ops.pack(w, "sell16")
        for back in (ops.unpack(structure, "scipy", values), ops.unpack(pack, "scipy")):
            assert (back != matrix).nnz == 0
            assert back.shape == w.shape
        assert torch.equal(ops.unpack(pack, torch.sparse_csr).to_dense(), w)


@pytest.mark.parametrize(
    ("dtype", "formats"),
    [
        (torch.int8, ("vnni16", "bitmap_s8", "windows_s8", "blocks4x4")),
        (torch.bfloat16, ("bitmap32", "sell8", "panels128")),
        (torch.float16, ("bitmap32", "blocks16")),
    ],
)
def test_conversions_of_narrow_weights(dtype: torch.dtype, formats: tuple[str, ...]) -> None:
    for w in (sparse(37, 41), torch.zeros(3, 4), torch.zeros(0, 4), torch.zeros(4, 0)):
        w = (w * 30).to(dtype)
        csr = ops.unpack(ops.pack(w, formats[0]), torch.sparse_csr)
        rows = torch.arange(w.shape[0]).repeat_interleave(csr.crow_indices().diff())
        coo = torch.sparse_coo_tensor(torch.stack([rows, csr.col_indices()]), csr.values(), w.shape)
        assert csr.dtype == dtype
        assert torch.equal(csr.values(), w[w != 0])
        for format in formats:
            pack = ops.pack(w, format)
            assert torch.equal(ops.pack(csr, format), pack)
            assert torch.equal(ops.pack(coo, format), pack)
            assert torch.equal(ops.unpack(pack, torch.sparse_csr).to_dense(), w)
    with pytest.raises(ValueError, match="the columns of a row must ascend, got 3 before 1 in row 0"):
        ops.pack(csr_of([0, 2], [3, 1], (1, 4)).to(dtype), formats[0])


def test_conversions_of_int8_from_and_to_scipy() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    w = (sparse(37, 41) * 30).to(torch.int8)
    matrix = scipy_sparse.csr_matrix(w.numpy())
    pack = ops.pack(w, "bitmap_s8")
    assert torch.equal(ops.pack(matrix, "bitmap_s8"), pack)
    back = ops.unpack(pack, "scipy")
    assert back.dtype == "int8"
    assert (back != matrix).nnz == 0


def test_a_structure_keeps_explicit_zeros_and_a_pack_does_not() -> None:
    csr = quiet_csr(torch.ones(3, 4))
    csr.values()[:5] = 0
    structure, values = ops.sparse_structure(csr)
    assert values.numel() == 12
    assert ops.describe(ops.pack(csr))["nonzeros"] == 7
    assert ops.describe(structure)["nonzeros"] == 12


def test_conversions_share_no_memory() -> None:
    csr = quiet_csr(sparse(5, 6))
    _, values = ops.sparse_structure(csr)
    before = values.clone()
    csr.values().zero_()
    assert torch.equal(values, before)


def csr_of(crow: list[int], col: list[int], shape: tuple[int, int], kind: str = "csr") -> Tensor:
    make = torch.sparse_csr_tensor if kind == "csr" else torch.sparse_csc_tensor
    return make(torch.tensor(crow), torch.tensor(col), torch.ones(len(col)), shape, check_invariants=False)


BAD_INDICES = {
    "out of range": (csr_of([0, 1, 2], [0, 5], (2, 3)), "col must be in 0 .. K-1=2, got 5 in row 1"),
    "negative": (csr_of([0, 1, 2], [-1, 0], (2, 3)), "got -1 in row 0"),
    "out of order": (csr_of([0, 2, 2], [2, 1], (2, 3)), "must ascend, got 2 before 1 in row 0"),
    "twice": (csr_of([0, 0, 2], [1, 1], (2, 3)), "must differ, got 1 before 1 in row 1"),
    "descending crow": (csr_of([0, 3, 2], [0, 1], (2, 3)), "crow must not descend, got 3 before 2 at row 1"),
    "short crow": (csr_of([0, 1, 1], [0, 1], (2, 3)), r"crow must run from 0 to .*=2, got 0 to 1"),
    "csc": (csr_of([0, 1, 2, 2], [0, 7], (2, 3), "csc"), "csc: col must be in 0 .. K-1=1, got 7"),
    "coo": (torch.sparse_coo_tensor([[0, 9], [0, 1]], [1.0, 1.0], (2, 3), check_invariants=False), "got 0 .. 9"),
}


@pytest.mark.parametrize("case", BAD_INDICES)
def test_bad_indices_are_refused(case: str) -> None:
    weight, message = BAD_INDICES[case]
    for convert in (ops.sparse_structure, ops.pack):
        with pytest.raises(ValueError, match=message):
            convert(weight)


def test_bad_indices_of_scipy_are_refused() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    matrix = scipy_sparse.csr_matrix(np.ones((2, 3), np.float32))
    matrix.indices[1] = 40
    for convert in (ops.sparse_structure, ops.pack):
        with pytest.raises(ValueError, match="got 40 in row 0"):
            convert(matrix)
        with pytest.raises(ValueError, match="must be float32, got float64"):
            convert(matrix.astype("float64"))


# --- Errors -----------------------------------------------------------------------------------------------------------

X, W = torch.randn(2, 23), sparse(19, 23)
S, V = ops.sparse_structure(W)
U4 = torch.ones(2, 32, dtype=torch.int8)
BAD_INPUT: dict[str, tuple[Callable[[], Any], str]] = {
    "K": (lambda: ops.sparse_linear(torch.randn(2, 22), S, values=V), r"x must have K=23 columns .* got x\[2, 22\]"),
    "N": (lambda: OPS.sparse_values_linear(X, S, V, 23, True), r"x must have N=19 columns .* got x\[2, 23\]"),
    "values": (lambda: ops.sparse_linear(X, S, values=V[1:]), r"values must have shape \[\d+\], got values\[\d+\]"),
    "values dtype": (lambda: ops.sparse_linear(X, S, values=V.double()), "values must be float32, got float64"),
    "x dtype": (lambda: ops.sparse_linear(X.double(), S, values=V), "x must be float32, got float64"),
    "bias": (lambda: ops.sparse_linear(X, S, torch.ones(18), values=V), r"bias must have shape \[19\]"),
    "out_features": (lambda: ops.sparse_linear(X, S, out_features=18, values=V), "must be the structure's 19, got 18"),
    "a pack": (lambda: ops.sparse_linear(X, ops.pack(W, "sell16"), values=V), r"got format 3, expected 15 \(structure"),
    "no values": (lambda: ops.sparse_linear(X, S), "weight must be a sparse float32 pack: got format 15"),
    "activation": (lambda: OPS.sparse_values_linear(X, S, V, 19, False, None, 9), "activation must be 0 .* got 9"),
    "spmm shape": (lambda: ops.spmm(S, V, X), r"dense.t\(\) must have K=23 .* got dense.t\(\)\[23, 2\]"),
    "spmm dim": (lambda: ops.spmm(S, V, X[0]), r"spmm: dense must be a matrix \[K, M\], got dense\[23\]"),
    "sddmm a": (lambda: ops.sddmm(S, torch.ones(18, 2), X), r"a.t\(\) must be .*N=19\], got a.t\(\)\[2, 18\]"),
    "sddmm b": (lambda: ops.sddmm(S, torch.ones(19, 3), X), r"sddmm: b must be a matrix \[M=3, K=23\], got b\[2, 23\]"),
    "sddmm dim": (lambda: ops.sddmm(S, torch.ones(19), X), r"sddmm: a must be a matrix, got a\[19\]"),
    "nonzeros": (lambda: ops.sddmm(S, torch.ones(19, 2), X, 3), r"as many as the structure's \d+, got 3"),
    "weight type": (lambda: ops.sparse_structure([[1.0]]), "must be a tensor or a scipy.sparse matrix, got list"),
    "weight dtype": (lambda: ops.sparse_structure(W.double()), "weight must be float32, got float64"),
    "weight dim": (lambda: ops.sparse_structure(W[0]), r"must be a matrix \[N, K\], got weight\[23\]"),
    "weight device": (lambda: ops.sparse_structure(W.to("meta")), "weight must be on the CPU, got meta"),
    "unpack without values": (lambda: ops.unpack(S), "values must be given for a structure"),
    "unpack with values": (lambda: ops.unpack(ops.pack(W), values=V), "for nothing else, got panels128"),
    "unpack values": (lambda: ops.unpack(S, values=V[1:]), r"values must be float32 \[\d+\], got float32"),
    "unpack layout": (lambda: ops.unpack(S, "csr", V), "layout must be torch.strided, .* got 'csr'"),
    "unpack int8 layout": (
        lambda: ops.unpack(ops.pack(torch.ones(2, 2, dtype=torch.int8)), "csr"),
        "layout must be torch.strided, torch.sparse_csr or 'scipy', got 'csr'",
    ),
    "unpack bfloat16 layout": (
        lambda: ops.unpack(ops.pack(W.bfloat16(), "bitmap32"), "scipy"),
        "layout must be torch.strided or torch.sparse_csr for bfloat16, got 'scipy'",
    ),
    "unpack u4 layout": (
        lambda: ops.unpack(ops.pack(U4, "u4", scale=torch.ones(2, 1).half(), group_size=32), torch.sparse_csr),
        "layout must be torch.strided for int4, got torch.sparse_csr",
    ),
    "pack type": (lambda: ops.pack([[1.0]]), "pack: weight must be a tensor or a scipy.sparse matrix, got list"),
    "pack array": (lambda: ops.pack(W.numpy()), "pack: weight must be a tensor or a scipy.sparse matrix, got ndarray"),
    "pack dtype": (lambda: ops.pack(W.double().to_sparse()), "int8, float32, .* where it is not dense, got float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    call, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_other_devices_are_refused() -> None:
    meta = torch.device("meta")
    with pytest.raises(ValueError, match="structure must be on cpu"):
        ops.sparse_linear(X, S.to(meta), values=V, out_features=19)
    with pytest.raises(ValueError, match="values must be on cpu"):
        ops.sparse_linear(X, S, values=V.to(meta), out_features=19)
    for name in ("sparse_values_linear", "sparse_values_linear_train", "sparse_sddmm", "sparse_sddmm_train"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastsparse::{name}", "CUDA")


@pytest.mark.skipif(_C.build_info()["cuda"] != "off", reason="this build has CUDA kernels")
def test_cuda_says_that_there_is_no_kernel() -> None:
    # Straight to the dispatcher's entry for CUDA; no device is needed for what only throws.
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name, what, arguments in (
        ("sparse_values_linear", "sparse_linear", (X, S, V, 19, False)),
        ("sparse_values_linear_train", "sparse_linear", (X, S, V, 19, False)),
        ("sparse_sddmm", "sddmm", (torch.randn(len(X), 19), X, S, V.numel())),
        ("sparse_sddmm_train", "sddmm", (torch.randn(len(X), 19), X, S, V.numel())),
    ):
        with pytest.raises(
            RuntimeError, match=f"^{what}: an argument is on cuda, and this build of fastsparse has no CUDA"
        ):
            getattr(torch.ops.fastsparse, name).default.redispatch(key, *arguments)


@pytest.mark.parametrize("count", [1, 2])
def test_warm_calls_allocate_no_scratch(count: int) -> None:
    structure, values = ops.sparse_structure(sparse(300, 260))
    inputs = [(torch.randn(m, 260), torch.randn(m, 300)) for m in (1, 17, 130)]

    def step() -> None:
        for x, grad in inputs:
            ops.sparse_linear(x, structure, values=values)
            OPS.sparse_values_linear(grad, structure, values, 260, True)
            OPS.sparse_sddmm(grad, x, structure, -1)

    with threads(count):
        step()
        step()
        before = _C.scratch_allocations()
        for _ in range(3):
            step()
        assert _C.scratch_allocations() == before
