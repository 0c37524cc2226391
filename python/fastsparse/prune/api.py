"""`prune_`, `finalize_`, `to_sparse_`: from a dense model to zeros that hold, and to layers that leave them out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsparse import _sharing, select
from fastsparse.convert import convert_
from fastsparse.nn.parametrizations import WEIGHT, Mask, bake, find, holder, only_ours, remove, weight_list
from fastsparse.prune.config import Magnitude, Sparse, SparseInt8, check_fraction
from fastsparse.report import Report

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_COLUMNS = ["layer", "shape", "weights", "zeros", "sparsity", "why"]


@dataclass
class _Layer:
    module: nn.Module
    names: list[str]
    reason: str | None = None  # why it is not pruned
    masks: list[Mask] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0] or "(model)"


def prune_(model: nn.Module, config: Magnitude) -> Report:
    """Sets weights to zero, in place, in such a way that they stay zero while the model is trained.

    Each pruned weight gets a mask (`nn.parametrizations.Mask`, a parametrization) that is computed at every use, so
    that momentum, weight decay and quantization-aware training leave exact zeros. The parameter behind it stays the
    same object: an optimizer that was made before goes on. Call it again with more sparsity (see `cubic`) to prune
    further; what was pruned stays pruned, so less sparsity than before changes nothing. Biases and norms are never
    pruned.

    Linear and convolution layers are pruned, except those that share a parameter with another module or carry a
    parametrization of another kind; the report says so.

    Args:
        model: any module.
        config: `Magnitude(sparsity, ...)`. Exactly round(sparsity * weights) zeros come out, of weights of equal
            magnitude those that come first; with a pattern of blocks, round(sparsity * blocks) blocks of zeros.

    Returns:
        A Report with a row per layer: layer, shape, weights, zeros, sparsity, why (if it was not pruned).

    Raises:
        TypeError: `model` or `config` is of another type.
        ValueError: a weight that is not finite. Whatever is raised, the model is as it was.
    """
    _check_model("prune_", model)
    if not isinstance(config, Magnitude):
        raise TypeError(f"prune_: config must be a Magnitude, got {type(config).__name__}")
    layers = list(_find_layers(model, config))
    wanted = [layer for layer in layers if layer.reason is None]
    magnitudes = [_magnitude(layer) for layer in wanted]
    if config.pattern is not None and ":" in config.pattern:
        keep = [_keep_of_every(magnitude, *config.shape) for magnitude in magnitudes]
    else:
        keep = _keep_blocks(magnitudes, config)
    _install(wanted, keep)
    how = config.scope if config.pattern is None else f"{config.scope}, {config.pattern}"
    return _report(f"pruned by magnitude, {how}", layers)


def finalize_(model: nn.Module) -> Report:
    """Ends the masks of `prune_`: the zeros become part of the weights, which are plain parameters again.

    Quantization-aware training on the same weights goes on. Zeros that are trained further now do not stay zero.

    Args:
        model: any module; one without masks stays as it is.

    Returns:
        A Report with a row per layer that had a mask: layer, shape, weights, zeros, sparsity.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    _check_model("finalize_", model)
    layers = [layer for layer in _named(model) if layer.masks]
    for layer in layers:
        bake(layer.module, Mask)
    return _report("masks made part of the weights", layers)


def to_sparse_(
    model: nn.Module,
    config: Sparse | SparseInt8 | None = None,
    data: Any = None,
    *,
    rows: int | tuple[int, int] | None = None,
    measure: select.Measure | None = None,
) -> Report:
    """Converts `nn.Linear` layers with many zeros to `nn.SparseLinear` (or `nn.SparseInt8Linear`), in place, where that
    was measured to be faster.

    This is `convert.convert_` with one conversion; what is measured, what stays dense and why is said there. Layers
    with masks stay dense until `finalize_`.

    Args:
        model: any module.
        config: `Sparse(...)` or `SparseInt8(...)`; the default is `Sparse()`.
        data: a batch of the model's inputs, as for `quantize_`: the choice holds for its size.
        rows: in the place of data, the rows of x that each layer is timed with, or two numbers of them, (few, many);
            with neither, 1.
        measure: seconds for one `select.Candidate`; the default is the real clock.

    Returns:
        A Report with one row per linear layer: layer, shape, dense us, sparse us, speed-up, chosen, why.

    Raises:
        TypeError: `model` or `config` is of another type.
        ValueError: data and rows, or a weight or bias that is not finite.
        RuntimeError: the converted model can't run on `data`.
    """
    config = Sparse() if config is None else config
    if not isinstance(config, (Sparse, SparseInt8)):
        raise TypeError(f"to_sparse_: config must be a Sparse or a SparseInt8, got {type(config).__name__}")
    if data is None and rows is None:
        rows = 1
    return convert_(model, [config], data, rows=rows, measure=measure, where="to_sparse_")


