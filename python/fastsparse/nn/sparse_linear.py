"""SparseLinear: torch.nn.Linear whose zeros are left out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
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
from fastsparse.ops._pack import Rows, read_header

_MAX_SIDE = 2**31 - 1


class SparseLinear(PackedLinear):
    """A linear layer with a sparse weight: y = activation(x W^T + bias), without what is zero in W.

    W is float32, bfloat16 or, on CUDA alone, float16. x float32, bfloat16 or float16 [..., in_features], on CUDA of the
    dtype of a weight of 16 bits; y [..., out_features] has x's dtype, or autocast's where autocast is on, as with
    `torch.nn.functional.linear`; the sums are float32. Differentiable in `x` and `bias`; the weight is fixed. `half()`,
    `to(dtype)` and the like move the module between devices but leave its dtypes alone.

    Attributes:
        in_features, out_features: K and N.
        activation: None, "relu", "gelu" (the exact one) or "silu"; applied inside the kernel.
        weight: uint8 [bytes], a buffer: the pack (`ops.describe`, `ops.unpack`). Its length depends on the zeros.
        bias: float32 [N], a Parameter, or None.
    """

    # What the pack's header says, so that no call asks a GPU for it. Kept at load and at moves, lost with the tensor.
    _header: dict[str, Any] | None = None

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None) -> None:
        """An empty layer (zeros), for `load_state_dict` to fill; `from_linear` makes one that computes something.

        Under `with torch.device("meta")` it allocates nothing; fill it with `load_state_dict(..., assign=True)`.

        Raises:
            ValueError: a size out of range, or an unknown activation.
        """
        super().__init__()
        check_size("SparseLinear", "in_features", in_features, _MAX_SIDE, "for the pack's header")
        check_size("SparseLinear", "out_features", out_features, _MAX_SIDE, "for the pack's header")
        check_activation(activation, "SparseLinear")
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        zeros = torch.zeros(out_features, dtype=torch.float32)
        # Without data there are no zeros to count: the length of a meta pack says nothing.
        empty = torch.empty(0, dtype=torch.uint8)
        if not zeros.is_meta:
            empty = ops.pack(zeros[:, None].expand(out_features, in_features), "panels128")
        self.register_buffer("weight", empty)
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str = "auto", rows: Rows = None, activation: str | None = None
    ) -> SparseLinear:
        """Packs a dense layer, exactly as it is; the layer itself stays, and the copy shares no memory with it.

        Args:
            linear: on the CPU, float32, bfloat16 or float16; what is zero in its weight [N, K] is left out, all else is
                kept to the bit. The bias is widened to float32.
            format, rows: as for `ops.pack`: "auto" measures, and rows=(few, many) may keep two formats. For CUDA
                alone are "nm24", "blocks16" and all of float16; "auto" gives "nm24" for 2:4 weights of bfloat16, too,
                where there is a GPU and rows is not at most 16.
            activation: None, "relu", "gelu" or "silu": what follows the layer and shall run inside the kernel.

        Returns:
            A layer in the training mode of `linear`, whose bias requires a gradient if that of `linear` does.

        Raises:
            TypeError: `linear` is no torch.nn.Linear.
            ValueError: names the argument, what came and what was expected.
        """
        where = "SparseLinear.from_linear"
        weight = weight_to_pack(linear, activation, where)
        try:
            pack = ops.pack(weight, format, rows)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        out_features, in_features = weight.shape
        with torch.device("meta"):  # every tensor of it is set below
            module = cls(in_features, out_features, linear.bias is not None, activation)
        module.weight = pack
        module.take_bias(linear)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        # Going round Module.__getattr__ takes a part off the cost of a small call.
        weight = self._buffers["weight"]
        assert weight is not None
        x = self.cast_for_autocast(x)
        return ops.sparse_linear(x, weight, self.bias, self.activation, self.out_features, None, self._header)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._header = None

    def _keep_header(self) -> None:
        self._header = None
        weight = self._buffers["weight"]
        if weight is None or weight.is_meta or weight.numel() == 0:
            return
        with contextlib.suppress(ValueError):  # memory that nothing was loaded into yet
            header = read_header(weight)
            # The number of values is no matter of a compiled graph.
            self._header = {name: header[name] for name in ("format", "dtype", "block", "n")}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        if self._header is None:  # before the move: the pack still lies where it is read at no cost
            self._keep_header()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._keep_header()

    def state_problems(self, state: dict[str, Any], prefix: str = "") -> list[str]:
        """What keeps the tensors of `state` under `prefix` from being this layer's; absent ones are not its matter.

        A pack is validated to its last index here.
        """
        n, k = self.out_features, self.in_features

        def misfit(header: dict[str, Any]) -> str | None:
            if header["format"] == "structure":
                return "got a structure (nn.TrainableSparseLinear has one)"
            if (header["n"], header["k"]) == (n, k) and header["dtype"] in ("float32", "bfloat16", "float16"):
                return None
            return f"got a pack of {header['dtype']} [N={header['n']}, K={header['k']}]"

        problems = pack_problems(state, prefix, f"a pack of floats [N={n}, K={k}]", misfit)
        return problems + vector_problems(self, state, prefix, {"bias": n})

    def make_room(self, weight: Tensor) -> None:
        """A pack is as long as its zeros let it be: the buffer takes the length of the one that is loaded."""
        if self.weight.shape != weight.shape:
            self.weight = self.weight.new_empty(weight.shape)
