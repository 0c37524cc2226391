"""quantize_: what is converted, what stays, and that errors leave nothing half done. The clock is injected."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fastsparse.nn import Int8Linear
from fastsparse.quantize import Int8Dynamic, Int8Static, quantize_
from fastsparse.select import Candidate

X = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))


def int8_wins(candidate: Candidate) -> float:
    return 1e-6 if candidate.implementation == "int8" else 4e-6


def dense_wins(candidate: Candidate) -> float:
    return 1e-6 if candidate.implementation == "dense" else 2e-6


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))


class Untouched:
    """Holds a model against what it was: the same modules, parameters, flags, hooks and bits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self.identity()
        self.state = copy.deepcopy(model.state_dict())

    def identity(self) -> list[Any]:
        modules = [
            (name, id(m), m.training, len(m._forward_pre_hooks))
            for name, m in self.model.named_modules(remove_duplicate=False)
        ]
        parameters = [(name, id(p), p.requires_grad) for name, p in self.model.named_parameters()]
        return [modules, parameters]

    def check(self) -> None:
        assert self.identity() == self.before
        state = self.model.state_dict()
        assert list(state) == list(self.state)
        for name, value in state.items():
            torch.testing.assert_close(value, self.state[name], rtol=0, atol=0, equal_nan=True)


def rows(report: Any) -> dict[str, dict[str, Any]]:
    return {row["layer"]: row for row in report.rows}


def stays_dense(model: nn.Module, data: Any, name: str, why: str) -> None:
    row = rows(quantize_(model, Int8Dynamic(), data, measure=int8_wins))[name]
    assert row["chosen"] == "dense"
    assert row["why"].startswith("kept dense: ")
    assert why in row["why"]
    assert isinstance(model.get_submodule(name), nn.Linear)


def test_layers_that_are_faster_are_converted() -> None:
    model = mlp()
    with torch.no_grad():
        expected = model(X)
    report = quantize_(model, Int8Dynamic(), X, measure=int8_wins)
    assert isinstance(model[0], Int8Linear)
    assert isinstance(model[2], Int8Linear)
    with torch.no_grad():
        assert (model(X) - expected).abs().max() < 0.05 * expected.abs().max()
    assert rows(report)["0"] == {
        "layer": "0",
        "shape": "M=3 K=16 N=32",
        "dense us": 4.0,
        "int8 us": 1.0,
        "speed-up": 4.0,
        "chosen": "int8",
        "why": "int8 is 4.00x as fast",
    }
    assert report.notes[0].startswith("2 of 2 linear layers converted")


def test_a_dense_layer_that_is_faster_stays() -> None:
    model = mlp()
    untouched = Untouched(model)
    report = quantize_(model, Int8Dynamic(), X, measure=dense_wins)
    untouched.check()
    assert [row["why"] for row in report.rows] == ["kept dense: 0.50x"] * 2


def test_each_layer_is_decided_by_its_own_figures() -> None:
    model = mlp()
    last = model[2]
    quantize_(model, Int8Dynamic(), X, measure=lambda c: int8_wins(c) if c.layer == "0" else dense_wins(c))
    assert isinstance(model[0], Int8Linear)
    assert model[2] is last


def test_layers_of_one_size_and_shape_are_decided_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 16),
        nn.Linear(16, 16),  # the noise of the clock alone would keep it dense
        nn.Linear(16, 16),
        nn.Linear(16, 16, bias=False),
        nn.Linear(16, 32),
        nn.Flatten(0, 1),
        nn.Unflatten(0, (-1, 1)),
        nn.Linear(32, 16),
        nn.Linear(16, 16),  # sees rows of another shape
    )

    def measure(candidate: Candidate) -> float:
        return dense_wins(candidate) if candidate.layer in ("1", "3", "8") else int8_wins(candidate)

    report = rows(quantize_(model, Int8Dynamic(), torch.randn(2, 3, 16), measure=measure))
    assert {name for name, row in report.items() if row["chosen"] == "dense"} == {"3", "8"}
    assert [report[name]["speed-up"] for name in "0128"] == [4.0, 4.0, 4.0, 0.5]


def test_the_margin_is_asked_for() -> None:
    slightly = {"dense": 1.2, "int8": 1.0}
    for margin, kind in ((1.1, Int8Linear), (1.3, nn.Linear)):
        model = mlp()
        quantize_(model, Int8Dynamic(margin=margin), X, measure=lambda c: slightly[c.implementation])
        assert isinstance(model[0], kind)


