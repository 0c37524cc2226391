"""`convert_`: dense layers of a model give way to faster ones, each where that was measured.

A `Conversion` says what one kind of layer takes the place of and how it is made; `quantize_` and `prune.to_sparse_` are
this function with one conversion, and any number can compete for the same layer.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastsparse import _sharing, select
from fastsparse.nn._packed import FLOATS
from fastsparse.ops._pack import Rows
from fastsparse.report import Report


@dataclass(frozen=True)
class Conversion:
    """One way to convert `nn.Linear` layers.

    Attributes:
        margin: how many times faster than the dense layer the new one must be to replace it; at least 1.
        min_weights: layers with fewer weights are not considered.
        skip: names of layers that stay dense, as in `named_modules()`; `*` and `?` match as in file names.
        measure: False converts every layer that can be converted, faster or not; then no data is needed.
    """

    margin: float = 1.05
    min_weights: int = 0
    skip: tuple[str, ...] = ()
    measure: bool = True

    name: ClassVar[str]  # in reports: "int8", "sparse"
    title: ClassVar[str]

    def __post_init__(self) -> None:
        where = type(self).__name__
        if not self.margin >= 1:
            raise ValueError(f"{where}: margin must be at least 1, got {self.margin}")
        if self.min_weights < 0:
            raise ValueError(f"{where}: min_weights must be at least 0, got {self.min_weights}")
        if isinstance(self.skip, str):
            raise ValueError(f"{where}: skip must be a tuple of names, got the string {self.skip!r}")

    def why_not(self, linear: nn.Linear) -> str | None:
        """Why this kind of layer can't stand in for that one, or None. The weight is a plain one, of FLOATS."""
        raise NotImplementedError  # every conversion says so itself

    def kind(self, linear: nn.Linear) -> Hashable:
        """What beside shape and dtype decides how long the new layer takes: layers alike in it are decided together."""
        return None

    def build(self, linear: nn.Linear, rows: Rows) -> nn.Module:
        """The new layer, on the CPU, for a layer on the CPU with finite weights that will see so many rows of x.

        Where they vary: (fewest, most).
        """
        raise NotImplementedError  # every conversion says so itself

    def batches_wanted(self) -> int:
        """Of how many batches of data the largest |x| of each layer is wanted: `build_for_range` is called then."""
        return 0

    def build_for_range(self, linear: nn.Linear, rows: Rows, largest: float) -> nn.Module:
        """In the place of `build`; `largest` is finite."""
        raise NotImplementedError  # where batches_wanted() is not 0


@dataclass
class _Layer:
    """One nn.Linear and what becomes of it."""

    module: nn.Linear
    names: list[str]
    seen: list[select.Seen] = field(default_factory=list)
    largest: float | None = None  # of |x|, where a conversion asked for it
    reason: str | None = None  # why it can't or shan't be converted at all
    reasons: dict[str, str] = field(default_factory=dict)  # by conversion: why not by this one
    built: dict[str, nn.Module] = field(default_factory=dict)
    choice: select.Choice | None = None
    chosen: str | None = None

    @property
    def rows(self) -> Rows:
        counts = {kind.rows for kind in self.seen}
        if len(counts) > 1:
            return min(counts), max(counts)
        return max(counts, default=None)


