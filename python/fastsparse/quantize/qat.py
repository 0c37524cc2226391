"""Quantization-aware training: the model computes, while it is trained, what `nn.Int8Linear` will compute."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsparse import _sharing, ops
from fastsparse.convert import read_by_torch, why_not_wanted
from fastsparse.nn._packed import FLOATS
from fastsparse.nn.parametrizations import WEIGHT, FakeQuantize, bake, find, holder, only_ours
from fastsparse.quantize.config import Int8Dynamic
from fastsparse.report import Report

_COLUMNS = ["layer", "shape", "trained", "why"]


class FakeQuantizeInput:
    """A forward pre-hook: the layer's input as int8 codes would hold it, one scale per row (per token)."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (_fake(args[0]), *args[1:]), kwargs
        return args, {name: _fake(value) if name == "input" else value for name, value in kwargs.items()}


def _fake(x: Any) -> Any:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.numel() == 0:
        return x
    return ops.fake_quantize(x, ops.quantize_per_token(x.detach())[1])


def prepare_qat_(model: nn.Module, config: Int8Dynamic | None = None) -> Report:
    """Makes linear layers compute, in place, with weights and inputs rounded to int8: a fine-tune gets used to it.

    Weights: symmetric, one scale per output; inputs: one scale per token, both taken anew at every step from the values
    at hand, as `nn.Int8Linear` takes them. Gradients go straight through the rounding (Bengio et al., 2013, "Estimating
    or Propagating Gradients Through Stochastic Neurons"; Jacob et al., 2018, "Quantization and Training of Neural
    Networks"). Zeros stay exact zeros, so masks of `prune_` hold. The parameters stay the same objects. Afterwards:
    `finalize_qat_`, then `quantize_`.

    Args:
        model: any module.
        config: which layers, by `min_weights` and `skip`; the default is `Int8Dynamic()`.

    Returns:
        A Report with a row per linear layer: layer, shape, trained (for int8 or dense), why.

    Raises:
        TypeError: `model` or `config` is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare_qat_: model must be an nn.Module, got {type(model).__name__}")
    config = Int8Dynamic() if config is None else config
    if not isinstance(config, Int8Dynamic):
        raise TypeError(f"prepare_qat_: config must be an Int8Dynamic, got {type(config).__name__}")
    owners = _sharing.owners(model)
    behind_its_back = read_by_torch(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            names.setdefault(module, []).append(name)

    report = Report("quantization-aware training, int8 dynamic per token", list(_COLUMNS))
    for module, known in names.items():
        assert isinstance(module, nn.Linear)
        reason = behind_its_back.get(module) or _why_not(module, owners) or why_not_wanted(module, known, config)
        if reason is None and not any(find(module, FakeQuantize)):
            parametrize.register_parametrization(module, WEIGHT, FakeQuantize())
            module.register_forward_pre_hook(FakeQuantizeInput(), with_kwargs=True)
        report.add(
            layer=" = ".join(known),
            shape=f"K={module.in_features} N={module.out_features}",
            trained="dense" if reason else "int8",
            why=reason or "",
        )
    return report


def finalize_qat_(model: nn.Module) -> None:
    """Ends `prepare_qat_`: the rounded weights become the weights, inputs are no longer rounded; masks stay.

    `quantize_` then finds the very codes that were trained.

    Raises:
        TypeError: `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"finalize_qat_: model must be an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if any(find(module, FakeQuantize)):
            bake(module, FakeQuantize)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, FakeQuantizeInput):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _why_not(linear: nn.Linear, owners: Any) -> str | None:
    if parametrize.type_before_parametrizations(linear) is not nn.Linear:
        return f"is a {type(linear).__name__}, not a plain nn.Linear"
    if not only_ours(linear):
        return "has a parametrization of another kind"
    if _sharing.is_shared(linear, owners) or _sharing.is_shared(holder(linear), owners):
        return _sharing.SHARED
    return Int8Dynamic().why_not(linear)