def test_the_candidates_are_run_at_the_recorded_shapes() -> None:
    shapes: list[tuple[str, str, tuple[int, ...]]] = []

    def measure(candidate: Candidate) -> float:
        handles = [
            nn.modules.module.register_module_forward_pre_hook(
                lambda m, args: shapes.append((candidate.layer, type(m).__name__, tuple(args[0].shape)))
            )
        ]
        candidate.run()
        handles[0].remove()
        return 1.0

    quantize_(mlp(), Int8Dynamic(), torch.zeros(2, 7, 16), measure=measure)
    assert shapes == [
        ("0", "Linear", (2, 7, 16)),
        ("0", "Int8Linear", (2, 7, 16)),
        ("2", "Linear", (2, 7, 32)),
        ("2", "Int8Linear", (2, 7, 32)),
    ]


def test_the_real_clock() -> None:
    model = mlp()
    report = quantize_(model, Int8Dynamic(), X)
    for row in report.rows:
        assert row["dense us"] > 0
        assert row["int8 us"] > 0
        converted = isinstance(model.get_submodule(row["layer"]), Int8Linear)
        assert converted == (row["chosen"] == "int8") == (row["speed-up"] >= 1.05)


def test_flags_and_statistics_stay() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    statistics = copy.deepcopy(model[1].state_dict())
    quantize_(model, Int8Dynamic(), X, measure=lambda c: int8_wins(c) if c.layer == "0" else dense_wins(c))
    assert isinstance(model[0], Int8Linear)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert not model[0].bias.requires_grad
    assert model[2].weight.requires_grad
    assert all(torch.equal(value, statistics[name]) for name, value in model[1].state_dict().items())


def test_convolutions_stay() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    convolution = model[0]
    report = quantize_(model, Int8Dynamic(), torch.randn(2, 1, 4, 4), measure=int8_wins)
    assert model[0] is convolution
    assert isinstance(model[3], Int8Linear)
    assert [row["layer"] for row in report.rows] == ["3"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    quantize_(model, Int8Dynamic(), X.to(dtype), measure=int8_wins)
    assert isinstance(model[0], Int8Linear)
    assert model(X.to(dtype)).dtype == dtype


# What shares something


def test_one_layer_in_two_places_stays_one() -> None:
    model = mlp()
    shared = nn.Linear(32, 32)
    model = nn.Sequential(model[0], shared, nn.Sequential(nn.ReLU(), shared), model[2])
    report = quantize_(model, Int8Dynamic(), X, measure=int8_wins)
    assert isinstance(model[1], Int8Linear)
    assert model[1] is model[2][1]
    assert [row["layer"] for row in report.rows] == ["0", "1 = 2.1", "3"]


class Tied(nn.Module):
    def __init__(self, share_data: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10, bias=False)
        if share_data:
            self.head.weight.data = self.embedding.weight.data
        else:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(tokens)))


@pytest.mark.parametrize("share_data", [False, True])
def test_tied_parameters_stay_dense(share_data: bool) -> None:
    model = Tied(share_data)
    stays_dense(model, torch.tensor([[1, 2, 3]]), "head", "shares a parameter with another module")
    assert isinstance(model.body, Int8Linear)
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_two_layers_with_one_weight_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    stays_dense(model, X, "0", "shares a parameter")
    stays_dense(model, X, "1", "shares a parameter")


# What torch reads itself


def test_multihead_attention_still_runs() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.last = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.attention(x, x, x)[0])

    model = Model()
    stays_dense(model, X[None], "attention.out_proj", "nn.MultiheadAttention")
    assert isinstance(model.last, Int8Linear)
    assert model(X[None]).shape == (1, 3, 4)


@pytest.mark.parametrize("training", [False, True])
def test_transformer_layers_still_run(training: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)).train(training)
    with torch.no_grad():
        expected = model(X[None])
    report = rows(quantize_(model, Int8Dynamic(), X[None], measure=int8_wins))
    for index in range(2):
        for name, why in (
            ("self_attn.out_proj", "MultiheadAttention"),
            ("linear1", "fast path"),
            ("linear2", "fast path"),
        ):
            assert why in report[f"0.layers.{index}.{name}"]["why"]
    assert isinstance(model[1], Int8Linear)
    with torch.no_grad():
        assert (model(X[None]) - expected).abs().max() < 0.05 * expected.abs().max()


# What is no plain linear layer


def test_hooks_stay_dense() -> None:
    model = mlp()
    model[0].register_forward_hook(lambda *_: None)
    stays_dense(model, X, "0", "has hooks")


