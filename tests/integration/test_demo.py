"""The demo end to end in its short form: files, fresh process, goals. The choice of layers is injected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import fastsparse
from fastsparse import demo
from fastsparse.nn import Int8Linear, SparseLinear
from fastsparse.select import Candidate

PLAN = demo.QUICK


def each_kind_wins_once(candidate: Candidate) -> float:
    """The first layer becomes int8, the two after it sparse, the head stays dense."""
    if candidate.implementation == "dense":
        return 4e-6
    if candidate.layer == "6":
        return 8e-6
    return 1e-6 if candidate.implementation == ("int8" if candidate.layer == "0" else "sparse") else 2e-6


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "made" / "on the way"
    assert demo.run(folder, seed=3, quick=True, measure=each_kind_wins_once) == 0
    return folder


@pytest.fixture(scope="module")
def facts(output: Path) -> dict[str, Any]:
    return json.loads((output / "demo.json").read_text())


@pytest.fixture(scope="module")
def stages(facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in facts["stages"]}


def test_every_stage_is_measured(facts: dict[str, Any], stages: dict[str, dict[str, Any]]) -> None:
    names = [demo.TEACHER, demo.DENSE, demo.PRUNED, demo.TRAINED, demo.CONVERTED, demo.LOADED]
    assert list(stages) == names
    for stage in facts["stages"]:
        assert stage["accuracy"] > 90
        assert stage["one_image"] > 0
        assert stage["batch"] > 0
        assert stage["one_image_speedup_over_dense"] > 0
        assert stage["one_image_speedup_over_compile"] is None


def test_accuracy_survives(stages: dict[str, dict[str, Any]], facts: dict[str, Any]) -> None:
    assert stages[demo.CONVERTED]["accuracy"] == stages[demo.LOADED]["accuracy"]
    assert stages[demo.DENSE]["accuracy"] - stages[demo.LOADED]["accuracy"] <= demo.ACCURACY_GOAL
    assert "reached: the loaded network predicts the same digit for every test image as the saved one" in facts["goals"]


def test_zeros_survive_from_pruning_to_the_loaded_file(output: Path, stages: dict[str, dict[str, Any]]) -> None:
    assert stages[demo.DENSE]["zeros"] < 0.01
    wanted = sum(round(PLAN.sparsity * n) for n in (64 * 256, 256 * 256, 256 * 64)) / (2 * 16384 + 65536 + 640)
    assert stages[demo.PRUNED]["zeros"] == pytest.approx(wanted)
    assert stages[demo.LOADED]["zeros"] >= stages[demo.TRAINED]["zeros"] >= stages[demo.PRUNED]["zeros"]
    pruned = demo.make_student(PLAN.widths)
    pruned.load_state_dict(safetensors.torch.load_file(output / "pruned.safetensors"))
    assert demo.zeros_lost(pruned, output / "converted.safetensors") == 0
    with torch.no_grad():
        pruned[0].weight.zero_()  # as if more had been pruned than the file holds
    assert demo.zeros_lost(pruned, output / "converted.safetensors") > 0


def test_layers_are_chosen_by_measurement(facts: dict[str, Any]) -> None:
    rows = facts["layers"]["rows"]
    chosen = [(row["layer"], row["chosen"]) for row in rows]
    assert chosen == [("0", "int8"), ("2", "sparse"), ("4", "sparse"), ("6", "dense")]
    assert rows[0]["shape"] == "M=1 K=64 N=256"
    assert rows[3]["why"] == "kept dense: 0.50x"


def test_the_file_holds_what_was_chosen(output: Path, stages: dict[str, dict[str, Any]]) -> None:
    model = fastsparse.load(output / "converted.safetensors", demo.make_student(PLAN.widths))
    assert [type(model[index]) for index in (0, 2, 4, 6)] == [Int8Linear, SparseLinear, SparseLinear, nn.Linear]
    _, _, images, labels = demo.load_digits(3)
    assert demo.accuracy(model, images, labels) == stages[demo.LOADED]["accuracy"]
    for name, file in ((demo.DENSE, "dense-student"), (demo.TEACHER, "teacher"), (demo.CONVERTED, "converted")):
        assert (output / f"{file}.safetensors").stat().st_size == stages[name]["file_bytes"]
    assert stages[demo.DENSE]["file_bytes"] > 2 * stages[demo.CONVERTED]["file_bytes"]


def test_the_plot_is_a_picture(output: Path) -> None:
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")


def trained(seed: int) -> nn.Sequential:
    images, labels, *_ = demo.load_digits(seed)
    model = demo.make_teacher(PLAN, seed)
    for _ in demo.train(model, demo._hard_loss(model), images, labels, epochs=1, seed=seed, rate=1e-3):
        pass
    return model


def test_the_same_seed_gives_the_same_network() -> None:
    random = torch.get_rng_state()
    first, again, other = (trained(seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["1.weight"], other["1.weight"])
    assert torch.equal(torch.get_rng_state(), random)


def test_threads_are_given_back(output: Path) -> None:
    before = torch.get_num_threads()
    with demo._threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name in ("sklearn", "rich") else real(name)
    )
    assert demo.run(quick=True) == 2
    assert capsys.readouterr().err == (
        "fastsparse demo: the demo also needs scikit-learn, rich: pip install scikit-learn rich\n"
    )


def test_a_fresh_process_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(demo.ChildError, match=r"converted in a fresh process: .*absent\.safetensors"):
        demo._fresh_process(tmp_path / "absent.safetensors", "converted", PLAN, 0)


# The goals


def judged(
    loaded: float = 97.5,
    file_bytes: int = 25,
    chosen: str = "int8",
    same: bool = True,
    judge_size: bool = True,
    zeros: float = 0.5,
    lost: int = 0,
) -> demo.Result:
    plan = demo.Plan(widths=(64, 8192, 10), judge_size=judge_size)
    layers = demo.Report("", [])
    layers.add(**{"layer": "0", "chosen": chosen, "dense us": 2.0, "int8 us": 4.0, "sparse us": 1.0})
    stages = [
        demo.Stage(demo.DENSE, 98.0, 0.0, 100, 2.0, 2.0),
        demo.Stage(demo.PRUNED, 98.0, 0.5, 100, 2.0, 2.0),
        demo.Stage(demo.CONVERTED, 98.0, 0.5, file_bytes, 4.0, 4.0),
        demo.Stage(demo.LOADED, loaded, zeros, file_bytes, 4.0, 4.0),
    ]
    result = demo.Result(0, plan, stages, layers)
    demo._judge(result, same, lost)
    return result


def test_slow_is_said_but_does_not_fail() -> None:
    result = judged()
    assert result.ok
    assert "MISSED: the converted layers are 0.50x faster together (above 1)" in result.goals
    assert "reached: the converted layers are 2.00x faster together (above 1)" in judged(chosen="sparse").goals


@pytest.mark.parametrize(
    ("case", "missed"),
    [
        ({"loaded": 96.9}, "MISSED: the converted student loses 1.10 points"),
        ({"file_bytes": 27}, "MISSED: the file is 3.70x smaller than the dense student's (at least 3.8)"),
        ({"same": False}, "MISSED: the loaded network predicts the same digit"),
        ({"zeros": 0.4}, "MISSED: 40.0% of the loaded weights are zero (at least 50%)"),
        ({"lost": 2}, "MISSED: 2 of the zeros were lost from pruning to the loaded file (0)"),
    ],
)
def test_accuracy_zeros_and_size_fail(case: dict[str, Any], missed: str) -> None:
    result = judged(**case)
    assert not result.ok
    assert any(goal.startswith(missed) for goal in result.goals)


def test_a_large_file_does_not_fail_where_nothing_is_faster() -> None:
    result = judged(file_bytes=100, chosen="dense")
    assert result.ok
    assert any("because nothing was faster for 0" in goal for goal in result.goals)
    assert any("no layer was faster converted" in goal for goal in result.goals)


def test_a_small_network_is_not_judged_by_size() -> None:
    result = judged(file_bytes=100, judge_size=False)
    assert result.ok
    assert any(goal.startswith("not judged: ") for goal in result.goals)
