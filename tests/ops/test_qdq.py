"""quantize, quantize_per_token, dequantize and fake_quantize: equal to the oracle to the bit, on every level."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastsparse import _C, ops, reference
from support import around, forced, guarded, isa_levels, same_bits, strided, threads, tiles

FAMILY = "qdq"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
TINY = torch.finfo(torch.float32).tiny

raw = torch.ops.fastsparse


def lengths() -> list[int]:
    """Round the groups of every level, and across a pattern of 1024."""
    return sorted({*around(tiles(FAMILY)[1]), 8, 9, 1023, 1025})


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Codes within and beyond the range at scales near 0.02, ties, and every special value."""
    x = torch.randn(shape) * 2
    flat = x.view(-1)
    special = torch.tensor([NAN, INF, -INF, 0.0, -0.0, 6e4, -6e4, 1e-40, 3e38, -3e38])
    spots = torch.randperm(flat.numel())[: min(flat.numel() // 3, 10)]
    flat[spots] = special[: len(spots)]
    return x.to(dtype)


def parameters(*shape: int, low: int = -128, high: int = 127, affine: bool = True) -> tuple[Tensor, Tensor | None]:
    scale = torch.rand(shape) * 0.03 + 0.005
    return scale, torch.randint(low, high + 1, shape, dtype=torch.int32) if affine else None


# The ways that parameters belong to x: (shape, axis, shape of scale). Axes with long and short rows, on every side.
LAYOUTS: dict[str, tuple[tuple[int, ...], int | None, tuple[int, ...]]] = {
    "one": ((5, 77), None, (1,)),
    "number": ((3, 41), None, ()),
    "of no dimensions": ((), None, ()),
    "rows": ((7, 133), None, (7, 1)),
    "short rows": ((2, 19, 9), None, (2, 19, 1)),
    "first": ((6, 130), 0, (6,)),
    "first, short": ((37, 27), 0, (37,)),
    "middle": ((3, 5, 67), 1, (5,)),
    "middle, short": ((3, 5, 9), -2, (5,)),
    "last": ((9, 45), -1, (45,)),
    "last, long": ((3, 2100), 1, (2100,)),
    "convolution": ((33, 3, 3, 3), 0, (33,)),
    "channels of 1": ((4, 1, 70), 1, (1,)),
    "vector": ((71,), 0, (71,)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_equal_to_the_oracle(isa: str, dtype: torch.dtype, layout: str) -> None:
    shape, axis, scale_shape = LAYOUTS[layout]
    for affine in (False, True):
        x = values(*shape, dtype=dtype)
        scale, zero = parameters(*scale_shape, affine=affine)
        with forced(isa, FAMILY):
            codes = ops.quantize(x, scale, zero, axis=axis)
            y = ops.dequantize(codes, scale, zero, axis, dtype=dtype)
            fake = ops.fake_quantize(x, scale, zero, axis=axis)
        assert same_bits(codes, reference.quantize(x, scale, zero, axis))
        assert same_bits(y, reference.dequantize(codes, scale, zero, axis, dtype))
        assert same_bits(fake, y), "fake_quantize is dequantize(quantize(x))"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_gradient_is_straight_through(isa: str, dtype: torch.dtype, layout: str) -> None:
    shape, axis, scale_shape = LAYOUTS[layout]
    for bits in (2, 5, 8):
        x = values(*shape, dtype=dtype).requires_grad_()
        scale, zero = parameters(*scale_shape, low=-(2 ** (bits - 1)), high=2 ** (bits - 1) - 1)
        grad = torch.randn(shape).to(dtype)
        with forced(isa, FAMILY):
            y = ops.fake_quantize(x, scale, zero, bits, axis)
            y.backward(grad)
            plain = ops.fake_quantize(x.detach(), scale, zero, bits, axis)
        wanted, passes = reference.fake_quantize(x.detach(), scale, zero, bits, axis)
        assert x.grad is not None
        assert same_bits(y.detach(), wanted)
        assert same_bits(plain, wanted)
        assert same_bits(x.grad, torch.where(passes, grad, torch.zeros_like(grad)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_per_token(isa: str, dtype: torch.dtype) -> None:
    with forced(isa, FAMILY):
        for k in lengths():
            x = torch.randn(9, k).to(dtype)
            if k:
                x[1] = 0
                x[2, -1], x[3, 0], x[4, k // 2] = NAN, INF, -INF
                x[5] = (x[5].double() * 1e-39).to(dtype)
                x[6, 0] = torch.finfo(dtype).max
            wanted = reference.quantize_per_token(x)
            for side in ("end", "begin"):
                codes, scale = ops.quantize_per_token(guarded(x, side))
                assert same_bits(codes, wanted[0]), k
                assert same_bits(scale, wanted[1]), k


def test_per_token_edges() -> None:
    x = torch.zeros(4, 5)
    x[1, 2], x[2, 3], x[3, 0] = NAN, -INF, 1e-44
    codes, scale = ops.quantize_per_token(x)
    assert scale[0] == 1
    assert scale[1].isnan()
    assert scale[2].isnan()
    assert scale[3] == TINY
    assert not codes.any()
    assert torch.equal(ops.quantize_per_token(torch.empty(3, 0))[1], torch.ones(3, 1))
    assert ops.quantize_per_token(torch.empty(0, 3))[1].shape == (0, 1)
    # A broken row comes back as NaN, the others as they were.
    back = ops.dequantize(codes, scale)
    assert back[1:3].isnan().all()
    assert not back[[0, 3]].any()


def test_static_edges() -> None:
    x = torch.tensor([NAN, INF, -INF, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -128.5, -129.0])
    one, zero = torch.ones(1), torch.tensor([7], dtype=torch.int32)
    assert ops.quantize(x, one).tolist() == [0, 127, -128, 0, 2, 2, 0, -2, 126, 127, -128, -128]
    assert ops.quantize(x, one, zero).tolist() == [7, 127, -128, 7, 9, 9, 7, 5, 127, 127, -121, -122]
    leaf = x.clone().requires_grad_()
    ops.fake_quantize(leaf, one).sum().backward()
    assert leaf.grad is not None
    # 127.5 rounds to 128, beyond the codes; -128.5 to -128, which is one.
    assert leaf.grad.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 0]


def test_the_largest_and_smallest_scales() -> None:
    x = torch.tensor([3e38, -3e38, TINY, 1.0, 0.0])
    for scale in (TINY, 1.0, 3.4e38):
        s = torch.tensor([scale])
        assert torch.equal(ops.quantize(x, s), reference.quantize(x, s))
        assert same_bits(ops.dequantize(ops.quantize(x, s), s), reference.dequantize(ops.quantize(x, s), s))


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_linear_makes_the_same_codes(dtype: torch.dtype) -> None:
    x = values(11, 75, dtype=dtype)
    x[:6] = torch.randn(6, 75).to(dtype)
    codes, scale = ops.quantize_per_token(x)
    identity = ops.pack(torch.eye(75, dtype=torch.int8))
    through = ops.int8_linear(x, identity, torch.ones(75))
    assert same_bits(through, ops.dequantize(codes, scale, dtype=dtype) + 0.0)
    s, zero = torch.tensor(0.03), torch.tensor(-9, dtype=torch.int32)
    through = ops.int8_linear(x, identity, torch.ones(75), None, None, s, zero)
    assert same_bits(through, ops.dequantize(ops.quantize(x, s, zero), s, zero, dtype=dtype) + 0.0)


def test_fake_quantize_agrees_with_torch() -> None:
    x = torch.randn(40, 33) * 3
    for bits in (8, 4):
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale, zero = parameters(1, low=low, high=high)
        assert zero is not None
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = ops.fake_quantize(ours, scale, zero, bits)
        wanted = torch.fake_quantize_per_tensor_affine(theirs, scale.item(), int(zero.item()), low, high)
        y.sum().backward()
        wanted.sum().backward()
        assert torch.equal(y, wanted)
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("isa", isa_levels())
def test_nothing_outside_is_read(isa: str) -> None:
    with forced(isa, FAMILY):
        for n, dtype, side in itertools.product(lengths(), DTYPES, ("end", "begin")):
            x = guarded(torch.randn(2, n).to(dtype), side)
            one, many = guarded(torch.rand(1) + 0.1, side), guarded(torch.rand(n) + 0.1, side)
            zero = guarded(torch.zeros(n, dtype=torch.int32), side)
            codes = guarded(ops.quantize(x, one), side)
            assert torch.equal(codes, reference.quantize(x, one))
            assert torch.equal(ops.dequantize(codes, one, dtype=dtype), reference.dequantize(codes, one, dtype=dtype))
            if n != 1:
                assert torch.equal(ops.quantize(x, many, zero, axis=1), reference.quantize(x, many, zero, 1))
            y, mask = raw.fake_quantize_train(x, one)
            got = raw.fake_quantize_backward(guarded(y, side), guarded(mask, side))
            assert torch.equal(got, torch.where(reference.fake_quantize(x, one)[1], y, torch.zeros_like(y)))


def canaried(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Callable[[], bool]]:
    """A tensor inside a larger one, and whether what lies round it is untouched."""
    count = torch.Size(shape).numel()
    whole = torch.full((count + 128,), 77, dtype=dtype)
    inner = whole[64 : 64 + count].view(shape)
    return inner, lambda: bool((whole[:64] == 77).all() and (whole[64 + count :] == 77).all())


@pytest.mark.parametrize("isa", isa_levels())
def test_per_token_into_given_tensors(isa: str) -> None:
    with forced(isa, FAMILY):
        for k in lengths():
            x = torch.randn(3, k)
            (codes, codes_intact), (scale, scale_intact) = canaried((3, k), torch.int8), canaried((3, 1), torch.float32)
            got = ops.quantize_per_token(x, out=(codes, scale))
            assert got[0] is codes
            assert got[1] is scale
            assert codes_intact()
            assert scale_intact()
            wanted = reference.quantize_per_token(x)
            assert torch.equal(codes, wanted[0])
            assert torch.equal(scale, wanted[1])


# Large enough to be stored past the caches, with rows that start on and off a vector.
@pytest.mark.parametrize("k", [4096, 4093])
@pytest.mark.parametrize("isa", isa_levels())
def test_large_outputs(isa: str, k: int) -> None:
    x = torch.randn(1100, k)
    scale, zero = parameters(k)
    with forced(isa, FAMILY):
        codes, scales = ops.quantize_per_token(x)
        static = ops.quantize(x, scale, zero, axis=1)
        y = ops.dequantize(static, scale, zero, axis=1)
        fake, mask = raw.fake_quantize_train(x, scale, zero, 8, 1)
        grad = raw.fake_quantize_backward(x, mask)
        one = ops.fake_quantize(x, scale[:1])
    with forced("scalar", FAMILY):
        assert torch.equal(codes, reference.quantize_per_token(x)[0])
        assert torch.equal(scales, reference.quantize_per_token(x)[1])
        assert torch.equal(static, ops.quantize(x, scale, zero, axis=1))
        assert torch.equal(y, ops.dequantize(static, scale, zero, axis=1))
        assert torch.equal(fake, y)
        assert torch.equal(grad, raw.fake_quantize_backward(x, mask))
        assert torch.equal(one, ops.fake_quantize(x, scale[:1]))


def everything(x: Tensor, axis: int | None, scale: Tensor, zero: Tensor | None) -> list[Tensor]:
    codes = ops.quantize(x, scale, zero, axis=axis)
    y, mask = raw.fake_quantize_train(x, scale, zero, 8, axis)
    back = ops.dequantize(codes, scale, zero, axis, dtype=x.dtype)
    return [codes, back, y, mask, raw.fake_quantize_backward(x, mask), *(ops.quantize_per_token(x) if x.dim() else ())]


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_agree_to_the_bit(dtype: torch.dtype) -> None:
    for shape, axis, scale_shape in LAYOUTS.values():
        x = values(*shape, dtype=dtype)
        scale, zero = parameters(*scale_shape)
        results = {}
        for isa in isa_levels():
            with forced(isa, FAMILY):
                results[isa] = everything(x, axis, scale, zero)
        for isa, got in results.items():
            assert all(same_bits(a, b) for a, b in zip(got, results["scalar"], strict=True)), (isa, shape, axis)


THREADED = {
    "one": ((3, 33333), None, (1,)),
    "rows": ((301, 211), None, (301, 1)),
    "few rows": ((2, 40001), 0, (2,)),
    "short": ((5001, 9), 0, (5001,)),
    "last": ((431, 101), 1, (101,)),
    "last, few rows": ((2, 30011), 1, (30011,)),
}


@pytest.mark.parametrize("layout", THREADED)
@pytest.mark.parametrize("isa", isa_levels())
def test_thread_count_changes_no_bit(isa: str, layout: str) -> None:
    shape, axis, scale_shape = THREADED[layout]
    x = values(*shape)
    scale, zero = parameters(*scale_shape)
    results = []
    with forced(isa, FAMILY):
        for count in (1, 2, 3):
            with threads(count):
                results.append(everything(x, axis, scale, zero))
    assert torch.equal(results[0][0], reference.quantize(x, scale, zero, axis))
    for got in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(got, results[0], strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_warm_calls_allocate_no_scratch(count: int) -> None:
    x, (scale, zero) = torch.randn(700, 101), parameters(101)
    with threads(count):
        everything(x, 1, scale, zero)
        before = _C.scratch_allocations()
        for _ in range(5):
            everything(x, 1, scale, zero)
        assert _C.scratch_allocations() == before


def views(x: Tensor) -> dict[str, Tensor]:
    return {
        "transposed": x.t().contiguous().t(),
        "strided rows": strided(x),
        "strided columns": x.repeat_interleave(2, dim=1)[:, ::2],
        "broadcast row": x[:1].expand_as(x),
        "broadcast column": x[:, :1].expand_as(x),
        "offset": torch.cat([x.new_zeros(1, x.shape[1]), x])[1:],
    }


@pytest.mark.parametrize("isa", isa_levels())
def test_any_strides(isa: str) -> None:
    scale, zero = parameters(23)
    wide_scale, wide_zero = parameters(46)
    assert wide_zero is not None
    with forced(isa, FAMILY):
        for name, x in views(torch.randn(7, 23)).items():
            for got, wanted in zip(
                everything(x, 1, scale, zero), everything(x.contiguous(), 1, scale, zero), strict=True
            ):
                assert torch.equal(got, wanted), name
                assert got.is_contiguous()
            strided_parameters = ops.quantize(x, wide_scale[::2], wide_zero[::2], axis=1)
            assert torch.equal(strided_parameters, reference.quantize(x, wide_scale[::2], wide_zero[::2], 1))
        x, codes = torch.randn(7, 23), strided(torch.randint(-128, 128, (7, 23), dtype=torch.int8))
        for side in ("end", "begin"):
            got = ops.quantize_per_token(guarded(strided(x), side))[0]
            assert torch.equal(got, reference.quantize_per_token(x)[0])
            assert torch.equal(
                ops.dequantize(guarded(codes, side), scale, zero, 1), reference.dequantize(codes, scale, zero, 1)
            )


SIZES = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 13, 31, 64, 67, 129])


@given(
    isa=st.sampled_from(isa_levels()),
    shape=st.lists(SIZES, min_size=1, max_size=3),
    axis=st.integers(-3, 2) | st.none(),
    dtype=st.sampled_from(DTYPES),
    affine=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_on_whatever(isa: str, shape: list[int], axis: int | None, dtype: torch.dtype, affine: bool, seed: int) -> None:
    torch.manual_seed(seed)
    if axis is not None and not -len(shape) <= axis < len(shape):
        axis = 0
    x = values(*shape, dtype=dtype)
    scale, zero = parameters(1 if axis is None else shape[axis], affine=affine)
    with forced(isa, FAMILY):
        codes, back, y, _, grad, *token = everything(x, axis, scale, zero)
    wanted, passes = reference.fake_quantize(x, scale, zero, 8, axis)
    assert torch.equal(codes, reference.quantize(x, scale, zero, axis))
    assert same_bits(back, wanted)
    assert same_bits(y, wanted)
    assert same_bits(grad, torch.where(passes, x, torch.zeros_like(x)))
    assert all(same_bits(a, b) for a, b in zip(token, reference.quantize_per_token(x), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", isa_levels())
def test_every_16_bit_value(isa: str, dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    scale, zero = parameters(1)
    with forced(isa, FAMILY):
        assert torch.equal(ops.quantize(x, scale, zero), reference.quantize(x, scale, zero))
        assert same_bits(ops.fake_quantize(x, scale, zero), reference.fake_quantize(x, scale, zero)[0])


def test_every_code_comes_back() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8)
    for scale in (0.25, 3e-5, 1e30):
        s = torch.tensor([scale])
        assert torch.equal(ops.quantize(ops.dequantize(codes, s), s), codes)


# --- torch.library, torch.compile, autograd ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["one", "rows", "first", "middle, short", "last"])
def test_opcheck(layout: str) -> None:
    shape, axis, scale_shape = LAYOUTS[layout]
    x, (scale, zero) = torch.randn(shape), parameters(*scale_shape)
    codes = ops.quantize(x, scale, zero, axis=axis)
    torch.library.opcheck(raw.quantize.default, (x, scale, zero, axis))
    torch.library.opcheck(raw.dequantize.default, (codes, scale, zero, axis, 1))
    torch.library.opcheck(raw.fake_quantize.default, (x, scale, zero, 8, axis))
    torch.library.opcheck(raw.fake_quantize_train.default, (x.clone().requires_grad_(), scale, zero, 8, axis))
    mask = raw.fake_quantize_train(x, scale, zero, 8, axis)[1]
    torch.library.opcheck(raw.fake_quantize_backward.default, (x.clone().requires_grad_(), mask))


def test_opcheck_per_token() -> None:
    x = torch.randn(2, 3, 9)
    torch.library.opcheck(raw.quantize_per_token.default, (x,))
    out = torch.empty(2, 3, 9, dtype=torch.int8), torch.empty(2, 3, 1)
    torch.library.opcheck(raw.quantize_per_token_out.default, (x, *out))


def test_compile_gives_the_same_bits() -> None:
    torch._dynamo.reset()
    scale, zero = parameters(23)

    def run(x: Tensor) -> list[Tensor]:
        codes = ops.quantize(x * 2, scale, zero, axis=1)
        out = torch.empty_like(x, dtype=torch.int8), x.new_empty(x.shape[0], 1)
        ops.quantize_per_token(x, out=out)
        return [codes + 1, ops.dequantize(codes, scale, zero, 1), *ops.quantize_per_token(x), *out]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 5, 8):
        x = torch.randn(m, 23)
        assert all(same_bits(a, b) for a, b in zip(compiled(x), run(x), strict=True))


def forward_backward(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_compile_forward_and_backward(axis: int | None) -> None:
    torch._dynamo.reset()
    scale, zero = parameters(1 if axis is None else 70)

    def run(x: Tensor) -> Tensor:
        return ops.fake_quantize(x * 1.5, scale, zero, 8, axis) * 2

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=axis is None)
    for m in (70, 71) if axis is None else (70,):
        x = torch.randn(m, 70)
        for got, wanted in zip(forward_backward(compiled, x), forward_backward(run, x), strict=True):
            assert same_bits(got, wanted)


@pytest.mark.inductor
def test_inductor_forward_and_backward() -> None:
    torch._dynamo.reset()
    scale = torch.rand(19) * 0.03 + 0.01

    def run(x: Tensor) -> Tensor:
        return ops.fake_quantize(x + 1, scale, axis=0) * 3

    x = torch.randn(19, 70)
    for got, wanted in zip(
        forward_backward(torch.compile(run, fullgraph=True), x), forward_backward(run, x), strict=True
    ):
        assert same_bits(got, wanted)


def test_the_second_derivative() -> None:
    x = torch.linspace(-3, 3, 50).requires_grad_()
    scale = torch.tensor(0.02)
    (first,) = torch.autograd.grad((ops.fake_quantize(x, scale) ** 2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    passes = reference.fake_quantize(x.detach(), scale)[1]
    assert torch.equal(second, 2.0 * passes)


def test_no_graph_where_none_is_asked_for() -> None:
    x, scale = torch.randn(3, 7).requires_grad_(), torch.tensor(0.02)
    with torch.no_grad():
        assert not ops.fake_quantize(x, scale).requires_grad
        assert not ops.fake_quantize(x, scale.clone().requires_grad_()).requires_grad
    assert not ops.fake_quantize(x.detach(), scale).requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.fake_quantize(x, scale), reference.fake_quantize(x, scale)[0])
    assert not ops.quantize(x, scale).requires_grad


# --- Bad input --------------------------------------------------------------------------------------------------------

X, CODES = torch.ones(3, 7), torch.ones(3, 7, dtype=torch.int8)
ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)
SEVEN, ZEROS = torch.ones(7), torch.zeros(7, dtype=torch.int32)


def spoiled(value: float) -> Tensor:
    scale = torch.ones(7)
    scale[4] = value
    return scale


BAD_INPUT: dict[str, tuple[Callable[[], Any], str, str]] = {
    "x float64": (
        lambda: ops.quantize(X.double(), ONE),
        "quantize: x must be float32, bfloat16 or float16",
        "got float64",
    ),
    "x codes": (lambda: ops.fake_quantize(CODES, ONE), "fake_quantize: x must be float32, bfloat16 or", "got int8"),
    "token x": (lambda: ops.quantize_per_token(CODES), "quantize_per_token: x must be float32, bfloat16", "got int8"),
    "token number": (
        lambda: ops.quantize_per_token(torch.tensor(1.0)),
        "quantize_per_token: x must have at least one dimension",
        "got x[]",
    ),
    "codes float": (lambda: ops.dequantize(X, ONE), "dequantize: codes must be int8", "got float32"),
    "dtype uint8": (
        lambda: ops.quantize(X, ONE, dtype=torch.uint8),
        "quantize: dtype must be torch.int8, the only one that has kernels so far",
        "got torch.uint8",
    ),
    "dtype fp8": (
        lambda: ops.quantize(X, ONE, dtype=torch.float8_e4m3fn),
        "quantize: dtype must be torch.int8",
        "got torch.float8_e4m3fn",
    ),
    "dtype float64": (
        lambda: ops.dequantize(CODES, ONE, dtype=torch.float64),
        "dequantize: dtype must be torch.float32, torch.bfloat16 or torch.float16",
        "got torch.float64",
    ),
    "dtype code": (lambda: raw.dequantize(CODES, ONE, None, None, 3), "dequantize: dtype must be 0 (float32)", "got 3"),
    "group_size": (lambda: ops.quantize(X, ONE, group_size=32), "quantize: group_size must be None", "got 32"),
    "group_size back": (lambda: ops.dequantize(CODES, ONE, group_size=7), "dequantize: group_size must be", "got 7"),
    "bits 9": (lambda: ops.fake_quantize(X, ONE, bits=9), "fake_quantize: bits must be in [2, 8]", "got 9"),
    "bits 1": (lambda: ops.fake_quantize(X, ONE, bits=1), "fake_quantize: bits must be in [2, 8]", "got 1"),
    "axis 2": (lambda: ops.quantize(X, SEVEN, axis=2), "quantize: axis must be a dimension of x[3, 7]", "got 2"),
    "axis -3": (lambda: ops.quantize(X, SEVEN, axis=-3), "quantize: axis must be a dimension of x[3, 7]", "got -3"),
    "scale float64": (lambda: ops.quantize(X, ONE.double()), "quantize: scale must be float32", "got float64"),
    "scale length": (
        lambda: ops.quantize(X, SEVEN, axis=0),
        "quantize: scale must have shape [3] for axis 0 of x[3, 7]",
        "got scale[7]",
    ),
    "scale matrix": (
        lambda: ops.fake_quantize(X, torch.ones(3, 1), axis=0),
        "fake_quantize: scale must have shape [3] for axis 0",
        "got scale[3, 1]",
    ),
    "scale without axis": (
        lambda: ops.dequantize(CODES, SEVEN),
        "dequantize: scale must have one element, or one per row of codes[3, 7]",
        "got scale[7]",
    ),
    "scale zero": (
        lambda: ops.quantize(X, ONE * 0),
        "quantize: scale must be finite and at least 1.2e-38",
        "got 0 at 0",
    ),
    "scale negative": (lambda: ops.quantize(X, spoiled(-2), axis=1), "scale must be finite and at", "got -2 at 4"),
    "scale subnormal": (
        lambda: ops.quantize(X, ONE * 1e-39),
        "quantize: scale must be finite and at least",
        "got 1e-39",
    ),
    "scale inf": (lambda: ops.fake_quantize(X, spoiled(INF), axis=1), "fake_quantize: scale must be", "got inf at 4"),
    "scale NaN": (lambda: ops.quantize(X, spoiled(NAN), axis=1), "quantize: scale must be finite", "got nan at 4"),
    "scale gradient": (
        lambda: ops.fake_quantize(X, torch.ones(1, requires_grad=True)),
        "fake_quantize: scale must not require a gradient",
        "there is none for it",
    ),
    "scale gradient back": (
        lambda: ops.dequantize(CODES, torch.ones(1, requires_grad=True)),
        "dequantize: scale must not require a gradient",
        "there is none for it",
    ),
    "zero_point int64": (lambda: ops.quantize(X, ONE, ZERO.long()), "quantize: zero_point must be int32", "got int64"),
    "zero_point shape": (
        lambda: ops.quantize(X, SEVEN, ZERO, axis=1),
        "quantize: zero_point must have the shape of scale[7]",
        "got zero_point[1]",
    ),
    "zero_point 128": (lambda: ops.quantize(X, ONE, ZERO + 128), "zero_point must be in [-128, 127]", "got 128 at 0"),
    "zero_point back": (
        lambda: ops.dequantize(CODES, SEVEN, ZEROS - 129, axis=1),
        "dequantize: zero_point must be in [-128, 127]",
        "got -129 at 0",
    ),
    "zero_point of 4 bits": (
        lambda: ops.fake_quantize(X, ONE, ZERO + 8, bits=4),
        "fake_quantize: zero_point must be in [-8, 7]",
        "got 8 at 0",
    ),
    "out codes dtype": (
        lambda: ops.quantize_per_token(X, out=(X, torch.ones(3, 1))),
        "quantize_per_token: codes must be int8",
        "got float32",
    ),
    "out codes shape": (
        lambda: ops.quantize_per_token(X, out=(CODES[:2], torch.ones(3, 1))),
        "quantize_per_token: codes must be contiguous and of the shape of x[3, 7]",
        "got codes[2, 7]",
    ),
    "out codes strided": (
        lambda: ops.quantize_per_token(X, out=(strided(CODES), torch.ones(3, 1))),
        "quantize_per_token: codes must be contiguous",
        "got codes[3, 7]",
    ),
    "out scale": (
        lambda: ops.quantize_per_token(X, out=(CODES.clone(), torch.ones(3))),
        "quantize_per_token: scale must be contiguous and of the shape of x[3, 7] with 1 at the end",
        "got scale[3]",
    ),
    "mask": (
        lambda: raw.fake_quantize_backward(X, torch.zeros(1, 2, dtype=torch.uint8)),
        "fake_quantize_backward: mask must be the one that fake_quantize_train made for grad[3, 7]",
        "got mask[1, 2]",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    call, wanted, got = BAD_INPUT[case]
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert wanted in message
    assert got in message
    assert "/" not in message, "no path of the build in a user's message"


@pytest.mark.parametrize("argument", ["scale", "zero_point"])
def test_another_device_is_refused(argument: str) -> None:
    arguments = {"scale": ONE, "zero_point": ZERO}
    arguments[argument] = arguments[argument].to("meta")
    for call, first in ((ops.quantize, X), (ops.dequantize, CODES), (ops.fake_quantize, X)):
        with pytest.raises(ValueError, match=f"{call.__name__}: {argument} must be on cpu like .*got .*meta"):
            call(first, **arguments)
    with pytest.raises(ValueError, match="quantize_per_token: codes must be on cpu"):
        ops.quantize_per_token(X, out=(CODES.to("meta"), torch.ones(3, 1)))


@pytest.mark.skipif(_C.build_info()["cuda"] != "off", reason="this build has CUDA kernels")
def test_cuda_says_that_there_is_no_kernel() -> None:
    # Straight to the dispatcher's entry for CUDA; no device is needed for what only throws.
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    for name, call in {
        "quantize": lambda: raw.quantize.default.redispatch(key, X, ONE),
        "quantize_per_token": lambda: raw.quantize_per_token.default.redispatch(key, X),
        "dequantize": lambda: raw.dequantize.default.redispatch(key, CODES, ONE),
        "fake_quantize": lambda: raw.fake_quantize.default.redispatch(key, X, ONE),
    }.items():
        with pytest.raises(
            RuntimeError, match=f"^{name}: an argument is on cuda, and this build of fastsparse has no CUDA kernels"
        ):
            call()


def test_a_spoiled_kernel_is_wrong() -> None:
    name = next(row["name"] for row in _C.kernels() if row["family"] == FAMILY and row["selected"])
    wanted = ops.quantize(X, ONE)
    _C.spoil_kernel(FAMILY, name)
    try:
        assert (ops.quantize(X, ONE) != wanted).sum() == 1
    finally:
        _C.spoil_kernel(FAMILY, "")
    with pytest.raises(ValueError, match="qdq has no kernel named sse9"):
        _C.spoil_kernel(FAMILY, "sse9")
    assert torch.equal(ops.quantize(X, ONE), wanted)
