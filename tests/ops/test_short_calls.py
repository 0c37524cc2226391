"""The short way of a call (csrc/direct.h): the bits of the op, and the op itself wherever something is not plain."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsparse import _C, ops

M, N, K = 5, 37, 64
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight(density: float = 0.4) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    w = torch.randn(N, K, generator=generator)
    return w * (torch.rand(N, K, generator=generator) < density)


def codes() -> Tensor:
    return (weight() * 40).clamp(-127, 127).to(torch.int8)


SCALE = torch.rand(N, generator=torch.Generator().manual_seed(1)) / 50
BIAS = torch.randn(N, generator=torch.Generator().manual_seed(2))
VNNI16 = ops.pack(codes())
GROUPS = ops.quantize_groups(weight(), 32)
U4 = ops.pack(GROUPS[0], "u4", scale=GROUPS[1], group_size=32)
BITMAP_U4 = ops.pack(GROUPS[0], "bitmap_u4", scale=GROUPS[1], group_size=32)
INT8 = ("bitmap_s8", "windows_s8", "blocks1x4", "blocks4x4")
BITMAP32, SELL8, PANELS = (ops.pack(weight(), format) for format in ("bitmap32", "sell8", "panels128"))


class Op:
    """One op: by the public function, by the short way and by the dispatcher, of x, a bias and an activation's code."""

    def __init__(self, name: str, dtypes: tuple[torch.dtype, ...], *parts: Any) -> None:
        self.name, self.dtypes, self.parts = name, dtypes, parts

    def __repr__(self) -> str:
        return self.name + "".join(f"-{ops.describe(p)['format']}" for p in self.parts if p.dtype == torch.uint8)

    def public(self, x: Tensor, bias: Tensor | None = BIAS, activation: str | None = None) -> Tensor:
        if self.name == "weight_only_linear":
            scale = self.parts[1] if len(self.parts) > 1 else None
            return ops.weight_only_linear(x, self.parts[0], bias, activation, scale)
        function: Callable[..., Tensor] = getattr(ops, self.name)
        return function(x, *self.parts, bias, activation)

    def short(self, x: Any, bias: Any = BIAS, activation: int = 0) -> Tensor | None:
        function: Callable[..., Tensor | None] = getattr(_C, self.name)
        if self.name == "weight_only_linear":
            scale = self.parts[1] if len(self.parts) > 1 else None
            return function(x, self.parts[0], scale, bias, -1, activation)
        if self.name == "sparse_linear":
            return function(x, *self.parts, bias, -1, activation)
        return function(x, *self.parts, bias, activation)

    def dispatched(self, x: Tensor, bias: Tensor | None = BIAS, activation: int = 0) -> Tensor:
        op: Any = getattr(torch.ops.fastsparse, self.name)
        if self.name == "weight_only_linear":
            scale = self.parts[1] if len(self.parts) > 1 else None
            y: Tensor = op(x, self.parts[0], scale, -1, bias, activation)
        elif self.name == "sparse_linear":
            y = op(x, *self.parts, -1, bias, activation)
        else:
            y = op(x, *self.parts, bias, activation)
        return y


OPS = [
    Op("int8_linear", FLOATS, VNNI16, SCALE),
    Op("weight_only_linear", FLOATS, VNNI16, SCALE),
    Op("weight_only_linear", FLOATS, U4),
    Op("weight_only_linear", FLOATS, BITMAP_U4),
    Op("sparse_linear", (torch.float32,), BITMAP32),
    Op("sparse_linear", (torch.float32,), SELL8),
    Op("sparse_linear", (torch.float32,), PANELS),
    *(Op("sparse_int8_linear", FLOATS, ops.pack(codes(), format), SCALE) for format in INT8),
]
each_op = pytest.mark.parametrize("op", OPS, ids=repr)


def x_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype)


