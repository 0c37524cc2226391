"""The main job on real data: train on handwritten digits, convert where measured faster, save, load, evaluate.

`fastsparse demo` calls `run`. Every network that is compared with int8 is measured in a process of its own or in turns
with it. All of it runs on one thread: two threads wait for each other as soon as another process takes one of their
cores, which makes the training up to five times as long and the figures worthless.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import fastsparse
from fastsparse import select
from fastsparse.quantize import Int8Dynamic, quantize_
from fastsparse.report import Report

BATCH = 64  # images at once, beside one at a time
TEST_IMAGES = 7 * BATCH
ACCURACY_GOAL = 0.5  # points that int8 may lose
SIZE_GOAL = 3.8  # times smaller

DENSE, COMPILED, INT8, LOADED = "dense, eager", "dense, torch.compile", "int8", "int8, fresh process"


@dataclass(frozen=True)
class Plan:
    """What is trained, and for how long.

    The wide layers are where kernels matter. The last one, 128 -> 10, takes a few microseconds whoever computes it, so
    that measuring should leave it dense.
    """

    widths: tuple[int, ...] = (64, 1024, 2048, 1024, 128, 10)
    epochs: int = 16
    compile: bool = True
    judge_size: bool = True  # a small network is mostly scales, biases and file header


QUICK = Plan(widths=(64, 512, 512, 64, 10), epochs=8, compile=False, judge_size=False)


@dataclass
class Stage:
    """One line of the final table. Times in seconds."""

    name: str
    accuracy: float | None = None
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
    """Runs the demo; under two minutes on two cores.

    Args:
        output: folder, made if need be, for demo.json, demo.png, dense.safetensors and int8.safetensors.
        seed: same seed, same accuracy.
        quick: a small network, few steps, no torch.compile; the file size is then not judged.
        measure: for `quantize_`; the default is the real clock.

    Returns:
        The exit status: 0; 1 if accuracy or file size miss their goal (times never fail); 2 if a package is missing.
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


def _work(folder: Path, seed: int, plan: Plan, measure: select.Measure | None) -> Result:
    start = time.perf_counter()
    images, labels, test_images, test_labels = load_digits(seed)
    dense_file, int8_file = folder / "dense.safetensors", folder / "int8.safetensors"
    with _progress() as progress:

        @contextmanager
        def step(text: str) -> Iterator[None]:
            task = progress.add_task(text, total=None)
            yield
            progress.update(task, total=1, completed=1)

        task = progress.add_task("train the dense network", total=plan.epochs)
        model = make_network(plan.widths, seed)
        for _ in train(model, images, labels, plan.epochs, seed):
            progress.advance(task)
        safetensors.torch.save_file(model.state_dict(), dense_file)

        with step("time every layer, dense and int8"):
            int8 = copy.deepcopy(model)
            # One image: a reader of handwriting answers while the pen still moves. The choice holds for that.
            layers = quantize_(int8, Int8Dynamic(), test_images[:1], measure=measure)
            fastsparse.save(int8, int8_file)
        with step("evaluate both networks"):
            times = measure_networks({DENSE: model, INT8: int8}, test_images)
            dense_stage = Stage(DENSE, accuracy(model, test_images, test_labels), _bytes(dense_file), *times[DENSE])
            int8_stage = Stage(INT8, accuracy(int8, test_images, test_labels), _bytes(int8_file), *times[INT8])
        with step("int8 in a fresh process"):
            loaded, predictions = _fresh_process(int8_file, "int8", plan, seed)
        stages = [dense_stage, int8_stage, loaded]
        if plan.compile:
            with step("torch.compile in a fresh process"):
                try:
                    compiled, _ = _fresh_process(dense_file, "compiled", plan, seed)
                except ChildError as error:  # no C++ compiler, most often: the rest of the demo stands without
                    compiled = Stage(COMPILED, note=f"not measured: {error}")
            stages.insert(1, compiled)

    result = Result(seed, plan, stages, layers)
    _judge(result, predict(int8, test_images).tolist() == predictions)
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