def convert_(
    model: nn.Module,
    conversions: Sequence[Conversion],
    data: Any = None,
    *,
    rows: int | tuple[int, int] | None = None,
    measure: select.Measure | None = None,
    where: str = "convert_",
) -> Report:
    """Converts `nn.Linear` layers in place, each to what was measured to be the fastest for it.

    The model runs once on one batch of `data` (in evaluation mode, without gradients) to learn the shapes that each
    layer sees; each layer is then timed at these shapes, dense and in every conversion, on this machine and with the
    current number of threads. Everything that can fail comes before the first layer is exchanged, and the converted
    model must get through the same batch: after any error the model is bit for bit what it was.

    Layers stay dense, with the reason in the report, if nothing is faster by the margin of the fastest conversion, were
    not reached by `data`, share a parameter with another module, carry hooks or parametrizations, are a subclass of
    `nn.Linear`, or sit where torch reads `weight` itself (`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`). A
    layer that is used in several places is converted once and stays one layer.

    Args:
        model: any module; float32, bfloat16 or float16 linear layers are considered.
        conversions: `Int8Dynamic(...)`, `Int8Static(...)`, `Sparse(...)`; one of each kind at most.
        data: a tensor, a tuple or mapping of the model's inputs, or an iterable of these (a DataLoader), of which the
            first is used: its batch size is the one that the choice holds for. `Int8Static` looks at more of them.
        rows: in the place of data: each layer is timed with so many rows of x; (few, many): with both.
        measure: seconds for one `select.Candidate`; the default is the real clock.
        where: the name under which errors are reported.

    Returns:
        A Report with one row per linear layer: layer, shape, microseconds dense and per conversion, speed-up, chosen,
        why.

    Raises:
        TypeError: `model` or a conversion is of another type.
        ValueError: no conversion, or two of a kind; neither data nor rows to measure with, or both; several conversions
            and nothing to be measured; a weight or bias that is not finite.
        RuntimeError: the converted model can't run on `data`.
    """
    _check(model, conversions, data, rows, where)
    measured = all(conversion.measure for conversion in conversions)
    layers = _find_layers(model, conversions)
    observed = max(conversion.batches_wanted() for conversion in conversions)
    batches = [] if data is None else select.batches(data, max(1, observed))
    batch = batches[0] if batches else None
    if batch is not None:
        seen = select.record(model, *batch, [layer.module for layer in layers])
        if observed > 0:
            largest = select.largest_inputs(model, batches, [layer.module for layer in layers])
            for layer in layers:
                layer.largest = largest.get(layer.module)
        for layer in layers:
            layer.seen = seen.get(layer.module, [])
            if layer.reason is None and measured:
                layer.reason = _why_not_seen(layer.seen)
    elif rows is not None:
        for layer in layers:
            weight = layer.module.weight
            layer.seen = [
                select.Seen((each, layer.module.in_features), weight.dtype, weight.device)
                for each in (rows if isinstance(rows, tuple) else (rows,))
            ]
    wanted = [layer for layer in layers if layer.reason is None]
    for layer in wanted:
        _check_finite(layer, where)
    for layer in wanted:
        for conversion in conversions:
            if conversion.name not in layer.reasons:
                _build(layer, conversion)
        if not layer.built:
            layer.reason = _joined(layer)
        elif not measured:
            (layer.chosen,) = layer.built
    if measured:
        _measure([layer for layer in wanted if layer.built], conversions, measure)
    _exchange(model, [layer for layer in layers if layer.chosen is not None], batch, where)
    return _report(layers, conversions, measured)


def _check(model: Any, conversions: Sequence[Any], data: Any, rows: Any, where: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{where}: model must be an nn.Module in Python, got a ScriptModule; convert it before scripting"
        )
    for conversion in conversions:
        if not isinstance(conversion, Conversion):
            raise TypeError(
                f"{where}: conversions must be of Conversion's kinds (Int8Dynamic, Sparse), "
                f"got {type(conversion).__name__}"
            )
    names = [conversion.name for conversion in conversions]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"{where}: conversions must be at least one, and one of each kind at most, got {names}")
    unmeasured = [conversion for conversion in conversions if not conversion.measure]
    if unmeasured and len(names) > 1:
        raise ValueError(f"{where}: only measuring can choose between {' and '.join(names)}: measure must be True")
    two = isinstance(rows, tuple) and len(rows) == 2
    few, many = rows if two else (rows, rows)
    good = type(few) is int and type(many) is int and 1 <= few <= many
    if rows is not None and (not good or data is not None):
        got = f"{rows!r}{'' if data is None else ' beside data'}"
        raise ValueError(
            f"{where}: rows must be an int of at least 1, or two, (few, many), in the place of data, got {got}"
        )
    if data is None and rows is None and not unmeasured:
        kind = type(conversions[0]).__name__
        raise ValueError(
            f"{where}: without data nothing can be measured: give data=<a batch as the model will see it>, "
            f"or {kind}(measure=False) to convert every layer unmeasured"
        )


