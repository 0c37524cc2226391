"""`quantize_`: which linear layers of a model may be converted, which are worth it, and the exchange itself."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastsparse import select
from fastsparse.nn import Int8Linear
from fastsparse.nn.int8_linear import MAX_K
from fastsparse.quantize.config import Int8Dynamic
from fastsparse.report import Report

INT8 = "int8"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_COLUMNS = ["layer", "shape", "dense us", "int8 us", "speed-up", "chosen", "why"]


@dataclass
class _Layer:
    """One nn.Linear and what becomes of it."""

    module: nn.Linear
    names: list[str]
    seen: list[select.Seen] = field(default_factory=list)
    reason: str | None = None  # why it can't or shan't be converted
    replacement: nn.Module | None = None
    choice: select.Choice | None = None


def quantize_(
    model: nn.Module, config: Int8Dynamic, data: Any = None, *, measure: select.Measure | None = None
) -> Report:
    """Converts `nn.Linear` layers to `nn.Int8Linear`, in place, where that was measured to be faster.

    The model runs once on one batch of `data` (in evaluation mode, without gradients) to learn the shapes that each
    layer sees; each layer is then timed at these shapes, dense and int8, on this machine and with the current number
    of threads. Everything that can fail comes before the first layer is exchanged, and the converted model must get
    through the same batch: after any error the model is bit for bit what it was.

    Layers stay dense, with the reason in the report, if they are not faster by `config.margin`, were not reached by
    `data`, share a parameter with another module, carry hooks or parametrizations, are a subclass of `nn.Linear`, or
    sit where torch reads `weight` itself (`nn.MultiheadAttention`, `nn.TransformerEncoderLayer`). A layer that is used
    in several places is converted once and stays one layer.

    Args:
        model: any module; float32, bfloat16 or float16 linear layers are considered.
        config: `Int8Dynamic(...)`.
        data: a tensor, a tuple or mapping of the model's inputs, or an iterable of these (a DataLoader), of which the
            first is used: its batch size is the one that the choice holds for.
        measure: seconds for one `select.Candidate`; the default is the real clock.

    Returns:
        A Report with one row per linear layer: layer, shape, dense us, int8 us, speed-up, chosen, why.

    Raises:
        TypeError: `model` or `config` is of another type.
        ValueError: no data to measure with, or a weight or bias that is not finite.
        RuntimeError: the converted model can't run on `data`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "quantize_: model must be an nn.Module in Python, got a ScriptModule; convert it before scripting"
        )
    if not isinstance(config, Int8Dynamic):
        raise TypeError(f"quantize_: config must be an Int8Dynamic, got {type(config).__name__}")
    if data is None and config.measure:
        raise ValueError(
            "quantize_: without data nothing can be measured: give data=<a batch as the model will see it>, "
            "or Int8Dynamic(measure=False) to convert every layer unmeasured"
        )

    layers = _find_layers(model, config)
    batch = None if data is None else select.first_batch(data)
    if batch is not None:
        seen = select.record(model, *batch, [layer.module for layer in layers])
        for layer in layers:
            layer.seen = seen.get(layer.module, [])
            if layer.reason is None and config.measure:
                layer.reason = _why_not_seen(layer.seen)
    for layer in layers:
        if layer.reason is None:
            _check_finite(layer)
    for layer in layers:
        if layer.reason is None:
            _build(layer)
    if config.measure:
        _measure(layers, config, measure)
    _exchange(model, [layer for layer in layers if layer.reason is None], batch)
    return _report(layers, config)


def _find_layers(model: nn.Module, config: Int8Dynamic) -> list[_Layer]:
    """Every nn.Linear once, with all its names, in the model's order."""
    owners = Counter(key for module in model.modules() for key in _identities(module))
    read_by_torch = {id(linear): reason for module in model.modules() for linear, reason in _read_by_torch(module)}
    layers: dict[int, _Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, nn.Linear):
            continue
        if id(module) in layers:
            layers[id(module)].names.append(name)
            continue
        layer = layers[id(module)] = _Layer(module, [name])
        if module is model:
            layer.reason = "it is the model itself, which can't be exchanged in place: use nn.Int8Linear.from_linear"
        else:
            layer.reason = read_by_torch.get(id(module)) or _why_not(module, owners)
    for layer in layers.values():
        if layer.reason is None:
            layer.reason = _why_not_wanted(layer, config)
    return list(layers.values())


def _identities(module: nn.Module) -> Iterator[object]:
    """What makes the parameters of one module recognisable in another: the object, or memory that begins alike."""
    for parameter in module._parameters.values():
        if parameter is not None:
            started = 0 if parameter.is_meta or parameter.numel() == 0 else parameter.data_ptr()
            yield (parameter.device, started) if started else id(parameter)