def make_network(widths: Sequence[int], seed: int = 0) -> nn.Sequential:
    """Linear layers of these widths with ReLU between."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, seed: int) -> Iterator[None]:
    """Trains in place and yields after every epoch. The same on every run with as many threads."""
    generator = torch.Generator().manual_seed(seed)
    batches = len(images) // 128
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * batches)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(128)[:batches]:
            # A little noise: 1349 images are few for millions of weights.
            noisy = images[batch] + 0.05 * torch.randn(len(batch), images.shape[1], generator=generator)
            loss = nn.functional.cross_entropy(model(noisy), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        yield
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """The digit of each image: int64 [images]."""
    return torch.cat([model(batch).argmax(1) for batch in images.split(BATCH)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent."""
    return 100.0 * (predict(model, images) == labels).sum().item() / len(labels)


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
        # 100 s: what two minutes leave; a cold torch.compile takes 10 to 40.
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
    parser.add_argument("--kind", choices=["int8", "compiled"], required=True)
    parser.add_argument("--widths", required=True)
    parser.add_argument("--seed", type=int, required=True)
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    _, _, images, labels = load_digits(options.seed)
    model = make_network([int(width) for width in options.widths.split(",")]).eval()
    start = time.perf_counter()
    if options.kind == "int8":
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
    stage.file_bytes = _bytes(options.file)
    stage.one_image, stage.batch = measure_networks({stage.name: model}, images)[stage.name]
    print(json.dumps({"stage": asdict(stage), "predictions": predict(model, images).tolist()}))


# Judging and showing


def _judge(result: Result, same_predictions: bool) -> None:
    dense, int8, loaded = (result.stage(name) for name in (DENSE, INT8, LOADED))
    assert dense.accuracy is not None
    assert loaded.accuracy is not None
    assert dense.file_bytes
    assert int8.file_bytes
    lost = dense.accuracy - loaded.accuracy
    result.judge(lost <= ACCURACY_GOAL, f"int8 loses {lost:.2f} points of accuracy (at most {ACCURACY_GOAL})")
    result.judge(same_predictions, "the loaded network predicts the same digit for every test image as the saved one")

    ratio = dense.file_bytes / int8.file_bytes
    text = f"the int8 file is {ratio:.2f}x smaller (at least {SIZE_GOAL})"
    kept = [row["layer"] for row in result.layers.rows if row["chosen"] == select.DENSE]
    wide = [name for name in kept if _weights(result.plan, name) > 200_000]
    if not result.plan.judge_size:
        result.goals.append(
            f"not judged: the int8 file is {ratio:.2f}x smaller; this network is too small for the goal"
        )
    elif ratio < SIZE_GOAL and wide:
        result.judge(False, f"{text}, because int8 was not faster for {', '.join(wide)}", counts=False)
    else:
        result.judge(ratio >= SIZE_GOAL, text)

    converted = [row for row in result.layers.rows if row["chosen"] != select.DENSE]
    if converted:
        speedup = sum(row["dense us"] for row in converted) / sum(row["int8 us"] for row in converted)
        result.judge(speedup > 1, f"the converted layers are {speedup:.2f}x faster together (above 1)", counts=False)
    else:
        result.judge(False, "no layer was faster as int8 on this machine, so none was converted", counts=False)
    for over in (DENSE, COMPILED):
        whole = result.speedup(loaded, over, "one_image")
        if whole is not None:
            text = f"the loaded network is {whole:.2f}x faster than {over} for one image (above 1)"
            result.judge(whole > 1, text, counts=False)


def _weights(plan: Plan, layer: str) -> int:
    index = int(layer) // 2  # a ReLU stands between two linear layers
    return plan.widths[index] * plan.widths[index + 1]