def cubic(progress: float, final: float, initial: float = 0.0) -> float:
    """The sparsity to have reached at a point of training: fast at first, slowly at the end.

    final + (initial - final) * (1 - progress)^3 (Zhu and Gupta, 2017, "To prune, or not to prune").

    Args:
        progress: how much of the pruning time is over, in [0, 1].
        final, initial: sparsity at the end and at the beginning, in [0, 1].

    Raises:
        ValueError: names the argument, what came and what was expected.
    """
    for name, value in (("progress", progress), ("final", final), ("initial", initial)):
        check_fraction("cubic", name, value)
    return final + (initial - final) * (1 - progress) ** 3


def _check_model(where: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be an nn.Module, got {type(model).__name__}")


def _named(model: nn.Module) -> list[_Layer]:
    """Every layer that could be pruned, once, with all its names."""
    layers: dict[int, _Layer] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _KINDS):
            layer = layers.setdefault(id(module), _Layer(module, []))
            layer.names.append(name)
            layer.masks = list(find(module, Mask))
    return list(layers.values())


def _find_layers(model: nn.Module, config: Magnitude) -> Iterator[_Layer]:
    owners = _sharing.owners(model)
    for layer in _named(model):
        module = layer.module
        if any(fnmatchcase(name, pattern) for name in layer.names for pattern in config.skip):
            layer.reason = "is in skip"
        elif not only_ours(module):
            layer.reason = "has a parametrization of another kind"
        elif nn.parameter.is_lazy(_original(module)):
            layer.reason = "has no shape yet (a lazy layer)"
        elif _sharing.is_shared(module, owners) or _sharing.is_shared(holder(module), owners):
            layer.reason = _sharing.SHARED
        elif not _original(module).is_floating_point() or _original(module).is_meta:
            layer.reason = f"its weight is {_original(module).dtype} on {_original(module).device}"
        elif _original(module).numel() < config.min_weights:
            layer.reason = f"has fewer weights than min_weights={config.min_weights}"
        yield layer


def _original(module: nn.Module) -> Any:
    """The parameter behind the weight."""
    owner: Any = holder(module)
    return owner.weight if owner is module else owner.original


@torch.no_grad()
def _magnitude(layer: _Layer) -> Tensor:
    """|weight| of what lives, -1 where a mask is: what was pruned goes first again."""
    magnitude: Tensor = _original(layer.module).abs()
    if magnitude.element_size() < 4:
        magnitude = magnitude.float()
    for mask in layer.masks:
        magnitude.masked_fill_(~mask.mask, -1)
    if not bool(torch.isfinite(magnitude).all()):
        raise ValueError(f"prune_: {layer.name}.weight must be finite, got NaN or infinity")
    return magnitude


def _keep(magnitude: Tensor, sparsity: float) -> Tensor:
    """bool, what stays: all but the round(sparsity * n) smallest, of equal ones those that come first."""
    flat = magnitude.flatten()
    count = round(sparsity * flat.numel())
    if count == 0:
        return torch.ones_like(magnitude, dtype=torch.bool)
    largest = flat.kthvalue(count).values
    goes = flat < largest
    equal = (flat == largest).nonzero().flatten()
    goes[equal[: count - int(goes.sum())]] = True
    return ~goes.reshape(magnitude.shape)