@each_op
@pytest.mark.parametrize("shape", [(K,), (1, K), (M, K), (0, K), (2, 3, K), (2, 0, K), (1, 2, 1, 2, K)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu"])
def test_bits_are_those_of_the_op(op: Op, shape: tuple[int, ...], activation: str | None) -> None:
    code = [None, "relu", "gelu", "silu"].index(activation)
    for dtype in op.dtypes:
        for bias in (None, BIAS):
            x = x_of(*shape, dtype=dtype)
            y = op.short(x, bias, code)
            expected = op.dispatched(x, bias, code)
            assert y is not None
            assert (y.dtype, y.shape, y.stride()) == (expected.dtype, expected.shape, expected.stride())
            assert torch.equal(y, expected)
            assert torch.equal(op.public(x, bias, activation), expected)
            assert not y.requires_grad
            assert y.is_leaf


@each_op
def test_rows_apart_are_read_where_they_are(op: Op) -> None:
    wide = x_of(M, K + 16)
    x = wide[:, :K]
    y = op.short(x)
    assert y is not None
    assert torch.equal(y, op.dispatched(x.contiguous()))


class Subclass(Tensor):
    pass


class Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


NOT_PLAIN: dict[str, Callable[[], Any]] = {
    "columns apart": lambda: x_of(M, 2 * K)[:, ::2],
    "transposed": lambda: x_of(K, M).t(),
    "rows that overlap": lambda: x_of(1, K).expand(M, K),
    "three dimensions, not contiguous": lambda: x_of(2, M, 2 * K)[..., :K],
    "K of another": lambda: x_of(M, K + 1),
    "no dimension": lambda: torch.tensor(1.0),
    "nine dimensions": lambda: x_of(1, 1, 1, 1, 1, 1, 1, 1, K),
    "float64": lambda: x_of(M, K).double(),
    "int32": lambda: x_of(M, K).int(),
    "a gradient to record": lambda: x_of(M, K).requires_grad_(),
    "a subclass": lambda: x_of(M, K).as_subclass(Subclass),
    "lazily negated": lambda: torch._neg_view(x_of(M, K)),
    "meta": lambda: x_of(M, K).to("meta"),
    "sparse": lambda: x_of(M, K).to_sparse(),
    "no tensor": lambda: None,
    "a list": lambda: [1.0] * K,
}


@each_op
@pytest.mark.parametrize("what", NOT_PLAIN)
def test_what_is_not_plain_takes_the_way_of_the_op(op: Op, what: str) -> None:
    x = NOT_PLAIN[what]()
    assert op.short(x) is None
    if what in (
        "columns apart",
        "transposed",
        "rows that overlap",
        "three dimensions, not contiguous",
        "lazily negated",
    ):
        assert torch.equal(op.public(x), op.dispatched(x.contiguous().clone()))
    elif what == "a gradient to record":
        y = op.public(x)
        y.sum().backward()
        assert y.requires_grad
        assert x.grad is not None
        with torch.no_grad():
            plain = op.short(x)
            assert plain is not None
            assert torch.equal(plain, y.detach())


@each_op
def test_a_bias_that_wants_a_gradient(op: Op) -> None:
    x, bias = x_of(M, K), torch.nn.Parameter(BIAS.clone())
    assert op.short(x, bias) is None
    assert op.public(x, bias).requires_grad
    with torch.no_grad():
        assert op.short(x, bias) is not None
    frozen = torch.nn.Parameter(BIAS.clone(), requires_grad=False)
    assert op.short(x, frozen) is not None


@each_op
def test_wrong_arguments_get_the_errors_of_the_op(op: Op) -> None:
    x = x_of(M, K)
    for bias in (BIAS[:-1], BIAS.double(), BIAS[:, None], torch.stack([BIAS, BIAS], 1)[:, 0]):
        assert op.short(x, bias) is None
    with pytest.raises(ValueError, match=f"{op.name}: bias must have shape"):
        op.public(x, BIAS[:-1])
    with pytest.raises(ValueError, match=f"{op.name}: x must have K={K} columns"):
        op.public(x_of(M, K + 1))
    for damage in (lambda p: p[:-64], lambda p: p[:10], lambda p: p.clone().fill_(0), lambda p: p.view(1, -1)):
        damaged = Op(op.name, op.dtypes, damage(op.parts[0]), *op.parts[1:])
        assert damaged.short(x) is None
        with pytest.raises(ValueError, match=f"{op.name}: weight must be"):
            damaged.public(x)


def test_weight_scale_is_checked() -> None:
    x = x_of(M, K)
    for scale in (SCALE.clone().fill_(float("nan")), SCALE[:-1], SCALE.double(), SCALE[:, None]):
        assert _C.int8_linear(x, VNNI16, scale, None, 0) is None
    with pytest.raises(ValueError, match="weight_scale must be finite"):
        ops.int8_linear(x, VNNI16, SCALE.clone().fill_(float("inf")))
    with pytest.raises(ValueError, match="weight_scale must not require a gradient"):
        ops.int8_linear(x, VNNI16, SCALE.clone().requires_grad_())


def test_out_features_is_checked() -> None:
    x = x_of(M, K)
    assert _C.sparse_linear(x, BITMAP32, None, N + 1, 0) is None
    assert _C.sparse_linear(x, BITMAP32, None, N, 0) is not None
    assert _C.weight_only_linear(x, U4, None, None, N + 1, 0) is None
    with pytest.raises(ValueError, match="out_features must be"):
        ops.sparse_linear(x, BITMAP32, out_features=N + 1)


@each_op
def test_activation_is_checked(op: Op) -> None:
    x = x_of(M, K)
    assert op.short(x, BIAS, 4) is None
    assert op.short(x, BIAS, -1) is None
    with pytest.raises(TypeError):
        op.short(x, BIAS, "relu")  # type: ignore[arg-type]
    assert op.short(x) is not None


def test_int8_mm() -> None:
    a, b = codes(), codes().t()
    c = _C.int8_mm(a, b)
    assert c is not None
    assert torch.equal(c, torch.ops.fastsparse.int8_mm(a, b))
    assert c.dtype == torch.int32
    assert torch.equal(c, (a.long() @ b.long()).int())
    assert torch.equal(_C.int8_mm(a[:0], b), torch.empty(0, N, dtype=torch.int32))
    for wrong in (a.int(), a[:, ::2], a[0], torch._neg_view(a), None):
        assert _C.int8_mm(wrong, b) is None
    assert _C.int8_mm(a[:, :-1], b) is None
    assert torch.equal(ops.int8_mm(torch._neg_view(a), b), -c)
    with pytest.raises(ValueError, match="int8_mm: b must have K=63 rows"):
        ops.int8_mm(a[:, :-1], b)


@each_op
def test_modes_see_the_op(op: Op) -> None:
    x = x_of(M, K)
    expected = op.public(x)
    with Counts() as counts:
        assert op.short(x) is None
        assert torch.equal(op.public(x), expected)
    assert any(name.startswith(f"fastsparse::{op.name}") for name in counts.names)
    with torch.device("cpu"):  # a function mode
        assert op.short(x) is None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        op.public(x)
    assert any(event.key.startswith(f"fastsparse::{op.name}") for event in profile.key_averages())
    traced = torch.jit.trace(lambda t: op.public(t), (x,))
    assert f"fastsparse::{op.name}" in str(traced.graph)
    assert op.short(x) is not None


@each_op
def test_fake_tensors_and_transforms(op: Op) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x = x_of(M, K)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert op.short(mode.from_tensor(x)) is None
        assert op.short(x) is None
    assert op.short(mode.from_tensor(x)) is None
    seen: list[Tensor | None] = []
    torch.vmap(lambda row: seen.append(op.short(row)) or row)(x)
    torch.func.grad(lambda t: seen.append(op.short(t)) or t.sum())(x)
    assert seen == [None, None]


@each_op
def test_inference_mode(op: Op) -> None:
    x = x_of(M, K)
    expected = op.public(x)
    with torch.inference_mode():
        y = op.short(x)
        assert y is not None
        assert y.is_inference()
        assert torch.equal(y, expected)


@each_op
def test_compiled(op: Op) -> None:
    torch._dynamo.reset()
    x = x_of(M, K)
    compiled = torch.compile(lambda t: op.public(t) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), op.public(x) * 2)


@each_op
def test_the_result_is_a_tensor_like_any_other(op: Op) -> None:
    y = op.short(x_of(M, K))
    assert y is not None
    assert type(y) is Tensor
    assert y.device.type == "cpu"
    assert y.untyped_storage().resizable()
    z = y.clone().requires_grad_()
    z.sum().backward()
    assert y.resize_(2, 3).shape == (2, 3)


@each_op
def test_nothing_is_kept(op: Op) -> None:
    x, bias = x_of(256, K), BIAS.clone()
    objects = (x, bias, *op.parts)
    wrong = x_of(256, K + 1)

    def calls(count: int) -> None:
        for _ in range(count):
            op.short(x, bias)
            op.short(wrong, bias)
            op.short(None, bias)

    before = [sys.getrefcount(each) for each in objects]
    calls(2000)
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    calls(2000)  # 75 MB of results
    assert [sys.getrefcount(each) for each in objects] == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 20_000  # KB


def test_long_kernels_leave_python_to_others() -> None:
    wide = ops.pack(torch.ones(2048, 2048, dtype=torch.int8))
    x, scale = x_of(2048, 2048), torch.ones(2048)
    steps, done = 0, threading.Event()

    def work() -> None:
        _C.int8_linear(x, wide, scale, None, 0)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        steps += 1
    thread.join()
    assert steps > 1000  # with the lock held one step would last as long as the call


def test_a_wrong_number_of_arguments() -> None:
    with pytest.raises(TypeError, match="expected 5 arguments"):
        _C.int8_linear(x_of(M, K), VNNI16)
