"""The formats blocks and nm of sparse_linear: bits, bytes, damage, errors, modules and files."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastsparse
from fastsparse import nn, ops, reference
from tests.support import cpu_rows, forced, guarded, isa_levels, same_bits, threads

BLOCKS = {"blocks1x4": (1, 4), "blocks4x4": (4, 4), "blocks8x8": (8, 8), "blocks16x16": (16, 16), "blocks16x1": (16, 1)}
NM = {"nm1:4": (1, 4), "nm2:4": (2, 4), "nm4:8": (4, 8)}
FORMATS = (*BLOCKS, *NM)
LEVELS = [level for level in isa_levels() if level in {row["level"] for row in cpu_rows("sparse_matmul")}]
# Round the tiles: 4 and 8 rows a pass, panels of 8 to 64; slices of 16 outputs, 4 side by side, chunks of 256; 64,
# 128, 256 and 4096 k.
SHAPES = [
    (1, 1, 1), (2, 17, 7), (3, 31, 9), (4, 33, 127), (5, 64, 128), (6, 100, 33), (7, 65, 66), (8, 255, 31),
    (9, 40, 129), (16, 256, 61), (17, 257, 130), (25, 61, 300), (33, 130, 64), (65, 31, 257),
    (12, 20, 700), (15, 33, 4100),
]  # fmt: skip
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]


def sparse(n: int, k: int, format: str, zeros: float = 0.7) -> Tensor:
    """A weight for the format; uneven on purpose: rows that are full and empty, holes in blocks and groups."""
    w = torch.randn(n, k)
    if format in NM:
        kept, of = NM[format]
        places = torch.rand(n, -(-k // of), of).argsort(-1).flatten(1)[:, :k]
        w *= (places < kept) & (torch.rand(n, k) >= zeros - 0.5)
    else:
        height, width = BLOCKS[format]
        stays = torch.rand(-(-n // height), -(-k // width)) >= zeros
        stays[len(stays) // 2 :: 5] = zeros < 1
        w *= stays.repeat_interleave(height, 0).repeat_interleave(width, 1)[:n, :k] & (torch.rand(n, k) >= 0.2)
    if n > 2:
        w[-1] = 0
    return w


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("isa", LEVELS)
def test_bits_are_those_of_the_other_formats_and_nothing_is_read_outside(isa: str, format: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in SHAPES + EMPTY:
            for zeros in (0.0, 0.8):
                w, x, bias = sparse(n, k, format, zeros), torch.randn(m, k), torch.randn(n)
                pack = ops.pack(w, format)
                y = ops.sparse_linear(x, pack)
                if zeros:
                    error = (y.double() - reference.sparse_linear(x, w)).abs()
                    assert (error <= reference.sparse_linear_bound(x, w) + 1e-45).all(), (m, n, k, zeros)
                other = ops.pack(w, "bitmap32")
                assert same_bits(y, ops.sparse_linear(x, other)), (m, n, k, zeros)
                expected = ops.sparse_linear(x, other, bias, "silu")
                for side in ("end", "begin"):
                    arguments = [guarded(t, side) for t in (x, pack, bias)]  # type: ignore[arg-type]
                    assert same_bits(ops.sparse_linear(*arguments, "silu"), expected), (m, n, k, zeros, side)


@pytest.mark.parametrize("format", FORMATS)
def test_threads_row_counts_and_strides_change_no_bit(format: str) -> None:
    w, x, bias = sparse(600, 150, format), torch.randn(150, 150), torch.randn(600)
    pack = ops.pack(w, format)
    expected = ops.sparse_linear(x, ops.pack(w, "bitmap32"), bias)
    for count in (1, 2):
        with threads(count):
            for rows in (1, 2, 3, 4, 5, 7, 8, 9, 12, 24, 25, 70, 150):
                assert same_bits(ops.sparse_linear(x[:rows], pack, bias), expected[:rows]), (count, rows)
                apart = torch.cat([x[:rows], x[:rows]], 1)[:, :150]
                assert same_bits(ops.sparse_linear(apart, pack, bias), expected[:rows]), (count, rows)


def pad(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 64)


def by_the_book(w: np.ndarray, format: str) -> bytes:
    """formats/blocks.h and nm.h again, in Python."""
    n, k = w.shape
    slices = -(-n // 16)
    parts = max(2 * -(-n // 512), 1)
    chunk_width = max(-(-n // parts // 16) * 16, 16)
    body = b""
    if format in BLOCKS:
        height, width = BLOCKS[format]
        side, code, block = 16 // height, 9, 256 * height + width
        full = np.zeros((16 * slices, -(-k // 128) * 128), np.float32)
        full[:n, :k] = np.where(w == 0, 0, w)
        offset, order, counts, index, value = [0], b"", b"", b"", b""
        for chunk in range(0, 16 * slices, chunk_width):
            rows = [full[r : r + height] for r in range(chunk, min(chunk + chunk_width, 16 * slices), height)]
            found = [[c for c in range(0, k, width) if r[:, c : c + width].any()] for r in rows]
            places = sorted(range(len(rows)), key=lambda i: -len(found[i]))
            for s in range(0, len(places), side):
                here = places[s : s + side]
                order += bytes(here)
                for b in range(0, k, 128):
                    counts += bytes(sum(b <= c < b + 128 for c in found[p]) for p in here)
                steps = len(found[here[0]])
                for i in range(steps):
                    firsts = [found[p][i] if i < len(found[p]) else None for p in here]
                    index += struct.pack(f"<{side}H", *(c or 0 for c in firsts))
                    blocks = [
                        np.zeros((height, width), np.float32) if c is None else rows[p][:, c : c + width]
                        for p, c in zip(here, firsts, strict=True)
                    ]
                    value += np.concatenate(blocks).T.astype("<f4").tobytes()
                offset.append(offset[-1] + steps)
        body = pad(struct.pack(f"<{len(offset)}Q", *offset)) + pad(order) + pad(counts) + pad(index) + value
    else:
        kept, of = NM[format]
        bits, code, block = (2 if of == 4 else 4), 10, 256 * kept + of
        values = 32 // bits
        span = values // kept * of
        full = np.zeros((16 * slices, -(-k // span) * span), np.float32)
        full[:n, :k] = np.where(w == 0, 0, w)
        for s in range(0, 16 * slices, 16):
            for first in range(0, full.shape[1], span):
                words, lanes = [0] * 16, np.zeros((values, 16), "<f4")
                for lane in range(16):
                    for i, c in enumerate(range(first, first + span, of)):
                        group = full[s + lane, c : c + of]
                        live = [j for j in range(of) if group[j] != 0]
                        live = sorted(live + [j for j in range(of) if group[j] == 0][: kept - len(live)])
                        for j, at in enumerate(live):
                            words[lane] |= at << bits * (i * kept + j)
                            lanes[i * kept + j, lane] = group[at]
                body += struct.pack("<16I", *words) + lanes.tobytes()
    header = struct.pack(
        "<4sHHIIqqqQ16s", b"fspk", code, 1, 2, block, n, k, np.count_nonzero(w), 64 + len(body), bytes(16)
    )
    return header + body


@pytest.mark.parametrize("format", FORMATS)
def test_pack_is_as_documented_to_the_byte_and_back(format: str) -> None:
    for n, k in [(1, 1), (3, 5), (16, 32), (33, 129), (300, 140), (0, 4), (4, 0)]:
        for zeros in (0.0, 0.7, 1.0):
            w = sparse(n, k, format, zeros)
            if w.numel():
                w[0, 0] = -0.0
            pack = ops.pack(w, format)
            assert pack.numpy().tobytes() == by_the_book(w.numpy(), format), (n, k, zeros)
            assert same_bits(ops.unpack(pack), w + 0.0)
            header = ops.describe(pack)
            assert (header["format"], header["dtype"], header["n"], header["k"]) == (format, "float32", n, k)
            assert (header["nonzeros"], header["bytes"]) == (int(w.count_nonzero()), pack.numel())
    assert same_bits(ops.pack(w.t().contiguous().t(), format), ops.pack(w, format))


@pytest.mark.parametrize("format", FORMATS)
def test_pack_keeps_every_value(format: str) -> None:
    w = torch.zeros(2, 40)
    w[0, [0, 9, 17, 30]] = torch.tensor([float("nan"), 1e-45, float("-inf"), 3.4e38])
    assert same_bits(ops.unpack(ops.pack(w, format)), w)


@pytest.mark.parametrize("format", FORMATS)
def test_validate_sees_every_damaged_byte(format: str) -> None:
    good = ops.pack(sparse(18, 20, format), format)
    for at in range(good.numel()):
        pack = good.clone()
        pack[at] ^= 0x41
        try:
            got = ops.unpack(pack)
        except ValueError:
            continue
        # What passes is another weight's pack, to the last byte.
        assert torch.equal(ops.pack(got, ops.describe(pack)["format"]), pack)


def refused_or_harmless(pack: Tensor, k: int) -> None:
    weight = guarded(pack)
    for rows in (1, 5, 70):
        x = guarded(torch.randn(rows, k))
        for isa in LEVELS:
            with forced(isa, "sparse_matmul"), contextlib.suppress(ValueError):
                ops.sparse_linear(x, weight)
    with contextlib.suppress(ValueError):
        ops.unpack(weight)


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_damaged_packs_never_read_outside(format: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    n, k = data.draw(st.sampled_from([(3, 5), (40, 140), (300, 9)]))
    pack = ops.pack(sparse(n, k, format), format).clone()
    tables = min(pack.numel(), 2000)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, tables - 1) | st.integers(0, pack.numel() - 1))
        pack[at] = data.draw(st.integers(0, 255) | st.just(255))
    refused_or_harmless(pack, k)


@pytest.mark.parametrize("fill", [255, 127, None])
@pytest.mark.parametrize("format", FORMATS)
def test_packs_of_garbage_never_read_outside(format: str, fill: int | None) -> None:
    for n, k in ((3, 5), (40, 140), (300, 9)):
        pack = ops.pack(sparse(n, k, format), format).clone()
        last = 64 + 8 * -(-n // 16)  # blocks: the number of steps, without which nothing else is read
        keep = pack[last : last + 8].clone()
        pack[64:] = torch.randint(0, 256, (pack.numel() - 64,)) if fill is None else fill
        if format in BLOCKS:
            pack[last : last + 8] = keep
        refused_or_harmless(pack, k)


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_and_overflowing_packs_are_refused(format: str) -> None:
    pack = ops.pack(sparse(9, 11, format), format)
    changes = [(12, "<I", 0x0202), (12, "<I", 0), (16, "<q", 2**31 - 1), (16, "<q", -1), (24, "<q", 2**31 - 1),
               (24, "<q", 2**40), (32, "<q", 2**62), (32, "<q", -1), (40, "<Q", 2**63), (8, "<I", 1)]  # fmt: skip
    bad = [pack[:-1], pack[:64], pack[:10], torch.cat([pack, pack[:64]])]
    for at, kind, value in changes:
        raw = bytearray(pack.numpy().tobytes())
        struct.pack_into(kind, raw, at, value)
        bad.append(torch.frombuffer(raw, dtype=torch.uint8))
    for damaged in bad:
        with pytest.raises(ValueError, match="sparse_linear: weight must be a sparse float32 pack"):
            ops.sparse_linear(torch.randn(1, 11), damaged.contiguous())
        with pytest.raises(ValueError, match="describe"):
            ops.describe(damaged.contiguous())


def test_a_weight_that_breaks_the_pattern_is_refused_with_its_place() -> None:
    w = torch.zeros(20, 30)
    w[17, 24:27] = 1
    with pytest.raises(ValueError, match=r"^pack: .* at most 2 of every 4 .* for nm2:4, got 3 in row 17, k 24 to 27"):
        ops.pack(w, "nm2:4")
    assert ops.describe(ops.pack(w, "nm4:8"))["nonzeros"] == 3
    w[17, 28:30] = 1
    with pytest.raises(ValueError, match=r"at most 4 of every 8 .* got 5 in row 17, k 24 to 31"):
        ops.pack(w, "nm4:8")


def test_bad_formats() -> None:
    w = torch.zeros(4, 4)
    for format in ("blocks", "blocks2x2", "nm", "nm3:4"):
        with pytest.raises(ValueError, match="pack: format must be 'auto'"):
            ops.pack(w, format)
    with pytest.raises(ValueError, match=r"format must be .* got 9 with block 514"):
        torch.ops.fastsparse.sparse_pack(w, 9, 0x0202)
    with pytest.raises(ValueError, match="at most K=65536 columns for blocks4x4"):
        ops.pack(torch.zeros(1, 65537), "blocks4x4")


@pytest.mark.parametrize("format", ["blocks1x4", "blocks4x4"])
@pytest.mark.parametrize("isa", LEVELS)
def test_every_first_k(isa: str, format: str) -> None:
    w = sparse(9, 65536, format, 0.99)
    x = torch.randn(1, w.shape[1])
    with forced(isa, "sparse_matmul"):
        got, expected = (ops.sparse_linear(x, ops.pack(w, f)) for f in (format, "bitmap32"))
    assert same_bits(got, expected)


@pytest.mark.parametrize("format", ["blocks4x4", "nm2:4"])
def test_layer_there_and_back(format: str, tmp_path: Path) -> None:
    linear = torch.nn.Linear(40, 24)
    linear.weight.data = sparse(24, 40, format)
    layer = nn.SparseLinear.from_linear(linear, format)
    x = torch.randn(5, 40, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, linear.weight.sum(0).expand(5, 40), atol=1e-5)
    model = torch.nn.Sequential(layer)
    fastsparse.save(model, tmp_path / "model.safetensors")
    loaded = fastsparse.load(tmp_path / "model.safetensors", torch.nn.Sequential(torch.nn.Linear(40, 24)))
    assert same_bits(loaded(x), y)
