"""nn.WeightOnlyLinear: conversion, state_dict, pickling, autocast, save and load, quantize_."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsparse
from fastsparse import ops
from fastsparse.nn import Int8Linear, WeightOnlyLinear
from fastsparse.quantize import Int4WeightOnly, Int8WeightOnly, quantize_

KINDS: list[dict[str, Any]] = [
    {"bits": 8},
    {"bits": 4},
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 128, "symmetric": False},
    {"bits": 4, "group_size": 128, "sparse": True},
]


def same(a: WeightOnlyLinear, b: WeightOnlyLinear) -> bool:
    x = torch.randn(3, a.in_features)
    return a.config() == b.config() and torch.equal(a.weight, b.weight) and torch.equal(a(x), b(x))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_from_linear(kind: dict[str, Any], bias: bool) -> None:
    linear = nn.Linear(150, 37, bias).eval()
    with torch.no_grad():
        linear.weight[torch.rand(37, 150) < 0.3] = 0
    layer = WeightOnlyLinear.from_linear(linear, activation="relu", **kind)
    assert not layer.training
    assert layer.group_size == (None if layer.bits == 8 else kind.get("group_size", 64))
    x = torch.randn(2, 5, 150)
    assert layer(x).shape == (2, 5, 37)
    assert relative(layer(x), linear(x).relu()) < (0.01 if layer.bits == 8 else 0.2)
    pack = copy.deepcopy(layer.weight)
    linear.weight.data.zero_()
    assert torch.equal(layer.weight, pack)


def test_eight_bits_have_the_codes_of_int8_linear() -> None:
    linear = nn.Linear(40, 9)
    a, b = WeightOnlyLinear.from_linear(linear), Int8Linear.from_linear(linear)
    assert torch.equal(a.weight, b.weight)
    assert a.weight_scale is not None
    assert torch.equal(a.weight_scale, b.weight_scale)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_exact_zeros(kind: dict[str, Any]) -> None:
    linear = nn.Linear(128, 16, bias=False)
    with torch.no_grad():
        linear.weight[:, ::2] = 0
    layer = WeightOnlyLinear.from_linear(linear, **kind)
    x = torch.zeros(1, 128)
    x[:, ::2] = torch.randn(64)
    assert torch.equal(layer(x), torch.zeros(1, 16))
    assert ops.describe(layer.weight)["nonzeros"] <= 16 * 64


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_layer_computes_its_bias(kind: dict[str, Any]) -> None:
    assert torch.equal(WeightOnlyLinear(7, 5, **kind)(torch.randn(3, 7)), torch.zeros(3, 5))
    assert WeightOnlyLinear(0, 5, **kind)(torch.randn(3, 0)).shape == (3, 5)
    assert WeightOnlyLinear(7, 0, **kind)(torch.randn(3, 7)).shape == (3, 0)


def test_repr() -> None:
    assert repr(WeightOnlyLinear(7, 5, bits=4)) == (
        "WeightOnlyLinear(in_features=7, out_features=5, bias=True, activation=None, bits=4, group_size=64, "
        "symmetric=True)"
    )
    assert repr(WeightOnlyLinear(7, 5, bits=4, sparse=True)).endswith("symmetric=True, sparse=True)")


def test_a_sparse_layer_gives_the_bits_of_the_dense_one() -> None:
    linear, x = nn.Linear(150, 37), torch.randn(3, 150)
    with torch.no_grad():
        linear.weight[torch.rand(37, 150) < 0.6] = 0
    dense, sparse = (WeightOnlyLinear.from_linear(linear, 4, sparse=each) for each in (False, True))
    assert torch.equal(dense(x), sparse(x))
    assert ops.describe(sparse.weight)["format"] == "bitmap_u4"
    assert "sparse" not in dense.config()
    assert sparse.config()["sparse"] is True
    with pytest.raises(RuntimeError, match=r"int4 in groups of 64, bitmap_u4 .* got a pack of int4 in groups of 64 "):
        sparse.load_state_dict(dense.state_dict())
    with pytest.raises(RuntimeError, match="got a pack of int4 in groups of 64, bitmap_u4"):
        dense.load_state_dict(sparse.state_dict())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_round_trip(kind: dict[str, Any], assign: bool) -> None:
    layer = WeightOnlyLinear.from_linear(nn.Linear(70, 19), **kind)
    assert sorted(layer.state_dict()) == (["bias", "weight"] if layer.bits == 4 else ["bias", "weight", "weight_scale"])
    target = WeightOnlyLinear(70, 19, **kind)
    target.load_state_dict(layer.state_dict(), assign=assign)
    assert same(layer, target)
    with torch.device("meta"):
        empty = WeightOnlyLinear(70, 19, **kind)
    assert empty.weight.shape == layer.weight.shape or empty.sparse
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert same(layer, empty)


def test_a_foreign_or_damaged_state_is_refused_and_changes_nothing() -> None:
    target = WeightOnlyLinear.from_linear(nn.Linear(70, 19), 4)
    before = copy.deepcopy(target)
    for other, message in (
        (
            WeightOnlyLinear(70, 19, bits=4, group_size=32),
            r"int4 in groups of 64 .* got a pack of int4 in groups of 32",
        ),
        (WeightOnlyLinear(70, 19, bits=4, symmetric=False), "got a pack of uint4 in groups of 64"),
        (WeightOnlyLinear(71, 19, bits=4), r"got a pack of int4 in groups of 64 \[N=19, K=71\]"),
        (Int8Linear(70, 19), "got a pack of int8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict(other.state_dict(), strict=False)
    damaged = copy.deepcopy(target.state_dict())
    damaged["weight"][16] += 1
    with pytest.raises(RuntimeError, match="weight must be a pack"):
        target.load_state_dict(damaged)
    with pytest.raises(RuntimeError, match=r"bias must be float32 \[19\], got float64"):
        target.load_state_dict({**before.state_dict(), "bias": torch.zeros(19).double()})
    assert same(target, before)
    eight = WeightOnlyLinear(70, 19)
    with pytest.raises(RuntimeError, match="weight_scale must be finite"):
        eight.load_state_dict({**eight.state_dict(), "weight_scale": torch.full((19,), float("nan"))})


@pytest.mark.parametrize("kind", KINDS)
def test_copies_pickles_and_moves_of_dtype(kind: dict[str, Any]) -> None:
    layer = WeightOnlyLinear.from_linear(nn.Linear(70, 19), activation="gelu", **kind)
    assert same(layer, copy.deepcopy(layer))
    assert same(layer, pickle.loads(pickle.dumps(layer)))
    for moved in (copy.deepcopy(layer).half(), copy.deepcopy(layer).to(torch.bfloat16), copy.deepcopy(layer).double()):
        assert moved.bias is not None
        assert moved.bias.dtype == torch.float32
        assert same(layer, moved)
    assert layer(torch.randn(2, 70).half()).dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 70)).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_compile_and_gradients(kind: dict[str, Any]) -> None:
    layer, x = WeightOnlyLinear.from_linear(nn.Linear(70, 19, bias=False), **kind), torch.randn(3, 70)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind: dict[str, Any], tmp_path: Path) -> None:
    dense = nn.Sequential(nn.Linear(70, 19), nn.ReLU(), nn.Linear(19, 7))
    model = nn.Sequential(
        WeightOnlyLinear.from_linear(dense[0], **kind),  # type: ignore[arg-type]
        nn.ReLU(),
        WeightOnlyLinear.from_linear(dense[2], **kind),  # type: ignore[arg-type]
    )
    path = tmp_path / "model.safetensors"
    fastsparse.save(model, path)
    x = torch.randn(3, 70)
    for target in (dense, copy.deepcopy(model)):
        assert torch.equal(fastsparse.load(path, target)(x), model(x))
    data = bytearray(path.read_bytes())
    at = data.index(b"fspk")
    data[at + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="weight must be a pack"):
        fastsparse.load(path)


@pytest.mark.parametrize(
    "config",
    [Int8WeightOnly(), Int4WeightOnly(group_size=32), Int4WeightOnly(symmetric=False), Int4WeightOnly(sparse=True)],
)
def test_quantize_puts_it_where_it_is_faster(config: Int8WeightOnly | Int4WeightOnly) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    x = torch.randn(1, 64)
    report = quantize_(
        model, config, x, measure=lambda c: 1.0 if (c.implementation == "dense") == (c.layer == "0") else 0.5
    )
    kinds = [type(model[0]), type(model[2])]
    assert kinds == [nn.Linear, WeightOnlyLinear] or kinds == [WeightOnlyLinear, nn.Linear]
    chosen = {row["layer"]: row["chosen"] for row in report.rows}
    assert sorted(chosen.values()) == sorted(["dense", config.name])


def test_quantize_leaves_zeros_out() -> None:
    linear = nn.Linear(150, 37)
    with torch.no_grad():
        linear.weight[torch.rand(37, 150) < 0.7] = 0
    layers: list[WeightOnlyLinear] = []
    for sparse in (False, True):
        model = nn.Sequential(copy.deepcopy(linear))
        quantize_(model, Int4WeightOnly(sparse=sparse, measure=False))
        layer = model[0]
        assert isinstance(layer, WeightOnlyLinear)
        assert layer.sparse == sparse
        layers.append(layer)
    dense, without = layers
    assert ops.describe(without.weight)["format"] == "bitmap_u4"
    assert without.weight.numel() < dense.weight.numel()
    x = torch.randn(2, 150)
    assert torch.equal(without(x), dense(x))


@pytest.mark.parametrize(("sparse", "kinds"), [(False, 1), (True, 2)])
def test_sparse_layers_are_timed_by_their_zeros(sparse: bool, kinds: int) -> None:
    layers = [nn.Linear(64, 64), nn.Linear(64, 64)]
    with torch.no_grad():
        layers[1].weight[torch.rand(64, 64) < 0.8] = 0
    assert len({Int4WeightOnly(sparse=sparse).kind(layer) for layer in layers}) == kinds


def test_weights_too_large_for_float16_scales_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight *= 1e8
    report = quantize_(model, Int4WeightOnly(measure=False))
    assert isinstance(model[0], nn.Linear)
    assert "float16" in report.rows[0]["why"]


def test_bad_input() -> None:
    linear = nn.Linear(8, 4)
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got ReLU"):
        WeightOnlyLinear.from_linear(nn.ReLU())  # type: ignore[arg-type]
    huge = nn.Linear(8, 4)
    huge.weight.data.fill_(1e7)
    nan = nn.Linear(8, 4)
    nan.weight.data[0, 0] = float("nan")
    for change, message in (
        (lambda: WeightOnlyLinear.from_linear(linear, 3), "bits must be 8 or 4, got 3"),
        (lambda: WeightOnlyLinear.from_linear(linear, 8, 32), "group_size must be None for 8 bits"),
        (lambda: WeightOnlyLinear.from_linear(linear, 4, 48), "group_size must be None, 32, 64 or 128, got 48"),
        (lambda: WeightOnlyLinear.from_linear(linear, 8, symmetric=False), "symmetric must be True for 8 bits"),
        (lambda: WeightOnlyLinear.from_linear(linear, sparse=True), "sparse must be False for 8 bits, got True"),
        (lambda: WeightOnlyLinear(8, 4, bits=4, symmetric=False, sparse=True), "sparse must be False with zero points"),
        (lambda: WeightOnlyLinear(8, 4, bits=4, sparse=1), "sparse must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: WeightOnlyLinear.from_linear(linear, activation="tanh"), "activation must be None"),
        (lambda: WeightOnlyLinear.from_linear(nn.Linear(2, 3).double()), "must be float32, bfloat16 or float16"),
        (lambda: WeightOnlyLinear.from_linear(nn.Linear(2, 3, device="meta")), "linear must be on the CPU, got meta"),
        (lambda: WeightOnlyLinear.from_linear(nn.LazyLinear(3)), "a lazy layer"),
        (lambda: WeightOnlyLinear.from_linear(huge, 4), "can't be quantized: .* one beyond 65504"),
        (lambda: WeightOnlyLinear.from_linear(nan, 4), "can't be quantized: .* got a NaN"),
        (lambda: WeightOnlyLinear.from_linear(nan, 8), "can't be quantized: .* got a NaN"),
        (lambda: WeightOnlyLinear(131072, 1), "in_features must be an int from 0"),
        (lambda: WeightOnlyLinear(-1, 1, bits=4), "in_features must be an int from 0"),
        (lambda: Int4WeightOnly(group_size=16), "group_size must be 32, 64 or 128, got 16"),
        (lambda: Int4WeightOnly(symmetric=1), "symmetric must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: Int4WeightOnly(sparse=1), "sparse must be True or False, got 1"),  # type: ignore[arg-type]
        (lambda: Int4WeightOnly(symmetric=False, sparse=True), "sparse must be False with zero points, got True"),
    ):
        with pytest.raises(ValueError, match=message):
            change()
