"""qdq against torch.compile and eager torch: quantize_per_token, dequantize, fake_quantize forward and backward.

Figures count the bytes that must move: 5 an element for int8 on one side, 16 for fake_quantize both ways (x and y, the
gradient of y and of x). Large shapes hold 16M elements (64 MB of x), the small one stays in the caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.registry import Call, Check, case, peer

LARGE = [{"m": (1 << 24) // k, "k": k} for k in (768, 4096, 11008)]
SHAPES = [*LARGE, {"m": 64, "k": 768}]
FAKE = [{"m": 4096, "k": 4096}, {"m": 64, "k": 768}]
CHECKED_ROWS = 64


def quick(m: int, k: int) -> bool:
    return m == 64


def int8_bytes(m: int, k: int) -> float:
    return 5.0 * m * k


def fake_bytes(m: int, k: int) -> float:
    return 16.0 * m * k


@functools.lru_cache(maxsize=1)
def operand(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m + k))


def fastsparse_missing() -> str | None:
    try:
        from fastsparse import ops  # noqa: F401
    except Exception as e:
        return f"fastsparse can't be imported: {e}"
    return None


def warm(call: Call) -> Call:
    """Called twice before it is timed: torch.compile compiles in its first call, which is no figure."""
    call()
    call()
    return call


def _plain(x: Tensor) -> tuple[Tensor, Tensor]:
    """What a user writes in torch; without the cases that ours has for rows of zeros and of NaN."""
    scale = x.abs().amax(1, keepdim=True) / 127.0
    return (x * (1.0 / scale)).round().to(torch.int8), scale


def _plain_into(x: Tensor, codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    new_codes, new_scale = _plain(x)
    codes.copy_(new_codes)
    scale.copy_(new_scale)
    return codes, scale


def check_codes(got: tuple[Tensor, Tensor], m: int, k: int) -> Check:
    codes, scale = _plain(operand(m, k)[-CHECKED_ROWS:])
    off = (got[0][-CHECKED_ROWS:].int() - codes.int()).abs().max() + (got[1][-CHECKED_ROWS:] - scale).abs().max()
    return Check(float(off), 0.0, "largest difference of codes and of scales")


# ---- quantize_per_token, into memory that is there ----


@case(
    "quantize_per_token into",
    shapes=SHAPES,
    unit="GB/s",
    work=int8_bytes,
    quick=quick,
    check=check_codes,
    available=fastsparse_missing,
)
def ours_into(m: int, k: int) -> Call:
    from fastsparse import ops

    x, out = operand(m, k), (torch.empty(m, k, dtype=torch.int8), torch.empty(m, 1))
    return lambda: ops.quantize_per_token(x, out=out)


@peer("quantize_per_token into", "torch.compile", check=check_codes)
def compiled_into(m: int, k: int) -> Call:
    torch._dynamo.reset()
    run = torch.compile(_plain_into, dynamic=False)
    x, codes, scale = operand(m, k), torch.empty(m, k, dtype=torch.int8), torch.empty(m, 1)
    return warm(lambda: run(x, codes, scale))


# ---- quantize_per_token, into new memory ----


@case(
    "quantize_per_token",
    shapes=SHAPES,
    unit="GB/s",
    work=int8_bytes,
    quick=quick,
    check=check_codes,
    available=fastsparse_missing,
)
def ours(m: int, k: int) -> Call:
    from fastsparse import ops

    x = operand(m, k)
    return lambda: ops.quantize_per_token(x)


@peer("quantize_per_token", "torch.compile", check=check_codes)
def compiled(m: int, k: int) -> Call:
    torch._dynamo.reset()
    run = torch.compile(_plain, dynamic=False)
    x = operand(m, k)
    return warm(lambda: run(x))


@peer("quantize_per_token", "torch eager", kind="bare", check=check_codes)
def eager(m: int, k: int) -> Call:
    x = operand(m, k)
    return lambda: _plain(x)


# ---- dequantize, per channel ----


@functools.lru_cache(maxsize=1)
def channels(k: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(k)
    return torch.rand(k, generator=g) * 0.03 + 0.01, torch.randint(-128, 128, (k,), dtype=torch.int32, generator=g)


def _plain_dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes.float() - zero.float()) * scale


@functools.lru_cache(maxsize=1)
def codes_of(m: int, k: int) -> Tensor:
    return torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=torch.Generator().manual_seed(m + k))


def check_values(got: Tensor, m: int, k: int) -> Check:
    want = _plain_dequantize(codes_of(m, k)[-CHECKED_ROWS:], *channels(k))
    return Check(float((got[-CHECKED_ROWS:] - want).abs().max()), 0.0, "largest difference")


@case(
    "dequantize",
    shapes=SHAPES,
    unit="GB/s",
    work=int8_bytes,
    quick=quick,
    check=check_values,
    available=fastsparse_missing,
)
def ours_dequantize(m: int, k: int) -> Call:
    from fastsparse import ops

    codes, (scale, zero) = codes_of(m, k), channels(k)
    return lambda: ops.dequantize(codes, scale, zero, axis=1)


@peer("dequantize", "torch.compile", check=check_values)
def compiled_dequantize(m: int, k: int) -> Call:
    torch._dynamo.reset()
    run = torch.compile(_plain_dequantize, dynamic=False)
    codes, (scale, zero) = codes_of(m, k), channels(k)
    return warm(lambda: run(codes, scale, zero))


# ---- fake_quantize, forward and backward ----

SCALE = 0.02


def _round_through(x: Tensor) -> Tensor:
    """clamp has the straight-through gradient, the rounding none."""
    t = (x * (1 / SCALE)).clamp(-128.0, 127.0)
    return (t + (t.round() - t).detach()) * SCALE


def _both_ways(run: Callable[[Tensor], Tensor], m: int, k: int) -> Call:
    x, grad = operand(m, k).clone().requires_grad_(), torch.ones(m, k)

    def call() -> Tensor:
        x.grad = None
        run(x).backward(grad)
        assert x.grad is not None
        return x.grad

    return warm(call)


def check_gradient(got: Tensor, m: int, k: int) -> Check:
    """Where a value is a rounding away from the last code, definitions may differ."""
    q = operand(m, k)[-CHECKED_ROWS:] * (1 / SCALE)
    clear = ((q.abs() - 127.5).abs() > 1).float()
    want = (q.abs() <= 127.5).float()
    return Check(
        float(((got[-CHECKED_ROWS:] - want) * clear).abs().max()), 1e-6, "largest difference away from the ends"
    )


@case(
    "fake_quantize both ways",
    shapes=FAKE,
    unit="GB/s",
    work=fake_bytes,
    quick=quick,
    check=check_gradient,
    available=fastsparse_missing,
)
def ours_fake(m: int, k: int) -> Call:
    from fastsparse import ops

    scale = torch.tensor([SCALE])
    return _both_ways(lambda x: ops.fake_quantize(x, scale), m, k)


@peer("fake_quantize both ways", "torch.fake_quantize_per_tensor_affine", kind="bare", check=check_gradient)
def torch_fake(m: int, k: int) -> Call:
    return _both_ways(lambda x: torch.fake_quantize_per_tensor_affine(x, SCALE, 0, -128, 127), m, k)


@peer("fake_quantize both ways", "torch.compile", check=check_gradient)
def compiled_fake(m: int, k: int) -> Call:
    torch._dynamo.reset()
    return _both_ways(torch.compile(_round_through, dynamic=False), m, k)
