"""sparse_linear's activation where gradients are recorded: inside the kernels, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional

from fastsparse import nn, ops
from tests.support import forced, guarded, isa_levels, same_bits, strided, threads

OPS = torch.ops.fastsparse
CODES = {"relu": 1, "gelu": 2, "silu": 3}
EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu,
}  # fmt: skip
# 1024 outputs: rows of y that push each other out of L1 have a way of their own.
SHAPES = [(1, 19, 23), (3, 33, 64), (9, 64, 130), (17, 257, 61), (70, 1024, 40), (0, 5, 4), (3, 0, 4), (3, 4, 0)]
FORMATS = ("bitmap32", "sell16", "panels128", "sell8", "sell8x32", "sell8x16", "sell4", "blocks4x4", "nm2:4")


def sparse(n: int, k: int, zeros: float = 0.7) -> Tensor:
    return torch.randn(n, k) * (torch.rand(n, k) >= zeros)


def two_of_four(w: Tensor) -> Tensor:
    keep = torch.zeros_like(w)
    keep[:, ::4], keep[:, 1::4] = 1, 1
    return w * keep


def packed(w: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """A weight that the format holds, and its pack."""
    w = two_of_four(w) if format == "nm2:4" else w
    return w, ops.pack(w, format)


@pytest.mark.parametrize("activation", CODES)
@pytest.mark.parametrize("isa", isa_levels())
def test_y_has_the_bits_of_the_plain_call(isa: str, activation: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in SHAPES:
            x, bias = torch.randn(m, k), torch.randn(n)
            for b in (None, bias):
                for format in FORMATS:
                    _, pack = packed(sparse(n, k), format)
                    expected = ops.sparse_linear(x, pack, b, activation)
                    y = ops.sparse_linear(x.clone().requires_grad_(), pack, b, activation)
                    assert y.requires_grad
                    assert same_bits(y.detach(), expected), (m, n, k, format)
                structure, values = ops.sparse_structure(sparse(n, k))
                expected = ops.sparse_linear(x, structure, b, activation, values=values)
                y = ops.sparse_linear(x, structure, b, activation, values=values.clone().requires_grad_())
                assert same_bits(y.detach(), expected), (m, n, k)


@pytest.mark.parametrize("activation", CODES)
@pytest.mark.parametrize("isa", isa_levels())
def test_z_is_the_call_without_activation(isa: str, activation: str) -> None:
    with forced(isa, "sparse_matmul"):
        for m, n, k in SHAPES:
            x, bias = torch.randn(m, k), torch.randn(n)
            for format in FORMATS:
                _, pack = packed(sparse(n, k), format)
                z = OPS.sparse_linear_train(x, pack, n, bias, CODES[activation])[1]
                if activation == "relu":
                    assert z.shape == (0,)
                else:
                    assert same_bits(z, ops.sparse_linear(x, pack, bias)), (m, n, k, format)


def oracle(x: Tensor, w: Tensor, bias: Tensor | None, activation: str, grad: Tensor) -> dict[str, Tensor]:
    """In float64, by torch; the gradient to the weight where it is not zero."""
    parts = {"x": x, "w": w} | ({} if bias is None else {"bias": bias})
    wide = {name: t.detach().double().requires_grad_() for name, t in parts.items()}
    y = EXACT[activation](functional.linear(wide["x"], wide["w"], wide.get("bias")))
    y.backward(grad.double())
    found = {name: t.grad for name, t in wide.items() if t.grad is not None}
    found["w"] = found["w"][w != 0]
    return found


def close(got: Tensor | None, wanted: Tensor) -> bool:
    assert got is not None
    scale = float(wanted.abs().max()) if wanted.numel() else 1.0
    return torch.allclose(got.double(), wanted, rtol=1e-5, atol=2e-6 * max(scale, 1e-30))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("activation", CODES)
@pytest.mark.parametrize("isa", isa_levels())
def test_gradients_against_float64(isa: str, activation: str, count: int) -> None:
    with forced(isa, "sparse_matmul"), threads(count):
        for m, n, k in SHAPES:
            w, grad = sparse(n, k), torch.randn(m, n)
            for b in (None, torch.randn(n)):
                x = torch.randn(m, k)
                wanted = oracle(x, w, b, activation, grad)
                bias = None if b is None else b.clone().requires_grad_()
                x.requires_grad_()
                for format in ("panels128", "bitmap32"):
                    x.grad = None
                    ops.sparse_linear(x, ops.pack(w, format), bias, activation).backward(grad)
                    assert close(x.grad, wanted["x"]), (m, n, k, format)
                structure, values = ops.sparse_structure(w)
                x.grad = None
                if bias is not None:
                    bias.grad = None
                ops.sparse_linear(x, structure, bias, activation, values=values.requires_grad_()).backward(grad)
                assert close(x.grad, wanted["x"]), (m, n, k)
                assert close(values.grad, wanted["w"]), (m, n, k)
                if bias is not None:
                    assert close(bias.grad, wanted["bias"]), (m, n, k)


def derivative(z: Tensor, activation: str, grad: Tensor | None = None) -> Tensor:
    grad = torch.ones_like(z) if grad is None else grad
    kept = functional.relu(z) if activation == "relu" else z
    return OPS.sparse_activation_grad(grad, kept, CODES[activation])


@pytest.mark.parametrize("activation", CODES)
def test_derivative_over_the_whole_range(activation: str) -> None:
    z = torch.cat([torch.linspace(-30, 30, 60_001), torch.tensor([-3e38, -1e20, -1e-40, -0.0, 0.0, 1e-40, 1e20, 3e38])])
    wide = z.double().requires_grad_()
    EXACT[activation](wide).sum().backward()
    assert wide.grad is not None
    expected = None
    for isa in isa_levels():
        with forced(isa, "sparse_matmul"):
            got = derivative(z, activation)
        # Of terms of up to 1.1: where they cancel, near the minimum, their rounding is what is left.
        assert float((got.double() - wide.grad).abs().max()) < 3e-7
        expected = got if expected is None else expected
        assert same_bits(got, expected)


@pytest.mark.parametrize("activation", CODES)
@pytest.mark.parametrize("isa", isa_levels())
def test_not_finite(isa: str, activation: str) -> None:
    z, grad = (
        torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 1.0]),
        torch.tensor([2.0, 2, 2, torch.nan, 0]),
    )
    with forced(isa, "sparse_matmul"):
        got = derivative(z, activation, grad)
    assert got[0].isnan() or (activation == "relu" and got[0] == 2)
    assert got[1] == 2
    assert abs(got[2]) < 1e-30  # of relu 0
    assert got[3].isnan()
    assert got[4] == 0


@pytest.mark.parametrize("activation", CODES)
@pytest.mark.parametrize("isa", isa_levels())
def test_derivative_reads_nothing_outside(isa: str, activation: str) -> None:
    with forced(isa, "sparse_matmul"):
        for count in (0, 1, 7, 8, 15, 16, 17, 33, 40_000):
            z, grad = torch.randn(count), torch.randn(count)
            expected = derivative(z, activation, grad)
            for side in ("end", "begin"):
                kept = functional.relu(z) if activation == "relu" else z
                guards = [guarded(t, side) for t in (grad, kept)]  # type: ignore[arg-type]
                assert same_bits(OPS.sparse_activation_grad(*guards, CODES[activation]), expected)


@pytest.mark.parametrize("activation", CODES)
def test_strides_and_expanded_gradients(activation: str) -> None:
    grad, z = torch.randn(6, 40), torch.randn(6, 40)
    expected = derivative(z, activation, grad)
    assert same_bits(derivative(strided(z), activation, strided(grad)), expected)
    assert same_bits(derivative(z, activation, grad.t().contiguous().t()), expected)
    pack = ops.pack(sparse(19, 23), "panels128")
    x = torch.randn(2, 3, 23, requires_grad=True)
    ops.sparse_linear(x, pack, None, activation).sum().backward()
    once = x.grad
    x.grad = None
    ops.sparse_linear(x, pack, None, activation).backward(torch.ones(2, 3, 19))
    assert once is not None
    assert x.grad is not None
    assert same_bits(x.grad, once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", CODES)
def test_half_precision(activation: str, dtype: torch.dtype) -> None:
    w, bias = sparse(19, 23), torch.randn(19)
    pack, (structure, values) = ops.pack(w, "panels128"), ops.sparse_structure(w)
    x = torch.randn(5, 23).to(dtype)
    grad = torch.randn(5, 19).to(dtype)
    wanted = oracle(x, w, bias, activation, grad)
    for arguments in ({"weight": pack}, {"weight": structure, "values": values}):
        x = x.detach().requires_grad_()
        y = ops.sparse_linear(x, bias=bias, activation=activation, **arguments)
        y.backward(grad)
        assert x.grad is not None
        assert y.dtype == x.grad.dtype == dtype
        step = torch.finfo(dtype).eps * float(wanted["x"].abs().max())
        assert float((x.grad.double() - wanted["x"]).abs().max()) <= step


@pytest.mark.parametrize("activation", CODES)
def test_second_derivatives(activation: str) -> None:
    w, bias = sparse(19, 23), torch.randn(19)
    structure, values = ops.sparse_structure(w)
    x, grad = torch.randn(5, 23), torch.randn(5, 19)

    def twice(layer: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        y = layer(*leaves)
        first = torch.autograd.grad(y, leaves, grad.to(y.dtype), create_graph=True)
        second = torch.autograd.grad(sum((f**2).sum() for f in first), leaves)
        return [*first, *second]

    def dense(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        weight = torch.zeros(19, 23, dtype=x.dtype)
        weight[w != 0] = 1
        weight = torch.zeros_like(weight).masked_scatter(weight.bool(), values)
        return EXACT[activation](functional.linear(x, weight, bias))

    got = twice(lambda x, v, b: ops.sparse_linear(x, structure, b, activation, values=v), x, values, bias)
    wanted = twice(dense, x.double(), values.double(), bias.double())
    for a, b in zip(got, wanted, strict=True):
        assert close(a.detach() / 10, b.detach() / 10)
    pack = ops.pack(w, "panels128")
    got = twice(lambda x, b: ops.sparse_linear(x, pack, b, activation), x, bias)
    wanted = twice(lambda x, b: dense(x, values.double(), b), x.double(), bias.double())
    for a, b in zip(got, wanted, strict=True):
        assert close(a.detach() / 10, b.detach() / 10)


@pytest.mark.parametrize("activation", CODES)
def test_compiled(activation: str) -> None:
    structure, values = ops.sparse_structure(sparse(19, 23))
    nonzeros, bias = values.numel(), torch.randn(19)

    def layer(x: Tensor, values: Tensor) -> Tensor:
        return ops.sparse_linear(x, structure, bias, activation, 19, values)

    def run(f: Callable[..., Tensor]) -> list[Tensor]:
        x, v = torch.linspace(-2, 2, 92).view(4, 23).requires_grad_(), values.detach().clone().requires_grad_()
        y = f(x, v)
        (y * torch.arange(19)).sum().backward()
        assert x.grad is not None
        assert v.grad is not None
        return [y.detach(), x.grad, v.grad]

    torch._dynamo.reset()
    compiled = run(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert compiled[2].numel() == nonzeros
    assert all(same_bits(a, b) for a, b in zip(run(layer), compiled, strict=True))


def test_the_activation_is_no_op_of_its_own() -> None:
    """In a recorded step: the product, its gradients and sparse_activation_grad, and nothing of torch's for it."""
    layer = nn.TrainableSparseLinear.from_linear(torch.nn.Linear(64, 48), activation="gelu")
    x = torch.randn(8, 64, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "fastsparse::sparse_activation_grad" in names
    assert not [name for name in names if "gelu" in name]


@pytest.mark.parametrize("activation", CODES)
def test_opcheck(activation: str) -> None:
    code, w, bias = CODES[activation], sparse(19, 23), torch.randn(19)
    structure, values = ops.sparse_structure(w)
    x, grad = torch.randn(5, 23), torch.randn(5, 19)
    inputs = [t.clone().requires_grad_() for t in (x, values, bias)]
    opcheck(OPS.sparse_linear_train.default, (inputs[0], ops.pack(w, "panels128"), 19, inputs[2], code))
    opcheck(OPS.sparse_values_linear_train.default, (inputs[0], structure, inputs[1], 19, False, inputs[2], code))
    opcheck(OPS.sparse_activation_grad.default, (grad, torch.randn(5, 19), code))


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "grad's dtype": (
        lambda: OPS.sparse_activation_grad(torch.ones(3).double(), torch.ones(3), 1),
        "grad must be float32",
    ),
    "saved's dtype": (
        lambda: OPS.sparse_activation_grad(torch.ones(3), torch.ones(3).int(), 1),
        "saved must be float32",
    ),
    "saved's shape": (
        lambda: OPS.sparse_activation_grad(torch.ones(3), torch.ones(4), 1),
        r"saved must have the shape of grad\[3\], got saved\[4\]",
    ),
    "activation": (
        lambda: OPS.sparse_activation_grad(torch.ones(3), torch.ones(3), 0),
        "activation must be 1 .* got 0",
    ),
    "train's activation": (
        lambda: OPS.sparse_linear_train(torch.ones(3, 4), ops.pack(torch.ones(5, 4), "bitmap32"), 5, None, 4),
        "sparse_linear: activation must be 0 .* got 4",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
