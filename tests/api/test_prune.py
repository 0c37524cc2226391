"""prune_, finalize_, to_sparse_: which weights go, that zeros hold, and that errors leave nothing half done."""

from __future__ import annotations

import copy
import io
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastsparse
from fastsparse import prune, quantize
from fastsparse.nn import SparseInt8Linear, SparseLinear
from fastsparse.nn.parametrizations import Mask
from fastsparse.prune import Magnitude, Sparse, SparseInt8, cubic, finalize_, prune_, to_sparse_
from fastsparse.select import Candidate

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def sparse_wins(candidate: Candidate) -> float:
    return 1e-6 if candidate.implementation == "sparse" else 4e-6


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))


def zeros(weight: Tensor) -> int:
    return weight.numel() - int(weight.detach().count_nonzero())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().sum().backward()
        optimizer.step()


# Which weights go


@pytest.mark.parametrize("sparsity", [0, 0.25, 0.5, 0.9, 1, 1 / 3])
def test_exactly_so_many_of_the_smallest_go(sparsity: float) -> None:
    model = mlp()
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    report = prune_(model, Magnitude(sparsity))
    for layer, old, row in zip((model[0], model[2]), before, report.rows, strict=True):
        assert zeros(layer.weight) == round(sparsity * old.numel()) == row["zeros"]
        alive = layer.weight != 0
        assert torch.equal(layer.weight[alive], old[alive])
        if 0 < sparsity < 1:
            assert old[~alive].abs().max() <= old[alive].abs().min()
    assert [row["layer"] for row in report.rows] == ["0", "2"]


def test_global_scope_compares_layers_with_each_other() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight *= 100
    prune_(model, Magnitude(0.5, scope="global"))
    total = model[0].weight.numel() + model[2].weight.numel()
    assert zeros(model[0].weight) + zeros(model[2].weight) == round(0.5 * total)
    assert zeros(model[2].weight) < 5


@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0]), min_size=1, max_size=40),
    sparsity=st.floats(0, 1),
)
def test_of_equal_magnitudes_the_first_go(values: list[float], sparsity: float) -> None:
    model = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    model[0].weight = nn.Parameter(torch.tensor([values]))
    prune_(model, Magnitude(sparsity))
    count = round(sparsity * len(values))
    order = sorted(range(len(values)), key=lambda index: (abs(values[index]), index))
    gone = set(order[:count])
    assert model[0].parametrizations.weight[0].mask.tolist() == [[index not in gone for index in range(len(values))]]


def test_convolutions_are_pruned_biases_and_norms_are_not() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv1d(4, 4, 3), nn.Conv3d(1, 2, 3))
    kept = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("weight")}
    prune_(model, Magnitude(0.75))
    assert zeros(model[0].weight) == round(0.75 * model[0].weight.numel())
    assert zeros(model[1].weight) == 0
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())


def test_skip_and_min_weights() -> None:
    report = prune_(model := mlp(), Magnitude(0.5, skip=("2",), min_weights=513))
    assert zeros(model[0].weight) == zeros(model[2].weight) == 0
    assert report.rows[0]["why"] == "not pruned: has fewer weights than min_weights=513"
    assert report.rows[1]["why"] == "not pruned: is in skip"


def test_a_shared_parameter_is_left_alone() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(32, 16), "head": nn.Linear(16, 32), "own": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    report = prune_(model, Magnitude(0.5))
    assert model["head"].weight is model["embedding"].weight
    assert report.rows[0]["why"] == "not pruned: shares a parameter with another module"
    assert zeros(model["own"].weight) == 8


def test_a_parametrization_of_another_kind_is_left_alone() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.LazyLinear(3))
    report = prune_(model, Magnitude(0.5))
    assert [row["why"] for row in report.rows] == [
        "not pruned: has a parametrization of another kind",
        "not pruned: has no shape yet (a lazy layer)",
    ]


