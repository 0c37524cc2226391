"""What an example needs to compare ways of computing the same: a process for each, turns, a table and a plot."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastsparse.report import Report


@dataclasses.dataclass
class Way:
    """One implementation, and what becomes of it; the first way of all is what the others are compared with."""

    name: str
    convert: Callable[[nn.Module, Tensor], tuple[nn.Module, Report | None]]
    compiled: bool = False
    needs: str | None = None  # a package, spelt alike for pip and import
    ours: bool = False
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # of one call, by shape
    speedup: dict[str, float] = dataclasses.field(default_factory=dict)  # over the first way
    cosine_mean: float | None = None
    cosine_least: float | None = None
    layers: Report | None = None
    problem: str | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """`batch` texts of `tokens` tokens at once. No padding: it would be counted as work."""

    batch: int
    tokens: int
    rounds: int = 5  # of measuring, all ways by turns
    passes: int = 3  # in a round, at least
    texts: int = 32  # whose vectors are compared, `batch` at a time

    def __str__(self) -> str:
        return f"{self.batch} x {self.tokens}"


class Process(Protocol):
    """What a way does in the process of its own; made there from the way and all shapes."""

    def load(self) -> None:
        """Everything that takes time but needs no quiet."""

    def convert(self, shape: Shape) -> Report | None:
        """Converts the model for this shape, and says which layers."""

    def embed(self, shape: Shape) -> list[list[float]]:
        """One vector for each text."""

    def time(self, shape: Shape) -> float:
        """Seconds of one call for `shape.batch` texts, from one phase of measuring."""


Make = Callable[[Way, list[Shape]], Process]


def serve(pipe: Any, make: Make, way: Way, shapes: list[Shape], log: Path) -> None:
    """The child's main function: (method, arguments) comes in, (answer, error) goes back."""
    with log.open("w") as file:  # what libraries say at import would garble the progress bar
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    process = make(way, shapes)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:  # the parent is through
            return
        try:
            pipe.send((getattr(process, method)(*arguments), None))
        except Exception as error:  # whatever a peer raises is its row in the table
            traceback.print_exc()
            pipe.send((None, traceback.format_exception_only(error)[0].strip().splitlines()[0]))


class Child:
    """Starts the process of one way and asks it. After the first failure it is not asked again."""

    def __init__(self, make: Make, way: Way, shapes: list[Shape], folder: Path) -> None:
        self.way = way
        if way.needs and importlib.util.find_spec(way.needs) is None:
            way.problem = f"{way.needs} is not installed: pip install {way.needs}"
            return
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        log = folder / f"{way.name.replace(', ', '-').replace(' ', '-')}.log"
        self.process = context.Process(target=serve, args=(theirs, make, way, shapes, log), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def ask(self, method: str, *arguments: Shape, timeout: float = 600.0) -> Any:
        """None if the way has failed, now or before."""
        if self.way.problem:
            return None
        try:
            self.pipe.send((method, arguments))
            if not self.pipe.poll(timeout):
                raise TimeoutError(f"no answer within {timeout:g} s")
            answer, self.way.problem = self.pipe.recv()
            return answer
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self.process.join(1)
            gone = f"its process ended with exit code {self.process.exitcode}"
            self.way.problem = str(error) if self.process.is_alive() else gone
            self.process.kill()
            return None


def run(make: Make, ways: list[Way], shapes: list[Shape], folder: Path) -> None:
    """Fills in the ways: times and vectors, or the problem. `folder` gets what the processes print."""
    from rich.progress import Progress

    with Progress(refresh_per_second=2) as progress:
        total = len(ways) * (2 + sum(1 + shape.rounds for shape in shapes))
        task = progress.add_task("load", total=total)
        children = [Child(make, way, shapes, folder) for way in ways]

        def ask(child: Child, method: str, *arguments: Shape) -> Any:
            answer = child.ask(method, *arguments)
            progress.advance(task)
            return answer

        def embed(child: Child) -> Tensor:
            return torch.tensor([vector for shape in shapes for vector in ask(child, "embed", shape) or []])

        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda child: ask(child, "load"), children))
            progress.update(task, description="convert")
            for child in children:  # one after another: quantize_ measures
                child.way.layers = ask(child, "convert", shapes[1])
            progress.update(task, description="compile, compare")
            vectors = list(pool.map(embed, children))
        for shape in shapes:
            progress.update(task, description=f"time {shape} tokens")
            # By turns: if the machine slows down, it does so for everyone.
            rounds = [[ask(child, "time", shape) for child in children] for _ in range(shape.rounds)]
            for way, seconds in zip(ways, zip(*rounds, strict=True), strict=True):
                if not way.problem:
                    way.seconds[str(shape)] = statistics.median(seconds)
    for way, own in zip(ways, vectors, strict=True):
        if not (way.problem or ways[0].problem):
            cosine = nn.functional.cosine_similarity(own, vectors[0])
            way.cosine_mean, way.cosine_least = cosine.mean().item(), cosine.min().item()
            way.speedup = {key: ways[0].seconds[key] / value for key, value in way.seconds.items()}


def show(title: str, ways: list[Way], shapes: list[Shape]) -> None:
    """The table, and a line for each way that has something to say."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0)
    for header in [*(text for shape in shapes for text in (f"{shape}\nms", "\nx")), "cosine\nmean", "\nleast"]:
        table.add_column(header, justify="right", no_wrap=True)
    for way in ways:
        if not way.problem:
            figures = [(f"{way.seconds[str(s)] * 1e3:.1f}", f"{way.speedup[str(s)]:.2f}") for s in shapes]
            cells = [cell for pair in figures for cell in pair]
            table.add_row(way.name, *cells, f"{way.cosine_mean:.4f}", f"{way.cosine_least:.4f}")
    console = Console()
    console.print(table)
    for way in ways:
        note = f"not measured: {way.problem}" if way.problem else way.layers and way.layers.notes[0]
        if note:
            console.print(f"{way.name}: {note}", markup=False, highlight=False, soft_wrap=True)


def plot(title: str, ways: list[Way], shapes: list[Shape], path: Path) -> None:
    """Bars of times by shape, and the cosines."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ways = [way for way in ways if not way.problem]
    places = range(len(ways))
    colours = ["#2a9d8f" if way.ours else "#9aa5b1" for way in ways]
    figure = Figure(figsize=(2.9 * len(shapes) + 5, 1.2 + 0.4 * len(ways)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left")
    axes = figure.subplots(1, len(shapes) + 1, sharey=True)
    for axis, shape in zip(axes, map(str, shapes), strict=False):
        axis.barh(places, [way.seconds[shape] * 1e3 for way in ways], color=colours, height=0.65)
        for place, way in enumerate(ways):
            time = way.seconds[shape] * 1e3
            text = f" {time:.{1 if time < 100 else 0}f} ms, {way.speedup[shape]:.2f}x"
            axis.text(time, place, text, va="center", fontsize=9)
        axis.spines["bottom"].set_visible(False)
        axis.set(title=f"{shape} tokens", xlim=(0, 1.9e3 * max(way.seconds[shape] for way in ways)), xticks=[])
    axes[-1].scatter([way.cosine_mean for way in ways], places, color=colours, zorder=2)
    axes[-1].scatter([way.cosine_least for way in ways], places, color=colours, marker="|", s=90, zorder=2)
    axes[-1].set_title(f"cosine to {ways[0].name}\n(dot: mean, line: least)")
    axes[-1].grid(axis="x", color="#dddddd")
    axes[0].set_yticks(places, [way.name for way in ways])
    axes[0].invert_yaxis()
    for axis in axes:
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.savefig(path)
