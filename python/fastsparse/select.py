"""The measured choice: a layer is replaced only where the replacement was faster, on this machine, at its own shapes.

`record` runs the model once and notes which inputs each layer really sees, `clock` times the candidates, `choose`
decides. The decision is a pure function of the seconds, so that a test (or a machine's saved timings) can supply them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

DENSE = "dense"


@dataclass(frozen=True)
class Seen:
    """One kind of input that a layer saw, and how often in one forward pass."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    calls: int = 1

    @property
    def rows(self) -> int:
        """M: the product of all sizes but the last."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows


@dataclass(frozen=True)
class Candidate:
    """One implementation of one layer.

    Attributes:
        layer: the layer's name.
        implementation: "dense", "int8", ...
        run: does what one forward pass asks of this layer.
        device: where it runs; the clock waits for the device.
        kind: layers of one kind do the same work; they are decided together, see `choose`.
    """

    layer: str
    implementation: str
    run: Callable[[], object]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kind: Hashable = None


Measure = Callable[[Candidate], float]
"""Seconds that one `candidate.run()` takes."""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one layer, and why.

    Attributes:
        layer: the layer's name.
        seconds: per implementation.
        chosen: the implementation.
        speedup: the dense layer's seconds over those of the fastest other candidate, whichever was chosen.
        why: in words, such as "kept dense: 0.7x".
    """

    layer: str
    seconds: dict[str, float]
    chosen: str
    speedup: float
    why: str


def decide(layer: str, seconds: Mapping[str, float], margin: float | Mapping[str, float] = 1.05) -> Choice:
    """Chooses for one layer. The dense layer stays unless the fastest other candidate is faster by `margin`.

    Args:
        layer: the layer's name.
        seconds: per implementation; "dense" must be among them.
        margin: how many times faster another candidate must be; at least 1. One for all, or per implementation.

    Raises:
        ValueError: no figure for the dense layer, a figure that is not a positive number, or a margin below 1.
    """
    if DENSE not in seconds:
        raise ValueError(f"decide: {layer}: the dense layer must be among the candidates, got {sorted(seconds)}")
    margins = [margin] if isinstance(margin, (int, float)) else list(margin.values())
    if not all(value >= 1 for value in margins):
        raise ValueError(f"decide: margin must be at least 1, got {margin}")
    for name, value in seconds.items():
        _check_seconds("decide", layer, name, value)
    others = {name: value for name, value in seconds.items() if name != DENSE}
    if not others:
        return Choice(layer, dict(seconds), DENSE, 1.0, "kept dense: nothing else to choose from")
    fastest = min(others, key=lambda name: others[name])
    speedup = seconds[DENSE] / others[fastest]
    asked = margin if isinstance(margin, (int, float)) else margin[fastest]
    if speedup >= asked:
        return Choice(layer, dict(seconds), fastest, speedup, f"{fastest} is {_times(speedup)} as fast")
    # Two digits are few: a figure just under the margin must not read like one that reaches it.
    close = f", and {asked:g}x is asked for" if speedup >= 1 else ""
    return Choice(layer, dict(seconds), DENSE, speedup, f"kept dense: {_times(speedup)}{close}")


def choose(
    candidates: Sequence[Candidate], margin: float | Mapping[str, float] = 1.05, measure: Measure | None = None
) -> dict[str, Choice]:
    """Times the candidates of any number of layers and chooses for each.

    Layers whose candidates share a `kind` get one choice, by the median over all of them: a transformer repeats a few
    shapes in every block, and its blocks shall not differ by the noise of the clock.

    Args:
        candidates: every layer has one called "dense". The order of the layers should be that of the model, because
            the clock runs them one after another.
        margin: see `decide`.
        measure: seconds for one candidate. Default: the real clock, see `clock`.

    Returns:
        layer name -> Choice.

    Raises:
        ValueError: see `decide`.
    """
    seconds = clock(candidates) if measure is None else [measure(candidate) for candidate in candidates]
    alike: dict[Hashable, list[float]] = {}
    for candidate, value in zip(candidates, seconds, strict=True):
        _check_seconds("choose", candidate.layer, candidate.implementation, value)
        alike.setdefault(_pool(candidate), []).append(value)
    by_layer: dict[str, dict[str, float]] = {}
    for candidate in candidates:
        by_layer.setdefault(candidate.layer, {})[candidate.implementation] = statistics.median(alike[_pool(candidate)])
    return {layer: decide(layer, figures, margin) for layer, figures in by_layer.items()}