def test_a_layer_in_two_places_is_pruned_once() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleList([shared, nn.ModuleList([shared])])
    report = prune_(model, Magnitude(0.5))
    assert [row["layer"] for row in report.rows] == ["0 = 1.0"]
    assert len(shared.parametrizations.weight) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_float_types(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    prune_(model, Magnitude(0.5))
    assert model[0].weight.dtype == dtype
    assert zeros(model[0].weight) == 256


# Zeros hold


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.1),
    ],
    ids=["sgd", "adamw", "adam"],
)
def test_zeros_hold_through_momentum_and_weight_decay(make: Any) -> None:
    model = mlp()
    optimizer = make(model.parameters())
    train(model, optimizer)  # momentum that points at what will be pruned
    prune_(model, Magnitude(0.6))
    gone = [model[0].weight == 0, model[2].weight == 0]
    alive = model[0].weight.detach().clone()
    train(model, optimizer)
    for layer, zero in zip((model[0], model[2]), gone, strict=True):
        assert torch.equal(layer.weight == 0, zero)
        assert not torch.signbit(layer.weight[zero]).any()
    assert not torch.equal(model[0].weight, alive)
    finalize_(model)
    for layer, zero in zip((model[0], model[2]), gone, strict=True):
        assert torch.equal(layer.weight == 0, zero)


def test_a_value_that_is_not_finite_behind_a_mask_stays_behind_it() -> None:
    model = mlp()
    prune_(model, Magnitude(0.5))
    original = model[0].parametrizations.weight.original
    with torch.no_grad():
        original[model[0].weight == 0] = math.inf
    assert zeros(model[0].weight) == 256
    assert torch.isfinite(model(X)).all()


def test_pruning_grows_and_never_shrinks() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.005, momentum=0.9)
    before = torch.zeros_like(model[0].weight, dtype=torch.bool)
    for step in range(5):
        prune_(model, Magnitude(cubic(step / 4, 0.8)))
        now = model[0].weight == 0
        assert bool((now | ~before).all())
        before = now
        train(model, optimizer)
    assert zeros(model[0].weight) == round(0.8 * 512)
    prune_(model, Magnitude(0.3))
    assert torch.equal(model[0].weight == 0, before)
    assert len(model[0].parametrizations.weight) == 1


def test_quantization_aware_training_keeps_zeros() -> None:
    model = mlp()
    prune_(model, Magnitude(0.5))
    gone = model[0].weight == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    quantize.prepare_qat_(model)
    train(model, optimizer)
    assert bool((model[0].weight[gone] == 0).all())
    quantize.finalize_qat_(model)
    train(model, optimizer)  # the mask outlives the rounding
    assert torch.equal(model[0].weight == 0, gone)
    finalize_(model)
    assert torch.equal(model[0].weight == 0, gone)


def test_pruning_under_quantization_aware_training() -> None:
    model = mlp()
    quantize.prepare_qat_(model)
    prune_(model, Magnitude(0.5))
    assert isinstance(model[0].parametrizations.weight[0], Mask)  # before the rounding
    gone = model[0].parametrizations.weight[0].mask.logical_not()
    finalize_(model)
    assert bool((model[0].parametrizations.weight.original[gone] == 0).all())
    quantize.finalize_qat_(model)
    assert type(model[0]) is nn.Linear
    assert bool((model[0].weight[gone] == 0).all())


def test_save_and_load_with_masks(tmp_path: Path) -> None:
    model, other = mlp(), mlp()
    prune_(model, Magnitude(0.5))
    prune_(other, Magnitude(0.1))
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    fastsparse.save(model, tmp_path / "masked.safetensors")
    fastsparse.load(tmp_path / "masked.safetensors", other)
    assert torch.equal(other[0].weight, model[0].weight)
    assert zeros(other[0].weight) == 256
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other[2].weight, model[2].weight)


def test_save_and_load_of_sparse_layers(tmp_path: Path) -> None:
    model = mlp()
    prune_(model, Magnitude(0.5))
    finalize_(model)
    dense = copy.deepcopy(model)
    to_sparse_(model, data=X, measure=sparse_wins)
    fastsparse.save(model, tmp_path / "sparse.safetensors")
    loaded = fastsparse.load(tmp_path / "sparse.safetensors", mlp())
    assert isinstance(loaded[0], SparseLinear)
    assert torch.equal(fastsparse.ops.unpack(loaded[0].weight), dense[0].weight)


