"""What the layers over a pack share: configuration, loading all or nothing, moves between devices, autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastsparse.ops import describe
from fastsparse.ops.int8_gemm import ACTIVATIONS

_Self = TypeVar("_Self", bound="PackedLinear")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PackedLinear(nn.Module):
    """A linear layer whose weight is a pack, a uint8 buffer named `weight`; its subclasses know the format."""

    CONFIG: ClassVar[tuple[str, ...]] = ("in_features", "out_features", "bias", "activation")  # the keys of config()
    weight: Tensor
    bias: nn.Parameter | None
    in_features: int
    out_features: int
    activation: str | None

    cpu_buffers: ClassVar[tuple[str, ...]] = ()  # stay on the CPU wherever the layer goes: kernels read their values
    optional_config: ClassVar[tuple[str, ...]] = ()  # what config() may hold beside its four

    def state_problems(self, state: dict[str, Any], prefix: str = "") -> list[str]:
        """What keeps the tensors of `state` under `prefix` from being this layer's; absent ones are not its matter."""
        raise NotImplementedError  # only a subclass knows its format

    def take_bias(self, linear: nn.Linear) -> None:
        """The dense layer's bias, copied, in float32."""
        if linear.bias is not None:
            bias = linear.bias.detach().to(torch.float32, copy=True)
            self.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)

    def make_room(self, weight: Tensor) -> None:
        """Called before a valid `weight` is loaded, for formats whose length depends on what they hold."""

    def cast_for_autocast(self, x: Tensor) -> Tensor:
        """Autocast knows torch's own ops only, so its cast is made here; like F.linear, it leaves float64 alone."""
        # Going round x.device takes a part off the cost of a small call.
        device = "cpu" if x.is_cpu else x.device.type
        if torch.is_autocast_enabled(device) and x.dtype in FLOATS:
            return x.to(torch.get_autocast_dtype(device))
        return x

    def config(self) -> dict[str, Any]:
        """The arguments that make an empty layer like this one; plain data, for JSON."""
        return {name: self.bias is not None if name == "bias" else getattr(self, name) for name in self.CONFIG}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # torch checks shapes alone, tensor by tensor: a foreign pack of the right length would be taken, and a scale
        # that fits before a pack that does not. Here all of a layer is taken or nothing.
        problems = self.state_problems(state_dict, prefix)
        if problems:
            error_msgs += [f"{type(self).__name__}: {problem}." for problem in problems]
            return
        weight = state_dict.get(prefix + "weight")
        if weight is not None:
            self.make_room(weight)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name in self.cpu_buffers:  # with assign=True they lie where the state does
            value = self._buffers.get(name)
            if value is not None:
                self._buffers[name] = value.cpu()

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        # half(), to(dtype) and type(dtype) convert a whole model through here. The kernels take x in any float dtype
        # but scale and bias in float32 alone (they meet the sum in float32), and the pack is bytes. So only what
        # fn does to the device is taken over.
        stay = [self._buffers.get(name) for name in self.cpu_buffers]

        def keep_dtype(tensor: Tensor) -> Tensor:
            if any(tensor is each for each in stay):
                return tensor
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        super()._apply(keep_dtype, recurse)
        return self


def weight_to_pack(linear: Any, activation: Any, where: str, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """The weight of a dense layer that from_linear may take, detached; raises what from_linear says."""
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{where}: linear must be a torch.nn.Linear, got {type(linear).__name__}")
    check_activation(activation, where)
    if nn.parameter.is_lazy(linear.weight):
        raise ValueError(f"{where}: linear has no weights yet (a lazy layer); run the model once before converting")
    weight = linear.weight.detach()
    if weight.device.type != "cpu":
        raise ValueError(f"{where}: linear must be on the CPU, got {weight.device}")
    if weight.dtype not in dtypes:
        names = [str(dtype).removeprefix("torch.") for dtype in (*dtypes, weight.dtype)]
        wanted = " or ".join(filter(None, (", ".join(names[:-2]), names[-2])))
        raise ValueError(f"{where}: linear.weight must be {wanted}, got {names[-1]} (linear.float() converts it)")
    return weight


def pack_problems(
    state: dict[str, Any],
    prefix: str,
    wanted: str,
    misfit: Callable[[dict[str, Any]], str | None],
    length: int | None = None,
) -> list[str]:
    """What keeps `weight` in `state` from being `wanted` ("a pack of ..."): one line or none; it may be absent.

    Args:
        misfit: gets what `ops.describe` says, which validates the pack; gives "got ..." where that is not wanted.
        length: of the pack in bytes, where all packs of the layer have the same.
    """
    weight = state.get(prefix + "weight")
    if weight is None:
        return []
    wanted = f"{prefix}weight must be {wanted}"
    if isinstance(weight, Tensor) and weight.is_meta:  # it has no header to read
        fits = weight.dtype == torch.uint8 and weight.dim() == 1 and weight.numel() == (length or weight.numel())
        return [] if fits else [f"{wanted}, got {what(weight)}"]
    try:
        header = describe(weight)
    except ValueError as error:
        return [f"{wanted}: {error}"]
    got = misfit(header)
    return [] if got is None else [f"{wanted}, {got}"]


def vector_problems(layer: nn.Module, state: dict[str, Any], prefix: str, lengths: dict[str, int]) -> list[str]:
    """The same of float32 vectors that the layer has, by name; a weight_scale must be finite."""
    problems = []
    for name, length in lengths.items():
        value = state.get(prefix + name)
        if value is None or getattr(layer, name) is None:
            continue
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape != (length,):
            problems.append(f"{prefix}{name} must be float32 [{length}], got {what(value)}")
        elif name == "weight_scale" and not value.is_meta and not bool(torch.isfinite(value).all()):
            problems.append(f"{prefix}{name} must be finite, got a NaN or an infinity in it")
    return problems


def check_size(where: str, name: str, value: Any, largest: int, why: str) -> None:
    if type(value) is not int or not 0 <= value <= largest:
        raise ValueError(f"{where}: {name} must be an int from 0 to {largest} {why}, got {value!r}")


def check_activation(activation: Any, where: str) -> None:
    if not (activation is None or isinstance(activation, str)) or activation not in ACTIVATIONS:
        raise ValueError(f"{where}: activation must be None, 'relu', 'gelu' or 'silu', got {activation!r}")


def what(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
