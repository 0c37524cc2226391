"""Int8Linear: torch.nn.Linear with int8 weights and int8 activations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsparse import ops
from fastsparse.nn._packed import (
    PackedLinear,
    check_activation,
    check_size,
    pack_problems,
    vector_problems,
    weight_to_pack,
    what,
)

MAX_K = 131071  # kMaxK in csrc/int8_gemm/int8_gemm.h: beyond it a sum of int8 products may leave int32
_MAX_K_AFFINE = 65793  # kMaxKAffine: with a zero point
_MAX_N = 2**31 - 1
_TINY = torch.finfo(torch.float32).tiny


def weight_scale(weight: Tensor) -> Tensor:
    """float32 [N] for a weight [N, K >= 1]: max(absmax / 127, FLT_MIN) of each row in float32, 1 for a row of zeros."""
    absmax = weight.detach().float().abs().amax(1)
    scale = (absmax / 127.0).clamp_min(_TINY)
    return torch.where(absmax == 0, torch.ones_like(scale), scale)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Per output channel (row), symmetric: weight ~ codes * scale[:, None].

    The arithmetic is float32: scale as `weight_scale` (1 for K = 0);
    codes = round(weight * (1 / scale)), half to even, so that zeros stay zeros and -128 never occurs.

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite.

    Returns:
        (codes int8 [N, K], scale float32 [N]).

    Raises:
        ValueError: a NaN or an infinity in the weight.
    """
    weight = weight.detach().float()
    if weight.shape[1] == 0:
        return weight.to(torch.int8), weight.new_ones(weight.shape[0])
    scale = weight_scale(weight)
    broken = int((~torch.isfinite(scale)).sum())
    if broken:
        raise ValueError(f"quantize_weight: weight must be finite, got a NaN or an infinity in {broken} of its rows")
    return (weight * (1.0 / scale)[:, None]).round_().to(torch.int8), scale


