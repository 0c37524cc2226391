"""The peer llama.cpp: its weight blocks, and its products where the package is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.cases import _ggml


def _weight(n: int, k: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(n + k + bits)
    top = 1 << (bits - 1)
    codes = torch.randint(-top, top, (n, k), dtype=torch.int8, generator=g)
    codes[0, :2] = torch.tensor([-top, top - 1])
    return codes, (torch.rand(n, k // _ggml.BLOCK, generator=g) + 0.5).half()


def test_blocks_of_4_bits() -> None:
    codes, scale = _weight(3, 64, 4)
    got = _ggml.blocks(codes, scale, 4).view(3, 2, 18)
    assert torch.equal(got[..., :2].contiguous().view(torch.float16)[..., 0], scale)
    halves = torch.cat((got[..., 2:] & 15, got[..., 2:] >> 4), 2)
    assert torch.equal(halves.view(3, 64).to(torch.int8) - 8, codes)


def test_blocks_of_8_bits() -> None:
    codes, scale = _weight(3, 64, 8)
    got = _ggml.blocks(codes, scale, 8).view(3, 2, 34)
    assert torch.equal(got[..., :2].contiguous().view(torch.float16)[..., 0], scale)
    assert torch.equal(got[..., 2:].contiguous().view(torch.int8).view(3, 64), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "n"), [(1, 16), (4, 24), (5, 13)])  # 13 columns: Q4_0 can't be repacked by eights
def test_linear(bits: int, m: int, n: int) -> None:
    if reason := _ggml.missing():
        pytest.skip(reason)
    codes, scale = _weight(n, 96, bits)
    g = torch.Generator().manual_seed(m)
    x, bias = torch.randn(m, 96, generator=g), torch.randn(n, generator=g)
    got = _ggml.linear(x, _ggml.blocks(codes, scale, bits), bias, bits)()
    dense = codes.double() * scale.double().repeat_interleave(_ggml.BLOCK, 1)
    # x is rounded to steps of its block's largest / 127, by a half at most: as much as that moves y, and no more.
    step = (
        x.double().view(m, -1, _ggml.BLOCK).abs().amax(2, keepdim=True).expand(m, -1, _ggml.BLOCK).reshape(m, -1) / 127
    )
    bound = 0.51 * step @ dense.abs().t() + 1e-3 * (x.double().abs() @ dense.abs().t())  # the step itself is a float16
    assert bool(((got.double() - (x.double() @ dense.t() + bias.double())).abs() <= bound).all())


def test_a_weight_of_another_size_is_refused() -> None:
    if reason := _ggml.missing():
        pytest.skip(reason)
    codes, scale = _weight(8, 64, 8)
    with pytest.raises(RuntimeError, match="ggml wants 544 bytes of weights, got 272"):
        _ggml.linear(torch.zeros(1, 64), _ggml.blocks(codes[:4], scale[:4], 8).view(8, -1), torch.zeros(8), 8)