def _find_layers(model: nn.Module, conversions: Sequence[Conversion]) -> list[_Layer]:
    """Every nn.Linear once, with all its names, in the model's order."""
    owners = _sharing.owners(model)
    behind_its_back = read_by_torch(model)
    layers: dict[int, _Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear):
            continue
        if id(module) in layers:
            layers[id(module)].names.append(name)
            continue
        layer = layers[id(module)] = _Layer(module, [name])
        if module is model:
            layer.reason = (
                "it is the model itself, which can't be exchanged in place: "
                "use the from_linear of nn.Int8Linear or nn.SparseLinear"
            )
        else:
            layer.reason = behind_its_back.get(module) or _why_not(module, owners)
    for layer in layers.values():
        for conversion in conversions:
            reason = why_not_wanted(layer.module, layer.names, conversion)
            if reason is None and layer.reason is None:
                reason = conversion.why_not(layer.module)
            if reason is not None:
                layer.reasons[conversion.name] = reason
        if layer.reason is None and len(layer.reasons) == len(conversions):
            layer.reason = _joined(layer)
    return list(layers.values())


def read_by_torch(model: nn.Module) -> dict[nn.Module, str]:
    """Layers whose weights torch's fused modules read behind the layer's back, and which modules those are."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found[module.out_proj] = "nn.MultiheadAttention reads its weight without calling it"
        if isinstance(module, nn.TransformerEncoderLayer):
            for linear in (module.linear1, module.linear2):
                found[linear] = "nn.TransformerEncoderLayer's fast path reads its weight without calling it"
    return found


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _why_not(linear: nn.Linear, owners: Counter[object]) -> str | None:
    """Why this layer can't be converted to anything, or None."""
    if parametrize.is_parametrized(linear):
        return "has a parametrization (of ours, prune.finalize_ and quantize.finalize_qat_ end them)"
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, not a plain nn.Linear"
    if "forward" in linear.__dict__:
        return "its forward was replaced"
    if any(getattr(linear, name, None) for name in _HOOKS):
        return "has hooks"
    if set(linear._parameters) != {"weight", "bias"} or linear._buffers or linear._modules:
        return "carries more than weight and bias"
    if _sharing.is_shared(linear, owners):
        return _sharing.SHARED
    weight = linear.weight
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.device.type not in ("cpu", "cuda"):
        return f"is on device {weight.device.type}"
    if weight.dtype not in FLOATS:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return "has no weights"
    return None


def why_not_wanted(linear: nn.Linear, names: Sequence[str], conversion: Conversion) -> str | None:
    """Whether the settings of a conversion leave this layer out, and why."""
    if any(fnmatchcase(name, pattern) for name in names for pattern in conversion.skip):
        return "is in skip"
    weights = linear.weight.numel()
    if weights < conversion.min_weights:
        return f"has {weights} weights, fewer than min_weights={conversion.min_weights}"
    return None


def _why_not_seen(seen: list[select.Seen]) -> str | None:
    if not seen:
        return "not reached by data, so not measured"
    for kind in seen:
        if kind.dtype not in FLOATS:
            return f"its input is {kind.dtype}"
    return None


def _joined(layer: _Layer) -> str:
    """One reason from those of the conversions; each with its name only where they differ."""
    reasons = list(layer.reasons.values())
    if len(set(reasons)) == 1:
        return reasons[0]
    return "; ".join(f"{name}: {reason}" for name, reason in layer.reasons.items())


def _check_finite(layer: _Layer, where: str) -> None:
    for name, parameter in layer.module.named_parameters(recurse=False):
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"{where}: {layer.names[0]}.{name} must be finite, got NaN or infinity")


def _build(layer: _Layer, conversion: Conversion) -> None:
    """Packs the weight, and tries the layer once: a device without a kernel shows here."""
    linear, device = layer.module, layer.module.weight.device
    source = linear if device.type == "cpu" else copy.deepcopy(linear).cpu()  # packs are made on the CPU
    if conversion.batches_wanted() > 0:
        if layer.largest is None or not math.isfinite(layer.largest):
            why = "not reached by data" if layer.largest is None else "it saw a NaN or an infinity"
            layer.reasons[conversion.name] = f"{why}, so its input has no range"
            return
        replacement = conversion.build_for_range(source, layer.rows, layer.largest).to(device)
    else:
        replacement = conversion.build(source, layer.rows).to(device)
    try:
        with torch.no_grad():
            replacement(torch.zeros(1, linear.in_features, dtype=linear.weight.dtype, device=device))
    except RuntimeError as error:  # NotImplementedError is one too; on the CPU there is always a kernel
        if device.type == "cpu":
            raise
        layer.reasons[conversion.name] = f"no {conversion.name} kernel runs on {device.type}: {error}"
    else:
        layer.built[conversion.name] = replacement


