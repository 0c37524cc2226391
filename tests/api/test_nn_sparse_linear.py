"""nn.SparseLinear: conversion, state_dict, pickling, autocast, save and load."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsparse
from fastsparse import ops
from fastsparse.nn import SparseLinear

FORMATS = ("auto", "bitmap32", "sell16", "panels128", "sell8", "sell8x32", "sell8x16", "sell4")


def pruned(k: int = 23, n: int = 19, bias: bool = True, zeros: float = 0.8) -> nn.Linear:
    linear = nn.Linear(k, n, bias)
    with torch.no_grad():
        linear.weight *= torch.rand(n, k) >= zeros
    return linear


def same(a: SparseLinear, b: SparseLinear) -> bool:
    x = torch.randn(3, a.in_features)
    return torch.equal(a.weight, b.weight) and torch.equal(a(x), b(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_from_linear_keeps_exactly_the_zeros(format: str, bias: bool) -> None:
    linear = pruned(bias=bias).eval()
    before = linear.weight.detach().clone()
    layer = SparseLinear.from_linear(linear, format, rows=1, activation="relu")
    assert torch.equal(ops.unpack(layer.weight), before)
    assert ops.describe(layer.weight)["nonzeros"] == int(before.count_nonzero())
    assert not layer.training
    x = torch.randn(2, 5, 23)
    assert torch.allclose(layer(x), linear(x).relu(), atol=1e-5)
    linear.weight.data.zero_()
    assert torch.equal(ops.unpack(layer.weight), before)


@pytest.mark.parametrize("format", ["auto", "bitmap32", "sell8", "sell8x32", "panels128"])
def test_a_bfloat16_layer_gives_the_bits_of_its_float32_twin(format: str, tmp_path: Path) -> None:
    linear = pruned().bfloat16()
    layer = SparseLinear.from_linear(linear, format, rows=1, activation="silu")
    assert ops.describe(layer.weight)["dtype"] == "bfloat16"
    assert torch.equal(ops.unpack(layer.weight), linear.weight)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    twin = SparseLinear.from_linear(copy.deepcopy(linear).float(), "bitmap32", activation="silu")
    for x in (torch.randn(3, 23), torch.randn(70, 23).bfloat16()):
        assert torch.equal(layer(x), twin(x))
    compiled = torch.compile(layer.eval().requires_grad_(False), fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    fastsparse.save(nn.Sequential(layer), tmp_path / "layer.safetensors")
    loaded = fastsparse.load(tmp_path / "layer.safetensors", nn.Sequential(nn.Linear(23, 19)))
    assert torch.equal(loaded(x), layer(x))


def test_formats_for_cuda_say_so_when_they_are_called() -> None:
    layer = SparseLinear.from_linear(pruned().half(), "bitmap32")
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    with pytest.raises(ValueError, match="got a bitmap32 of float16, which runs on CUDA only"):
        layer(torch.randn(2, 23))


def test_an_empty_layer_computes_its_bias() -> None:
    layer = SparseLinear(7, 5)
    assert torch.equal(layer(torch.randn(3, 7)), torch.zeros(3, 5))
    assert SparseLinear(0, 5)(torch.randn(3, 0)).shape == (3, 5)
    assert repr(layer) == "SparseLinear(in_features=7, out_features=5, bias=True, activation=None)"


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_round_trip_into_another_length(format: str, assign: bool) -> None:
    layer = SparseLinear.from_linear(pruned(), format)
    target = SparseLinear(23, 19)
    target.load_state_dict(layer.state_dict(), assign=assign)
    assert same(layer, target)
    with torch.device("meta"):
        empty = SparseLinear(23, 19)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert same(layer, empty)


def test_a_foreign_or_damaged_state_is_refused_and_changes_nothing() -> None:
    target = SparseLinear.from_linear(pruned())
    before = copy.deepcopy(target)
    other = SparseLinear.from_linear(pruned(k=24)).state_dict()
    with pytest.raises(RuntimeError, match=r"weight must be a pack of floats \[N=19, K=23\], got a pack"):
        target.load_state_dict(other)
    damaged = copy.deepcopy(SparseLinear.from_linear(pruned()).state_dict())
    damaged["weight"][64:72] = 255
    with pytest.raises(RuntimeError, match="damaged pack"):
        target.load_state_dict(damaged)
    int8 = {"weight": ops.pack(torch.ones(19, 23, dtype=torch.int8)), "bias": torch.zeros(19)}
    with pytest.raises(RuntimeError, match="got a pack of int8"):
        target.load_state_dict(int8)
    with pytest.raises(RuntimeError, match=r"bias must be float32 \[19\], got float64"):
        target.load_state_dict({**before.state_dict(), "bias": torch.zeros(19).double()})
    assert same(target, before)


def test_copies_pickles_and_moves_of_dtype() -> None:
    layer = SparseLinear.from_linear(pruned(), activation="gelu")
    assert same(layer, copy.deepcopy(layer))
    assert same(layer, pickle.loads(pickle.dumps(layer)))
    for moved in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).double()):
        assert moved.weight.dtype == torch.uint8
        assert moved.bias is not None
        assert moved.bias.dtype == torch.float32
        assert same(layer, moved)
    assert layer(torch.randn(2, 23).half()).dtype == torch.float16


def test_the_header_is_known_without_asking_the_device() -> None:
    # What CUDA calls go by (docs/decisions/0009); kept from loads and moves on, lost with the tensor it was read from.
    layer = SparseLinear.from_linear(pruned(), "bitmap32")
    expected = {"format": "bitmap32", "dtype": "float32", "block": 32, "n": 19}
    assert layer._header is None
    assert layer.to(torch.device("cpu"))._header == expected
    assert copy.deepcopy(layer)._header == expected
    layer.load_state_dict(SparseLinear.from_linear(pruned(), "sell16").state_dict())
    assert layer._header == {"format": "sell16", "dtype": "float32", "block": 16, "n": 19}
    for assign in (True, False):
        layer.load_state_dict(SparseLinear.from_linear(pruned(zeros=0.3), "bitmap32").state_dict(), assign=assign)
        assert layer._header == expected
    layer.weight = ops.pack(torch.randn(19, 23), "panels128")
    assert layer._header is None
    with torch.device("meta"):
        empty = SparseLinear(23, 19)
    assert empty.to(torch.device("meta"))._header is None
    assert empty.to_empty(device="cpu")._header is None


def test_autocast_gives_its_dtype() -> None:
    layer, x = SparseLinear.from_linear(pruned()), torch.randn(3, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))
        assert layer(x).dtype == torch.bfloat16


def test_gradients_reach_x_and_bias() -> None:
    linear = pruned()
    layer = SparseLinear.from_linear(linear)
    grads: list[list[Tensor]] = []
    for module in (linear, layer):
        x = torch.ones(4, 23, requires_grad=True)
        module(x).square().sum().backward()
        assert x.grad is not None
        assert module.bias is not None
        assert module.bias.grad is not None
        grads.append([x.grad, module.bias.grad])
    for got, wanted in zip(grads[1], grads[0], strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)


def test_compile_fullgraph() -> None:
    layer, x = SparseLinear.from_linear(pruned(bias=False)), torch.randn(3, 23)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("format", FORMATS)
def test_save_and_load(format: str, tmp_path: Path) -> None:
    dense = nn.Sequential(pruned(), nn.ReLU(), pruned(19, 7))
    model = nn.Sequential(
        SparseLinear.from_linear(dense[0], format), nn.ReLU(), SparseLinear.from_linear(dense[2], format)
    )  # type: ignore[arg-type]
    path = tmp_path / "model.safetensors"
    fastsparse.save(model, path)
    x = torch.randn(3, 23)
    # Into the dense architecture, into a converted model of other lengths, and into itself.
    for target in (
        nn.Sequential(nn.Linear(23, 19), nn.ReLU(), nn.Linear(19, 7)),
        nn.Sequential(SparseLinear(23, 19), nn.ReLU(), SparseLinear(19, 7)),
        copy.deepcopy(model),
    ):
        assert torch.equal(fastsparse.load(path, target)(x), model(x))
    tensors = fastsparse.load(path)
    assert torch.equal(ops.unpack(tensors["0.weight"]), dense[0].weight)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    fastsparse.save(nn.Sequential(SparseLinear.from_linear(pruned())), path)
    data = bytearray(path.read_bytes())
    at = data.index(b"fspk")
    data[at + 64] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged pack"):
        fastsparse.load(path)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Linear, got ReLU"):
        SparseLinear.from_linear(nn.ReLU())  # type: ignore[arg-type]
    for change, message in (
        (lambda: SparseLinear.from_linear(nn.Linear(2, 3).double()), "float32, bfloat16 or float16, got float64"),
        (lambda: SparseLinear.from_linear(nn.Linear(2, 3, device="meta")), "linear must be on the CPU, got meta"),
        (lambda: SparseLinear.from_linear(nn.LazyLinear(3)), "a lazy layer"),
        (lambda: SparseLinear.from_linear(nn.Linear(2, 3), "vnni16"), "from_linear: pack: format must be 'auto'"),
        (lambda: SparseLinear.from_linear(nn.Linear(2, 3), activation="tanh"), "activation must be None"),
        (lambda: SparseLinear(-1, 2), "in_features must be an int from 0"),
        (lambda: SparseLinear(1, 2, activation="tanh"), "activation must be None"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
