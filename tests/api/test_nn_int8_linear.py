"""nn.Int8Linear: its values against the oracle, and everything that modules go through in the life of a model."""

from __future__ import annotations

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn

import fastsparse
from fastsparse import ops, reference
from fastsparse.nn import Int8Linear
from fastsparse.nn.int8_linear import quantize_weight

ACTIVATIONS = [None, "relu", "gelu", "silu"]
HALVES = [torch.bfloat16, torch.float16]
# Of the float32 epilogue against float64, and of one rounding to the output's dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def layers(n=37, k=101, bias=True, activation=None, seed=0):
    torch.manual_seed(seed)
    dense = nn.Linear(k, n, bias=bias)
    return dense, Int8Linear.from_linear(dense, activation)


def oracle(module, x):
    weight = ops.unpack(module.weight)
    return reference.int8_linear(x, weight, module.weight_scale, module.bias, module.activation)


def tensors(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module, before):
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def copied_by(how, module):
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---- values ----


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_oracle(bias, activation, dtype):
    _, module = layers(bias=bias, activation=activation)
    x = torch.randn(2, 5, 101).to(dtype)
    with torch.no_grad():
        got = module(x)
    expected = oracle(module, x)
    assert got.shape == (2, 5, 37)
    assert got.dtype == dtype
    scale = expected.abs().max()
    assert (got.double() - expected).abs().max() <= TOLERANCE[dtype] * scale


def test_forward_is_close_to_the_dense_layer():
    dense, module = layers(256, 512)
    x = torch.randn(64, 512)
    error = (module(x) - dense(x)).norm() / dense(x).norm()
    assert error < 0.02


@pytest.mark.filterwarnings("ignore:Initializing zero-element:UserWarning")
@pytest.mark.parametrize(("n", "k"), [(0, 5), (5, 0), (0, 0), (1, 1), (16, 4), (17, 5)])
def test_odd_shapes(n, k):
    weight, bias = torch.randn(n, k), torch.randn(n)
    dense = nn.utils.skip_init(nn.Linear, k, n)
    dense.weight, dense.bias = nn.Parameter(weight), nn.Parameter(bias)
    module = Int8Linear.from_linear(dense)
    for x in (torch.randn(k), torch.randn(3, k), torch.randn(0, k), torch.randn(2, 0, 3, k)):
        got = module(x)
        assert got.shape == (*x.shape[:-1], n)
        torch.testing.assert_close(got.double(), oracle(module, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(9, 33, generator=torch.Generator().manual_seed(1)),
        torch.randn(9, 33, generator=torch.Generator().manual_seed(2)) * 1e-4,
        torch.zeros(4, 8),
        torch.full((3, 5), torch.finfo(torch.float16).max),
        torch.tensor([[1e-45, -1e-45], [1e-38, 2e-38], [0.0, 3.0]]),
        torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -2.5]]),
    ],
    ids=["random", "small", "zeros", "largest", "subnormal", "halfway"],
)
def test_quantize_weight_is_the_oracle(weight, dtype):
    weight = weight.to(dtype)
    codes, scale = quantize_weight(weight)
    expected_codes, expected_scale = reference.quantize_weight(weight)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scale, expected_scale)
    assert codes[weight == 0].count_nonzero() == 0


def test_quantize_weight_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match=r"weight must be finite.* in 1 of its rows"):
        quantize_weight(torch.tensor([[1.0, float("inf")], [0.0, 1.0]]))


def test_rows_that_are_not_finite_give_nan_and_only_they():
    _, module = layers()
    x = torch.randn(3, 101)
    x[1, 7] = float("inf")
    got = module(x)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


# ---- from_linear ----


def test_from_linear_copies():
    dense, module = layers()
    before, state = module(torch.ones(101)), tensors(module)
    with torch.no_grad():
        dense.weight.zero_()
        dense.bias.zero_()
    assert unchanged(module, state)
    assert torch.equal(module(torch.ones(101)), before)


def test_from_linear_keeps_mode_and_gradient_flags():
    dense = nn.Linear(8, 4)
    assert Int8Linear.from_linear(dense).training
    assert Int8Linear.from_linear(dense).bias.requires_grad
    dense.eval().requires_grad_(False)
    module = Int8Linear.from_linear(dense)
    assert not module.training
    assert not module.bias.requires_grad


