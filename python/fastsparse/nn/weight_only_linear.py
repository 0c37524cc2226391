"""WeightOnlyLinear: torch.nn.Linear with a weight of 8 or 4 bits, for few rows of x."""

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
)
from fastsparse.nn.int8_linear import MAX_K, quantize_weight
from fastsparse.ops.int8_gemm import GROUP_SIZES, u4_bytes

DEFAULT_GROUP_SIZE = 64
_MAX_SIDE = 2**31 - 1


class WeightOnlyLinear(PackedLinear):
    """A linear layer whose weight has 8 bits (one scale per output) or 4 (one scale per output and group of inputs).

    y = activation(x W^T + bias) for x float32, bfloat16 or float16 [..., in_features]; y [..., out_features] has x's
    dtype, or autocast's where autocast is on, as with `torch.nn.functional.linear`. x is rounded to 8 bits in groups
    (`ops.weight_only_linear`), which costs far less accuracy than the rounding of the weight. Made for 1 to 16 rows,
    where the time is that of reading the weight; right for any number. Differentiable in `x` and `bias`; the weight is
    fixed. Rows of x with a NaN or an infinity give NaN.

    The module works in every float dtype of x as it is: `half()`, `to(dtype)` and the like move it between devices but
    leave its dtypes alone.

    Attributes:
        in_features, out_features: K and N.
        activation: None, "relu", "gelu" (the exact one) or "silu"; applied inside the kernel.
        bits: 8 or 4.
        group_size: 32, 64 or 128 inputs with one scale; None for 8 bits.
        symmetric: False: the groups have zero points (4 bits alone).
        sparse: True: the zeros of the weight are left out (4 bits, symmetric): the same y, sooner from about 50% zeros
            on, for up to 4 rows; on the CPU alone.
        weight: uint8 [bytes], a buffer: the pack (`ops.describe`, `ops.unpack`, `ops.unpack_scales`).
        weight_scale: float32 [N], a buffer, for 8 bits; None for 4, whose scales are in the pack.
        bias: float32 [N], a Parameter, or None.
    """

    CONFIG = (*PackedLinear.CONFIG, "bits", "group_size", "symmetric")
    optional_config: ClassVar[tuple[str, ...]] = ("sparse",)
    weight_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str | None = None,
        bits: int = 8,
        group_size: int | None = None,
        symmetric: bool = True,
        sparse: bool = False,
    ) -> None:
        """An empty layer (zeros), for `load_state_dict` to fill; `from_linear` makes one that computes something.

        Under `with torch.device("meta")` it allocates nothing; fill it with `load_state_dict(..., assign=True)`.

        Raises:
            ValueError: a size out of range, or an unknown activation, number of bits or group size.
        """
        super().__init__()
        _check_kind("WeightOnlyLinear", bits, group_size, symmetric, sparse)
        if bits == 8:
            check_size("WeightOnlyLinear", "in_features", in_features, MAX_K, "for a vnni16 pack")
        else:
            check_size("WeightOnlyLinear", "in_features", in_features, _MAX_SIDE, "for the pack's header")
        check_size("WeightOnlyLinear", "out_features", out_features, _MAX_SIDE, "for the pack's header")
        check_activation(activation, "WeightOnlyLinear")
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        self.bits = bits
        self.group_size = DEFAULT_GROUP_SIZE if bits == 4 and group_size is None else group_size
        self.symmetric = symmetric
        self.sparse = sparse
        zeros = torch.zeros(out_features, dtype=torch.float32)
        if bits == 8:
            pack = ops.pack(torch.zeros(out_features, in_features, dtype=torch.int8))
        elif zeros.is_meta and sparse:  # without data there are no zeros to count: the length says nothing
            pack = torch.empty(0, dtype=torch.uint8)
        elif zeros.is_meta:
            assert self.group_size is not None
            pack = torch.empty(u4_bytes(out_features, in_features, self.group_size, not symmetric), dtype=torch.uint8)
        else:
            pack = _pack_u4(torch.zeros(out_features, in_features), self.group_size, symmetric, sparse)
        self.register_buffer("weight", pack)
        self.register_buffer("weight_scale", torch.ones_like(zeros) if bits == 8 else None)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        bits: int = 8,
        group_size: int | None = None,
        activation: str | None = None,
        symmetric: bool = True,
        sparse: bool = False,
    ) -> WeightOnlyLinear:
        """Quantizes a dense layer; the layer itself stays as it is, and the copy shares no memory with it.

        Args:
            linear: on the CPU, float32, bfloat16 or float16; finite weights [N, K], for 8 bits K at most 131071.
            bits: 8: one scale per output, as `nn.Int8Linear`. 4: `ops.quantize_groups`. Zeros stay exact zeros.
            group_size: for 4 bits: 32, 64 (the default) or 128.
            activation: None, "relu", "gelu" or "silu": what follows the layer and shall run inside the kernel.
            symmetric: for 4 bits: False gives every group a zero point.
            sparse: for 4 bits, symmetric: True leaves out what is zero, or rounds to zero.

        Returns:
            A layer in the training mode of `linear`, whose bias requires a gradient if that of `linear` does.

        Raises:
            TypeError: `linear` is no torch.nn.Linear.
            ValueError: names the argument, what came and what was expected.
        """
        where = "WeightOnlyLinear.from_linear"
        weight = weight_to_pack(linear, activation, where)
        _check_kind(where, bits, group_size, symmetric, sparse)
        out_features, in_features = weight.shape
        if bits == 8 and in_features > MAX_K:
            raise ValueError(f"{where}: linear must have at most {MAX_K} in_features for 8 bits, got {in_features}")
        with torch.device("meta"):  # every tensor of it is set below
            module = cls(
                in_features, out_features, linear.bias is not None, activation, bits, group_size, symmetric, sparse
            )
        try:
            if bits == 8:
                codes, module.weight_scale = quantize_weight(weight)
                module.weight = ops.pack(codes)
            else:
                module.weight = _pack_u4(weight, module.group_size, symmetric, sparse)
        except ValueError as error:
            raise ValueError(f"{where}: linear.weight can't be quantized: {error}") from error
        module.take_bias(linear)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        # Going round Module.__getattr__ takes a part off the cost of a small call.
        buffers: dict[str, Any] = self._buffers
        return ops.weight_only_linear(
            self.cast_for_autocast(x),
            buffers["weight"],
            self.bias,
            self.activation,
            buffers["weight_scale"],
            self.out_features,
        )

    def config(self) -> dict[str, Any]:
        return super().config() | ({"sparse": True} if self.sparse else {})

    def state_problems(self, state: dict[str, Any], prefix: str = "") -> list[str]:
        """What keeps the tensors of `state` under `prefix` from being this layer's; absent ones are not its matter.

        A 4-bit pack is validated to its last byte here.
        """
        n, k = self.out_features, self.in_features

        def misfit(header: dict[str, Any]) -> str | None:
            got = _kind_of(header)
            if (got, header["n"], header["k"]) == (self._kind(), n, k):
                return None
            return f"got a pack of {got} [N={header['n']}, K={header['k']}]"

        wanted = f"a pack of {self._kind()} [N={n}, K={k}]"
        problems = pack_problems(state, prefix, wanted, misfit, None if self.sparse else self.weight.numel())
        return problems + vector_problems(self, state, prefix, {"weight_scale": n, "bias": n})

    def make_room(self, weight: Tensor) -> None:
        """A sparse pack is as long as its zeros let it be: the buffer takes the length of the one that is loaded."""
        if self.sparse and self.weight.shape != weight.shape:
            self.weight = self.weight.new_empty(weight.shape)

    def _kind(self) -> str:
        if self.bits == 8:
            return "int8"
        kind = f"{'int4' if self.symmetric else 'uint4'} in groups of {self.group_size}"
        return f"{kind}, bitmap_u4" if self.sparse else kind


