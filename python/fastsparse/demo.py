"""The main job on real data: distill, prune, train for int8, convert where measured faster, save, load, evaluate.

A convolutional teacher learns handwritten digits, a student of linear layers learns from it through the fused loss and
is then pruned and fine-tuned for int8; `convert_` gives each layer the kernel that was measured to be the fastest.

`fastsparse demo` calls `run`. Networks that are compared are measured in turns or in a process of their own. All of it
runs on one thread: two threads wait for each other as soon as another process takes one of their cores, which makes the
training up to five times as long and the figures worthless.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import fastsparse
from fastsparse import ops, prune, quantize, select
from fastsparse.convert import convert_
from fastsparse.distill import Distiller
from fastsparse.nn._packed import PackedLinear
from fastsparse.report import Report

BATCH = 64  # images at once, beside one at a time
TEST_IMAGES = 7 * BATCH
ACCURACY_GOAL = 1.0  # points that the converted student may lose against the dense one
ZEROS_GOAL = 0.5
SIZE_GOAL = 3.8  # times smaller

TEACHER, DENSE, COMPILED = "teacher, convolutions", "dense student", "dense, torch.compile"
PRUNED, TRAINED = "pruned", "pruned, int8 training"
CONVERTED, LOADED = "converted", "converted, fresh process"


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long.

    The student's wide layers are where kernels matter. The last one, 128 -> 10, takes a few microseconds whoever
    computes it, so that measuring should leave it dense; it is too small to be pruned.
    """

    channels: tuple[int, int] = (64, 128)
    widths: tuple[int, ...] = (64, 1024, 2048, 1024, 128, 10)
    sparsity: float = 0.85
    min_weights: int = 10_000
    teacher_epochs: int = 10
    dense_epochs: int = 14
    prune_epochs: int = 16  # the sparsity grows during the first two thirds
    int8_epochs: int = 4
    compile: bool = True
    judge_size: bool = True  # a small network is mostly scales, biases and file header


QUICK = Plan(
    channels=(8, 16),
    widths=(64, 256, 256, 64, 10),
    sparsity=0.7,
    teacher_epochs=12,
    dense_epochs=8,
    prune_epochs=6,
    int8_epochs=2,
    compile=False,
    judge_size=False,
)


@dataclass
class Stage:
    """One line of the final table. Times in seconds; zeros: the part of the weights, without biases."""

    name: str
    accuracy: float | None = None
    zeros: float | None = None
    file_bytes: int | None = None
    one_image: float | None = None
    batch: float | None = None
    note: str = ""


@dataclass
class Result:
    """All that the demo found; demo.json holds it."""

    seed: int
    plan: Plan
    stages: list[Stage]
    layers: Report
    goals: list[str] = field(default_factory=list)
    ok: bool = True
    seconds: float = 0.0

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def speedup(self, stage: Stage, over: str, what: str) -> float | None:
        """How many times faster `stage` is than the stage called `over`, in one_image or batch."""
        theirs = [getattr(other, what) for other in self.stages if other.name == over]
        ours = getattr(stage, what)
        return theirs[0] / ours if ours and theirs and theirs[0] else None

    def judge(self, passed: bool, text: str, counts: bool = True) -> None:
        self.goals.append(f"{'reached' if passed else 'MISSED'}: {text}")
        self.ok = self.ok and (passed or not counts)


def run(
    output: str | os.PathLike[str] = "demo-output",
    seed: int = 0,
    quick: bool = False,
    *,
    measure: select.Measure | None = None,
) -> int:
    """Runs the demo; under three minutes on two cores.

    Args:
        output: folder, made if need be, for demo.json, demo.png and a safetensors file per stage.
        seed: same seed, same accuracy.
        quick: small networks, few steps, no torch.compile; the file size is then not judged.
        measure: for `convert_`; the default is the real clock.

    Returns:
        The exit status: 0; 1 if accuracy, zeros or file size miss their goal (times never fail); 2 if a package is
        missing.
    """
    missing = missing_extras()
    if missing is not None:
        print(f"fastsparse demo: {missing}", file=sys.stderr)
        return 2
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    with _threads(1):
        result = _work(folder, seed, QUICK if quick else Plan(), measure)
    _write_json(result, folder / "demo.json")
    _plot(result, folder / "demo.png")
    _print(result, folder)
    return 0 if result.ok else 1


