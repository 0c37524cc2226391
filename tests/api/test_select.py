"""The measured choice. The clock is injected, so that no result depends on this machine's load."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastsparse import select


def candidate(layer: str, implementation: str) -> select.Candidate:
    return select.Candidate(layer, implementation, lambda: None)


def choose(margin: float = 1.05, **seconds: float) -> select.Choice:
    candidates = [candidate("layer", name) for name in seconds]
    return select.choose(candidates, margin, lambda c: seconds[c.implementation])["layer"]


def test_a_faster_candidate_is_chosen() -> None:
    choice = choose(dense=8e-6, int8=2e-6)
    assert choice.chosen == "int8"
    assert choice.speedup == pytest.approx(4)
    assert choice.why == "int8 is 4.00x as fast"
    assert choice.seconds == {"dense": 8e-6, "int8": 2e-6}


def test_a_faster_dense_layer_stays() -> None:
    choice = choose(dense=7e-6, int8=10e-6)
    assert (choice.chosen, choice.why) == ("dense", "kept dense: 0.70x")


@pytest.mark.parametrize(("int8", "chosen"), [(1.0, "dense"), (0.97, "dense"), (0.95, "int8")])
def test_the_margin_decides_close_calls(int8: float, chosen: str) -> None:
    assert choose(margin=1.05, dense=1.0, int8=int8).chosen == chosen


def test_a_close_call_names_the_margin() -> None:
    assert choose(margin=1.05, dense=1.0, int8=0.97).why == "kept dense: 1.03x, and 1.05x is asked for"


def test_the_fastest_of_several_is_chosen() -> None:
    assert choose(dense=3.0, int8=2.0, sparse=1.0).chosen == "sparse"


def test_dense_alone_stays() -> None:
    assert choose(dense=1.0).chosen == "dense"


def test_layers_are_decided_one_by_one() -> None:
    seconds = {("a", "dense"): 2.0, ("a", "int8"): 1.0, ("b", "dense"): 1.0, ("b", "int8"): 2.0}
    choices = select.choose([candidate(*key) for key in seconds], 1.05, lambda c: seconds[c.layer, c.implementation])
    assert {name: choice.chosen for name, choice in choices.items()} == {"a": "int8", "b": "dense"}


def test_layers_of_one_kind_are_decided_together() -> None:
    seconds = {"a": 1.2, "b": 1.0, "c": 1.3}  # int8 takes 1.0 everywhere, so b alone would stay dense
    candidates = [
        select.Candidate(layer, name, lambda: None, kind=("same", 16))
        for layer in seconds
        for name in ("dense", "int8")
    ]
    candidates += [select.Candidate("other", name, lambda: None, kind="other") for name in ("dense", "int8")]
    choices = select.choose(
        candidates, 1.05, lambda c: seconds.get(c.layer, 0.5) if c.implementation == "dense" else 1.0
    )
    assert [(choice.chosen, choice.speedup) for choice in choices.values()] == [("int8", 1.2)] * 3 + [("dense", 0.5)]


def test_a_layer_is_not_of_a_kind_named_like_it() -> None:
    candidates = [select.Candidate("a", "dense", lambda: None), select.Candidate("b", "dense", lambda: None, kind="a")]
    choices = select.choose(candidates, 1.05, lambda c: 1.0 if c.layer == "a" else 3.0)
    assert [choice.seconds["dense"] for choice in choices.values()] == [1.0, 3.0]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_one_bad_figure_does_not_vanish_in_the_median(bad: float) -> None:
    candidates = [select.Candidate(layer, "dense", lambda: None, kind=0) for layer in "abc"]
    with pytest.raises(ValueError, match="choose: b: dense must take a positive number of seconds, got"):
        select.choose(candidates, 1.05, lambda c: bad if c.layer == "b" else 1.0)


def test_no_candidates_no_choices() -> None:
    assert select.choose([]) == {}


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_seconds_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="layer: int8 must take a positive number of seconds, got"):
        choose(dense=1.0, int8=bad)


def test_dense_must_be_measured_too() -> None:
    with pytest.raises(ValueError, match="dense layer must be among the candidates"):
        choose(int8=1.0)


@pytest.mark.parametrize("margin", [0.9, math.nan])
def test_margins_below_one_are_refused(margin: float) -> None:
    with pytest.raises(ValueError, match="margin must be at least 1"):
        choose(margin=margin, dense=1.0, int8=1.0)


def test_the_clock_measures_in_phases() -> None:
    calls: list[str] = []
    names = [("a", "dense"), ("a", "int8"), ("b", "dense"), ("b", "int8")]
    candidates = [
        select.Candidate(layer, kind, lambda layer=layer, kind=kind: calls.append(f"{layer} {kind}"))  # type: ignore[misc]
        for layer, kind in names
    ]
    seconds = select.clock(candidates, rounds=2, budget=0.0)
    assert len(seconds) == 4
    assert all(value > 0 for value in seconds)
    # One warm pass and three measured ones over both layers, then the other implementation; all of it twice.
    assert calls == (["a dense", "b dense"] * 4 + ["a int8", "b int8"] * 4) * 2


def test_the_clock_makes_as_few_passes_as_asked() -> None:
    calls: list[int] = []
    candidate = select.Candidate("model", "dense", lambda: calls.append(1))
    (seconds,) = select.clock([candidate], rounds=2, budget=0.0, passes=1)
    assert seconds > 0
    assert len(calls) == 4  # a warm pass and a measured one, twice


def test_record_sees_each_shape_and_its_calls() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.never, self.keyword = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.keyword(input=self.twice(self.twice(x))[:, 0])

    model = Model()
    layers = [model.twice, model.never, model.keyword]
    seen = select.record(model, (torch.zeros(3, 5, 4),), {}, layers)
    assert [(s.shape, s.rows, s.calls) for s in seen[model.twice]] == [((3, 5, 4), 15, 2)]
    assert [(s.shape, s.dtype) for s in seen[model.keyword]] == [((3, 4), torch.float32)]
    assert model.never not in seen
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_record_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[1].eval()  # frozen by its owner, in a model that trains
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    select.record(model, (torch.randn(6, 4, generator=torch.Generator()),), {}, [model[0]])
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_record_cleans_up_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 2)).train()
    with pytest.raises(RuntimeError):
        select.record(model, (torch.zeros(1, 4),), {}, list(model))
    assert all(module.training for module in model.modules())
    assert not any(layer._forward_pre_hooks for layer in model)


def test_empty_inputs_count_as_none() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert select.record(model, (torch.zeros(0, 4),), {}, list(model)) == {}


X, LABELS = torch.zeros(2, 4), torch.zeros(2)


@pytest.mark.parametrize(
    ("data", "args", "keywords"),
    [
        (X, 1, []),
        ((X, X), 2, []),
        ({"x": X}, 0, ["x"]),
        ([X, X], 1, []),
        ([(X, X)], 2, []),
        ([[X, LABELS]], 1, []),
        (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, LABELS), batch_size=2), 1, []),
        ((batch for batch in [X]), 1, []),
    ],
)
def test_first_batch(data: object, args: int, keywords: list[str]) -> None:
    positional, named = select.first_batch(data)
    assert len(positional) == args
    assert list(named) == keywords
    assert all(torch.equal(value, X) for value in (*positional, *named.values()))


@pytest.mark.parametrize("data", [[], iter(()), 3, "text", None])
def test_data_that_is_none(data: object) -> None:
    with pytest.raises(ValueError, match="data: must"):
        select.first_batch(data)