def _kind_of(header: dict[str, Any]) -> str:
    if header["format"] == "u4":
        return f"{header['dtype']} in groups of {header['block']}"
    if header["format"] == "bitmap_u4":
        return f"int4 in groups of {header['block']}, bitmap_u4"
    sparse = header["dtype"] == "int8" and header["format"] != "vnni16"
    return f"int8, {header['format']}" if sparse else str(header["dtype"])


def _check_kind(where: str, bits: Any, group_size: Any, symmetric: Any, sparse: Any) -> None:
    if type(bits) is not int or bits not in (8, 4):
        raise ValueError(f"{where}: bits must be 8 or 4, got {bits!r}")
    if group_size is not None and (type(group_size) is not int or bits == 8 or group_size not in GROUP_SIZES):
        wanted = "None for 8 bits, which have one scale per output" if bits == 8 else "None, 32, 64 or 128"
        raise ValueError(f"{where}: group_size must be {wanted}, got {group_size!r}")
    if type(symmetric) is not bool or (bits == 8 and not symmetric):
        wanted = "True for 8 bits" if bits == 8 else "True or False"
        raise ValueError(f"{where}: symmetric must be {wanted}, got {symmetric!r}")
    if type(sparse) is not bool or (sparse and (bits == 8 or not symmetric)):
        wanted = "False for 8 bits" if bits == 8 else "False with zero points" if not symmetric else "True or False"
        raise ValueError(f"{where}: sparse must be {wanted}, got {sparse!r}")


def _pack_u4(weight: Tensor, group_size: int | None, symmetric: bool, sparse: bool) -> Tensor:
    assert group_size is not None
    codes, scale, zero_point = ops.quantize_groups(weight, group_size, symmetric)
    return ops.pack(codes, "bitmap_u4" if sparse else "u4", scale=scale, zero_point=zero_point, group_size=group_size)