class Int8Linear(PackedLinear):
    """A linear layer in W8A8: int8 weights, one scale per output channel; x quantized dynamically, one scale per token.

    y = activation(x W^T + bias + residual) for x float32, bfloat16 or float16 [..., in_features]; y [..., out_features]
    has x's dtype, or autocast's where autocast is on, as with `torch.nn.functional.linear`. Differentiable in `x`,
    `bias` and `residual`; the weight is fixed. Rows of x with a NaN or an infinity give NaN.

    With `static_x`, x is quantized by the one scale and zero point that the layer holds, and may come as int8 codes of
    them (y is then float32, or autocast's dtype). With `static_y`, y is int8: codes by the layer's y_scale and
    y_zero_point, without a gradient. So layers hand on int8 to each other where one's y_scale and y_zero_point are the
    next one's x_scale and x_zero_point; `torch.nn.Sequential` of them is a chain that is never in float.

    The module works in every float dtype of x as it is: `half()`, `to(dtype)` and the like move it between devices but
    leave its dtypes alone.

    Attributes:
        in_features, out_features: K and N.
        activation: None, "relu", "gelu" (the exact one) or "silu"; applied inside the kernel.
        weight: uint8 [bytes], a buffer: the pack (`ops.describe`, `ops.unpack`).
        weight_scale: float32 [N], a buffer.
        bias: float32 [N], a Parameter, or None.
        static_x, static_y: whether there are x_scale and x_zero_point, y_scale and y_zero_point.
        x_scale, y_scale: float32 [], buffers; x_zero_point, y_zero_point: int32 [], buffers. They stay on the CPU.
    """

    weight_scale: Tensor
    x_scale: Tensor
    x_zero_point: Tensor
    y_scale: Tensor
    y_zero_point: Tensor
    static_x: bool = False
    static_y: bool = False

    cpu_buffers: ClassVar[tuple[str, ...]] = ("x_scale", "x_zero_point", "y_scale", "y_zero_point")
    optional_config: ClassVar[tuple[str, ...]] = ("static_x", "static_y")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        static_x: bool = False,
        static_y: bool = False,
    ) -> None:
        """An empty layer (zeros), for `load_state_dict` to fill; `from_linear` makes one that computes something.

        Under `with torch.device("meta")` it allocates nothing; fill it with `load_state_dict(..., assign=True)`.

        Raises:
            ValueError: a size out of range, an unknown activation, or a flag that is no bool.
        """
        super().__init__()
        check_size("Int8Linear", "in_features", in_features, MAX_K, "for the sums to be exact in int32")
        check_size("Int8Linear", "out_features", out_features, _MAX_N, "for the pack's header")
        check_activation(activation, "Int8Linear")
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.register_buffer("weight", ops.pack(torch.zeros(out_features, in_features, dtype=torch.int8)))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32))
        zeros = torch.zeros(out_features, dtype=torch.float32)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)
        for side, static in (("x", static_x), ("y", static_y)):
            if type(static) is not bool:
                raise ValueError(f"Int8Linear: static_{side} must be True or False, got {static!r}")
            if static:
                self._set_static(side, 1.0, 0)
        self.static_x = static_x
        self.static_y = static_y

    def _set_static(self, side: str, scale: float, zero_point: int) -> None:
        self.register_buffer(f"{side}_scale", torch.tensor(scale, dtype=torch.float32, device="cpu"))
        self.register_buffer(f"{side}_zero_point", torch.tensor(zero_point, dtype=torch.int32, device="cpu"))

    def config(self) -> dict[str, Any]:
        static = {name: True for name in self.optional_config if getattr(self, name)}
        return super().config() | static

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        activation: str | None = None,
        x_scale: float | None = None,
        x_zero_point: int | None = None,
        y_scale: float | None = None,
        y_zero_point: int | None = None,
    ) -> Int8Linear:
        """Quantizes a dense layer; the layer itself stays as it is, and the copy shares no memory with it.

        Args:
            linear: on the CPU, float32, bfloat16 or float16; finite weights [N, K], K at most 131071. A layer in half
                precision is quantized from the float32 values of its weights. float64 is refused: the kernels take no
                float64 x, so the copy could not stand in for it; say `linear.float()` if float32 is what you want.
            activation: None, "relu", "gelu" or "silu": what follows the layer and shall run inside the kernel.
            x_scale: > 0 (as a float32): x is quantized with it, or comes as int8. None: dynamically.
            x_zero_point: in [-128, 127]; None: 0. Needs x_scale, and K at most 65793 where it is not 0.
            y_scale, y_zero_point: the same for y, which becomes int8. None: y is a float.

        Returns:
            A layer in the training mode of `linear`, whose bias requires a gradient if that of `linear` does.

        Raises:
            TypeError: `linear` is no torch.nn.Linear.
            ValueError: names the argument, what came and what was expected.
        """
        weight = weight_to_pack(linear, activation, "Int8Linear.from_linear")
        out_features, in_features = weight.shape
        if in_features > MAX_K:
            raise ValueError(
                f"Int8Linear.from_linear: linear must have at most {MAX_K} in_features for the sums to be exact in "
                f"int32, got {in_features}"
            )
        static = {}
        for side, given in (("x", (x_scale, x_zero_point)), ("y", (y_scale, y_zero_point))):
            static[side] = _check_static(side, *given)
        if static["x"] is not None and static["x"][1] != 0 and in_features > _MAX_K_AFFINE:
            raise ValueError(
                f"Int8Linear.from_linear: linear must have at most {_MAX_K_AFFINE} in_features beside an x_zero_point "
                f"for the sums to be exact in int32, got {in_features}"
            )
        try:
            codes, scale = quantize_weight(weight)
        except ValueError as error:
            raise ValueError(f"Int8Linear.from_linear: linear.weight can't be quantized: {error}") from error
        with torch.device("meta"):  # every tensor of it is set below
            flags = [static[side] is not None for side in ("x", "y")]
            module = cls(in_features, out_features, linear.bias is not None, activation, *flags)
        for side, values in static.items():
            if values is not None:
                module._set_static(side, *values)
        module.weight = ops.pack(codes)
        module.weight_scale = scale
        module.take_bias(linear)
        return module.train(linear.training)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        # Going round Module.__getattr__ takes a part off the cost of a small call, too.
        buffers: dict[str, Any] = self._buffers
        x = self.cast_for_autocast(x)
        weight, weight_scale = buffers["weight"], buffers["weight_scale"]
        if residual is None and not self.static_x and not self.static_y:
            return ops.int8_linear(x, weight, weight_scale, self.bias, self.activation)
        dtype = None
        if x.dtype == torch.int8 and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        return ops.int8_linear(
            x,
            weight,
            weight_scale,
            self.bias,
            self.activation,
            buffers.get("x_scale"),
            buffers.get("x_zero_point"),
            None if residual is None else self.cast_for_autocast(residual),
            buffers.get("y_scale"),
            buffers.get("y_zero_point"),
            dtype,
        )

    def state_problems(self, state: dict[str, Any], prefix: str = "") -> list[str]:
        """What keeps the tensors of `state` under `prefix` from being this layer's; absent ones are not its matter."""
        n, k = self.out_features, self.in_features

        def misfit(header: dict[str, Any]) -> str | None:
            if (header["n"], header["k"]) != (n, k):
                return f"got a pack of [N={header['n']}, K={header['k']}]"
            return None if header["format"] == "vnni16" else f"of the format vnni16, got {header['format']}"

        problems = pack_problems(state, prefix, f"a pack of [N={n}, K={k}]", misfit, self.weight.numel())
        problems += vector_problems(self, state, prefix, {"weight_scale": n, "bias": n})
        for name in self.cpu_buffers:
            value = state.get(prefix + name)
            if value is None or name not in self._buffers:
                continue
            problem = _static_problem(name, value, k)
            if problem is not None:
                problems.append(f"{prefix}{name} must be {problem}")
        return problems


