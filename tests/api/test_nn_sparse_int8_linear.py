"""nn.SparseInt8Linear: Int8Linear to the bit, exact zeros, state_dict, files, copies, gradients, compile."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsparse
from fastsparse import ops
from fastsparse.nn import Int8Linear, SparseInt8Linear, SparseLinear, WeightOnlyLinear
from fastsparse.ops.sparse_int8 import windows_are_fast

FORMATS = ("bitmap_s8", "windows_s8", "blocks1x4", "blocks4x4")


def pruned(k: int = 23, n: int = 19, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(k, n, bias=bias)
    linear.weight.data *= torch.rand(n, k) < 0.1
    return linear


def same(a: SparseInt8Linear, b: SparseInt8Linear) -> bool:
    x = torch.randn(3, a.in_features)
    return torch.equal(a.weight, b.weight) and torch.equal(a(x), b(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_from_linear_keeps_the_zeros_and_is_int8_linear(format: str, bias: bool) -> None:
    linear = pruned(bias=bias).eval()
    layer = SparseInt8Linear.from_linear(linear, format, activation="relu")
    dense = Int8Linear.from_linear(linear, "relu")
    assert ops.describe(layer.weight)["format"] == format
    assert torch.equal(ops.unpack(layer.weight), ops.unpack(dense.weight))
    assert (ops.unpack(layer.weight)[linear.weight == 0] == 0).all()
    assert not layer.training
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 5, 23).to(dtype)
        assert torch.equal(layer(x), dense(x))
    before = layer.weight.clone()
    linear.weight.data.zero_()
    assert torch.equal(layer.weight, before)


def test_auto_follows_the_rows() -> None:
    few, many = ("windows_s8", "windows_s8") if windows_are_fast() else ("bitmap_s8", "blocks1x4")
    for rows, format in ((1, few), (64, many), (None, many)):
        layer = SparseInt8Linear.from_linear(pruned(256, 256), rows=rows)
        assert ops.describe(layer.weight)["format"] == format


def test_an_empty_layer_computes_its_bias() -> None:
    assert torch.equal(SparseInt8Linear(7, 5)(torch.randn(3, 7)), torch.zeros(3, 5))
    assert SparseInt8Linear(0, 5)(torch.randn(3, 0)).shape == (3, 5)
    assert repr(SparseInt8Linear(7, 5)) == "SparseInt8Linear(in_features=7, out_features=5, bias=True, activation=None)"


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_round_trip_into_another_length(format: str, assign: bool) -> None:
    layer = SparseInt8Linear.from_linear(pruned(), format)
    target = SparseInt8Linear(23, 19)
    target.load_state_dict(layer.state_dict(), assign=assign)
    assert same(layer, target)
    with torch.device("meta"):
        empty = SparseInt8Linear(23, 19)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert same(layer, empty)


def test_a_foreign_or_damaged_state_is_refused_and_changes_nothing() -> None:
    target = SparseInt8Linear.from_linear(pruned())
    before = copy.deepcopy(target)
    state = before.state_dict()
    damaged = state["weight"].clone()
    damaged[-1] ^= 1
    for change, message in (
        ({"weight": SparseInt8Linear.from_linear(pruned(k=24)).weight}, r"got blocks1x4 of \[N=19, K=24\]"),
        ({"weight": damaged}, "damaged pack"),
        ({"weight": ops.pack(torch.ones(19, 23, dtype=torch.int8))}, "got vnni16 of"),
        ({"weight": SparseLinear.from_linear(pruned()).weight}, "got panels128 of"),
        ({"weight_scale": torch.ones(18)}, r"weight_scale must be float32 \[19\], got float32 \[18\]"),
        ({"weight_scale": torch.full((19,), float("nan"))}, "weight_scale must be finite"),
        ({"bias": torch.zeros(19).double()}, r"bias must be float32 \[19\], got float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict({**state, **change})
        assert same(target, before)


def test_the_dense_layers_refuse_a_sparse_pack() -> None:
    pack = SparseInt8Linear.from_linear(pruned()).weight
    for layer in (Int8Linear.from_linear(pruned()), WeightOnlyLinear.from_linear(pruned(), bits=8)):
        with pytest.raises(RuntimeError, match=r"blocks1x4"):
            layer.load_state_dict({**layer.state_dict(), "weight": pack})


def test_copies_pickles_moves_of_dtype_and_autocast() -> None:
    layer = SparseInt8Linear.from_linear(pruned(), activation="gelu")
    assert same(layer, copy.deepcopy(layer))
    assert same(layer, pickle.loads(pickle.dumps(layer)))
    for moved in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).double()):
        assert (moved.weight.dtype, moved.weight_scale.dtype) == (torch.uint8, torch.float32)
        assert same(layer, moved)
    x = torch.randn(3, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))


def test_gradients_reach_x_and_bias_as_those_of_int8_linear() -> None:
    linear = pruned()
    grads: list[list[Tensor | None]] = []
    for module in (Int8Linear.from_linear(linear), SparseInt8Linear.from_linear(linear)):
        x = torch.linspace(-1, 1, 92).reshape(4, 23).requires_grad_()
        module(x).square().sum().backward()
        assert module.bias is not None
        grads.append([x.grad, module.bias.grad])
    for got, wanted in zip(grads[1], grads[0], strict=True):
        assert got is not None
        assert wanted is not None
        assert torch.equal(got, wanted)


def test_compile_fullgraph() -> None:
    layer, x = SparseInt8Linear.from_linear(pruned(bias=False)), torch.randn(3, 23)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("format", FORMATS)
def test_save_and_load(format: str, tmp_path: Path) -> None:
    dense = [pruned(), pruned(19, 7)]
    model = nn.Sequential(
        SparseInt8Linear.from_linear(dense[0], format), nn.ReLU(), SparseInt8Linear.from_linear(dense[1], format)
    )
    path = tmp_path / "model.safetensors"
    fastsparse.save(model, path)
    x = torch.randn(3, 23)
    # Into the dense architecture, into a converted model of other lengths, and into itself.
    for target in (
        nn.Sequential(nn.Linear(23, 19), nn.ReLU(), nn.Linear(19, 7)),
        nn.Sequential(SparseInt8Linear(23, 19), nn.ReLU(), SparseInt8Linear(19, 7)),
        copy.deepcopy(model),
    ):
        assert torch.equal(fastsparse.load(path, target)(x), model(x))
    data = bytearray(path.read_bytes())
    data[data.index(b"fspk") + 64] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged pack"):
        fastsparse.load(path)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, got ReLU"):
        SparseInt8Linear.from_linear(nn.ReLU())  # type: ignore[arg-type]
    broken = pruned()
    broken.weight.data[3, 4] = float("inf")
    for change, message in (
        (lambda: SparseInt8Linear.from_linear(nn.Linear(2, 3).double()), "must be float32, .* got float64"),
        (lambda: SparseInt8Linear.from_linear(nn.Linear(2, 3, device="meta")), "linear must be on the CPU, got meta"),
        (lambda: SparseInt8Linear.from_linear(nn.Linear(2, 3), "panels128"), "format must be 'auto' or .* 'panels128'"),
        (lambda: SparseInt8Linear.from_linear(nn.Linear(2, 3), rows=-1), "from_linear: pack: rows must be None"),
        (lambda: SparseInt8Linear.from_linear(nn.Linear(2, 3), activation="tanh"), "activation must be None"),
        (lambda: SparseInt8Linear.from_linear(broken), "linear.weight can't be quantized: .* NaN or an infinity"),
        (lambda: SparseInt8Linear.from_linear(nn.Linear(131072, 1)), "at most 131071 in_features"),
        (lambda: SparseInt8Linear(-1, 2), "in_features must be an int from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