# finalize_


def test_finalize_gives_the_layer_back_as_it_was() -> None:
    model = mlp()
    parameter = model[0].weight
    prune_(model, Magnitude(0.5))
    masked, y = model[0].weight.detach().clone(), model(X)
    report = finalize_(model)
    assert type(model[0]) is nn.Linear
    assert model[0].weight is parameter
    assert torch.equal(parameter, masked)
    assert torch.equal(model(X), y)
    assert [row["zeros"] for row in report.rows] == [256, 80]
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert finalize_(model).rows == []


def test_finalize_of_a_copy_leaves_the_original_its_mask() -> None:
    model = mlp()
    prune_(model, Magnitude(0.5))
    twin = copy.deepcopy(model)
    finalize_(twin)
    assert type(twin[0]) is nn.Linear
    assert parametrize.is_parametrized(model[0], "weight")
    train(model, torch.optim.SGD(model.parameters(), 0.1))
    assert zeros(model[0].weight) == zeros(twin[0].weight) == 256
    finalize_(model)


# to_sparse_


def test_to_sparse_without_data_measures_one_row() -> None:
    model = mlp()
    prune_(model, Magnitude(0.5))
    finalize_(model)
    seen: list[str] = []

    def measure(candidate: Candidate) -> float:
        seen.append(candidate.implementation)
        candidate.run()
        return sparse_wins(candidate)

    report = to_sparse_(model, measure=measure)
    assert [row["shape"] for row in report.rows] == ["M=1 K=16 N=32", "M=1 K=32 N=5"]
    assert seen == ["dense", "sparse"] * 2
    assert isinstance(model[0], SparseLinear)
    assert report.rows[0]["speed-up"] == 4


def test_to_sparse_keeps_dense_what_is_not_faster_or_has_no_zeros() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[:, :8] = 0
    report = to_sparse_(model, rows=2, measure=lambda candidate: 1e-6)
    assert [row["why"] for row in report.rows] == [
        "kept dense: 1.00x, and 1.05x is asked for",
        "kept dense: has 0% zeros, fewer than min_sparsity=0.2",
    ]
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_to_sparse_says_that_masks_must_end_first() -> None:
    model = mlp()
    prune_(model, Magnitude(0.5))
    report = to_sparse_(model, measure=sparse_wins)
    assert "prune.finalize_" in report.rows[0]["why"]


def test_half_precision_stays_dense() -> None:
    report = to_sparse_(mlp().bfloat16(), Sparse(min_sparsity=0), measure=sparse_wins)
    assert "its weight is torch.bfloat16, and only float32 is converted" in report.rows[0]["why"]


def test_to_sparse_int8_keeps_zeros_and_gives_the_bits_of_int8(tmp_path: Path) -> None:
    model = mlp()
    prune_(model, Magnitude(0.75, pattern="4x4", skip=("2",)))
    finalize_(model)
    gone = model[0].weight == 0
    reference = copy.deepcopy(model)
    quantize.quantize_(reference, quantize.Int8Dynamic(measure=False, skip=("2",)))
    report = to_sparse_(model, SparseInt8(measure=False), rows=(1, 64))
    assert [row["chosen"] for row in report.rows] == ["sparse int8", "dense"]
    assert "has 0% zeros, fewer than min_sparsity=0.4" in report.rows[1]["why"]
    layer = model[0]
    assert isinstance(layer, SparseInt8Linear)
    assert fastsparse.ops.describe(layer.weight)["format"] == "blocks4x4"
    assert torch.equal(fastsparse.ops.unpack(layer.weight) == 0, gone)
    wanted = reference(X)
    assert torch.equal(model(X), wanted)
    fastsparse.save(model, tmp_path / "m.safetensors")
    assert torch.equal(fastsparse.load(tmp_path / "m.safetensors", mlp())(X), wanted)