def missing_extras() -> str | None:
    """Which packages the demo lacks and how to get them, in one sentence; or None."""
    wanted = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich"}
    missing = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
    if not missing:
        return None
    return f"the demo also needs {', '.join(missing)}: pip install {' '.join(missing)}"


# The stages

Loss = Callable[[Tensor, Tensor], Tensor]


def _work(folder: Path, seed: int, plan: Plan, measure: select.Measure | None) -> Result:
    start = time.perf_counter()
    data = load_digits(seed)
    images, labels, test_images, test_labels = data
    files = {name: folder / f"{name.split(',')[0].replace(' ', '-')}.safetensors" for name in (TEACHER, DENSE, PRUNED)}
    files[TRAINED], files[CONVERTED] = folder / "int8-training.safetensors", folder / "converted.safetensors"
    with _progress() as progress:

        @contextmanager
        def step(text: str) -> Iterator[None]:
            task = progress.add_task(text, total=None)
            yield
            progress.update(task, total=1, completed=1)

        def learn(text: str, model: nn.Module, loss: Loss, epochs: int, rate: float) -> Iterator[int]:
            task = progress.add_task(text, total=epochs)
            for epoch in train(model, loss, images, labels, epochs, seed, rate):
                yield epoch
                progress.advance(task)

        teacher = make_teacher(plan, seed)
        for _ in learn("train the teacher", teacher, _hard_loss(teacher), plan.teacher_epochs, 2e-3):
            pass
        student = make_student(plan.widths, seed)
        distiller = Distiller(teacher, student, temperature=2.0, alpha=0.8)

        def soft_loss(x: Tensor, target: Tensor) -> Tensor:
            return distiller(x, target).loss

        for _ in learn("distill the student", student, soft_loss, plan.dense_epochs, 1e-3):
            pass
        networks: dict[str, nn.Module] = {TEACHER: teacher, DENSE: copy.deepcopy(student)}

        growing = max(1, plan.prune_epochs * 2 // 3)
        for epoch in learn("prune it, step by step", student, soft_loss, plan.prune_epochs, 1e-3):
            sparsity = prune.cubic(min(1.0, (epoch + 1) / growing), plan.sparsity)
            prune.prune_(student, prune.Magnitude(sparsity, min_weights=plan.min_weights))
        networks[PRUNED] = copy.deepcopy(student)
        prune.finalize_(networks[PRUNED])

        quantize.prepare_qat_(student)
        for _ in learn("train it for int8", student, soft_loss, plan.int8_epochs, 3e-4):
            pass
        quantize.finalize_qat_(student)
        prune.finalize_(student)
        networks[TRAINED] = copy.deepcopy(student)
        for name, model in networks.items():
            safetensors.torch.save_file(model.state_dict(), files[name])

        with step("time every layer"):
            # One image: a reader of handwriting answers while the pen still moves. The choice holds for that.
            candidates = [quantize.Int8Dynamic(), prune.Sparse()]
            layers = convert_(student, candidates, test_images[:1], measure=measure)
            networks[CONVERTED] = student
            fastsparse.save(student, files[CONVERTED])
        with step("evaluate all networks"):
            times = measure_networks(networks, test_images)
            stages = [
                Stage(name, accuracy(model, test_images, test_labels), zeros(model), _bytes(files[name]), *times[name])
                for name, model in networks.items()
            ]
        with step("converted, in a fresh process"):
            loaded, predictions = _fresh_process(files[CONVERTED], "converted", plan, seed)
            stages.append(loaded)
        if plan.compile:
            with step("torch.compile, in a fresh process"):
                try:
                    compiled, _ = _fresh_process(files[DENSE], "compiled", plan, seed)
                except ChildError as error:  # no C++ compiler, most often: the rest of the demo stands without
                    compiled = Stage(COMPILED, note=f"not measured: {error}")
            stages.insert(2, compiled)

    result = Result(seed, plan, stages, layers)
    same = predict(student, test_images).tolist() == predictions
    _judge(result, same, zeros_lost(networks[PRUNED], files[CONVERTED]))
    result.seconds = time.perf_counter() - start
    return result


def load_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, which come with the package.

    Returns:
        (images float32 [1349, 64] in 0..1, labels int64 [1349], test images [448, 64], test labels [448]).
    """
    from sklearn.datasets import load_digits as digits
    from sklearn.model_selection import train_test_split

    data = digits()
    parts = train_test_split(
        data.data, data.target, test_size=TEST_IMAGES, random_state=seed % 2**32, stratify=data.target
    )
    images, test_images = (torch.tensor(part / 16, dtype=torch.float32) for part in parts[:2])
    labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in parts[2:])
    return images, labels, test_images, test_labels


def make_teacher(plan: Plan, seed: int = 0) -> nn.Sequential:
    """Two 3 x 3 convolutions and two linear layers over images that come as rows of 64 pixels."""
    first, second = plan.channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, first, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * second, 256),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(256, 10),
        )


def make_student(widths: Sequence[int], seed: int = 0) -> nn.Sequential:
    """Linear layers of these widths with ReLU between."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _hard_loss(model: nn.Module) -> Loss:
    return lambda x, target: nn.functional.cross_entropy(model(x), target, label_smoothing=0.05)


def train(
    model: nn.Module, loss: Loss, images: Tensor, labels: Tensor, epochs: int, seed: int, rate: float
) -> Iterator[int]:
    """Trains in place and yields before every epoch. The same on every run with as many threads.

    Weights must not be exchanged in between; a mask or a rounding that is put over them is fine.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = len(images) // 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches)
    with torch.random.fork_rng(devices=[]):  # dropout draws from torch's own state
        torch.manual_seed(seed)
        for epoch in range(epochs):
            yield epoch
            model.train()
            for batch in torch.randperm(len(images), generator=generator).split(128)[:batches]:
                # A little noise: 1349 images are few for millions of weights.
                noisy = images[batch] + 0.05 * torch.randn(len(batch), images.shape[1], generator=generator)
                value = loss(noisy, labels[batch])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                schedule.step()
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The digit of each image: int64 [images]."""
    return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100.0 * (predict(model, images) == labels).sum().item() / len(labels)


def zeros(model: nn.Module) -> float:
    """The part of the weights of linear and convolution layers, packed ones too, that is exactly zero."""
    weights = [
        ops.unpack(module.weight) if isinstance(module, PackedLinear) else module.weight
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, PackedLinear))
    ]
    return 1 - sum(int(torch.count_nonzero(weight)) for weight in weights) / sum(w.numel() for w in weights)