@pytest.mark.parametrize("dtype", HALVES)
def test_from_half_precision_linear(dtype):
    dense = nn.Linear(64, 32).to(dtype)
    module = Int8Linear.from_linear(dense)
    assert module.weight_scale.dtype == module.bias.dtype == torch.float32
    assert torch.equal(module.bias.detach(), dense.bias.detach().float())
    assert torch.equal(module.weight, Int8Linear.from_linear(dense.float()).weight)
    assert module(torch.randn(3, 64, dtype=dtype)).dtype == dtype


def test_from_parametrized_linear():
    class Half(nn.Module):
        def forward(self, weight):
            return weight * (torch.arange(weight.shape[1]) % 2)

    dense = nn.Linear(8, 4)
    nn.utils.parametrize.register_parametrization(dense, "weight", Half())
    codes = ops.unpack(Int8Linear.from_linear(dense).weight)
    assert codes[:, ::2].count_nonzero() == 0
    assert codes[:, 1::2].count_nonzero() > 0


def weight_of(value):
    dense = nn.Linear(4, 3)
    with torch.no_grad():
        dense.weight[1, 2] = value
    return dense


@pytest.mark.parametrize(
    ("linear", "error", "message"),
    [
        (nn.Conv2d(1, 1, 1), TypeError, r"linear must be a torch\.nn\.Linear, got Conv2d"),
        (None, TypeError, r"linear must be a torch\.nn\.Linear, got NoneType"),
        (weight_of(float("nan")), ValueError, r"linear\.weight .*must be finite, got a NaN or an infinity in 1 of"),
        (weight_of(-float("inf")), ValueError, r"linear\.weight .*must be finite, got a NaN or an infinity in 1 of"),
        (nn.Linear(131072, 1), ValueError, r"at most 131071 in_features .* got 131072"),
        (nn.Linear(4, 3, device="meta"), ValueError, r"linear must be on the CPU, got meta"),
        (nn.Linear(4, 3).double(), ValueError, r"float32, bfloat16 or float16, got float64"),
        (nn.LazyLinear(3), ValueError, r"no weights yet"),
    ],
    ids=["conv", "none", "nan", "inf", "k", "device", "float64", "lazy"],
)
@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_from_linear_refuses(linear, error, message):
    with pytest.raises(error, match=rf"^Int8Linear\.from_linear: .*{message}"):
        Int8Linear.from_linear(linear)


def test_the_largest_k_is_exact():
    dense = nn.Linear(131071, 1, bias=False)
    nn.init.constant_(dense.weight, 1.0)
    module = Int8Linear.from_linear(dense)
    assert module(torch.full((1, 131071), -1.0)).item() == pytest.approx(-131071, rel=1e-6)


@pytest.mark.parametrize("activation", ["tanh", "", 3, ["relu"], nn.ReLU()])
def test_unknown_activation(activation):
    with pytest.raises(ValueError, match=r"^Int8Linear\.from_linear: activation must be None, 'relu', 'gelu' or"):
        Int8Linear.from_linear(nn.Linear(4, 3), activation)
    with pytest.raises(ValueError, match=r"^Int8Linear: activation must be None, 'relu', 'gelu' or 'silu', got "):
        Int8Linear(4, 3, activation=activation)


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (131072, 3), (4, -1), (4, 2**31), (4.0, 3), (4, True), ("4", 3)])
def test_constructor_refuses_sizes(k, n):
    with pytest.raises(ValueError, match=r"^Int8Linear: (in|out)_features must be an int from 0 to \d+ .*, got "):
        Int8Linear(k, n)


@pytest.mark.parametrize(
    "bad", [torch.randn(2, 100), torch.randn(2, 101).double(), torch.ones(2, 101, dtype=torch.int32)]
)
def test_forward_refuses_other_inputs(bad):
    _, module = layers()
    with pytest.raises(ValueError, match=r"^int8_linear: "):
        module(bad)
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"^int8_linear: "):
        module(bad)


