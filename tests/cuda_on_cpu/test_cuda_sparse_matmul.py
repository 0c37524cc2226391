"""sparse_linear on the CPU stand-in, against the float64 oracle and, where the sums have one order, the CPU's bits."""

from __future__ import annotations

import os
import re
from pathlib import Path

import builds
import pytest
import torch
from device import Device
from standin import Finding, StandIn
from torch import Tensor

from fastsparse import nn, ops, reference
from support import same_bits, strided

FEW, BITMAP16, MMA, BLOCKS, CSR, STRUCTURE = (
    builds.ROOT / f"csrc/sparse_matmul/cuda/sm80_{name}.cu"
    for name in ("few_rows", "bitmap16", "mma_sp", "blocks", "csr", "structure")
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = [None, "relu", "gelu", "silu"]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_close(got: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, activation: str | None, what: object) -> None:
    """The sums may be off as a chain of float32 roundings may be; the activation's slope is at most 1.13."""
    expected = reference.sparse_linear(x, w, bias, activation)
    bound = reference.sparse_linear_bound(x, w, bias) * 1.13
    if activation in ("gelu", "silu"):  # erfcf and expf are the device's own
        bound = bound + 2e-6 * expected.abs() + 1e-6
    bound = bound + UNIT[got.dtype] * (expected.abs() + bound) + (2.0**-25 if got.dtype == torch.float16 else 1e-38)
    error = (got.double() - expected).abs()
    assert (error <= bound).all(), (what, float((error / bound).max()))


# --- bitmap32 --------------------------------------------------------------------------------------------------------

# Off every tile: 1, 2, 4, 8, 16 rows; 32 outputs; 32 k and 16 warps of them.
SHAPES = [
    (1, 1, 1),
    (1, 130, 64),
    (2, 17, 33),
    (3, 31, 511),
    (5, 64, 513),
    (8, 33, 300),
    (11, 95, 1025),
    (16, 32, 31),
    (19, 65, 97),
]
EMPTY = [(3, 5, 0), (0, 3, 4), (3, 0, 4), (0, 0, 0)]


def sparse(n: int, k: int, zeros: float) -> Tensor:
    """Uneven: with a full row, a full column and an empty row."""
    w = torch.randn(n, k) * (torch.rand(n, k) >= zeros)
    if n > 2 and k > 2 and 0 < zeros < 1:
        w[n // 2], w[:, k // 2], w[-1] = torch.randn(k), torch.randn(n), 0
    return w


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitmap32(kernels: StandIn, dtype: torch.dtype, seed: int) -> None:
    for i, (m, n, k) in enumerate(SHAPES + EMPTY):
        w = sparse(n, k, [0.5, 0.9, 0.0, 1.0][(i + seed) % 4])
        x = torch.randn(m, k).to(dtype)
        x = strided(x) if i % 3 == 1 else x
        bias, activation = torch.randn(n) if i % 2 else None, ACTIVATIONS[(i + seed) % 4]
        with kernels.launches(seed, offset=i % 2):
            got = kernels.sparse_linear(x, ops.pack(w, "bitmap32"), n, bias, activation)
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert got.shape == (m, n)
        assert got.dtype == dtype
        assert_close(got, x, w, bias, activation, (m, n, k))


def test_bitmap32_has_the_bits_of_the_cpu_where_one_warp_sums(kernels: StandIn) -> None:
    for m, n, k in [(1, 40, 32), (7, 33, 31), (18, 64, 17)]:
        w, x, bias = sparse(n, k, 0.5), torch.randn(m, k), torch.randn(n)
        pack = ops.pack(w, "bitmap32")
        for b, activation in ((None, None), (bias, None), (bias, "relu")):
            with kernels.launches():
                got = kernels.sparse_linear(x, pack, n, b, activation)
            assert same_bits(got, ops.sparse_linear(x, pack, b, activation)), (m, n, k, activation)


def test_bits_of_bitmap32_depend_neither_on_the_rows_nor_on_the_order_of_threads(kernels: StandIn) -> None:
    n, k = 40, 700
    pack, x = ops.pack(sparse(n, k, 0.6), "bitmap32"), torch.randn(20, k)
    with kernels.launches():
        expected = kernels.sparse_linear(x, pack, n)
    for seed, rows in enumerate((1, 2, 3, 8, 16)):
        with kernels.launches(seed):
            assert same_bits(kernels.sparse_linear(x[:rows], pack, n), expected[:rows]), rows


def test_damaged_bitmap32_is_never_read_outside(kernels: StandIn) -> None:
    # The header is right, all behind it is noise: wrong numbers, and no finding of the stand-in.
    n, k = 70, 333
    clean = ops.pack(sparse(n, k, 0.8), "bitmap32")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        pack = torch.randint(0, 256, clean.shape, dtype=torch.uint8, generator=generator)
        pack[:64] = clean[:64]
        with kernels.launches(seed):
            kernels.sparse_linear(torch.randn(2, k), pack, n)


# --- bitmap32 of 16-bit values ---------------------------------------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]
# Off every tile: 8 and 16 rows; 32 outputs; 16 and 32 k, 16 warps of them; the ring of 4 KB at every density.
SHAPES_16 = [(1, 1, 1), (2, 33, 64), (7, 95, 1025), (8, 32, 15), (9, 64, 2100), (16, 31, 513), (19, 70, 97)]


def only_by_the_data(kernels: StandIn, source: Path) -> bool:
    """Whether no bank conflicts are but those that lie in the data, as the lines themselves say."""
    if kernels.bank_conflicts() == 0:
        return True
    lines = source.read_text().splitlines()
    places = re.findall(rf"(?:^|; |\n)\S*{re.escape(source.name)}:(\d+)", kernels.conflict_places())
    return bool(places) and all(re.search("conflicts as the .* are", lines[int(line) - 1]) for line in places)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", HALVES)
def test_bitmap16(kernels: StandIn, dtype: torch.dtype, seed: int) -> None:
    for i, (m, n, k) in enumerate(SHAPES_16 + EMPTY):
        w = sparse(n, k, [0.5, 0.9, 0.0, 1.0][(i + seed) % 4]).to(dtype)
        x = torch.randn(m, k).to(dtype)
        x = strided(x) if i % 3 == 1 else x
        bias, activation = torch.randn(n) if i % 2 else None, ACTIVATIONS[(i + seed) % 4]
        with kernels.launches(seed, offset=i % 2):
            got = kernels.sparse_linear(x, ops.pack(w, "bitmap32"), n, bias, activation, "bitmap16")
            assert only_by_the_data(kernels, BITMAP16), kernels.conflict_places()
        assert got.shape == (m, n)
        assert got.dtype == dtype
        assert_close(got, x, w, bias, activation, (m, n, k))


def test_bitmap16_takes_whole_numbers_exactly_whatever_the_rows(kernels: StandIn) -> None:
    # As for nm24.
    n, k = 40, 700
    for dtype in HALVES:
        w = sparse(n, k, 0.7).sign().to(dtype)
        pack, x = ops.pack(w, "bitmap32"), torch.randint(-1, 2, (20, k)).to(dtype)
        for seed, rows in enumerate((1, 8, 9, 20)):
            with kernels.launches(seed):
                got = kernels.sparse_linear(x[:rows], pack, n, format="bitmap16")
            assert torch.equal(got.double(), reference.sparse_linear(x[:rows], w))


def test_damaged_bitmap16_is_never_read_outside(kernels: StandIn) -> None:
    n, k = 70, 333
    clean = ops.pack(sparse(n, k, 0.8).half(), "bitmap32")
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        pack = torch.randint(0, 256, clean.shape, dtype=torch.uint8, generator=generator)
        pack[:64] = clean[:64]
        if seed:
            pack[64:88] = clean[64:88]  # the offsets
        with kernels.launches(seed):
            kernels.sparse_linear(torch.randn(2, k).half(), pack, n, format="bitmap16")


# --- nm24 ------------------------------------------------------------------------------------------------------------

# Off every tile: rows 32, 128, 8; outputs 16, 128, 8; k 4, 64 and the ring of 3 stages.
SHAPES_24 = [
    (1, 1, 1),
    (2, 130, 64),
    (5, 16, 67),
    (32, 129, 255),
    (33, 136, 264),
    (129, 15, 320),
    (40, 257, 96),
]


def sparse24(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Two random places of every four, some of them zero as well; a row of zeros."""
    generator = torch.Generator().manual_seed(1000 * seed + n + k)
    w = torch.randn(n, k, generator=generator)
    groups = -(-k // 4)
    places = torch.rand(n, groups, 4, generator=generator).argsort(-1)
    w = torch.where(places.reshape(n, 4 * groups)[:, :k] < 2, w, 0.0) * (torch.rand(n, k, generator=generator) < 0.9)
    if n > 1:
        w[n // 2] = 0
    return w.to(dtype)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", HALVES)
def test_nm24(kernels: StandIn, dtype: torch.dtype, seed: int) -> None:
    for i, (m, n, k) in enumerate(SHAPES_24 + EMPTY):
        w, x = sparse24(n, k, dtype, seed), torch.randn(m, k).to(dtype)
        x = strided(x) if i % 3 == 1 else x
        bias, activation = torch.randn(n) if i % 2 else None, ACTIVATIONS[(i + seed) % 4]
        with kernels.launches(seed, offset=i % 2):
            got = kernels.sparse_linear(x, ops.pack(w, "nm24"), n, bias, activation, "nm24")
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert got.shape == (m, n)
        assert got.dtype == dtype
        assert_close(got, x, w, bias, activation, (m, n, k))


def test_nm24_takes_whole_numbers_exactly(kernels: StandIn) -> None:
    # Products and sums are whole numbers far below 2^24, results below 2^8: any order gives the same.
    m, n, k = 70, 200, 130
    for dtype in HALVES:
        w = sparse24(n, k, dtype).sign()
        x = torch.randint(-1, 2, (m, k)).to(dtype)
        with kernels.launches():
            got = kernels.sparse_linear(x, ops.pack(w, "nm24"), n, format="nm24")
        assert torch.equal(got.double(), reference.sparse_linear(x, w))


def test_an_nm24_weight_wants_its_own_dtype(kernels: StandIn) -> None:
    pack = ops.pack(sparse24(4, 8, torch.float16), "nm24")
    with kernels.launches(), pytest.raises((Finding, ValueError), match="x must have the dtype of an nm24 weight"):
        kernels.sparse_linear(torch.randn(2, 8).bfloat16(), pack, 4, format="nm24")


# --- blocks16 --------------------------------------------------------------------------------------------------------

# Off every tile: rows 32, 128 (squares of 64), 256 (of 32) and groups of 16 of them; squares; the ring of 3 or 4.
SHAPES_BLOCKS = [
    (1, 1, 1, 32),
    (5, 70, 200, 64),
    (32, 130, 321, 32),
    (33, 96, 264, 32),
    (129, 129, 520, 64),
    (260, 72, 100, 32),
]


def sparse_blocks(n: int, k: int, block: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Half of the squares, one row of them full and one empty; in the squares some zeros, too."""
    generator = torch.Generator().manual_seed(1000 * seed + n + k)
    rows, columns = -(-n // block), -(-k // block)
    kept = torch.rand(rows, columns, generator=generator) < 0.5
    kept[:1] = True
    if rows > 1:
        kept[-1] = False
    dense = torch.randn(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < 0.9)
    return (dense * kept.repeat_interleave(block, 0)[:n].repeat_interleave(block, 1)[:, :k]).to(dtype)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", HALVES)
def test_blocks16(kernels: StandIn, dtype: torch.dtype, seed: int) -> None:
    for i, (m, n, k, block) in enumerate(SHAPES_BLOCKS + [(*shape, 32) for shape in EMPTY]):
        w, x = sparse_blocks(n, k, block, dtype, seed), torch.randn(m, k).to(dtype)
        x = strided(x) if i % 3 == 1 else x
        bias, activation = torch.randn(n) if i % 2 else None, ACTIVATIONS[(i + seed) % 4]
        with kernels.launches(seed, offset=i % 2):
            got = kernels.sparse_linear(x, ops.pack(w, "blocks16"), n, bias, activation, "blocks16")
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert got.shape == (m, n)
        assert got.dtype == dtype
        assert_close(got, x, w, bias, activation, (m, n, k))


@pytest.mark.parametrize("block", [32, 64])
def test_blocks16_takes_whole_numbers_exactly_whatever_the_rows(kernels: StandIn, block: int) -> None:
    # As for nm24; 17 tiles of rows are more than one group.
    n, k = 2 * block, 3 * block
    for dtype, m in zip(HALVES, (17 * (256 if block == 32 else 128) - 5, 30), strict=True):
        w = sparse_blocks(n, k, block, dtype).sign()
        pack = ops.pack(w, "blocks16")
        assert ops.describe(pack)["block"] == block
        x = torch.randint(-1, 2, (m, k)).to(dtype)
        with kernels.launches():
            got = kernels.sparse_linear(x, pack, n, format="blocks16")
        assert torch.equal(got.double(), reference.sparse_linear(x, w))


def test_damaged_blocks16_is_never_read_outside(kernels: StandIn) -> None:
    # The header and the order of the rows are right (a row named twice would be written twice), all else is noise.
    n, k = 130, 200
    for seed, block in enumerate((32, 64)):
        clean = ops.pack(sparse_blocks(n, k, block, torch.float16), "blocks16")
        generator = torch.Generator().manual_seed(seed)
        pack = torch.randint(0, 256, clean.shape, dtype=torch.uint8, generator=generator)
        pack[:128] = clean[:128]
        pack[128:192:8] = 0  # some offsets small enough
        pack[129:192:4] = pack[130:192:4] = pack[131:192:4] = 0
        with kernels.launches(seed):
            kernels.sparse_linear(torch.randn(40, k).half(), pack, n, format="blocks16")


# --- Headers: a pack by what its caller says of it -------------------------------------------------------------------


def packs_of(n: int, k: int, zeros: float) -> dict[str, Tensor]:
    return {
        "bitmap32": ops.pack(sparse(n, k, zeros), "bitmap32"),
        "bitmap16": ops.pack(sparse(n, k, zeros).half(), "bitmap32"),
        "nm24": ops.pack(sparse24(n, k, torch.float16), "nm24"),
        "blocks16": ops.pack(sparse_blocks(n, k, 32, torch.float16), "blocks16"),
    }


def test_a_pack_by_its_description(kernels: StandIn) -> None:
    # As ops.sparse_linear(header=...); how many values a pack has is not asked for.
    for (m, n, k), zeros in zip([(5, 70, 130), (3, 5, 7), (2, 33, 64), (1, 40, 0)], (0.5, 0.0, 0.97, 0.5), strict=True):
        x, bias = torch.randn(m, k), torch.randn(n)
        for format, pack in packs_of(n, k, zeros).items():
            rows, header = x if format == "bitmap32" else x.half(), ops.describe(pack)
            with kernels.launches():
                expected = kernels.sparse_linear(rows, pack, n, bias, "silu", format)
                got = kernels.sparse_linear(rows, pack, n, bias, "silu", format, header)
            assert same_bits(got, expected), (format, n, k)
            assert torch.isfinite(expected).all()


def test_a_pack_that_is_not_as_it_was_described_gives_nan(kernels: StandIn) -> None:
    m, n, k = 5, 64, 64
    x = torch.randn(m, k)
    for format, pack in packs_of(n, k, 0.5).items():
        rows, header = x if format == "bitmap32" else x.half(), ops.describe(pack)
        for bias, activation in ((None, None), (torch.randn(n), "relu")):
            damaged = pack.clone()
            damaged[16] ^= 1  # N
            with kernels.launches():
                got = kernels.sparse_linear(rows, damaged, n, bias, activation, format, header)
            assert got.isnan().all(), format


# --- spmm, sddmm of a bare CSR: what a structure on a device becomes (below); no operator takes one -------------------

on_the_standin = pytest.mark.skipif("os.environ.get('CUDA_ON_CPU_BUILDS') == 'device'", reason="no operator takes it")
# Off every tile: rows 32, 128, 4; outputs 32; k 32; values of a row 8, 16, 32, 64.
SHAPES_CSR = [(1, 1, 1), (7, 33, 70), (32, 31, 5), (33, 64, 130), (131, 40, 97), (260, 3, 300)]


def csr(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(crow, col, values)"""
    row, col = w.nonzero(as_tuple=True)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), w.ne(0).sum(1).cumsum(0)])
    return crow.int(), col.int(), w[row, col]


@on_the_standin
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_spmm(kernels: StandIn, seed: int) -> None:
    for i, (m, n, k) in enumerate(SHAPES_CSR + EMPTY):
        w, x = sparse(n, k, [0.5, 0.9, 0.0, 1.0][(i + seed) % 4]), torch.randn(m, k)
        x = strided(x) if i % 2 else x
        with kernels.launches(seed, offset=i % 2):
            got = kernels.spmm(*csr(w), x, n)
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert_close(got, x, w, None, None, (m, n, k))
        if m:  # columns ascend: the chain of the CPU's kernels
            assert same_bits(got, ops.sparse_linear(x, ops.pack(w, "panels128"))), (m, n, k)


def assert_gradient_close(got: Tensor, w: Tensor, dy: Tensor, x: Tensor) -> None:
    row, column = w.nonzero(as_tuple=True)
    expected = (dy.double().t() @ x.double())[row, column]
    magnitude = (dy.double().abs().t() @ x.double().abs())[row, column]
    assert got.shape == expected.shape
    assert ((got.double() - expected).abs() <= magnitude * (len(x) + 1) * 2.0**-24).all(), (len(x), *w.shape)


@on_the_standin
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sddmm(kernels: StandIn, seed: int) -> None:
    for i, (m, n, k) in enumerate(SHAPES_CSR + EMPTY):
        w = sparse(n, k, [0.5, 0.9, 0.0, 1.0][(i + seed) % 4])
        dy, x = torch.randn(m, n), torch.randn(m, k)
        dy, x = (strided(dy), x) if i % 2 else (dy, strided(x))
        crow, col, _ = csr(w)
        with kernels.launches(seed, offset=i % 2):
            got = kernels.sddmm(crow, col, dy, x)
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        assert_gradient_close(got, w, dy, x)


@on_the_standin
def test_a_damaged_csr_is_never_followed_outside(kernels: StandIn) -> None:
    m, n, k, nonzeros = 37, 50, 60, 400
    x, dy, values = torch.randn(m, k), torch.randn(m, n), torch.randn(nonzeros)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        low, high = [(-(2**31), 2**31), (-9, 450), (0, 450)][seed]
        crow = torch.randint(low, high, (n + 1,), dtype=torch.int32, generator=generator)
        col = torch.randint(-3, k + 3, (nonzeros,), dtype=torch.int32, generator=generator)
        with kernels.launches(seed):
            kernels.spmm(crow, col, values, x, n)
        crow = crow.sort().values  # else rows overlap, and a gradient is written twice
        with kernels.launches(seed):
            kernels.sddmm(crow, col, dy, x)


# --- From a structure: spmm, sddmm and sparse_linear of live values --------------------------------------------------

# Off every tile, too: chunks of 256 outputs, blocks of 128 columns, 1024 columns whose sums are one turn.
SHAPES_STRUCTURE = [(3, 257, 129), (33, 300, 260), (5, 20, 1100), (2, 1100, 20)]


def way(t: Tensor, i: int) -> Tensor:
    """A matrix as it is, with its rows apart, with its columns together, or with its columns apart."""
    return (t, strided(t), t.t().contiguous().t(), strided(t.t().contiguous()).t())[i % 4] if t.numel() else t


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_products_of_a_structure(kernels: StandIn, seed: int) -> None:
    for i, (m, n, k) in enumerate(SHAPES_CSR + SHAPES_STRUCTURE + EMPTY):
        w = sparse(n, k, [0.5, 0.9, 0.0, 1.0][(i + seed) % 4])
        structure, values = ops.sparse_structure(w)
        x, dy, bias = torch.randn(m, k), torch.randn(m, n), torch.randn(n) if i % 2 else None
        activation = ACTIVATIONS[(i + seed) % 4]
        with kernels.launches(seed, offset=i % 2):
            y = kernels.values_linear(way(x, i), structure, values, n, False, bias, activation)
            dx = kernels.values_linear(way(dy, i + 1), structure, values, k, True)
            gradient = kernels.values_gradient(way(dy, i + 2), way(x, i + 3), structure, len(values))
            assert only_by_the_data(kernels, STRUCTURE), kernels.conflict_places()
        assert_close(y, x, w, bias, activation, (m, n, k))
        assert_close(dx, dy, w.t().contiguous(), None, None, (m, n, k, "transposed"))
        assert_gradient_close(gradient, w, dy, x)
        if activation in (None, "relu"):  # the others' functions are the device's own
            assert same_bits(y, ops.sparse_linear(x, structure, bias, activation, values=values)), (m, n, k)
        plain = torch.ops.fastsparse.sparse_values_linear
        assert same_bits(dx, plain(dy, structure, values, k, True)), (m, n, k)


def test_values_that_are_stored_zeros_have_gradients(kernels: StandIn) -> None:
    m, n, k = 20, 40, 140
    w = torch.sparse_csr_tensor(torch.arange(n + 1), torch.arange(n), torch.zeros(n), (n, k), check_invariants=False)
    structure, values = ops.sparse_structure(w)
    x, dy = torch.randn(m, k), torch.randn(m, n)
    with kernels.launches():
        gradient = kernels.values_gradient(dy, x, structure, len(values))
    assert_gradient_close(gradient, torch.eye(n, k), dy, x)


def test_a_structure_of_other_sizes_gives_nan(kernels: StandIn) -> None:
    # The device tells: the host does not read the header where the arguments say what it must be.
    m, n, k = 7, 40, 50
    structure, values = ops.sparse_structure(sparse(n, k, 0.5))
    x, dy = torch.randn(m, k - 1), torch.randn(m, n)
    with kernels.launches():
        assert kernels.values_linear(x, structure, values, n).isnan().all()
        assert kernels.values_linear(dy[:, 1:], structure, values, k, True).isnan().all()
        assert kernels.values_gradient(dy, x, structure, len(values)).isnan().all()
        assert kernels.values_linear(torch.randn(m, k), structure, values[1:], n).isnan().all()


def test_a_damaged_structure_is_never_followed_outside(kernels: StandIn) -> None:
    m, n, k = 9, 300, 200
    structure, values = ops.sparse_structure(sparse(n, k, 0.7))
    x, dy = torch.randn(m, k), torch.randn(m, n)
    tables = 128 + 2 * 2 * 512 + 2 * 2 * 256 * 4  # where the indices begin
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        damaged = torch.randint(0, 256, structure.shape, dtype=torch.uint8, generator=generator)
        damaged[:128] = structure[:128]
        if seed == 1:  # all but the indices
            damaged[:tables] = structure[:tables]
        elif seed == 2:  # starts that lie within the values
            damaged[2176 + 2 : tables : 4] = damaged[2176 + 3 : tables : 4] = 0
        if seed != 1 and kernels.build == "race":
            continue  # several threads may write what belongs to one value: which of them stays is open
        with kernels.launches(seed):
            kernels.values_linear(x, damaged, values, n)
            if kernels.build != "race":
                kernels.values_linear(dy, damaged, values, k, True)
            kernels.values_gradient(dy, x, damaged, len(values))


@pytest.mark.skipif(
    "os.environ.get('CUDA_ON_CPU_BUILDS') != 'device' or os.environ.get('FASTSPARSE_TEST_DEVICE') == 'cpu'",
    reason="needs a GPU",
)
def test_calls_are_captured_into_a_cuda_graph(kernels: Device) -> None:
    m, n, k = 8, 96, 160
    w, linear = sparse(n, k, 0.5), torch.nn.Linear(k, n)
    linear.weight.data.copy_(w)
    fixed = nn.SparseLinear.from_linear(linear, "bitmap32").to(kernels.name)
    live = nn.TrainableSparseLinear.from_linear(linear).to(kernels.name)
    x, graph = torch.randn(m, k, device=kernels.name), torch.cuda.CUDAGraph()
    with torch.no_grad():
        fixed(x), live(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            results = fixed(x), live(x)
        x.copy_(torch.randn(m, k))
        graph.replay()
        for module, result in zip((fixed, live), results, strict=True):
            assert same_bits(result.cpu(), module(x).cpu())


# --- Defects planted in copies of these kernels: the tests above would see them --------------------------------------

WRONG, CONFLICTS = "wrong result", "bank conflicts"
# what is wrong: (source, right, wrong, build that sees it, what it says)
DEFECTS = {
    "a lane counts its own bit too": (FEW, "(1u << lane) - 1", "(2u << lane) - 1", "fast", WRONG),
    "x read before all lanes wrote it": (
        FEW,
        ": 0.0f;\n    __syncwarp();\n",
        ": 0.0f;\n",
        "race",
        r"race: .*sm80_few_rows\.cu:\d+",
    ),
    "a wait that leaves one group too many": (
        MMA,
        "wait<kStages - 2>",
        "wait<kStages - 1>",
        "fast",
        r"sm80_mma_sp\.cu:\d+: metadata must name",
    ),
    "the wrong half of the positions": (MMA, "mma_sp<T, kHalf>(", "mma_sp<T, 1 - kHalf>(", "fast", WRONG),
    "a lost swizzle": (MMA, "16 * (chunk ^ (row % 8))", "16 * chunk", "fast", CONFLICTS),
    "results over a stage that others still read": (
        MMA,
        "__syncthreads();  // nobody reads a stage any more",
        "// nobody reads a stage any more",
        "race",
        r"race: .*sm80_mma_sp\.cu:\d+",
    ),
    "values read before they have arrived": (BITMAP16, "wait<kLate>", "wait<kLate + 2>", "fast", WRONG),
    "a ring filled over values that are not used yet": (
        BITMAP16,
        "kFill - used <= kRing",
        "kFill - used <= kRing + 1024",
        "fast",
        WRONG,
    ),
    "lanes that do not wait for each other's values": (
        BITMAP16,
        "__syncwarp();  // values, x and spots are there for all lanes",
        "",
        "race",
        r"(race|under way|uninitialised).*sm80_bitmap16\.cu:\d+",
    ),
    "nothing behind the end of the ring": (
        BITMAP16,
        "if (slot == 0 && lane == 0)",
        "if (slot < 0)",
        "race",
        "uninitialised",
    ),
    "k in another order than x": (
        BITMAP16,
        "t % 2 == 0 ? 0x5410 : 0x7632",
        "t % 2 == 0 ? 0x5432 : 0x7610",
        "fast",
        WRONG,
    ),
    "the column of the step before": (BLOCKS, "next = column(ahead + 1)", "next = column(ahead)", "fast", WRONG),
    "a lost swizzle of rows of 64 bytes": (BLOCKS, ": row / 2 % 4;", ": 0;", "fast", CONFLICTS),
    "a stage refilled while others read it": (
        BLOCKS,
        "__syncthreads();  // this stage is there for all",
        "__syncwarp();  // this stage is there for all",
        "race",
        r"(race|under way).*sm80_blocks\.cu:\d+",
    ),
    "more columns of x than there are": (
        BLOCKS,
        "row0 + row < o.m ? inside_k : 0",
        "row0 + row < o.m ? kChunk : 0",
        "race",
        r"out of bounds: .*",
    ),
    "the values of a row behind those handed round": (
        CSR,
        "for (; j < count; ++j)",
        "for (; j < 0; ++j)",
        "fast",
        WRONG,
    ),
    "a column that the structure may make up": (
        CSR,
        "column < s.csr.k;",
        "column <= s.csr.k;",
        "race",
        "out of bounds",
    ),
    "a gradient of half the rows": (CSR, "m += 4 * kShare", "m += 8 * kShare", "fast", "gradient"),
    "results stored before all outputs are there": (
        CSR,
        "  __syncthreads();\n  // Lanes are outputs now.",
        "  // Lanes are outputs now.",
        "race",
        r"(race|uninitialised).*sm80_csr\.cu:\d+",
    ),
    "bits counted before all are set": (
        STRUCTURE,
        "  });\n  __syncthreads();\n}",
        "  });\n}",
        "race",
        r"(race|uninitialised).*sm80_structure\.cu:\d+",
    ),
    "a value's own bit among those below": (
        STRUCTURE,
        "(1u << row % 32) - 1",
        "(2u << row % 32) - 1",
        "fast",
        WRONG,
    ),
    "sums of warps that the next turn writes over": (
        STRUCTURE,
        "__syncthreads();  // nobody reads the sums of this turn any more",
        "",
        "race",
        r"race: .*sm80_structure\.cu:\d+",
    ),
    "columns whose turn forgets those before": (
        STRUCTURE,
        "unsigned warps_before = before;",
        "unsigned warps_before = 0;",
        "fast",
        WRONG,
    ),
    "a header that nobody looks at": (CSR, "right = holds(e.header)", "right = true", "fast", "header"),
}


@pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="fast and race, in the process without sanitizers")
@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defects_are_caught(name: str, tmp_path: Path) -> None:
    source, right, wrong, build, expected = DEFECTS[name]
    text = source.read_text()
    assert text.count(right) == 1, f"{right!r} must stand in {source.name} once"
    kernels = StandIn(build, builds.variant(build, source, text.replace(right, wrong), tmp_path))
    m, n, k = 40, 130, 260
    format, w = {
        FEW: ("bitmap32", sparse(n, k, 0.5)),
        BITMAP16: ("bitmap16", sparse(n, 20 * k, 0.2).half()),
        MMA: ("nm24", sparse24(n, k, torch.float16)),
        BLOCKS: ("blocks16", sparse_blocks(n, k, 32, torch.float16)),
        CSR: ("csr", sparse(n, k, 0.5)),
        STRUCTURE: ("structure", sparse(n, 5 * k, 0.5)),
    }[source]
    x = torch.randn(m, w.shape[1]).to(w.dtype)
    report = ""
    try:
        with kernels.launches():
            if format == "csr":
                crow, col, values = csr(w)
                col[5] = k if "make up" in name else col[5]
                got = kernels.spmm(crow, col, values, x, n)
                gradient = kernels.sddmm(crow, col, dy := torch.randn(m, n), x)
                if expected == "header":
                    assert not kernels.values_linear(x[:, 1:], *ops.sparse_structure(w), n).isnan().any()
            elif format == "structure":
                x, w = torch.randn(m, n), w.t()
                got = kernels.values_linear(x, *ops.sparse_structure(w.t()), len(w), True)
            else:
                packed = ops.pack(w, format.replace("16", "32") if source == BITMAP16 else format)
                got = kernels.sparse_linear(x, packed, n, format=format)
            conflicts = kernels.bank_conflicts()
    except Finding as finding:
        report = str(finding)
    if report:
        assert re.search(expected, report), report
    elif expected == CONFLICTS:
        assert_close(got, x, w, None, None, "conflicts cost time only")
        assert conflicts > 0
    elif expected == "header":
        assert_close(got, x, w, None, None, "")
    elif expected == "gradient":
        with pytest.raises(AssertionError):
            assert_gradient_close(gradient, w, dy, x)
    else:
        assert expected == WRONG, "nothing was found"
        with pytest.raises(AssertionError):
            assert_close(got, x, w, None, None, "")
