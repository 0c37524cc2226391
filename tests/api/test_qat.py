"""prepare_qat_ and finalize_qat_: training computes what nn.Int8Linear computes afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastsparse import ops
from fastsparse.nn import Int8Linear
from fastsparse.quantize import Int8Dynamic, finalize_qat_, prepare_qat_, quantize_

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))


def test_training_sees_what_int8_will_compute() -> None:
    model = mlp()
    int8 = copy.deepcopy(model)
    quantize_(int8, Int8Dynamic(measure=False))
    prepare_qat_(model)
    torch.testing.assert_close(model(X), int8(X), rtol=1e-5, atol=1e-5)
    assert not torch.equal(model(X), mlp()(X))


def test_the_trained_codes_are_those_that_are_packed() -> None:
    model = mlp()
    prepare_qat_(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for _ in range(5):
        optimizer.zero_grad()
        (model(X) - 1).square().sum().backward()
        optimizer.step()
    trained = model(X)
    original = model[0].parametrizations.weight.original
    scale = original.detach().abs().amax(1, keepdim=True) / 127
    codes = (original / scale).round()
    finalize_qat_(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is original
    assert not model[0]._forward_pre_hooks
    int8 = Int8Linear.from_linear(model[0])
    assert torch.equal(ops.unpack(int8.weight), codes.to(torch.int8))
    report = quantize_(model, Int8Dynamic(measure=False))
    assert [row["chosen"] for row in report.rows] == ["int8", "int8"]
    torch.testing.assert_close(model(X), trained, rtol=1e-5, atol=1e-5)


def test_gradients_go_straight_through() -> None:
    torch.manual_seed(0)
    dense, model = nn.Sequential(nn.Linear(16, 4)), nn.Sequential(nn.Linear(16, 4))
    model.load_state_dict(dense.state_dict())
    prepare_qat_(model)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(x).sum().backward()
    dense(y).sum().backward()
    weight = model[0].parametrizations.weight.original
    torch.testing.assert_close(weight.grad, dense[0].weight.grad, rtol=0.02, atol=0.05)
    torch.testing.assert_close(x.grad, y.grad, rtol=0.02, atol=0.05)
    assert int(weight.grad.count_nonzero()) == weight.numel()


def test_which_layers() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight

    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "a": nn.Linear(4, 4),
            "skipped": nn.Linear(4, 4),
            "small": nn.Linear(2, 2),
            "shared": shared,
            "tied": tied,
            "own": Own(4, 4),
            "normed": parametrizations.weight_norm(nn.Linear(4, 4)),
            "attention": nn.MultiheadAttention(4, 1),
        }
    )
    report = prepare_qat_(model, Int8Dynamic(skip=("skip*",), min_weights=5))
    why = {row["layer"]: (row["trained"], row["why"]) for row in report.rows}
    assert why["a"] == ("int8", "")
    assert why["skipped"] == ("dense", "is in skip")
    assert why["small"] == ("dense", "has 4 weights, fewer than min_weights=5")
    assert why["shared"] == why["tied"] == ("dense", "shares a parameter with another module")
    assert why["own"] == ("dense", "is a Own, not a plain nn.Linear")
    assert why["normed"] == ("dense", "has a parametrization of another kind")
    assert why["attention.out_proj"] == ("dense", "nn.MultiheadAttention reads its weight without calling it")


def test_twice_is_once_and_keyword_inputs_are_rounded_too() -> None:
    model = mlp()
    prepare_qat_(model)
    y = model(X)
    prepare_qat_(model)
    assert len(model[0].parametrizations.weight) == len(model[0]._forward_pre_hooks) == 1
    assert torch.equal(model(X), y)
    assert torch.equal(model[0](input=X), model[0](X))


def test_a_copy_can_be_ended_alone() -> None:
    model = mlp()
    prepare_qat_(model)
    twin = copy.deepcopy(model)
    finalize_qat_(twin)
    assert type(twin[0]) is nn.Linear
    assert not twin[0]._forward_pre_hooks
    assert len(model[0]._forward_pre_hooks) == 1
    model(X).sum().backward()


def test_layers_without_weights() -> None:
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 0))
    prepare_qat_(model)
    assert model(torch.zeros(2, 0)).shape == (2, 0)
    finalize_qat_(model)


def test_compiles() -> None:
    model = mlp()
    prepare_qat_(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))
    compiled(X).sum().backward()
    assert model[0].parametrizations.weight.original.grad is not None


def test_errors() -> None:
    with pytest.raises(TypeError, match=r"prepare_qat_: model must be an nn\.Module, got int"):
        prepare_qat_(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="prepare_qat_: config must be an Int8Dynamic, got str"):
        prepare_qat_(mlp(), "int8")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"finalize_qat_: model must be an nn\.Module, got NoneType"):
        finalize_qat_(None)  # type: ignore[arg-type]