def _check_static(side: str, scale: Any, zero_point: Any) -> tuple[float, int] | None:
    """The values to be held for x or y of a layer; None: there are none."""
    where = "Int8Linear.from_linear"
    if scale is None:
        if zero_point is not None:
            raise ValueError(f"{where}: {side}_zero_point needs {side}_scale, got {zero_point!r} and no scale")
        return None
    zero = 0 if zero_point is None else zero_point
    if type(scale) not in (float, int) or not _TINY <= scale <= torch.finfo(torch.float32).max:
        raise ValueError(f"{where}: {side}_scale must be a finite float, at least 1.2e-38, got {scale!r}")
    if type(zero) is not int or not -128 <= zero <= 127:
        raise ValueError(f"{where}: {side}_zero_point must be an int in [-128, 127], got {zero!r}")
    return scale, zero


def _static_problem(name: str, value: Any, k: int) -> str | None:
    """What `value` must be to be the x_scale, x_zero_point, y_scale or y_zero_point of a layer, and is not; or None."""
    is_scale = name.endswith("scale")
    dtype = torch.float32 if is_scale else torch.int32
    if not isinstance(value, Tensor) or value.dtype != dtype or value.shape != () or value.is_meta:
        return f"{str(dtype).removeprefix('torch.')} [] with a value, got {what(value)}"
    number = value.item()
    if is_scale and not _TINY <= number < float("inf"):
        return f"finite and at least 1.2e-38, got {number}"
    if not is_scale and not -128 <= number <= 127:
        return f"in [-128, 127], got {number}"
    if name == "x_zero_point" and number != 0 and k > _MAX_K_AFFINE:
        return f"0 for more than {_MAX_K_AFFINE} in_features, got {number}"
    return None