def _keep_blocks(magnitudes: list[Tensor], config: Magnitude) -> list[Tensor]:
    """bool for each: whole blocks of config.shape stay or go; single weights are blocks of 1 x 1."""
    scores = [_block_score(magnitude, *config.shape) for magnitude in magnitudes]
    if config.scope == "global" and scores:
        flat = torch.cat([score.flatten().cpu() for score in scores])
        parts = _keep(flat, config.sparsity).split([score.numel() for score in scores])
        keep = [part.reshape(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]
    else:
        keep = [_keep(score, config.sparsity) for score in scores]
    if config.shape == (1, 1):
        return keep
    height, width = config.shape
    whole = [part.repeat_interleave(height, 0).repeat_interleave(width, 1) for part in keep]
    return [
        part[: len(matrix), : matrix.shape[1]].reshape(magnitude.shape)
        for part, magnitude in zip(whole, magnitudes, strict=True)
        for matrix in (_matrix(magnitude),)
    ]


def _matrix(magnitude: Tensor) -> Tensor:
    return magnitude.flatten(1) if magnitude.dim() > 1 else magnitude[:, None]


def _block_score(magnitude: Tensor, height: int, width: int) -> Tensor:
    """The mean magnitude of each block; below 0 where nothing in it lives."""
    if (height, width) == (1, 1):
        return magnitude
    matrix = _matrix(magnitude)
    n, k = matrix.shape
    pad = 0, -k % width, 0, -n % height

    def sums(t: Tensor) -> Tensor:
        t = nn.functional.pad(t, pad)
        return t.reshape(-(-n // height), height, -(-k // width), width).sum((1, 3))

    size = sums(torch.ones_like(matrix))
    lives = sums((matrix >= 0).to(matrix.dtype)) > 0
    return torch.where(lives, sums(matrix.clamp_min(0)) / size, -1)


def _keep_of_every(magnitude: Tensor, kept: int, of: int) -> Tensor:
    """bool: the `kept` largest of every `of` consecutive inputs stay; of equal ones those that come last."""
    matrix = _matrix(magnitude)
    n, k = matrix.shape
    groups = nn.functional.pad(matrix, (0, -k % of), value=-2.0).reshape(n, -(-k // of), of)
    goes = groups.argsort(dim=-1, stable=True)[..., : of - kept]
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, goes, False)
    return keep.flatten(1)[:, :k].reshape(magnitude.shape)


def _install(layers: list[_Layer], keep: list[Tensor]) -> None:
    """Puts the masks in; if anything interrupts, the model is as it was."""
    had = [[(mask, mask.mask) for mask in layer.masks] for layer in layers]
    now = [[mask & alive for _, mask in masks] for masks, alive in zip(had, keep, strict=True)]
    try:
        for layer, masks, alive in zip(layers, now, keep, strict=True):
            for mask, new in zip(layer.masks, masks, strict=True):
                mask.mask = new
            if not layer.masks:
                layer.masks = [Mask(alive)]
                _register(layer.module, layer.masks[0])
    except BaseException:
        for layer, before in zip(layers, had, strict=True):
            for mask, old in before:
                mask.mask = old
            if not before and any(find(layer.module, Mask)):
                remove(layer.module, Mask)
        raise


def _register(module: nn.Module, mask: Mask) -> None:
    if parametrize.is_parametrized(module, WEIGHT):
        weight_list(module).insert(0, mask)  # first: the scale of a fake quantization is that of the weights that live
    else:
        parametrize.register_parametrization(module, WEIGHT, mask)


def _report(title: str, layers: list[_Layer]) -> Report:
    report = Report(title, list(_COLUMNS))
    weights = zeros = 0
    for layer in layers:
        weight: Any = layer.module.weight
        row: dict[str, Any] = {"layer": " = ".join(layer.names)}
        if not nn.parameter.is_lazy(weight):
            here = weight.numel() - (0 if weight.is_meta else int(torch.count_nonzero(weight)))
            row |= {"shape": "x".join(map(str, weight.shape)), "weights": weight.numel(), "zeros": here}
            row["sparsity"] = round(here / max(weight.numel(), 1), 4)
            weights, zeros = weights + weight.numel(), zeros + here
        report.add(**row, why="" if layer.reason is None else f"not pruned: {layer.reason}")
    report.notes.append(f"{zeros} of {weights} weights are zero ({100 * zeros / max(weights, 1):.1f}%)")
    return report