def test_pruned_layers_stay_dense() -> None:
    model = mlp()
    prune.random_unstructured(model[0], "weight", 0.5)
    stays_dense(model, X, "0", "has hooks")


def test_parametrized_layers_stay_dense() -> None:
    model = mlp()
    parametrizations.weight_norm(model[0])
    stays_dense(model, X, "0", "has a parametrization")


def test_subclasses_stay_dense() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = nn.Sequential(Doubled(16, 4))
    stays_dense(model, X, "0", "is a Doubled")


def test_replaced_forwards_stay_dense() -> None:
    model = mlp()
    model[0].forward = lambda x: nn.functional.linear(x, model[0].weight)  # type: ignore[method-assign]
    stays_dense(model, X, "0", "its forward was replaced")


def test_layers_with_more_inside_stay_dense() -> None:
    model = mlp()
    model[0].adapter = nn.Linear(16, 2)
    stays_dense(model, X, "0", "carries more than weight and bias")


def test_double_precision_stays_dense() -> None:
    stays_dense(mlp().double(), X.double(), "0", "torch.float64")


def test_layers_beyond_exact_sums_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(131072, 1))
    stays_dense(model, torch.zeros(1, 131072), "0", "K=131072 is more than the 131071")


def test_layers_without_values_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(16, 4, device="meta"))
    stays_dense(model, X.to("meta"), "0", "is on device meta")


def test_layers_that_data_does_not_reach_stay_dense() -> None:
    model = mlp()
    model.add_module("aside", nn.ModuleList([nn.Linear(4, 4)]))
    model.forward = lambda x: model[2](model[1](model[0](x)))  # type: ignore[method-assign]
    stays_dense(model, X, "aside.0", "not reached by data")
    assert isinstance(model[0], Int8Linear)


def test_the_model_itself_can_not_be_exchanged() -> None:
    model = nn.Linear(16, 4)
    report = quantize_(model, Int8Dynamic(), X, measure=int8_wins)
    assert "it is the model itself" in report.rows[0]["why"]


def test_skip_and_min_weights() -> None:
    model = mlp()
    report = rows(quantize_(model, Int8Dynamic(skip=("0",), min_weights=161), X, measure=int8_wins))
    assert report["0"]["why"] == "kept dense: is in skip"
    assert report["2"]["why"] == "kept dense: has 160 weights, fewer than min_weights=161"
    quantize_(model, Int8Dynamic(skip=("[!0]",)), X, measure=int8_wins)
    assert [type(layer) for layer in model] == [Int8Linear, nn.ReLU, nn.Linear]


def test_a_model_without_linear_layers() -> None:
    report = quantize_(nn.Sequential(nn.ReLU()), Int8Dynamic(), X)
    assert report.rows == []


# Without data


def test_no_data_no_measurement() -> None:
    model = mlp()
    untouched = Untouched(model)
    with pytest.raises(ValueError, match="without data nothing can be measured"):
        quantize_(model, Int8Dynamic())
    untouched.check()


def test_unmeasured_conversion_on_request() -> None:
    model = mlp()
    report = quantize_(model, Int8Dynamic(measure=False))
    assert isinstance(model[0], Int8Linear)
    assert rows(report)["0"] == {
        "layer": "0",
        "shape": "K=16 N=32",
        "chosen": "int8",
        "why": "converted unmeasured, as asked",
    }


# Errors leave the model as it was


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weights_that_are_not_finite(bad: float, name: str) -> None:
    model = mlp()
    with torch.no_grad():
        getattr(model[2], name).view(-1)[3] = bad
    untouched = Untouched(model)
    with pytest.raises(ValueError, match=rf"2\.{name} must be finite"):
        quantize_(model, Int8Dynamic(), X, measure=int8_wins)
    untouched.check()


@pytest.mark.parametrize("data", [torch.zeros(3, 15), [], (X, X), {"y": X}, "text"])
def test_data_that_does_not_fit(data: Any) -> None:
    model = mlp()
    untouched = Untouched(model)
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        quantize_(model, Int8Dynamic(), data, measure=int8_wins)
    untouched.check()


def test_a_clock_that_fails() -> None:
    def measure(candidate: Candidate) -> float:
        if candidate.layer == "2":
            raise OSError("no clock")
        return int8_wins(candidate)

    model = mlp()
    untouched = Untouched(model)
    with pytest.raises(OSError, match="no clock"):
        quantize_(model, Int8Dynamic(), X, measure=measure)
    untouched.check()


