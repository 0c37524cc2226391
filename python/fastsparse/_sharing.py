"""Which modules of a model share parameters: what is changed for one of them would silently change the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

SHARED = "shares a parameter with another module"


def identities(module: nn.Module) -> Iterator[object]:
    """What makes the module's own parameters recognisable in another: the object, or memory that begins alike."""
    for parameter in module._parameters.values():
        if parameter is not None:
            nowhere = nn.parameter.is_lazy(parameter) or parameter.is_meta or parameter.numel() == 0
            started = 0 if nowhere else parameter.data_ptr()
            yield (parameter.device, started) if started else id(parameter)


def owners(model: nn.Module) -> Counter[object]:
    """How many modules own each parameter of the model."""
    return Counter(key for module in model.modules() for key in identities(module))


def is_shared(module: nn.Module, owners: Counter[object]) -> bool:
    return any(owners[key] > 1 for key in identities(module))