def _read_by_torch(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Layers whose weights torch's fused modules read behind the layer's back."""
    if isinstance(module, nn.MultiheadAttention):
        yield module.out_proj, "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(module, nn.TransformerEncoderLayer):
        for linear in (module.linear1, module.linear2):
            yield linear, "nn.TransformerEncoderLayer's fast path reads its weight without calling it"


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
    """Why this layer can't be converted, or None."""
    if parametrize.is_parametrized(linear):
        return "has a parametrization"
    if type(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, not a plain nn.Linear"
    if "forward" in linear.__dict__:
        return "its forward was replaced"
    if any(getattr(linear, name, None) for name in _HOOKS):
        return "has hooks"
    if set(linear._parameters) != {"weight", "bias"} or linear._buffers or linear._modules:
        return "carries more than weight and bias"
    if any(owners[key] > 1 for key in _identities(linear)):
        return "shares a parameter with another module"
    weight = linear.weight
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.device.type not in ("cpu", "cuda"):
        return f"is on device {weight.device.type}"
    if weight.dtype not in _DTYPES:
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return "has no weights"
    if linear.in_features > MAX_K:
        return f"K={linear.in_features} is more than the {MAX_K} that are exact in int32"
    return None


def _why_not_wanted(layer: _Layer, config: Int8Dynamic) -> str | None:
    if any(fnmatchcase(name, pattern) for name in layer.names for pattern in config.skip):
        return "is in skip"
    weights = layer.module.weight.numel()
    if weights < config.min_weights:
        return f"has {weights} weights, fewer than min_weights={config.min_weights}"
    return None


def _why_not_seen(seen: list[select.Seen]) -> str | None:
    if not seen:
        return "not reached by data, so not measured"
    for kind in seen:
        if kind.dtype not in _DTYPES:
            return f"its input is {kind.dtype}"
    return None


def _check_finite(layer: _Layer) -> None:
    for name, parameter in layer.module.named_parameters(recurse=False):
        if not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"quantize_: {layer.names[0]}.{name} must be finite, got NaN or infinity")


def _build(layer: _Layer) -> None:
    """Packs the weight, and tries the layer once: a device without a kernel shows here."""
    linear, device = layer.module, layer.module.weight.device
    source = linear if device.type == "cpu" else copy.deepcopy(linear).cpu()  # packs are made on the CPU
    replacement = Int8Linear.from_linear(source).to(device)
    try:
        with torch.no_grad():
            replacement(torch.zeros(1, linear.in_features, dtype=linear.weight.dtype, device=device))
    except RuntimeError as error:  # NotImplementedError is one too; on the CPU there is always a kernel
        if device.type == "cpu":
            raise
        layer.reason = f"no int8 kernel runs on {device.type}: {error}"
    else:
        layer.replacement = replacement


def _measure(layers: list[_Layer], config: Int8Dynamic, measure: select.Measure | None) -> None:
    candidates = []
    for layer in layers:
        if layer.replacement is not None:
            inputs = select.make_inputs(layer.seen)
            linear, device = layer.module, layer.seen[0].device
            # What decides how long a layer takes; its numbers do not.
            kind = (*linear.weight.shape, linear.bias is not None, linear.weight.dtype, frozenset(layer.seen))
            for implementation, module in ((select.DENSE, linear), (INT8, layer.replacement)):
                run = select.repeat(module, inputs)
                candidates.append(select.Candidate(layer.names[0], implementation, run, device, kind))
    with torch.no_grad():
        choices = select.choose(candidates, config.margin, measure)
    for layer in layers:
        if layer.replacement is not None:
            layer.choice = choices[layer.names[0]]
            if layer.choice.chosen == select.DENSE:
                layer.reason = layer.choice.why
                layer.replacement = None


def _exchange(model: nn.Module, layers: list[_Layer], batch: tuple[tuple[Any, ...], dict[str, Any]] | None) -> None:
    """Puts the replacements in; if the model then can't run, or anything interrupts, takes them out again."""
    replacements = {id(layer.module): layer.replacement for layer in layers if layer.replacement is not None}
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
            f"quantize_: the model can't run with {names} converted, so it was left as it was; "
            f"name what must stay dense in Int8Dynamic(skip=...): {type(error).__name__}: {error}"
        ) from error


def _report(layers: list[_Layer], config: Int8Dynamic) -> Report:
    report = Report("int8, dynamic per token", list(_COLUMNS))
    for layer in layers:
        row: dict[str, Any] = {"layer": " = ".join(layer.names), "shape": _shape(layer)}
        if layer.choice is not None:
            row["dense us"] = round(layer.choice.seconds[select.DENSE] * 1e6, 1)
            row["int8 us"] = round(layer.choice.seconds[INT8] * 1e6, 1)
            row["speed-up"] = round(layer.choice.speedup, 2)
        if layer.reason is None:
            row["chosen"] = INT8
            row["why"] = layer.choice.why if layer.choice is not None else "converted unmeasured, as asked"
        else:
            row["chosen"] = select.DENSE
            row["why"] = layer.reason if layer.reason.startswith("kept dense") else f"kept dense: {layer.reason}"
        report.add(**row)
    converted = sum(layer.reason is None for layer in layers)
    how = f"measured with torch.get_num_threads() = {torch.get_num_threads()}" if config.measure else "not measured"
    report.notes.append(f"{converted} of {len(layers)} linear layers converted; {how}")
    busy = select.busy() if config.measure else None
    if busy is not None:
        report.notes.append(busy)
    return report


def _shape(layer: _Layer) -> str:
    rows = ",".join(str(m) for m in sorted({kind.rows for kind in layer.seen}))
    return f"{f'M={rows} ' if rows else ''}K={layer.module.in_features} N={layer.module.out_features}"