def test_sparse_int8_layers_alike_are_those_with_like_blocks() -> None:
    scattered, blocks = mlp()[0], mlp()[0]
    with torch.no_grad():
        scattered.weight[::2] = 0
        blocks.weight[:16] = 0
    kind = SparseInt8().kind
    assert kind(scattered) == (50, 0)
    assert kind(blocks) == (50, 50)
    assert "131071" in (SparseInt8().why_not(nn.Linear(131072, 1)) or "")


# Errors


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, math.nan, math.inf, "half", None, True])
def test_sparsity_outside_its_range(sparsity: Any) -> None:
    with pytest.raises(ValueError, match=r"Magnitude: sparsity must be a number in \[0, 1\], got "):
        Magnitude(sparsity)


def test_other_arguments() -> None:
    with pytest.raises(ValueError, match="scope must be 'layer' or 'global', got 'all'"):
        Magnitude(0.5, scope="all")
    with pytest.raises(ValueError, match="min_weights must be at least 0, got -1"):
        Magnitude(0.5, min_weights=-1)
    with pytest.raises(ValueError, match="skip must be a tuple of names, got the string 'head'"):
        Magnitude(0.5, skip="head")
    with pytest.raises(ValueError, match=r"cubic: progress must be a number in \[0, 1\], got 2"):
        cubic(2, 0.5)
    with pytest.raises(ValueError, match=r"Sparse: min_sparsity must be a number in \[0, 1\], got 3"):
        Sparse(min_sparsity=3)
    with pytest.raises(ValueError, match=r"SparseInt8: min_sparsity must be a number in \[0, 1\], got -1"):
        SparseInt8(min_sparsity=-1)
    with pytest.raises(ValueError, match=r"rows must be an int of at least 1, or two, \(few, many\), .* got 0"):
        to_sparse_(mlp(), rows=0)
    with pytest.raises(ValueError, match=r"rows must be an int .* in the place of data, got 1 beside data"):
        to_sparse_(mlp(), data=X, rows=1)
    for rows in ((2, 1), (1,), (1, 2, 3), (0, 1), (1, None)):
        with pytest.raises(ValueError, match=r"or two, \(few, many\)"):
            to_sparse_(mlp(), rows=rows)  # type: ignore[arg-type]
    for call in (lambda: prune_(3, Magnitude(0.5)), lambda: finalize_("x"), lambda: to_sparse_([])):
        with pytest.raises(TypeError, match=r"model must be an nn\.Module, got "):
            call()
    with pytest.raises(TypeError, match="prune_: config must be a Magnitude, got float"):
        prune_(mlp(), 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="to_sparse_: config must be a Sparse or a SparseInt8, got Magnitude"):
        to_sparse_(mlp(), Magnitude(0.5))  # type: ignore[arg-type]


def test_a_weight_that_is_not_finite_changes_nothing() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"prune_: 2\.weight must be finite, got NaN or infinity"):
        prune_(model, Magnitude(0.5))
    assert not parametrize.is_parametrized(model[0])
    assert zeros(model[0].weight) == 0


def test_an_interruption_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    prune_(model, Magnitude(0.25, skip=("2",)))
    before = model[0].weight.detach().clone()
    register = prune.api._register

    def interrupted(module: nn.Module, mask: Mask) -> None:
        register(module, mask)
        raise KeyboardInterrupt

    monkeypatch.setattr(prune.api, "_register", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_(model, Magnitude(0.5))
    assert torch.equal(model[0].weight, before)
    assert type(model[2]) is nn.Linear
    assert zeros(model[2].weight) == 0


def test_cubic_is_fast_at_first_and_ends_at_the_end() -> None:
    values = [cubic(step / 10, 0.9, 0.1) for step in range(11)]
    assert values[0] == pytest.approx(0.1)
    assert values[10] == pytest.approx(0.9)
    steps = [b - a for a, b in itertools.pairwise(values)]
    assert all(a > b > 0 for a, b in itertools.pairwise(steps))


# Patterns


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("3:5", 3, 5)])
def test_the_largest_of_every_group_stay_and_stay_zero_in_training(pattern: str, kept: int, of: int) -> None:
    model = mlp()
    model.append(nn.Linear(5, 7))  # 5 inputs: the last group is cut off
    before = [p.detach().clone() for p in (model[0].weight, model[2].weight, model[3].weight)]
    report = prune_(model, Magnitude(1 - kept / of, pattern=pattern))
    masks = [model[i].weight.detach() != 0 for i in (0, 2, 3)]
    for mask, old in zip(masks, before, strict=True):
        for row, magnitudes in zip(mask, old.abs(), strict=True):
            for first in range(0, len(row), of):
                alive, size = row[first : first + of], magnitudes[first : first + of]
                assert int(alive.sum()) == min(kept, len(alive))
                assert not (~alive).any() or size[~alive].max() <= size[alive].min()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1))
    assert all(torch.equal(model[i].weight != 0, mask) for i, mask in zip((0, 2, 3), masks, strict=True))
    assert report.title == f"pruned by magnitude, layer, {pattern}"
    finalize_(model)
    if pattern != "3:5":
        assert torch.equal(SparseLinear.from_linear(model[0], f"nm{pattern}")(X), SparseLinear.from_linear(model[0])(X))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (1, 4), (8, 3), (16, 1)])
