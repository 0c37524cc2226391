"""The demo end to end in its short form: files, fresh process, goals. The choice of layers is injected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastsparse
from fastsparse import demo
from fastsparse.nn import Int8Linear
from fastsparse.select import Candidate

PLAN = demo.QUICK


def wide_layers_win(candidate: Candidate) -> float:
    """The head stays dense, the three layers before it are converted."""
    if candidate.implementation == "dense":
        return 4e-6
    return 8e-6 if candidate.layer == "6" else 2e-6


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "made" / "on the way"
    assert demo.run(folder, seed=3, quick=True, measure=wide_layers_win) == 0
    return folder


@pytest.fixture(scope="module")
def facts(output: Path) -> dict[str, Any]:
    return json.loads((output / "demo.json").read_text())


def test_every_stage_is_measured(facts: dict[str, Any]) -> None:
    assert [stage["name"] for stage in facts["stages"]] == [demo.DENSE, demo.INT8, demo.LOADED]
    for stage in facts["stages"]:
        assert stage["accuracy"] > 90
        assert stage["one_image"] > 0
        assert stage["batch"] > 0
        assert stage["one_image_speedup_over_eager"] > 0
        assert stage["one_image_speedup_over_compile"] is None


def test_int8_keeps_the_accuracy_through_the_file(facts: dict[str, Any]) -> None:
    dense, int8, loaded = (stage["accuracy"] for stage in facts["stages"])
    assert int8 == loaded
    assert dense - loaded <= demo.ACCURACY_GOAL
    assert "reached: the loaded network predicts the same digit for every test image as the saved one" in facts["goals"]


def test_layers_are_chosen_by_measurement(facts: dict[str, Any]) -> None:
    rows = facts["layers"]["rows"]
    assert [(row["layer"], row["chosen"]) for row in rows] == [
        ("0", "int8"),
        ("2", "int8"),
        ("4", "int8"),
        ("6", "dense"),
    ]
    assert rows[0]["shape"] == "M=1 K=64 N=512"
    assert rows[3]["why"] == "kept dense: 0.50x"


def test_the_files_hold_what_was_chosen(output: Path, facts: dict[str, Any]) -> None:
    model = fastsparse.load(output / "int8.safetensors", demo.make_network(PLAN.widths))
    assert [isinstance(model[index], Int8Linear) for index in (0, 2, 4, 6)] == [True, True, True, False]
    assert isinstance(model[6], nn.Linear)
    _, _, images, labels = demo.load_digits(3)
    assert demo.accuracy(model, images, labels) == facts["stages"][2]["accuracy"]
    sizes = [(output / name).stat().st_size for name in ("dense.safetensors", "int8.safetensors")]
    assert sizes == [facts["stages"][0]["file_bytes"], facts["stages"][1]["file_bytes"]]
    assert sizes[0] > 3 * sizes[1]


def test_the_plot_is_a_picture(output: Path) -> None:
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")


def trained(seed: int) -> nn.Sequential:
    images, labels, *_ = demo.load_digits(seed)
    model = demo.make_network(PLAN.widths, seed)
    for _ in demo.train(model, images, labels, epochs=1, seed=seed):
        pass
    return model


def test_the_same_seed_gives_the_same_network() -> None:
    random = torch.get_rng_state()
    first, again, other = (trained(seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["0.weight"], other["0.weight"])
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
    with pytest.raises(demo.ChildError, match=r"int8 in a fresh process: .*absent\.safetensors"):
        demo._fresh_process(tmp_path / "absent.safetensors", "int8", PLAN, 0)


# The goals


def judged(
    loaded: float = 98.0, int8_bytes: int = 25, chosen: str = "int8", same: bool = True, judge_size: bool = True
) -> demo.Result:
    plan = demo.Plan(widths=(64, 8192, 10), judge_size=judge_size)
    layers = demo.Report("", [])
    row = {"layer": "0", "chosen": chosen, "dense us": 2.0, "int8 us": 4.0}
    layers.add(**row)
    stages = [
        demo.Stage(demo.DENSE, 98.0, 100, 2.0, 2.0),
        demo.Stage(demo.INT8, 98.0, int8_bytes, 4.0, 4.0),
        demo.Stage(demo.LOADED, loaded, int8_bytes, 4.0, 4.0),
    ]
    result = demo.Result(0, plan, stages, layers)
    demo._judge(result, same)
    return result


def test_slow_is_said_but_does_not_fail() -> None:
    result = judged()
    assert result.ok
    assert "MISSED: the converted layers are 0.50x faster together (above 1)" in result.goals


@pytest.mark.parametrize(
    ("case", "missed"),
    [
        ({"loaded": 97.4}, "MISSED: int8 loses 0.60 points of accuracy (at most 0.5)"),
        ({"int8_bytes": 27}, "MISSED: the int8 file is 3.70x smaller (at least 3.8)"),
        ({"same": False}, "MISSED: the loaded network predicts the same digit"),
    ],
)
def test_accuracy_and_size_fail(case: dict[str, Any], missed: str) -> None:
    result = judged(**case)
    assert not result.ok
    assert any(goal.startswith(missed) for goal in result.goals)


def test_a_large_file_does_not_fail_where_int8_is_slower() -> None:
    result = judged(int8_bytes=100, chosen="dense")
    assert result.ok
    assert any("because int8 was not faster for 0" in goal for goal in result.goals)
    assert any("none was converted" in goal for goal in result.goals)


def test_a_small_network_is_not_judged_by_size() -> None:
    result = judged(int8_bytes=100, judge_size=False)
    assert result.ok
    assert result.goals[2].startswith("not judged: ")