def test_a_packer_that_fails_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Int8Linear.from_linear

    def from_linear(linear: nn.Linear, activation: str | None = None) -> Int8Linear:
        if linear.out_features == 5:
            raise MemoryError("no room")
        return original(linear, activation)

    monkeypatch.setattr(Int8Linear, "from_linear", from_linear)
    model = mlp()
    untouched = Untouched(model)
    with pytest.raises(MemoryError, match="no room"):
        quantize_(model, Int8Dynamic(), X, measure=int8_wins)
    untouched.check()


class ReadsTheWeight(nn.Module):
    """Calls its layer, and reads the weight besides: no check of the layer alone can see that."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.first, self.second, self.error = nn.Linear(16, 16), nn.Linear(16, 16), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.second.weight.dtype == torch.uint8:
            raise self.error("uint8")
        return self.second(self.first(x))


def test_a_model_that_can_not_run_converted() -> None:
    model = ReadsTheWeight(TypeError)
    untouched = Untouched(model)
    with pytest.raises(RuntimeError, match=r"can't run with first, second converted.*skip.*TypeError: uint8"):
        quantize_(model, Int8Dynamic(), X, measure=int8_wins)
    untouched.check()
    quantize_(model, Int8Dynamic(skip=("second",)), X, measure=int8_wins)
    assert isinstance(model.first, Int8Linear)


def test_an_interrupt_passes_through() -> None:
    model = ReadsTheWeight(KeyboardInterrupt)
    untouched = Untouched(model)
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, Int8Dynamic(), X, measure=int8_wins)
    untouched.check()


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("model", Int8Dynamic(), "model must be an nn.Module, got str"),
        (
            nn.Linear(2, 2),
            "int8",
            "config must be an Int8Dynamic, Int8Static, Int8WeightOnly or Int4WeightOnly, got str",
        ),
        (torch.jit.ScriptModule(), Int8Dynamic(), "got a ScriptModule"),
    ],
)
def test_arguments_of_other_types(model: Any, config: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        quantize_(model, config, X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"margin": 0.5}, "margin must be at least 1, got 0.5"),
        ({"margin": math.nan}, "margin must be at least 1"),
        ({"min_weights": -1}, "min_weights must be at least 0"),
        ({"skip": "head"}, "skip must be a tuple of names"),
    ],
)
def test_configurations_that_make_no_sense(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Int8Dynamic(**arguments)


# ---- Int8Static: ranges from the data ----


def static_wins(candidate: Candidate) -> float:
    return 1e-6 if candidate.implementation == "int8 static" else 4e-6


def test_static_scales_are_the_largest_inputs_over_127() -> None:
    model = mlp().train()
    batches = [[torch.randn(3, 16) * scale, torch.zeros(3)] for scale in (1.0, 9.0, 2.0, 50.0)]
    inputs = [batch[0] for batch in batches[:3]]
    with torch.no_grad():
        largest = [max(x.abs().max() for x in inputs), max(model[0](x).relu().max() for x in inputs)]
    report = quantize_(model, Int8Static(batches=3), batches, measure=static_wins)
    assert [row["chosen"] for row in report.rows] == ["int8 static"] * 2
    for layer, size in zip((model[0], model[2]), largest, strict=True):
        assert isinstance(layer, Int8Linear)
        assert layer.static_x
        assert not layer.static_y
        assert layer.x_scale.item() == pytest.approx(size.item() / 127)
        assert layer.x_zero_point == 0
    assert model.training


def test_static_from_one_batch_and_from_an_iterator() -> None:
    for data in (X, (X,), iter([X]), {"input": X}):
        model = mlp()
        quantize_(model, Int8Static(), data, measure=static_wins)
        assert model[0].x_scale.item() == pytest.approx(X.abs().max().item() / 127)


def test_static_without_a_range_stays_dense() -> None:
    for data, why in ((torch.full((2, 16), math.inf), "it saw a NaN or an infinity"), (X * math.nan, "it saw a NaN")):
        model = mlp()
        before = Untouched(model)
        report = quantize_(model, Int8Static(), data, measure=static_wins)
        assert all(why in row["why"] for row in report.rows)
        before.check()
    model = mlp()
    report = quantize_(model, Int8Static(measure=False))
    assert all("not reached by data, so its input has no range" in row["why"] for row in report.rows)
    model = mlp()
    quantize_(model, Int8Static(measure=False), torch.zeros(3, 16))
    assert model[0].x_scale == 1.0


@pytest.mark.parametrize("batches", [0, -1, 2.0, True])
def test_static_wants_batches(batches: Any) -> None:
    with pytest.raises(ValueError, match="Int8Static: batches must be an int of at least 1"):
        Int8Static(batches=batches)