def test_whole_blocks_of_the_smallest_mean_go(height: int, width: int, scope: str) -> None:
    model = mlp()
    before = [model[0].weight.detach().abs(), model[2].weight.detach().abs()]
    prune_(model, Magnitude(0.5, scope=scope, pattern=f"{height}x{width}"))
    total = gone = 0
    for layer, old in zip((model[0], model[2]), before, strict=True):
        dead, alive = [], []
        for rows, values in zip((layer.weight != 0).split(height), old.split(height), strict=True):
            for block, size in zip(rows.split(width, 1), values.split(width, 1), strict=True):
                assert block.all() or not block.any()
                (alive if block.any() else dead).append(float(size.mean()))
        assert scope == "global" or (len(dead) == round(0.5 * len(dead + alive)) and max(dead) <= min(alive) + 1e-6)
        total, gone = total + len(dead + alive), gone + len(dead)
    assert scope == "layer" or gone == round(0.5 * total)
    # What was pruned goes first again: more sparsity takes more of what lives.
    masks = [model[i].weight.detach() != 0 for i in (0, 2)]
    prune_(model, Magnitude(0.75, scope=scope, pattern=f"{height}x{width}"))
    assert all(not ((model[i].weight != 0) & ~mask).any() for i, mask in zip((0, 2), masks, strict=True))
    assert zeros(model[0].weight) + zeros(model[2].weight) > sum(int((~mask).sum()) for mask in masks)


def test_patterns_of_convolutions_run_over_their_flattened_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    prune_(model, Magnitude(0.5, pattern="2:4"))
    assert (model[0].weight.flatten(1)[:, :24].reshape(8, 6, 4) != 0).sum(-1).eq(2).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.4, "pattern": "2:4"}, "sparsity must be 0.5 for '2:4', got 0.4"),
        ({"sparsity": 0.5, "pattern": "2-4"}, "pattern must be None, 'RxC' or 'N:M'.* got '2-4'"),
        ({"sparsity": 0.5, "pattern": 24}, "pattern must be None, .* got 24"),
        ({"sparsity": 0.0, "pattern": "5:4"}, "at most M of M, got '5:4'"),
        ({"sparsity": 0.5, "pattern": "0x4"}, "pattern must be None, .* got '0x4'"),
        ({"sparsity": 0.5, "pattern": "2:4", "scope": "global"}, "scope must be 'layer' for '2:4', got 'global'"),
    ],
)
def test_bad_patterns(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Magnitude: .*{message}"):
        Magnitude(**arguments)


def test_layers_that_do_not_have_the_pattern_stay_dense() -> None:
    model = mlp()
    prune_(model, Magnitude(0.5, pattern="2:4", skip=("2",)))
    finalize_(model)
    prune_(model, Magnitude(0.5, skip=("0",)))
    finalize_(model)
    report = to_sparse_(model, Sparse(format="nm2:4", min_weights=0), measure=sparse_wins)
    assert isinstance(model[0], SparseLinear)
    assert isinstance(model[2], nn.Linear)
    assert "not 2:4" in report.rows[1]["why"]
