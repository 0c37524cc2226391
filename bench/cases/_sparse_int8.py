"""sparse_int8_linear, part of sparse_matmul: against our own dense int8_linear, torch._int_mm and dense float32.

Figures count dense work: 2 M N K operations. Zeros come in blocks of r outputs x c k: 1 x 1 is unstructured.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from bench.measure import in_turn
from bench.registry import Call, Check, case, peer
from bench.sparse_bars import FAR, WEIGHTS

DEFAULT = ("default",)
FROM_DRAM = "sparse_int8_linear from DRAM"  # one row, weights in turn
INT4_FROM_DRAM = "weight_only_linear without zeros, from DRAM"  # 4 bits in groups of GROUP, the same places zero
GROUP = 128
CASE, DENSE, INT_MM = "sparse_int8_linear", "fastsparse int8_linear", "torch._int_mm"
INT8_BITMAP, DENSE_INT4 = "fastsparse bitmap_s8", "fastsparse u4"
BLOCKS = ((1, 4, 75), (4, 4, 75), (4, 4, 50), (1, 1, 90))  # (r, c, zeros)
SHAPES = [
    {"m": m, "k": k, "n": n, "r": 1, "c": 1, "zeros": z} for k, n in WEIGHTS for z in (50, 70, 80) for m in (1, 4)
] + [
    {"m": m, "k": k, "n": n, "r": r, "c": c, "zeros": z}
    for k, n in WEIGHTS
    for r, c, z in BLOCKS
    for m in (16, 128, 512)
]


@functools.lru_cache(maxsize=1)
def operands(m: int, k: int, n: int, r: int, c: int, zeros: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(m * 1_000_003 + k * 1_009 + n + 7 * r + c + zeros)
    weight = torch.randint(1, 128, (n, k), dtype=torch.int8, generator=g)
    weight *= torch.randint(0, 2, (n, k), dtype=torch.int8, generator=g) * 2 - 1
    live = torch.rand(-(-n // r), -(-k // c), generator=g) * 100 >= zeros
    weight *= live.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    scale = (torch.rand(n, generator=g) + 0.5) / (74 * k**0.5)
    return torch.randn(m, k, generator=g), weight, scale, torch.randn(n, generator=g)


@functools.lru_cache(maxsize=1)
def int4(m: int, k: int, n: int, r: int, c: int, zeros: int) -> tuple[Tensor, Tensor]:
    """Codes and scales: the int8 weight in sixteenths, what is not zero rounded away from it."""
    _, weight, scale, _ = operands(m, k, n, r, c, zeros)
    codes = weight.sign() * ((weight.short().abs() + 8) // 16).clamp_(1, 7).to(torch.int8)
    return codes, (16 * scale).half()[:, None].expand(n, -(-k // GROUP)).contiguous()


@functools.lru_cache(maxsize=2)
def int4_packed(format: str, m: int, k: int, n: int, r: int, c: int, zeros: int) -> Tensor:
    from fastsparse import ops

    codes, scale = int4(m, k, n, r, c, zeros)
    return ops.pack(codes, format, scale=scale, group_size=GROUP)


def int4_bytes(m: int, k: int, n: int, r: int, c: int, zeros: int) -> int:
    return int4_packed("bitmap_u4", m, k, n, r, c, zeros).numel()


def u4_bytes(m: int, k: int, n: int, r: int, c: int, zeros: int) -> int:
    return int4_packed("u4", m, k, n, r, c, zeros).numel()


def work(m: int, k: int, n: int, r: int, c: int, zeros: int) -> float:
    return 2.0 * m * n * k


@functools.lru_cache(maxsize=1)
def packed(m: int, k: int, n: int, r: int, c: int, zeros: int) -> Tensor:
    from fastsparse import ops

    return ops.pack(operands(m, k, n, r, c, zeros)[1], "sparse", rows=m)


def packed_bytes(m: int, k: int, n: int, r: int, c: int, zeros: int) -> int:
    return packed(m, k, n, r, c, zeros).numel()


def dense_bytes(m: int, k: int, n: int, r: int, c: int, zeros: int) -> int:
    return n * k


def fp32_bytes(m: int, k: int, n: int, r: int, c: int, zeros: int) -> int:
    return 4 * n * k


def check(got: Tensor, m: int, k: int, n: int, r: int, c: int, zeros: int) -> Check:
    from fastsparse import reference

    x, weight, scale, bias = operands(m, k, n, r, c, zeros)
    want = reference.sparse_int8_linear(x[:16], weight, scale, bias)
    return Check(float((got[:16].double() - want).norm() / want.norm()), 1e-5, "relative to the oracle, Frobenius norm")


def check_float(got: Tensor, m: int, k: int, n: int, r: int, c: int, zeros: int) -> Check:
    x, weight, scale, bias = operands(m, k, n, r, c, zeros)
    want = x[:16].double() @ (weight.double() * scale.double()[:, None]).t() + bias.double()
    error = float((got[:16].double() - want).norm() / want.norm())
    return Check(error, 1e-5, "relative to unquantized float64, Frobenius norm")


def check_int4(got: Tensor, m: int, k: int, n: int, r: int, c: int, zeros: int) -> Check:
    from fastsparse import reference

    x, _, _, bias = operands(m, k, n, r, c, zeros)
    codes, scale = int4(m, k, n, r, c, zeros)
    want = reference.weight_only_linear(x, codes, scale, bias, group_size=GROUP)
    return Check(float((got.double() - want).norm() / want.norm()), 1e-5, "relative to the oracle, Frobenius norm")


def _codes(m: int, k: int) -> Tensor:
    return torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=torch.Generator().manual_seed(m + k))


def check_bare(got: Tensor, m: int, k: int, n: int, r: int, c: int, zeros: int) -> Check:
    want = _codes(m, k)[:16].double() @ operands(m, k, n, r, c, zeros)[1].double().t()
    return Check(float((got[:16].double() - want).abs().max()), 0.0, "largest difference to the exact integers")


def missing() -> str | None:
    try:
        from fastsparse import ops  # noqa: F401
    except Exception as e:
        return f"fastsparse can't be imported: {e}"
    return None


def ours(m: int, k: int, n: int, r: int, c: int, zeros: int) -> Call:
    from fastsparse import ops

    x, _, scale, bias = operands(m, k, n, r, c, zeros)
    pack = packed(m, k, n, r, c, zeros).clone()
    return lambda: ops.sparse_int8_linear(x, pack, scale, bias)


def our_int4(m: int, k: int, n: int, r: int, c: int, zeros: int) -> Call:
    return _int4("bitmap_u4", m, k, n, r, c, zeros)


def dense_int4(m: int, k: int, n: int, r: int, c: int, zeros: int) -> Call:
    return _int4("u4", m, k, n, r, c, zeros)


def _int4(format: str, m: int, k: int, n: int, r: int, c: int, zeros: int) -> Call:
    from fastsparse import ops

    x, _, _, bias = operands(m, k, n, r, c, zeros)
    pack = int4_packed(format, m, k, n, r, c, zeros).clone()
    return lambda: ops.weight_only_linear(x, pack, bias)


def int8_bitmap(m: int, k: int, n: int, r: int, c: int, zeros: int) -> Call:
    from fastsparse import ops

    x, weight, scale, bias = operands(m, k, n, r, c, zeros)
    pack = ops.pack(weight, "bitmap_s8")
    return lambda: ops.sparse_int8_linear(x, pack, scale, bias)


def int8_bitmap_bytes(m: int, k: int, n: int, r: int, c: int, zeros: int) -> int:
    return int((100 - zeros) * n * k / 100 + n * k / 8)


def our_dense(m: int, k: int, n: int, r: int, c: int, zeros: int) -> Call:
    from fastsparse import ops

    x, weight, scale, bias = operands(m, k, n, r, c, zeros)
    pack = ops.pack(weight)
    return lambda: ops.int8_linear(x, pack, scale, bias)


def bare_int_mm(m: int, k: int, n: int, r: int, c: int, zeros: int) -> Call:
    """No quantize, no epilogue. The weight as torch stores it, [N, K], seen transposed: the faster of both layouts."""
    codes, weight = _codes(m, k), operands(m, k, n, r, c, zeros)[1].clone()
    return lambda: torch._int_mm(codes, weight.t())


def dense_fp32(m: int, k: int, n: int, r: int, c: int, zeros: int) -> Call:
    x, weight, scale, bias = operands(m, k, n, r, c, zeros)
    values = weight.float() * scale[:, None]
    return lambda: functional.linear(x, values, bias)


def register() -> None:
    """Called by the family's file at each import of it: registering is what an import is for."""
    case(
        CASE,
        shapes=SHAPES,
        unit="GOP/s",
        work=work,
        quick=lambda m, k, n, r, c, zeros: (k, n) == (768, 768) and m in (1, 128),
        compute="int8",
        weight_bytes=packed_bytes,
        check=check,
        available=missing,
        mallocs=DEFAULT,
    )(ours)
    peer(CASE, DENSE, compute="int8", weight_bytes=dense_bytes, check=check, available=missing, mallocs=DEFAULT)(
        our_dense
    )
    peer(CASE, INT_MM, kind="bare", compute="int8", weight_bytes=dense_bytes, check=check_bare, mallocs=DEFAULT)(
        bare_int_mm
    )
    peer(CASE, "torch fp32", kind="fp32", compute="fp32", weight_bytes=fp32_bytes, check=check_float, mallocs=DEFAULT)(
        dense_fp32
    )
    case(
        FROM_DRAM,
        shapes=[shape for shape in SHAPES if shape["m"] == 1 and shape["k"] == 4096],
        unit="GOP/s",
        work=work,
        quick=lambda **_: False,
        check=check,
        available=missing,
        mallocs=DEFAULT,
    )(in_turn(ours, packed_bytes))
    peer(FROM_DRAM, DENSE, check=check, available=missing, mallocs=DEFAULT)(in_turn(our_dense, dense_bytes))
    case(
        INT4_FROM_DRAM,
        shapes=[{"m": 1, "k": k, "n": n, "r": 1, "c": 1, "zeros": z} for k, n in FAR for z in (50, 60, 70)],
        unit="GOP/s",
        work=work,
        quick=lambda **_: False,
        check=check_int4,
        available=missing,
        mallocs=DEFAULT,
    )(in_turn(our_int4, int4_bytes))
    peer(INT4_FROM_DRAM, INT8_BITMAP, check=check, available=missing, mallocs=DEFAULT)(
        in_turn(int8_bitmap, int8_bitmap_bytes)
    )
    peer(INT4_FROM_DRAM, DENSE_INT4, check=check_int4, available=missing, mallocs=DEFAULT)(
        in_turn(dense_int4, u4_bytes)
    )
