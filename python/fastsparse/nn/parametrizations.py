"""What a weight is seen through while a network is pruned or trained for int8: masks and fake quantization.

Both are parametrizations of torch.nn.utils.parametrize, computed at every use of the weight. A value that was set to
zero once would not last: momentum moves it again in the next step, whatever its gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastsparse import ops
from fastsparse.nn.int8_linear import weight_scale

WEIGHT = "weight"
_Kind = TypeVar("_Kind", bound=nn.Module)


class Mask(nn.Module):
    """The weight with exact zeros where the mask is False, whatever is in the parameter behind it.

    Attributes:
        mask: bool, the weight's shape, a buffer: True for what lives.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        # Not a product: that would leave -0.0, and NaN where the value behind the mask is not finite.
        return torch.where(self.mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class FakeQuantize(nn.Module):
    """A weight [N, K] as `nn.Int8Linear` will have it: rounded to int8 with one scale per row, and back.

    The scale is that of `nn.int8_linear.weight_scale`, from the weight at hand. The gradient is straight through.
    """

    def forward(self, weight: Tensor) -> Tensor:
        if weight.numel() == 0:
            return weight
        return ops.fake_quantize(weight, weight_scale(weight), axis=0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def find(module: nn.Module, kind: type[_Kind]) -> Iterator[_Kind]:
    """The parametrizations of that kind on the module's weight."""
    if parametrize.is_parametrized(module, WEIGHT):
        for parametrization in weight_list(module):
            if isinstance(parametrization, kind):
                yield parametrization


def only_ours(module: nn.Module) -> bool:
    """Whether the weight is a plain parameter but for masks and fake quantization."""
    if not parametrize.is_parametrized(module):
        return True
    lists: Any = module.parametrizations
    return set(lists) == {WEIGHT} and all(isinstance(each, (Mask, FakeQuantize)) for each in lists[WEIGHT])


def bake(module: nn.Module, kind: type[nn.Module]) -> None:
    """Ends the parametrizations of that kind on the weight; what they made of the values stays.

    The parameter stays the same object, so that an optimizer goes on with it. Parametrizations of other kinds stay.
    """
    chain = list(weight_list(module))
    last = max(index for index, each in enumerate(chain) if isinstance(each, kind))
    with torch.no_grad():
        original = value = weight_list(module).original
        # All up to the last of its kind: what comes before it decides what it sees.
        for each in chain[: last + 1]:
            value = each(value)
        original.copy_(value)
    remove(module, kind)


def remove(module: nn.Module, kind: type[nn.Module]) -> None:
    """Ends the parametrizations of that kind on the weight; the parameter behind them shows as it is."""
    others = [each for each in weight_list(module) if not isinstance(each, kind)]
    # A deepcopy shares the class that torch made for the parametrized module, and torch takes the weight off that
    # class: without a class of its own, the module that was copied would lose its weight here.
    shared = type(module)
    body = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, body)
    parametrize.remove_parametrizations(module, WEIGHT, leave_parametrized=False)
    for name in [name for name in module._parameters if name != WEIGHT]:  # the weight comes first, as it did
        module._parameters[name] = module._parameters.pop(name)
    for each in others:
        # unsafe: nothing to be checked, it was there before
        parametrize.register_parametrization(module, WEIGHT, each, unsafe=True)


def weight_list(module: nn.Module) -> Any:
    """The ParametrizationList of a weight that has one."""
    lists: Any = module.parametrizations
    return lists[WEIGHT]


def holder(module: nn.Module) -> nn.Module:
    """The module that owns the weight's parameter: the layer itself, or its list of parametrizations."""
    return weight_list(module) if parametrize.is_parametrized(module, WEIGHT) else module
