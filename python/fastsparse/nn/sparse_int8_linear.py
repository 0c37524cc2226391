"""SparseInt8Linear: torch.nn.Linear with int8 weights, whose zeros are left out, and int8 activations."""

from __future__ import annotations

from typing import Any

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
)
from fastsparse.nn.int8_linear import MAX_K, quantize_weight
from fastsparse.ops.sparse_int8 import FORMATS

_MAX_N = 2**31 - 1


class SparseInt8Linear(PackedLinear):
    """A linear layer in W8A8 without what is zero in its weight: `Int8Linear`, to the bit, with dynamic activations.

    y = activation(x W^T + bias) for x float32, bfloat16 or float16 [..., in_features]; y [..., out_features] has x's
    dtype, or autocast's where autocast is on, as with `torch.nn.functional.linear`. Differentiable in `x` and `bias`;
    the weight is fixed. Rows of x with a NaN or an infinity give NaN. `half()`, `to(dtype)` and the like leave its
    dtypes alone.

    Attributes:
        in_features, out_features: K and N.
        activation: None, "relu", "gelu" (the exact one) or "silu"; applied inside the kernel.
        weight: uint8 [bytes], a buffer: the pack (`ops.describe`, `ops.unpack`). Its length depends on the zeros.
        weight_scale: float32 [N], a buffer.
        bias: float32 [N], a Parameter, or None.
    """

    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None) -> None:
        """An empty layer (zeros), for `load_state_dict` to fill; `from_linear` makes one that computes something.

        Under `with torch.device("meta")` it allocates nothing; fill it with `load_state_dict(..., assign=True)`.

        Raises:
            ValueError: a size out of range, or an unknown activation.
        """
        super().__init__()
        check_size("SparseInt8Linear", "in_features", in_features, MAX_K, "for the sums to be exact in int32")
        check_size("SparseInt8Linear", "out_features", out_features, _MAX_N, "for the pack's header")
        check_activation(activation, "SparseInt8Linear")
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        zeros = torch.zeros(out_features, dtype=torch.float32)
        # Without data there are no zeros to count: the length of a meta pack says nothing.
        empty = torch.empty(0, dtype=torch.uint8)
        if not zeros.is_meta:
            empty = ops.pack(zeros.to(torch.int8)[:, None].expand(out_features, in_features), "blocks1x4")
        self.register_buffer("weight", empty)
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32))
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str = "auto", rows: int | None = None, activation: str | None = None
    ) -> SparseInt8Linear:
        """Quantizes a dense layer and leaves its zeros out; the layer stays, and the copy shares no memory with it.

        Args:
            linear: on the CPU, float32, bfloat16 or float16; finite weights [N, K], K at most 131071. What is zero in
                its weight is zero in the copy, and so is what rounds to zero.
            format: "bitmap_s8" (few rows of x), "windows_s8" (zeros anywhere), "blocks1x4" or "blocks4x4" (zeros in
                blocks, many rows), or "auto": the one of them that is the fastest for the zeros and `rows`, measured
                (`ops.pack`, "sparse"); never a dense one.
            rows: rows of x to be expected; None: many.
            activation: None, "relu", "gelu" or "silu": what follows the layer and shall run inside the kernel.

        Returns:
            A layer in the training mode of `linear`, whose bias requires a gradient if that of `linear` does.

        Raises:
            TypeError: `linear` is no torch.nn.Linear.
            ValueError: names the argument, what came and what was expected.
        """
        where = "SparseInt8Linear.from_linear"
        weight = weight_to_pack(linear, activation, where)
        out_features, in_features = weight.shape
        if format not in ("auto", *FORMATS):
            names = ", ".join(map(repr, FORMATS))
            raise ValueError(f"{where}: format must be 'auto' or one of {names}, got {format!r}")
        if in_features > MAX_K:
            raise ValueError(
                f"{where}: linear must have at most {MAX_K} in_features for the sums to be exact in int32, "
                f"got {in_features}"
            )
        try:
            codes, scale = quantize_weight(weight)
        except ValueError as error:
            raise ValueError(f"{where}: linear.weight can't be quantized: {error}") from error
        try:
            pack = ops.pack(codes, "sparse" if format == "auto" else format, rows)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        with torch.device("meta"):  # every tensor of it is set below
            module = cls(in_features, out_features, linear.bias is not None, activation)
        module.weight = pack
        module.weight_scale = scale
        module.take_bias(linear)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        # Going round Module.__getattr__ takes a part off the cost of a small call.
        buffers: dict[str, Any] = self._buffers
        return ops.sparse_int8_linear(
            self.cast_for_autocast(x), buffers["weight"], buffers["weight_scale"], self.bias, self.activation
        )

    def state_problems(self, state: dict[str, Any], prefix: str = "") -> list[str]:
        """What keeps the tensors of `state` under `prefix` from being this layer's; absent ones are not its matter.

        A pack is validated to its last byte here.
        """
        n, k = self.out_features, self.in_features

        def misfit(header: dict[str, Any]) -> str | None:
            if header["dtype"] == "int8" and header["format"] in FORMATS and (header["n"], header["k"]) == (n, k):
                return None
            return f"got {header['format']} of [N={header['n']}, K={header['k']}]"

        problems = pack_problems(state, prefix, f"a sparse pack of int8 [N={n}, K={k}]", misfit)
        return problems + vector_problems(self, state, prefix, {"weight_scale": n, "bias": n})

    def make_room(self, weight: Tensor) -> None:
        """A pack is as long as its zeros let it be: the buffer takes the length of the one that is loaded."""
        if self.weight.shape != weight.shape:
            self.weight = self.weight.new_empty(weight.shape)
