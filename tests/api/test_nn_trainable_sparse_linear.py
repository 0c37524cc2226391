"""nn.TrainableSparseLinear: conversion, training with torch's optimisers, state_dict, save and load, compilation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsparse
from fastsparse import ops
from fastsparse.nn import SparseLinear, TrainableSparseLinear


def pruned(k: int = 23, n: int = 19, bias: bool = True, zeros: float = 0.8) -> nn.Linear:
    linear = nn.Linear(k, n, bias)
    with torch.no_grad():
        linear.weight *= torch.rand(n, k) >= zeros
    return linear


def same(a: TrainableSparseLinear, b: TrainableSparseLinear) -> bool:
    x = torch.randn(3, a.in_features)
    return torch.equal(a.weight, b.weight) and torch.equal(a.values, b.values) and torch.equal(a(x), b(x))


@pytest.mark.parametrize("bias", [True, False])
def test_from_linear_and_back_keep_exactly_the_zeros(bias: bool) -> None:
    linear = pruned(bias=bias).eval()
    before = linear.weight.detach().clone()
    layer = TrainableSparseLinear.from_linear(linear)
    linear.weight.data.zero_()
    x = torch.randn(2, 5, 23)
    dense = torch.nn.functional.linear(x, before, linear.bias)
    assert torch.allclose(layer(x), dense, atol=1e-5)
    back, sparse = layer.to_linear(), layer.to_sparse("sell16")
    assert torch.equal(back.weight, before)
    assert torch.equal(ops.unpack(sparse.weight), before)
    assert ops.describe(sparse.weight)["format"] == "sell16"
    assert torch.equal(sparse(x), layer(x))
    assert [each.training for each in (layer, back, sparse)] == [False] * 3
    layer.values.data.zero_()
    assert torch.equal(back.weight, before)
    with_activation = TrainableSparseLinear.from_linear(pruned(bias=bias), "relu")
    assert torch.equal(with_activation.to_sparse()(x), with_activation(x))
    with pytest.raises(ValueError, match="to_linear: activation must be None, got 'relu'"):
        with_activation.to_linear()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_follows_the_masked_dense_layer(name: str) -> None:
    dense = nn.Sequential(pruned(), nn.ReLU(), pruned(19, 7)).double()
    masks = [dense[0].weight != 0, dense[2].weight != 0]
    sparse = nn.Sequential(
        TrainableSparseLinear.from_linear(copy.deepcopy(dense[0]).float(), "relu"),  # type: ignore[arg-type]
        TrainableSparseLinear.from_linear(copy.deepcopy(dense[2]).float()),  # type: ignore[arg-type]
    )
    x, target = torch.randn(40, 23), torch.randn(40, 7)
    steps = [OPTIMIZERS[name](model.parameters()) for model in (dense, sparse)]
    first = last = 0.0
    for step in range(15):
        for model, optimizer in zip((dense, sparse), steps, strict=True):
            kind = torch.float64 if model is dense else torch.float32
            optimizer.zero_grad()
            loss = (model(x.to(kind)) - target.to(kind)).square().mean()
            loss.backward()
            if model is dense:
                for layer, mask in zip((dense[0], dense[2]), masks, strict=True):
                    layer.weight.grad *= mask
            optimizer.step()
        first, last = loss.item() if step == 0 else first, loss.item()
        with torch.no_grad():  # SGD's momentum and weight decay leave masked zeros alone only if they stay zeros
            for layer, mask in zip((dense[0], dense[2]), masks, strict=True):
                layer.weight *= mask
    assert last < first
    for ours, theirs in ((sparse[0], dense[0]), (sparse[1], dense[2])):
        assert isinstance(ours, TrainableSparseLinear)
        got = ops.unpack(ours.weight, values=ours.values)
        assert torch.allclose(got.double(), theirs.weight, atol=1e-4)
        assert torch.equal(got == 0, theirs.weight == 0)
        assert torch.allclose(ours.bias.double(), theirs.bias, atol=1e-4)


def test_frozen_stays_frozen() -> None:
    linear = pruned()
    linear.weight.requires_grad_(False)
    layer = TrainableSparseLinear.from_linear(linear)
    assert not layer.values.requires_grad
    layer(torch.randn(2, 23)).sum().backward()
    assert layer.values.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is not None


def test_an_empty_layer_computes_its_bias() -> None:
    layer = TrainableSparseLinear(7, 5)
    assert torch.equal(layer(torch.randn(3, 7)), torch.zeros(3, 5))
    assert TrainableSparseLinear(0, 5)(torch.randn(3, 0)).shape == (3, 5)
    assert repr(layer) == "TrainableSparseLinear(in_features=7, out_features=5, bias=True, activation=None)"


@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip_into_another_length(assign: bool) -> None:
    layer, target = TrainableSparseLinear.from_linear(pruned()), TrainableSparseLinear(23, 19)
    values = target.values
    target.load_state_dict(layer.state_dict(), assign=assign)
    assert same(layer, target)
    assert assign or target.values is values  # an optimiser that holds it goes on
    with torch.device("meta"):
        empty = TrainableSparseLinear(23, 19)
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert same(layer, empty)


def test_a_foreign_or_damaged_state_is_refused_and_changes_nothing() -> None:
    target = TrainableSparseLinear.from_linear(pruned())
    before = copy.deepcopy(target)
    state = before.state_dict()
    damaged = state["weight"].clone()
    damaged[200] ^= 1
    for change, message in (
        (TrainableSparseLinear.from_linear(pruned(24)).state_dict(), r"structure of \[N=19, K=23\], got structure \[N"),
        ({"weight": damaged}, "damaged structure"),
        ({"weight": ops.pack(pruned().weight)}, "got panels128"),
        ({"values": state["values"][1:]}, r"values must be float32 \[\d+\], got float32"),
        ({"values": state["values"].double()}, "values must be float32 .* got float64"),
        ({"bias": torch.zeros(18)}, r"bias must be float32 \[19\], got float32 \[18\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            target.load_state_dict({**state, **change})
        assert same(target, before)
    with pytest.raises(RuntimeError, match="got a structure"):
        SparseLinear(23, 19).load_state_dict({"weight": state["weight"], "bias": state["bias"]})


def test_copies_pickles_and_moves_of_dtype() -> None:
    layer = TrainableSparseLinear.from_linear(pruned(), activation="gelu")
    assert same(layer, copy.deepcopy(layer))
    assert same(layer, pickle.loads(pickle.dumps(layer)))
    moved = copy.deepcopy(layer).half()
    assert (moved.weight.dtype, moved.values.dtype) == (torch.uint8, torch.float32)
    assert same(layer, moved)


def test_autocast_and_compile_fullgraph() -> None:
    layer, x = TrainableSparseLinear.from_linear(pruned(bias=False), "silu"), torch.randn(3, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x.bfloat16()))
        assert layer(x).dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads: list[Tensor] = []
    for call in (layer, compiled):
        layer.zero_grad()
        call(x).square().sum().backward()
        assert layer.values.grad is not None
        grads.append(layer.values.grad.clone())
    assert torch.equal(*grads)


def test_save_and_load(tmp_path: Path) -> None:
    dense = nn.Sequential(pruned(), nn.ReLU(), pruned(19, 7))
    layers = [TrainableSparseLinear.from_linear(dense[i]) for i in (0, 2)]  # type: ignore[arg-type]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    path = tmp_path / "model.safetensors"
    fastsparse.save(model, path)
    x = torch.randn(3, 23)
    for target in (
        nn.Sequential(nn.Linear(23, 19), nn.ReLU(), nn.Linear(19, 7)),
        nn.Sequential(TrainableSparseLinear(23, 19), nn.ReLU(), TrainableSparseLinear(19, 7)),
        copy.deepcopy(model),
    ):
        loaded = fastsparse.load(path, target)
        assert torch.equal(loaded(x), model(x))
        loaded(x).sum().backward()
        assert loaded[0].values.grad is not None
    tensors = fastsparse.load(path)
    assert torch.equal(ops.unpack(tensors["0.weight"], values=tensors["0.values"]), dense[0].weight)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"linear must be a torch\.nn\.Linear, got ReLU"):
        TrainableSparseLinear.from_linear(nn.ReLU())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight must be float32, got float64"):
        TrainableSparseLinear.from_linear(pruned().double())
    with pytest.raises(ValueError, match=r"activation must be None, .* got 'tanh'"):
        TrainableSparseLinear(3, 4, activation="tanh")
    with pytest.raises(ValueError, match="in_features must be an int from 0"):
        TrainableSparseLinear(-1, 4)