def clock(candidates: Sequence[Candidate], rounds: int = 5, budget: float = 0.1, passes: int = 3) -> list[float]:
    """Seconds of one `run()` per candidate, under `no_grad`.

    Measured in phases: all layers of one implementation run one after another, first unrecorded, then recorded; then
    the next implementation; and all of that `rounds` times. So each layer finds the caches as in the model: filled by
    its neighbours, never by its own rival, which could push a large weight out to memory while the small one stays
    near and so invent a speed-up.

    A phase gives its 20th percentile, because what other processes take only ever adds; the rounds give their median.
    No statistic helps two threads on cores that others use: each then waits for the other (see `busy`).

    Args:
        candidates: what to time.
        rounds: how often each phase is repeated.
        budget: seconds that a phase lasts.
        passes: how many recorded passes a phase makes in any case; fewer than three only where one takes seconds.
    """
    phases: dict[str, list[int]] = {}
    for index, candidate in enumerate(candidates):
        phases.setdefault(candidate.implementation, []).append(index)
    found: list[list[float]] = [[] for _ in candidates]
    with torch.no_grad():
        for _ in range(rounds):
            for indices in phases.values():
                for index in indices:
                    _seconds(candidates[index])
                samples: dict[int, list[float]] = {index: [] for index in indices}
                end, done = time.perf_counter() + budget, 0
                while done < passes or (done < 1000 and time.perf_counter() < end):
                    done += 1
                    for index in indices:
                        samples[index].append(_seconds(candidates[index]))
                for index in indices:
                    found[index].append(sorted(samples[index])[done // 5])
    return [statistics.median(values) for values in found]


def _pool(candidate: Candidate) -> Hashable:
    """Whose figures are taken together."""
    alone = ("layer", candidate.layer)
    return (alone if candidate.kind is None else ("kind", candidate.kind)), candidate.implementation


def _check_seconds(where: str, layer: str, name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{where}: {layer}: {name} must take a positive number of seconds, got {value}")


def busy() -> str | None:
    """A sentence for the report if other processes use this machine, which the clock can't make up for; or None."""
    if not hasattr(os, "getloadavg") or torch.get_num_threads() == 1:
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores + 1:  # torch's own threads count too
        return None
    return (
        f"the machine is busy (load {load:.1f} on {cores} cores), so these figures may be off: "
        "measure again when it is quiet, or with torch.set_num_threads(1)"
    )


def _seconds(candidate: Candidate) -> float:
    if candidate.device.type == "cuda":
        torch.cuda.synchronize(candidate.device)
    start = time.perf_counter()
    candidate.run()
    if candidate.device.type == "cuda":
        torch.cuda.synchronize(candidate.device)
    return time.perf_counter() - start


def record(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layers: Collection[nn.Module]
) -> dict[nn.Module, list[Seen]]:
    """Runs the model once on one batch and notes what each of `layers` sees.

    The model runs in evaluation mode under `no_grad`: batch statistics, dropout and torch's random state are not
    touched, and the training flags are as before afterwards, also after an error.

    Args:
        model: the model.
        args, kwargs: one batch, as `first_batch` gives it.
        layers: modules of `model`, each called with one tensor.

    Returns:
        layer -> its inputs; layers that saw no input, or only empty ones, are missing.

    Raises:
        What the model itself raises.
    """
    counts: dict[nn.Module, Counter[tuple[tuple[int, ...], torch.dtype, torch.device]]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        for value in (*inputs, *keywords.values()):
            if isinstance(value, Tensor) and value.numel() > 0:
                counts.setdefault(module, Counter())[tuple(value.shape), value.dtype, value.device] += 1
                return

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
        run(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {
        layer: [Seen(shape, dtype, device, calls) for (shape, dtype, device), calls in counter.items()]
        for layer, counter in counts.items()
    }


def largest_inputs(
    model: nn.Module, batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], layers: Collection[nn.Module]
) -> dict[nn.Module, float]:
    """The largest |x| that each of `layers` sees over all batches; NaN where one was among them.

    The model runs as for `record`. Layers that saw no input, or only empty ones, are missing.
    """
    found: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        for value in (*inputs, *keywords.values()):
            if isinstance(value, Tensor) and value.numel() > 0:
                largest = value.detach().abs().amax().float()
                found[module] = torch.maximum(found[module], largest) if module in found else largest
                return

    handles = []
    try:
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(note, with_kwargs=True))
        for args, kwargs in batches:
            run(model, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: float(largest) for layer, largest in found.items()}


def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`model(*args, **kwargs)` in evaluation mode, without gradients, and with nothing in the model changed by it."""
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        return model(*args, **kwargs)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each module's own training flag outside."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        # Not model.train(): that would wake the modules that their owner froze.
        for module, flag in flags:
            module.training = flag


def first_batch(data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for one call of the model.

    Args:
        data: a tensor (the only input), a tuple (the positional inputs), a mapping (the keyword inputs), or an
            iterable of those, of which the first is taken. A list counts as an iterable, so that a DataLoader of
            `[inputs, labels]` gives its inputs.

    Raises:
        ValueError: none of these, or empty.
    """
    if isinstance(data, Tensor):
        return (data,), {}
    if isinstance(data, tuple):
        return data, {}
    if isinstance(data, Mapping):
        return (), dict(data)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        for batch in data:
            return first_batch(batch)
        raise ValueError("data: must hold at least one batch, got an empty iterable")
    raise ValueError(
        f"data: must be a tensor, a tuple or mapping of inputs, or an iterable of these, got {type(data).__name__}"
    )


def batches(data: Any, most: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """As `first_batch`, but up to `most` batches where `data` is an iterable of them."""
    if isinstance(data, (Tensor, tuple, Mapping, str, bytes)) or not isinstance(data, Iterable):
        return [first_batch(data)]
    found = [first_batch(batch) for batch in itertools.islice(data, most)]
    return found or [first_batch(data)]


def make_inputs(seen: Sequence[Seen]) -> list[tuple[Tensor, int]]:
    """For each kind of input one random tensor of that shape, dtype and device, and how often it came."""
    generator = torch.Generator().manual_seed(0)  # torch's own random state stays as it is
    return [
        (torch.randn(s.shape, generator=generator, dtype=torch.float32).to(s.device, s.dtype), s.calls) for s in seen
    ]


def repeat(layer: Callable[[Tensor], Any], inputs: Sequence[tuple[Tensor, int]]) -> Callable[[], None]:
    """Runs a layer on all that one forward pass of the model asks of it."""

    def calls() -> None:
        for x, times in inputs:
            for _ in range(times):
                layer(x)

    return calls


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"