def zeros_lost(pruned: nn.Module, file: Path) -> int:
    """How many weights that are zero in `pruned` are not zero in the file."""
    stored = fastsparse.load(file)
    lost = 0
    for name, module in pruned.named_modules():
        if isinstance(module, nn.Linear):
            weight = stored[f"{name}.weight"]
            weight = ops.unpack(weight) if weight.dtype == torch.uint8 else weight
            lost += int(torch.count_nonzero(weight[module.weight == 0]))
    return lost


def measure_networks(models: dict[str, nn.Module], images: Tensor) -> dict[str, tuple[float, float]]:
    """name -> seconds for (one image, a batch), all networks by turns."""
    times: list[list[float]] = []
    for inputs in (images[:1], images[:BATCH]):
        candidates = [
            select.Candidate("network", name, select.repeat(model, [(inputs, 1)])) for name, model in models.items()
        ]
        times.append(select.clock(candidates, rounds=7))
    return {name: (times[0][index], times[1][index]) for index, name in enumerate(models)}


# A fresh process


class ChildError(RuntimeError):
    """The other process did not get through; the message is the last line it wrote."""


def _fresh_process(file: Path, kind: str, plan: Plan, seed: int) -> tuple[Stage, list[int]]:
    """Loads, evaluates and times a file in a new Python. Returns the stage and what it predicts for the test images."""
    widths = ",".join(map(str, plan.widths))
    command = [sys.executable, "-m", "fastsparse.demo", str(file), "--kind", kind, "--widths", widths]
    try:
        # 100 s: what three minutes leave; a cold torch.compile takes 10 to 40.
        child = subprocess.run([*command, "--seed", str(seed)], capture_output=True, text=True, timeout=100)
    except subprocess.TimeoutExpired as error:
        raise ChildError("no answer after 100 s") from error
    if child.returncode != 0:
        lines = child.stderr.strip().splitlines() or [f"exit status {child.returncode}"]
        raise ChildError(f"{kind} in a fresh process: {lines[-1]}")
    answer = json.loads(child.stdout.strip().splitlines()[-1])
    return Stage(**answer["stage"]), answer["predictions"]