# ---- autograd ----


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_dequantized_weight(activation):
    _, module = layers(activation=activation)
    x = torch.randn(6, 101, requires_grad=True)
    upstream = torch.randn(6, 37)
    module(x).backward(upstream)

    weight = ops.unpack(module.weight).float() * module.weight_scale[:, None]
    with torch.no_grad():  # where the activation is evaluated: at the quantized sums
        pre = reference.int8_linear(x, ops.unpack(module.weight), module.weight_scale, module.bias)
    pre = pre.float().requires_grad_()
    act = {None: lambda y: y, "relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}[activation]
    act(pre).backward(upstream)
    torch.testing.assert_close(x.grad, pre.grad @ weight, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(module.bias.grad, pre.grad.sum(0), atol=1e-5, rtol=1e-4)


def test_grad_mode_does_not_change_the_values():
    _, module = layers()
    x = torch.randn(6, 101)
    with torch.no_grad():
        plain = module(x)
    assert torch.equal(module(x.requires_grad_()).detach(), plain)
    assert not plain.requires_grad
    module.eval()
    assert torch.equal(module(x).detach(), plain)


# ---- autocast and compile ----


@pytest.mark.parametrize("autocast_dtype", HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_autocast_casts_as_linear_does(dtype, autocast_dtype):
    dense, module = layers()
    x = torch.randn(3, 101).to(dtype)
    with torch.autocast("cpu", dtype=autocast_dtype):
        got, expected = module(x), dense(x)
    assert got.dtype == expected.dtype == autocast_dtype
    assert torch.equal(got, module(x.to(autocast_dtype)))
    with torch.autocast("cpu", dtype=autocast_dtype), torch.autocast("cpu", enabled=False):
        assert module(x).dtype == dtype


def test_autocast_gradients():
    _, module = layers()
    x = torch.randn(3, 101, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    y.float().sum().backward()
    assert x.grad.dtype == module.bias.grad.dtype == torch.float32
    assert torch.equal(module.bias.grad, torch.full((37,), 3.0))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_compile_forward_and_backward(autocast, dynamic):
    torch._dynamo.reset()
    _, module = layers(activation="gelu")
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for f in (module, compiled):
        torch.manual_seed(1)
        x = torch.randn(5, 101, requires_grad=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = f(x)
        y.float().square().sum().backward()
        results.append((y.detach(), x.grad, f.bias.grad))
    assert results[1][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_compile_with_autocast_inside_the_graph():
    torch._dynamo.reset()
    _, module = layers()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        return y, module(x)

    x = torch.randn(5, 101)
    half, full = f(x)
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(half, module(x.bfloat16()))
    assert torch.equal(full, module(x))


def test_compile_with_inductor():
    torch._dynamo.reset()
    # Layers alone: inductor has to plan the buffers round them, but no C++ to compile, which takes it many seconds.
    model = nn.Sequential(layers(activation="relu")[1], layers(64, 37, bias=False)[1])
    x = torch.randn(5, 101)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(x), model(x))


# ---- conversions ----


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
        (lambda m: m.type(torch.bfloat16), torch.bfloat16),
        (lambda m: m.double(), torch.float32),
        (lambda m: m.float(), torch.float32),
    ],
    ids=["half", "bfloat16", "to_dtype", "to_device_dtype", "type", "double", "float"],
)
def test_conversions_leave_the_layer_as_it_is(convert, dtype):
    dense, module = layers()
    model = nn.Sequential(module, dense)
    before = tensors(module)
    module(torch.randn(2, 101)).sum().backward()
    convert(model)
    assert unchanged(module, before)
    assert module.weight.dtype == torch.uint8
    assert module.weight_scale.dtype == module.bias.dtype == module.bias.grad.dtype == torch.float32
    assert module(torch.randn(2, 101).to(dtype)).dtype == dtype


def test_to_meta_and_back():
    _, module = layers()
    state = tensors(module)
    module.to("meta", torch.float16)
    assert all(value.is_meta for value in module.state_dict().values())
    assert module.weight_scale.dtype == torch.float32
    module.to_empty(device="cpu").load_state_dict(state)
    assert unchanged(module, state)


def test_share_memory():
    _, module = layers()
    module.share_memory()
    assert module.weight.is_shared()


# ---- copies and state_dict ----


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("bias", [True, False])
def test_copies(how, bias):
    _, module = layers(bias=bias, activation="silu")
    other = copied_by(how, module)
    x = torch.randn(3, 101)
    assert torch.equal(other(x), module(x))
    assert repr(other) == repr(module)
    state = tensors(module)
    other.weight.zero_()
    other.weight_scale.zero_()
    assert unchanged(module, state)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip(bias, assign, tmp_path):
    _, module = layers(bias=bias)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert list(state) == (["bias"] if bias else []) + ["weight", "weight_scale"]
    fresh = Int8Linear(101, 37, bias=bias)
    fresh.load_state_dict(state, assign=assign)
    x = torch.randn(3, 101)
    assert torch.equal(fresh(x), module(x))
    assert not bias or isinstance(fresh.bias, nn.Parameter)


def test_an_empty_layer_computes_zeros():
    module = Int8Linear(101, 37)
    assert ops.describe(module.weight)["nonzeros"] == 0
    assert torch.equal(module(torch.randn(2, 101)), torch.zeros(2, 37))
    assert (module.in_features, module.out_features, module.activation) == (101, 37, None)
    assert Int8Linear(101, 37, bias=False).bias is None


def test_an_empty_layer_on_meta_is_filled_by_assignment():
    _, module = layers()
    with torch.device("meta"):
        fresh = nn.Sequential(Int8Linear(101, 37))
    assert fresh[0].weight.is_meta
    fresh.load_state_dict({f"0.{name}": value for name, value in module.state_dict().items()}, assign=True)
    x = torch.randn(3, 101)
    assert torch.equal(fresh(x), module(x))


def damaged(pack, at, value):
    pack = pack.clone()
    pack[at] = value
    return pack


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("weight", lambda t: damaged(t, 0, 0), r"be a pack of \[N=37, K=101\]: .*must begin with b'fspk'"),
        ("weight", lambda t: damaged(t, 4, 99), r"format 99"),
        ("weight", lambda t: damaged(t, 6, 2), r"version 2"),
        ("weight", lambda t: t[:-64], r"must have \d+ bytes"),
        ("weight", lambda t: t[:10], r"at least its header"),
        ("weight", lambda t: t.view(torch.int8), r"must be a uint8 vector"),
        ("weight", lambda t: torch.zeros(37, 101), r"must be a uint8 vector .* got torch\.float32 \[37, 101\]"),
        ("weight", lambda t: "text", r"must be a uint8 vector .* got str"),
        # 37 rows and 38 take the same number of bytes, so that torch's own check of shapes would pass it
        ("weight", lambda t: ops.pack(torch.ones(38, 101, dtype=torch.int8)), r"got a pack of \[N=38, K=101\]"),
        ("weight", lambda t: torch.zeros(5, dtype=torch.uint8, device="meta"), r"got uint8 \[5\]"),
        ("weight_scale", lambda t: damaged(t, 3, float("nan")), r"be finite"),
        ("weight_scale", lambda t: damaged(t, 3, float("inf")), r"be finite"),
        ("weight_scale", lambda t: t[:-1], r"be float32 \[37\], got float32 \[36\]"),
        ("weight_scale", lambda t: t.half(), r"be float32 \[37\], got float16 \[37\]"),
        ("bias", lambda t: t[None], r"be float32 \[37\], got float32 \[1, 37\]"),
        ("bias", lambda t: t.double(), r"be float32 \[37\], got float64 \[37\]"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_refuses(name, damage, message, strict):
    model = nn.ModuleDict({"encoder": nn.Sequential(layers(seed=1)[1])})
    before = tensors(model)
    state = {f"encoder.0.{key}": value for key, value in layers(seed=2)[1].state_dict().items()}
    state[f"encoder.0.{name}"] = damage(state[f"encoder.0.{name}"])
    with pytest.raises(RuntimeError, match=rf"Int8Linear: encoder\.0\.{name} must .*{message}"):
        model.load_state_dict(state, strict=strict)
    assert unchanged(model, before)


def test_load_state_dict_names_missing_and_unexpected():
    _, module = layers()
    state = tensors(module)
    del state["weight_scale"]
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        module.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        Int8Linear(101, 37, bias=False).load_state_dict(tensors(module))


def test_repr():
    _, module = layers(activation="gelu")
    assert repr(module) == "Int8Linear(in_features=101, out_features=37, bias=True, activation='gelu')"


# ---- static: one scale and zero point for x, for y ----

STATIC = [
    {"x_scale": 0.031},
    {"x_scale": 0.031, "x_zero_point": -7},
    {"y_scale": 0.02, "y_zero_point": 100},
    {"x_scale": 0.031, "x_zero_point": 3, "y_scale": 0.5},
]


def static_layer(values, activation="gelu"):
    torch.manual_seed(0)
    return Int8Linear.from_linear(nn.Linear(101, 37), activation, **values)


@pytest.mark.parametrize("values", STATIC)
def test_static_is_the_op_with_these_values(values):
    module, x, residual = static_layer(values), torch.randn(5, 101), torch.randn(5, 37)
    for more in ({}, {"residual": residual}):
        with torch.no_grad():
            wanted = ops.int8_linear(
                x, module.weight, module.weight_scale, module.bias, module.activation, **values, **more
            )
            assert torch.equal(module(x, **more), wanted)
        assert wanted.dtype == (torch.int8 if "y_scale" in values else torch.float32)
    assert module(x).requires_grad == ("y_scale" not in values)
    if "x_scale" in values:
        zero_point = torch.tensor(values.get("x_zero_point", 0), dtype=torch.int32)
        assert torch.equal(module(ops.quantize(x, torch.tensor(values["x_scale"]), zero_point)), module(x))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict", "fastsparse", "assign"])
@pytest.mark.parametrize("values", STATIC)
def test_static_values_go_where_the_layer_goes(values, how, tmp_path):
    module, x = static_layer(values), torch.randn(5, 101)
    names = [
        name for side in ("x", "y") if f"{side}_scale" in values for name in (f"{side}_scale", f"{side}_zero_point")
    ]
    assert [name for name in module.state_dict() if name.startswith(("x_", "y_"))] == names
    if how in ("state_dict", "assign"):
        with torch.device("meta" if how == "assign" else "cpu"):
            other = Int8Linear(**module.config())
        other.load_state_dict(module.state_dict(), assign=how == "assign")
    elif how == "fastsparse":
        fastsparse.save(nn.Sequential(module), tmp_path / "model.safetensors")
        (other,) = fastsparse.load(tmp_path / "model.safetensors", nn.Sequential(nn.Linear(101, 37)))
        # Into a layer that has other values of its own, too.
        again = nn.Sequential(static_layer({name: 1.5 for name in values if name.endswith("scale")}))
        fastsparse.load(tmp_path / "model.safetensors", again)
        assert torch.equal(again(x), module(x))
    else:
        other = copied_by(how, module)
    assert torch.equal(other(x), module(x))
    assert other.config() == module.config()
    for name in names:
        assert getattr(other, name).dtype == getattr(module, name).dtype
        assert getattr(other, name) == pytest.approx(values.get(name, 0))
        assert getattr(other, name) is not getattr(module, name)


def test_static_values_keep_their_dtype_and_stay_on_the_cpu():
    module = static_layer(STATIC[3])
    x = torch.randn(5, 101)
    wanted = module(x)
    assert torch.equal(module.half()(x), wanted)
    moved = copy.deepcopy(module).to("meta")
    assert moved.weight.is_meta
    assert moved.x_scale == module.x_scale
    assert module.to_empty(device="cpu").y_scale == 0.5


def test_dynamic_layers_have_no_static_state():
    module = static_layer({})
    assert list(module.state_dict()) == ["bias", "weight", "weight_scale"]
    assert list(module.config()) == ["in_features", "out_features", "bias", "activation"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*x_scale"):
        module.load_state_dict(static_layer(STATIC[0]).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*y_scale"):
        static_layer(STATIC[3]).load_state_dict(static_layer(STATIC[0]).state_dict())


def chain():
    """Three layers that hand on int8, and their scales and zero points from x to the last layer's x."""
    torch.manual_seed(3)
    codes = [(0.03, -5), (0.011, -128), (0.02, 9), (None, None)]
    layers = []
    for (k, n, activation), (xs, xz), (ys, yz) in zip(
        [(40, 96, "relu"), (96, 67, "gelu"), (67, 10, None)], codes, codes[1:], strict=False
    ):
        layers.append(Int8Linear.from_linear(nn.Linear(k, n), activation, xs, xz, ys, yz))
    return nn.Sequential(*layers), codes


@pytest.mark.parametrize("rows", [1, 3, 17, 200])
def test_a_chain_is_its_layers_with_fake_quantization_between(rows):
    model, codes = chain()
    between = []
    for layer in model:
        layer.register_forward_pre_hook(lambda _, args: between.append(args[0].dtype))
    x = torch.randn(2, rows, 40)
    for given in (x, x.bfloat16(), ops.quantize(x, torch.tensor(0.03), torch.tensor(-5, dtype=torch.int32))):
        between.clear()
        with torch.no_grad():
            got = model(given)
        assert between == [given.dtype, torch.int8, torch.int8]
        assert got.dtype == torch.float32
        y = given
        for layer, (scale, zero_point) in zip(model, codes[1:], strict=False):
            y = ops.int8_linear(
                y, layer.weight, layer.weight_scale, layer.bias, layer.activation, layer.x_scale, layer.x_zero_point,
                dtype=torch.float32,
            ).detach()  # fmt: skip
            if scale is not None:
                y = ops.fake_quantize(y, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))
        assert torch.equal(got, y)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_a_chain_compiles(backend):
    torch._dynamo.reset()
    model, _ = chain()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for x in (torch.randn(6, 40), torch.randint(-128, 128, (6, 40), dtype=torch.int8)):
        with torch.no_grad():
            assert torch.equal(compiled(x), model(x))
    compiled(torch.randn(6, 40)).sum().backward()
    wanted = copy.deepcopy(model)
    wanted(torch.randn(6, 40)).sum().backward()
    assert torch.equal(model[2].bias.grad, wanted[2].bias.grad)


def test_a_chain_under_autocast():
    model, _ = chain()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(3, 40)).dtype == torch.bfloat16
        assert model[0](torch.randn(3, 40), torch.randn(3, 96)).dtype == torch.int8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x_zero_point": 3}, "x_zero_point needs x_scale, got 3"),
        ({"y_zero_point": 3}, "y_zero_point needs y_scale, got 3"),
        ({"x_scale": 0.0}, "x_scale must be a finite float, at least 1.2e-38, got 0.0"),
        ({"x_scale": float("nan")}, "x_scale must be a finite float, at least 1.2e-38, got nan"),
        ({"y_scale": float("inf")}, "y_scale must be a finite float, at least 1.2e-38, got inf"),
        ({"y_scale": "1"}, "y_scale must be a finite float, at least 1.2e-38, got '1'"),
        ({"x_scale": 1.0, "x_zero_point": 128}, "x_zero_point must be an int in [-128, 127], got 128"),
        ({"y_scale": 1.0, "y_zero_point": 1.0}, "y_zero_point must be an int in [-128, 127], got 1.0"),
    ],
)
def test_bad_static_values(values, message):
    with pytest.raises(ValueError, match=re.escape("Int8Linear.from_linear: " + message)):
        static_layer(values)


def test_bad_static_state_is_refused():
    with pytest.raises(ValueError, match="at most 65793 in_features beside an x_zero_point"):
        Int8Linear.from_linear(nn.Linear(65794, 1), None, 0.1, 1)
    with pytest.raises(ValueError, match="static_x must be True or False, got 1"):
        Int8Linear(2, 2, static_x=1)
    module = static_layer(STATIC[3])
    before = tensors(module)
    for name, value, message in [
        ("x_scale", torch.tensor(0.0), "x_scale must be finite and at least 1.2e-38, got 0.0"),
        ("y_scale", torch.tensor(float("nan")), "y_scale must be finite and at least 1.2e-38, got nan"),
        ("y_scale", torch.ones(1), "y_scale must be float32 [] with a value, got float32 [1]"),
        ("y_scale", torch.ones((), dtype=torch.float64), "y_scale must be float32 [] with a value, got float64 []"),
        ("x_zero_point", torch.tensor(128, dtype=torch.int32), "x_zero_point must be in [-128, 127], got 128"),
        ("x_zero_point", torch.tensor(1), "x_zero_point must be int32 [] with a value, got int64 []"),
    ]:
        with pytest.raises(RuntimeError, match=re.escape(message)):
            module.load_state_dict(module.state_dict() | {name: value})
        assert unchanged(module, before)
