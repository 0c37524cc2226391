"""Every sparse format on weights whose zeros lie awkwardly, and on packs whose numbers stand in the wrong places.

Each pattern x format x level x dtype of x against float64; then packs with numbers exchanged, repeated or far too
large: what passes must be the pack of another weight, to the last byte, and whatever the bytes are, nothing outside is
read.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastsparse
from fastsparse import ops, reference
from fastsparse.nn import SparseInt8Linear, SparseLinear
from tests.ops import test_sparse_blocks as blocks
from tests.ops import test_sparse_int8 as int8
from tests.ops import test_sparse_matmul as unstructured
from tests.support import forced, guarded, isa_levels, same_bits, threads

FLOAT = (*unstructured.FORMATS, *blocks.FORMATS)
INT8 = int8.FORMATS
HALF = (torch.bfloat16, torch.float16)
# Sides that are multiples of nothing: less than a slice, a chunk of 256 and an output, more rows than a pass, a panel.
SHAPES = [(1, 37, 211), (5, 67, 197), (37, 131, 389), (3, 259, 131)]


def pattern(name: str, n: int, k: int) -> Tensor:
    """True where the weight is not zero."""
    falling = torch.linspace(1, 0, k) ** 4, torch.linspace(1, 0, n)[:, None] ** 4
    live = torch.zeros(n, k, dtype=torch.bool)
    match name:
        case "everything":
            live[:] = True
        case "one row":
            live[n // 2] = True
        case "one column":
            live[:, k // 2] = True
        case "last column":
            live[:, -1] = True
        case "corners":
            live[:: n - 1, :: k - 1] = True
        case "stripes":
            live[:, ::5] = True
        case "empty rows":
            live = torch.rand(n, k) < 0.5
            live[::2] = False
        case "skewed columns":
            live = torch.rand(n, k) < falling[0]
        case "skewed columns, last full":
            live = torch.rand(n, k) < falling[0].flip(0)
        case "skewed rows":
            live = torch.rand(n, k) < falling[1]
        case "skewed both":
            live = torch.rand(n, k) < falling[0] * falling[1]
        case "staircase":
            live = (torch.arange(n)[:, None] * k // n - torch.arange(k)).abs() < 3
    return live


PATTERNS = [
    "nothing", "everything", "one row", "one column", "last column", "corners", "stripes", "empty rows",
    "skewed columns", "skewed columns, last full", "skewed rows", "skewed both", "staircase",
]  # fmt: skip


def shapes(name: str) -> list[tuple[int, int, int]]:
    """Two of them for each pattern."""
    return SHAPES[PATTERNS.index(name) % 2 :: 2]


def weight(format: str, name: str, n: int, k: int) -> Tensor:
    w = torch.randn(n, k) * pattern(name, n, k)
    if format in blocks.NM:  # of each group only the first places that the format has
        kept, of = blocks.NM[format]
        groups = torch.nn.functional.pad(w, (0, -k % of)).view(n, -1, of)
        w = torch.where((groups != 0).cumsum(-1) <= kept, groups, torch.zeros(())).flatten(1)[:, :k].contiguous()
    return w


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("format", FLOAT)
@pytest.mark.parametrize("isa", isa_levels())
def test_float_weights(isa: str, format: str, name: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in shapes(name):
            w, x, bias = weight(format, name, n, k), torch.randn(m, k), torch.randn(n)
            pack = ops.pack(w, format)
            y = ops.sparse_linear(x, pack, bias)
            unstructured.assert_close(y, x, w, bias, (m, n, k))
            with threads(2):
                assert same_bits(ops.sparse_linear(x, pack, bias), y), (m, n, k)
            for dtype in HALF:
                half = x.to(dtype)
                rounded = ops.sparse_linear(half, pack, bias)
                exact = ops.sparse_linear(half.float(), pack, bias)
                unstructured.assert_close(exact, half, w, bias, (m, n, k, dtype))
                assert same_bits(rounded, exact.to(dtype)), (m, n, k, dtype)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("isa", isa_levels())
def test_bfloat16_weights_structures_and_pairs(isa: str, name: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in shapes(name):
            w, x, bias = weight("bitmap32", name, n, k).bfloat16(), torch.randn(m, k), torch.randn(n)
            wide = w.float()
            expected = ops.sparse_linear(x, ops.pack(wide, "bitmap32"), bias)
            unstructured.assert_close(expected, x, wide, bias, (m, n, k))
            structure, values = ops.sparse_structure(wide)
            assert same_bits(ops.sparse_linear(x, ops.pack(w, "bitmap32"), bias), expected), (m, n, k)
            assert same_bits(ops.sparse_linear(x, structure, bias, values=values), expected), (m, n, k)
            assert same_bits(ops.sparse_linear(x, ops.pack(wide, rows=(1, 64)), bias), expected), (m, n, k)
            for dtype in HALF:
                half = x.to(dtype)
                wanted = ops.sparse_linear(half.float(), ops.pack(wide, "bitmap32"), bias).to(dtype)
                assert same_bits(ops.sparse_linear(half, ops.pack(w, "bitmap32"), bias), wanted), (m, n, k, dtype)
                assert same_bits(ops.sparse_linear(half, structure, bias, values=values), wanted), (m, n, k, dtype)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("format", INT8)
@pytest.mark.parametrize("row", int8.rows())
def test_int8_weights(row: str, format: str, name: str) -> None:
    with int8.running(row):
        for m, n, k in shapes(name):
            w = torch.randint(-128, 128, (n, k), dtype=torch.int8) * pattern(name, n, k)
            x, scale, bias = torch.randn(m, k), torch.rand(n) + 0.01, torch.randn(n)
            pack = ops.pack(w, format)
            y = ops.sparse_int8_linear(x, pack, scale, bias)
            wanted = reference.sparse_int8_linear(x, w, scale, bias)
            assert ((y.double() - wanted).abs() <= 1e-6 * wanted.abs().amax(1, keepdim=True) + 1e-30).all(), (m, n, k)
            with threads(2):
                assert same_bits(ops.sparse_int8_linear(x, pack, scale, bias), y), (m, n, k)
            for dtype in (torch.float32, *HALF):
                given_ = x.to(dtype)
                dense = ops.int8_linear(given_, ops.pack(w), scale, bias)
                assert same_bits(ops.sparse_int8_linear(given_, pack, scale, bias), dense), (m, n, k, dtype)


# --- Numbers in the wrong places --------------------------------------------------------------------------------------


# Some formats have one name for float32 and int8.
CASES = [(format, torch.float32) for format in FLOAT] + [(format, torch.int8) for format in INT8]


def sample(format: str, dtype: torch.dtype, n: int, k: int) -> Tensor:
    if dtype == torch.int8:
        return int8.sparse(n, k, 0.5)
    return blocks.sparse(n, k, format) if format in blocks.FORMATS else unstructured.sparse(n, k, 0.5)


def misplaced(pack: Tensor, size: int, at: int, how: str) -> Tensor:
    """The pack with the number of `size` bytes at `at` exchanged with the next one, repeated there, or made huge."""
    bad = pack.clone()
    here, there = bad[at : at + size].clone(), bad[at + size : at + 2 * size].clone()
    if how == "exchanged":
        bad[at : at + size], bad[at + size : at + 2 * size] = there, here
    elif how == "repeated":
        bad[at + size : at + 2 * size] = here
    else:
        bad[at : at + size] = torch.tensor([255] * (size - 1) + [127], dtype=torch.uint8)
    return bad


def run(pack: Tensor, dtype: torch.dtype, n: int, k: int) -> None:
    """On guarded memory, where an access outside is a crash; errors are as good as numbers."""
    bad = guarded(pack)
    for m in (1, 5, 20):
        x = guarded(torch.randn(m, k))
        if dtype == torch.int8:
            for row in int8.rows():
                with int8.running(row), contextlib.suppress(ValueError):
                    ops.sparse_int8_linear(x, bad, torch.ones(n))
        else:
            for isa in isa_levels():
                with forced(isa, "sparse_matmul"), contextlib.suppress(ValueError):
                    ops.sparse_linear(x, bad)


HOW = ("exchanged", "repeated", "huge")


@pytest.mark.parametrize(("format", "dtype"), CASES)
def test_a_number_in_the_wrong_place_is_seen_when_loaded(format: str, dtype: torch.dtype) -> None:
    n, k = 19, 23
    good = ops.pack(sample(format, dtype, n, k), format)
    refused = None
    for size in (1, 2, 4, 8):
        for at in range(64, min(good.numel(), 2500) - 2 * size, size):
            for how in HOW:
                bad = misplaced(good, size, at, how)
                if torch.equal(bad, good):
                    continue
                try:
                    got = ops.unpack(bad)
                except ValueError as error:
                    refused = bad if "damaged pack" in str(error) else refused
                    continue
                # What passes is another weight's pack, to the last byte.
                assert torch.equal(ops.pack(got, format), bad), (size, at, how)
    assert refused is not None
    target = SparseInt8Linear(k, n) if dtype == torch.int8 else SparseLinear(k, n)
    state = target.state_dict()
    with pytest.raises(RuntimeError, match="damaged pack"):
        target.load_state_dict({**state, "weight": refused})


@pytest.mark.parametrize("format", FLOAT)
def test_a_file_with_a_damaged_pack_is_refused(format: str, tmp_path: Path) -> None:
    linear = nn.Linear(23, 19, bias=False)
    linear.weight.data = sample(format, torch.float32, 19, 23)
    path = tmp_path / "model.safetensors"
    fastsparse.save(nn.Sequential(SparseLinear.from_linear(linear, format)), path)
    data, pack = bytearray(path.read_bytes()), ops.pack(linear.weight.data, format)
    at = data.index(b"fspk")
    assert data[at : at + pack.numel()] == pack.numpy().tobytes()
    count = 0
    for place in range(64, min(pack.numel(), 600), 7):
        bad = misplaced(pack, 1, place, "huge")
        try:
            ops.describe(bad)
        except ValueError:
            path.write_bytes(data[:at] + bad.numpy().tobytes() + data[at + pack.numel() :])
            with pytest.raises(ValueError, match=r"weight.* pack"):
                fastsparse.load(path)
            count += 1
    assert count > 3


@pytest.mark.parametrize(("format", "dtype"), CASES)
@given(data=st.data())
def test_numbers_in_the_wrong_places_never_lead_outside(format: str, dtype: torch.dtype, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    n, k = data.draw(st.sampled_from([(3, 5), (40, 140), (300, 9), (17, 700)]))
    pack = ops.pack(sample(format, dtype, n, k), format)
    for _ in range(data.draw(st.integers(1, 6))):
        size = data.draw(st.sampled_from([1, 2, 4, 8]))
        last = (min(pack.numel(), data.draw(st.sampled_from([300, 3000, 10**6]))) - 64) // size - 2
        at = 64 + size * data.draw(st.integers(0, last))
        pack = misplaced(pack, size, at, data.draw(st.sampled_from(HOW)))
    run(pack, dtype, n, k)
    with contextlib.suppress(ValueError):
        ops.unpack(guarded(pack))