def _write_json(result: Result, path: Path) -> None:
    stages = []
    for stage in result.stages:
        line: dict[str, Any] = asdict(stage)
        for what, over in itertools.product(("one_image", "batch"), (DENSE, COMPILED)):
            line[f"{what}_speedup_over_{'eager' if over == DENSE else 'compile'}"] = result.speedup(stage, over, what)
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
    for title in ("accuracy\n%", "file\nMB", "1 image\nms", "over\neager", "over\ncompile", batch, "over\neager"):
        table.add_column(title, justify="right", no_wrap=True)
    for stage in result.stages:
        table.add_row(
            stage.name,
            _text(stage.accuracy, "{:.2f}"),
            _text(stage.file_bytes, "{:.2f}", 1e-6),
            _text(stage.one_image, "{:.2f}", 1e3),
            _text(result.speedup(stage, DENSE, "one_image"), "{:.2f}x"),
            _text(result.speedup(stage, COMPILED, "one_image"), "{:.2f}x"),
            _text(stage.batch, "{:.2f}", 1e3),
            _text(result.speedup(stage, DENSE, "batch"), "{:.2f}x"),
        )
    console.print(table)

    table = Table(title="Layer by layer, chosen for one image", box=box.SIMPLE_HEAD, title_justify="left", padding=0)
    table.add_column("layer", no_wrap=True)
    for title in ("dense us", "int8 us", "speed-up"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("chosen", no_wrap=True)
    table.add_column("why")
    for row in result.layers.rows:
        figures = (_text(row.get(key), form) for key, form in _LAYER_FIGURES)
        table.add_row(f"{row['layer']}: {_widths(row)}", *figures, row["chosen"], row["why"])
    console.print(table)

    for line in (*result.layers.notes, *(f"{s.name}: {s.note}" for s in result.stages if s.note), "", *result.goals):
        console.print(line, markup=False, highlight=False)
    files = ", ".join(str(folder / name) for name in ("demo.png", "demo.json", "dense.safetensors", "int8.safetensors"))
    console.print(f"\n{result.seconds:.0f} s. Written: {files}", markup=False, highlight=False, soft_wrap=True)


_LAYER_FIGURES = (("dense us", "{:.1f}"), ("int8 us", "{:.1f}"), ("speed-up", "{:.2f}x"))


def _widths(row: dict[str, Any]) -> str:
    """ "1024 -> 2048" for a row with shape "M=1 K=1024 N=2048"."""
    return str(row["shape"]).split(" K=")[1].replace(" N=", " -> ")


def _text(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(value * factor)


_GREY, _GREEN = "#9aa5b1", "#2a9d8f"
_BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # a line may pass under a figure, not through it


def _plot(result: Result, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # Not pyplot: that would choose a display and stay in the caller's process.
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12, hspace=0.06, wspace=0.03)
    figure = Figure(figsize=(12, 7.2), dpi=120, layout=layout)
    FigureCanvasAgg(figure)
    mosaic = figure.subplot_mosaic("AAABBB;CCDDEE")
    axes = dict(zip(("one", "batch", "layers", "file", "accuracy"), (mosaic[key] for key in "ABCDE"), strict=True))
    figure.suptitle(
        f"Handwritten digits: dense and int8 on one thread of {_processor()}", fontsize=13, x=0.01, ha="left"
    )

    stages = [stage for stage in result.stages if stage.one_image is not None]
    names = [stage.name.replace(", ", ",\n") for stage in stages]
    colours = [_GREEN if stage.name in (INT8, LOADED) else _GREY for stage in stages]
    for key, what, title in (("one", "one_image", "one image"), ("batch", "batch", f"{BATCH} images")):
        texts = []
        for stage in stages:
            ratio = result.speedup(stage, DENSE, what)
            times = "" if stage.name == DENSE or ratio is None else f"  ({ratio:.2f}x)"
            texts.append(f"{getattr(stage, what) * 1e3:.{2 if what == 'one_image' else 1}f} ms{times}")
        values = [getattr(stage, what) * 1e3 for stage in stages]
        _bars(axes[key], names, values, texts, colours, f"Time for {title} (speed-up over eager)")

    rows = [row for row in result.layers.rows if "speed-up" in row]
    _bars(
        axes["layers"],
        [_widths(row).replace("->", "\u2192") for row in rows],
        [row["speed-up"] for row in rows],
        [f"{row['speed-up']:.2f}x{', kept dense' if row['chosen'] == select.DENSE else ''}" for row in rows],
        [_GREY if row["chosen"] == select.DENSE else _GREEN for row in rows],
        "int8 over dense, layer by layer, one image",
    )
    axes["layers"].axvline(1, color="#444444", linewidth=1, linestyle=":")

    files = [stage for stage in result.stages if stage.name in (DENSE, INT8)]
    sizes = [(stage.file_bytes or 0) / 1e6 for stage in files]
    ratio = sizes[0] / sizes[1]
    texts = [f"{sizes[0]:.3g} MB", f"{sizes[1]:.3g} MB  ({ratio:.2f}x smaller)"]
    _bars(axes["file"], ["dense", "int8"], sizes, texts, [_GREY, _GREEN], "File size")

    # Points, not bars: the axis does not begin at zero.
    axis, figures = axes["accuracy"], [stage.accuracy or 0.0 for stage in stages]
    axis.scatter(figures, range(len(stages)), color=colours, s=70, zorder=2)
    for position, value in enumerate(figures):
        axis.annotate(f"{value:.2f}%", (value, position), xytext=(0, 9), textcoords="offset points", ha="center")
    lowest = min(figures)
    axis.set_xlim(lowest - 1, min(100.0, lowest + 2) + 0.2)
    axis.set_ylim(len(stages) - 0.5, -0.7)
    axis.set_yticks(range(len(stages)), names)
    axis.set_title(f"Accuracy on {TEST_IMAGES} test images, %", loc="left", fontsize=11)
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