def _measure(layers: list[_Layer], conversions: Sequence[Conversion], measure: select.Measure | None) -> None:
    candidates = []
    for layer in layers:
        linear, inputs = layer.module, select.make_inputs(layer.seen)
        shape = (*linear.weight.shape, linear.bias is not None, linear.weight.dtype, frozenset(layer.seen))
        kind = (*shape, *((each.name, each.kind(linear)) for each in conversions if each.name in layer.built))
        for name, module in {select.DENSE: linear, **layer.built}.items():
            run = select.repeat(module, inputs)
            candidates.append(select.Candidate(layer.names[0], name, run, layer.seen[0].device, kind))
    margins = {conversion.name: conversion.margin for conversion in conversions}
    with torch.no_grad():
        choices = select.choose(candidates, margins, measure)
    for layer in layers:
        layer.choice = choices[layer.names[0]]
        if layer.choice.chosen == select.DENSE:
            layer.reason = layer.choice.why
        else:
            layer.chosen = layer.choice.chosen


def _exchange(
    model: nn.Module, layers: list[_Layer], batch: tuple[tuple[Any, ...], dict[str, Any]] | None, where: str
) -> None:
    """Puts the replacements in; if the model then can't run, or anything interrupts, takes them out again."""
    replacements = {id(layer.module): layer.built[layer.chosen] for layer in layers if layer.chosen is not None}
    # Entries of a dict: no setattr of anyone's can refuse half way, and the order of the children stays.
    places = [
        (parent._modules, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if id(child) in replacements
    ]
    try:
        for children, name, child in places:
            children[name] = replacements[id(child)]
        if places and batch is not None:
            select.run(model, *batch)
    except BaseException as error:
        for children, name, child in places:
            children[name] = child
        if not isinstance(error, Exception):
            raise
        names = ", ".join(layer.names[0] for layer in layers)
        raise RuntimeError(
            f"{where}: the model can't run with {names} converted, so it was left as it was; "
            f"name what must stay dense in skip: {type(error).__name__}: {error}"
        ) from error


def _report(layers: list[_Layer], conversions: Sequence[Conversion], measured: bool) -> Report:
    names = [conversion.name for conversion in conversions]
    times = [f"{name} us" for name in (select.DENSE, *names)]
    title = " or ".join(conversion.title for conversion in conversions)
    report = Report(title, ["layer", "shape", *times, "speed-up", "chosen", "why"])
    for layer in layers:
        row: dict[str, Any] = {"layer": " = ".join(layer.names), "shape": _shape(layer)}
        if layer.choice is not None:
            for name, seconds in layer.choice.seconds.items():
                row[f"{name} us"] = round(seconds * 1e6, 1)
            row["speed-up"] = round(layer.choice.speedup, 2)
        if layer.chosen is not None:
            row["chosen"] = layer.chosen
            row["why"] = layer.choice.why if layer.choice is not None else "converted unmeasured, as asked"
        else:
            assert layer.reason is not None
            row["chosen"] = select.DENSE
            row["why"] = layer.reason if layer.reason.startswith("kept dense") else f"kept dense: {layer.reason}"
        report.add(**row)
    converted = sum(layer.chosen is not None for layer in layers)
    how = f"measured with torch.get_num_threads() = {torch.get_num_threads()}" if measured else "not measured"
    report.notes.append(f"{converted} of {len(layers)} linear layers converted; {how}")
    busy = select.busy() if measured else None
    if busy is not None:
        report.notes.append(busy)
    return report


def _shape(layer: _Layer) -> str:
    rows = ",".join(str(m) for m in sorted({kind.rows for kind in layer.seen}))
    return f"{f'M={rows} ' if rows else ''}K={layer.module.in_features} N={layer.module.out_features}"
