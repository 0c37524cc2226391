"""mma and mma.sp of ptx.h against a plain product of the matrices whose elements the layouts place."""

from __future__ import annotations

import pytest
import torch
from standin import StandIn
from torch import Tensor

KINDS = {"s8": (0, torch.int8), "f16": (1, torch.float16), "bf16": (2, torch.bfloat16)}
SPARSE = {"s8": (3, torch.int8), "f16": (4, torch.float16), "bf16": (5, torch.bfloat16)}


def values(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-128, 128, (rows, k)).to(dtype)  # every dtype holds these exactly


def product(kernels: StandIn, kind: int, a: Tensor, b: Tensor, metadata: Tensor | None) -> Tensor:
    with kernels.launches(seed=1):
        out = kernels.empty((16, 8), torch.int32 if a.dtype == torch.int8 else torch.float32)
        kernels.call("wrappers_product", kind, *(kernels.copy(t) for t in (a, b, metadata)), out)
        return out.double()


@pytest.mark.parametrize("name", KINDS)
def test_mma(kernels: StandIn, name: str) -> None:
    kind, dtype = KINDS[name]
    k = 32 // torch.empty(0, dtype=dtype).element_size()
    a, b = values(16, k, dtype), values(8, k, dtype)
    assert torch.equal(product(kernels, kind, a, b, None), a.double() @ b.double().t())


@pytest.mark.parametrize("name", SPARSE)
def test_mma_sp(kernels: StandIn, name: str) -> None:
    kind, dtype = SPARSE[name]
    k = 64 // torch.empty(0, dtype=dtype).element_size()
    kept, b = values(16, k // 2, dtype), values(8, k, dtype)
    pairs = torch.tensor([(i, j) for j in range(4) for i in range(j)])
    positions = pairs[torch.randint(len(pairs), (16, k // 4))]  # [row, chunk, 2]
    a = torch.zeros(16, k // 4, 4, dtype=torch.float64).scatter_(2, positions, kept.double().view(16, k // 4, 2))
    bits = (positions[..., 0] + 4 * positions[..., 1]).tolist()
    words = [0] * 32
    for row in range(16):
        for chunk in range(k // 4):
            if name != "s8":  # selector 1: lanes 2 and 3 of a quad
                lane, shift = 4 * (row % 8) + 2 + chunk // 4, 16 * (row // 8) + 4 * (chunk % 4)
            else:
                lane, shift = 4 * (row % 8) + 2 * (chunk // 8) + row // 8, 4 * (chunk % 8)
            words[lane] |= bits[row][chunk] << shift
    metadata = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert torch.equal(product(kernels, kind, kept, b, metadata), a.view(16, k) @ b.double().t())