def _child(arguments: Sequence[str] | None = None) -> None:
    """The other side of `_fresh_process`: prints one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m fastsparse.demo", description="Evaluates one file of the demo.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--kind", choices=["converted", "compiled"], required=True)
    parser.add_argument("--widths", required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    _, _, images, labels = load_digits(options.seed)
    model: nn.Module = make_student([int(width) for width in options.widths.split(",")]).eval()
    start = time.perf_counter()
    if options.kind == "converted":
        fastsparse.load(options.file, model)
        stage = Stage(LOADED, note=f"loaded in {time.perf_counter() - start:.2f} s")
    else:
        model.load_state_dict(safetensors.torch.load_file(options.file))
        model.compile(dynamic=False)
        with torch.no_grad():
            model(images[:1])
            model(images[:BATCH])
        stage = Stage(COMPILED, note=f"compiled in {time.perf_counter() - start:.0f} s")
    stage.accuracy = accuracy(model, images, labels)
    stage.zeros = zeros(model)
    stage.file_bytes = _bytes(options.file)
    stage.one_image, stage.batch = measure_networks({stage.name: model}, images)[stage.name]
    print(json.dumps({"stage": asdict(stage), "predictions": predict(model, images).tolist()}))


# Judging and showing


def _judge(result: Result, same_predictions: bool, zeros_lost: int) -> None:
    dense, pruned, converted, loaded = (result.stage(name) for name in (DENSE, PRUNED, CONVERTED, LOADED))
    assert dense.accuracy is not None
    assert loaded.accuracy is not None
    assert pruned.zeros is not None
    assert loaded.zeros is not None
    assert dense.file_bytes
    assert converted.file_bytes
    lost = dense.accuracy - loaded.accuracy
    text = f"the converted student loses {lost:.2f} points of accuracy against the dense one (at most {ACCURACY_GOAL})"
    result.judge(lost <= ACCURACY_GOAL, text)
    result.judge(same_predictions, "the loaded network predicts the same digit for every test image as the saved one")
    text = f"{100 * loaded.zeros:.1f}% of the loaded weights are zero (at least {100 * ZEROS_GOAL:.0f}%)"
    result.judge(loaded.zeros >= ZEROS_GOAL, text)
    text = f"{zeros_lost} of the zeros were lost from pruning to the loaded file (0)"
    result.judge(zeros_lost == 0, text)

    ratio = dense.file_bytes / converted.file_bytes
    text = f"the file is {ratio:.2f}x smaller than the dense student's (at least {SIZE_GOAL})"
    kept = [row["layer"] for row in result.layers.rows if row["chosen"] == select.DENSE]
    wide = [name for name in kept if _weights(result.plan, name) > 200_000]
    if not result.plan.judge_size:
        result.goals.append(f"not judged: the file is {ratio:.2f}x smaller; this network is too small for the goal")
    elif ratio < SIZE_GOAL and wide:
        result.judge(False, f"{text}, because nothing was faster for {', '.join(wide)}", counts=False)
    else:
        result.judge(ratio >= SIZE_GOAL, text)

    changed = [row for row in result.layers.rows if row["chosen"] != select.DENSE]
    if changed:
        speedup = sum(row["dense us"] for row in changed) / sum(row[f"{row['chosen']} us"] for row in changed)
        result.judge(speedup > 1, f"the converted layers are {speedup:.2f}x faster together (above 1)", counts=False)
    else:
        result.judge(False, "no layer was faster converted on this machine, so none was", counts=False)
    for over in (DENSE, COMPILED):
        whole = result.speedup(loaded, over, "one_image")
        if whole is not None:
            text = f"the loaded network is {whole:.2f}x faster than the {over} for one image (above 1)"
            result.judge(whole > 1, text, counts=False)


def _weights(plan: Plan, layer: str) -> int:
    index = int(layer) // 2  # a ReLU stands between two linear layers
    return plan.widths[index] * plan.widths[index + 1]


def _write_json(result: Result, path: Path) -> None:
    stages = []
    for stage in result.stages:
        line: dict[str, Any] = asdict(stage)
        for what, over in itertools.product(("one_image", "batch"), (DENSE, COMPILED)):
            line[f"{what}_speedup_over_{'dense' if over == DENSE else 'compile'}"] = result.speedup(stage, over, what)
        stages.append(line)
    facts = {
        "ok": result.ok,
        "goals": result.goals,
        "seed": result.seed,
        "plan": asdict(result.plan),
        "batch": BATCH,
        "seconds": round(result.seconds, 1),
        "stages": stages,
        "layers": result.layers.to_dict(),
        "machine": {"python": platform.python_version(), "processor": _processor(), **fastsparse.info()},
    }
    path.write_text(json.dumps(facts, indent=2, default=str) + "\n", encoding="utf-8")


def _print(result: Result, folder: Path) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="Handwritten digits, one thread", box=box.SIMPLE_HEAD, title_justify="left", padding=0)
    table.add_column("stage", no_wrap=True)
    batch = f"{BATCH} images\nms"
    for title in ("accuracy\n%", "zeros\n%", "file\nMB", "1 image\nms", "over\ndense", batch, "over\ndense"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage in result.stages:
        table.add_row(
            stage.name,
            _text(stage.accuracy, "{:.2f}"),
            _text(stage.zeros, "{:.1f}", 100),
            _text(stage.file_bytes, "{:.2f}", 1e-6),
            _text(stage.one_image, "{:.2f}", 1e3),
            _text(result.speedup(stage, DENSE, "one_image"), "{:.2f}x"),
            _text(stage.batch, "{:.2f}", 1e3),
            _text(result.speedup(stage, DENSE, "batch"), "{:.2f}x"),
        )
    console.print(table)

    table = Table(title="Layer by layer, chosen for one image", box=box.SIMPLE_HEAD, title_justify="left", padding=0)
    table.add_column("layer", no_wrap=True)
    for title, _ in _LAYER_FIGURES:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("chosen", no_wrap=True)
    for row in result.layers.rows:
        figures = (_text(row.get(key), form) for key, form in _LAYER_FIGURES)
        table.add_row(f"{row['layer']}: {_widths(row)}", *figures, row["chosen"])
    console.print(table)

    for line in (*result.layers.notes, *(f"{s.name}: {s.note}" for s in result.stages if s.note), "", *result.goals):
        console.print(line, markup=False, highlight=False)
    last = f"\n{result.seconds:.0f} s. demo.png, demo.json and the networks are in {folder}"
    console.print(last, markup=False, highlight=False, soft_wrap=True)


_LAYER_FIGURES = (("dense us", "{:.1f}"), ("int8 us", "{:.1f}"), ("sparse us", "{:.1f}"), ("speed-up", "{:.2f}x"))


def _widths(row: dict[str, Any]) -> str:
    """ "1024 -> 2048" for a row with shape "M=1 K=1024 N=2048"."""
    return str(row["shape"]).split(" K=")[1].replace(" N=", " -> ")


def _text(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(value * factor)


_GREY, _GREEN, _BLUE = "#9aa5b1", "#2a9d8f", "#457b9d"
_KIND_COLOURS = {select.DENSE: _GREY, "int8": _BLUE, "sparse": _GREEN}
_BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # a line may pass under a figure, not through it


def _plot(result: Result, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Not pyplot: that would choose a display and stay in the caller's process.
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12, hspace=0.06, wspace=0.03)
    figure = Figure(figsize=(12, 8.4), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    mosaic = figure.subplot_mosaic("AAABBB;CCDDEE")
    axes = dict(zip(("one", "batch", "layers", "file", "accuracy"), (mosaic[key] for key in "ABCDE"), strict=True))
    figure.suptitle(
        f"Handwritten digits, from teacher to converted student, on one thread of {_processor()}",
        fontsize=13,
        x=0.01,
        ha="left",
    )

    stages = [stage for stage in result.stages if stage.one_image is not None]
    names = [stage.name.replace(", ", ",\n") for stage in stages]
    colours = [_GREEN if stage.name in (CONVERTED, LOADED) else _GREY for stage in stages]
    for key, what, title in (("one", "one_image", "one image"), ("batch", "batch", f"{BATCH} images")):
        texts = []
        for stage in stages:
            ratio = result.speedup(stage, DENSE, what)
            times = "" if stage.name == DENSE or ratio is None else f"  ({ratio:.2f}x)"
            texts.append(f"{getattr(stage, what) * 1e3:.{2 if what == 'one_image' else 1}f} ms{times}")
        values = [getattr(stage, what) * 1e3 for stage in stages]
        _bars(axes[key], names, values, texts, colours, f"Time for {title} (speed-up over the dense student)")

    rows = [row for row in result.layers.rows if "speed-up" in row]
    names_, values, texts, colours_ = [], [], [], []
    for row in rows:
        for kind in ("int8", "sparse"):
            if row.get(f"{kind} us"):
                ratio = row["dense us"] / row[f"{kind} us"]
                chosen = row["chosen"] == kind
                names_.append(f"{_widths(row)} {kind}".replace("->", "\u2192"))
                values.append(ratio)
                texts.append(f"{ratio:.2f}x{', chosen' if chosen else ''}")
                colours_.append(_KIND_COLOURS[kind] if chosen else _GREY)
    _bars(axes["layers"], names_, values, texts, colours_, "Over dense, layer by layer, one image")
    axes["layers"].axvline(1, color="#444444", linewidth=1, linestyle=":")

    files = [stage for stage in result.stages if stage.name in (TEACHER, DENSE, PRUNED, CONVERTED)]
    sizes = [(stage.file_bytes or 0) / 1e6 for stage in files]
    dense = (result.stage(DENSE).file_bytes or 0) / 1e6
    _bars(
        axes["file"],
        [stage.name.split(",")[0] for stage in files],
        sizes,
        [f"{size:.3g} MB" + (f"  ({dense / size:.2f}x smaller)" if size < dense else "") for size in sizes],
        [_GREEN if stage.name == CONVERTED else _GREY for stage in files],
        "File size",
    )

    # Points, not bars: the axis does not begin at zero.
    axis, figures = axes["accuracy"], [stage.accuracy or 0.0 for stage in stages]
    axis.scatter(figures, range(len(stages)), color=colours, s=70, zorder=2)
    for position, (value, stage) in enumerate(zip(figures, stages, strict=True)):
        text = f"{value:.2f}%" + (f", {100 * stage.zeros:.0f}% zeros" if stage.zeros and stage.zeros > 0.01 else "")
        axis.annotate(text, (value, position), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
    lowest, highest = min(figures), max(figures)
    axis.set_xlim(lowest - 1.2, highest + 1.2)
    axis.set_ylim(len(stages) - 0.5, -0.7)
    short = [stage.name.split(", ")[0 if stage.name == TEACHER else -1] for stage in stages]
    axis.set_yticks(range(len(stages)), short)
    axis.set_title(f"Accuracy on {TEST_IMAGES} test images", loc="left", fontsize=11)
    axis.grid(axis="x", color="#dddddd", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    figure.savefig(path)


def _bars(axis: Any, names: list[str], values: list[float], texts: list[str], colours: list[str], title: str) -> None:
    """Horizontal bars from the top down, each with its figure at the end: no scale to read them off."""
    axis.barh(range(len(values)), values, color=colours, height=0.62)
    for position, (value, text) in enumerate(zip(values, texts, strict=True)):
        axis.annotate(text, (value, position), xytext=(5, 0), textcoords="offset points", va="center", bbox=_BLANK)
    axis.set_yticks(range(len(values)), names)
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.set_xlim(0, max(values, default=1) * 1.55)  # room for the figures
    axis.set_xticks([])
    axis.set_title(title, loc="left", fontsize=11)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _progress() -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        refresh_per_second=4,  # drawing takes the interpreter away from what is measured
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _bytes(path: Path) -> int:
    return path.stat().st_size


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    _child()
