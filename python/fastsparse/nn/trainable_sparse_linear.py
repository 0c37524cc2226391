"""TrainableSparseLinear: torch.nn.Linear whose zeros stay zeros while the rest is trained."""

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
from fastsparse.nn.sparse_linear import _MAX_SIDE, SparseLinear
from fastsparse.ops._pack import Rows, read_header


class TrainableSparseLinear(PackedLinear):
    """A linear layer with a sparse float32 weight that is trained: y = activation(x W^T + bias).

    What was zero in W when the layer was made has no value and no gradient; everything else is in `values`. Neither
    pass makes the dense weight nor its gradient. x float32, bfloat16 or float16 [..., in_features]; y has x's dtype, or
    autocast's where autocast is on; the sums are float32. For inference `to_sparse()` is faster: here every call puts
    the values into the order of the kernels first.

    Attributes:
        in_features, out_features: K and N.
        activation: None, "relu", "gelu" (the exact one) or "silu"; applied inside the kernel.
        weight: uint8 [bytes], a buffer: the structure (`ops.sparse_structure`, `ops.unpack(weight, values=values)`).
        values: float32 [nonzeros], a Parameter: by row, then column.
        bias: float32 [N], a Parameter, or None.
    """

    CONFIG: ClassVar[tuple[str, ...]] = ("in_features", "out_features", "bias", "activation")
    values: nn.Parameter

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str | None = None) -> None:
        """A layer without any values, for `load_state_dict` to fill; `from_linear` makes one that computes something.

        Under `with torch.device("meta")` it allocates nothing; fill it with `load_state_dict(..., assign=True)`.

        Raises:
            ValueError: a size out of range, or an unknown activation.
        """
        super().__init__()
        check_size("TrainableSparseLinear", "in_features", in_features, _MAX_SIDE, "for the structure's header")
        check_size("TrainableSparseLinear", "out_features", out_features, _MAX_SIDE, "for the structure's header")
        check_activation(activation, "TrainableSparseLinear")
        self.in_features = in_features
        self.out_features = out_features
        self.activation = activation
        zeros = torch.zeros(out_features, dtype=torch.float32)
        # Without data there is nothing to count: the lengths of meta tensors say nothing.
        structure, values = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.float32)
        if not zeros.is_meta:
            structure, values = ops.sparse_structure(zeros[:, None].expand(out_features, in_features))
        self.register_buffer("weight", structure)
        self.register_parameter("values", nn.Parameter(values))
        self.register_parameter("bias", nn.Parameter(zeros) if bias else None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, activation: str | None = None) -> TrainableSparseLinear:
        """Takes a pruned dense layer apart; the layer itself stays, and the copy shares no memory with it.

        Args:
            linear: on the CPU, float32; what is zero in its weight [N, K] stays zero, all else is trained.
            activation: None, "relu", "gelu" or "silu": what follows the layer and shall run inside the kernel.

        Returns:
            A layer in the training mode of `linear`; its values and bias require a gradient if weight and bias do.

        Raises:
            TypeError: `linear` is no torch.nn.Linear.
            ValueError: names the argument, what came and what was expected.
        """
        where = "TrainableSparseLinear.from_linear"
        weight = weight_to_pack(linear, activation, where, (torch.float32,))
        structure, values = ops.sparse_structure(weight)
        out_features, in_features = weight.shape
        with torch.device("meta"):  # every tensor of it is set below
            module = cls(in_features, out_features, linear.bias is not None, activation)
        module.weight = structure
        module.values = nn.Parameter(values, requires_grad=linear.weight.requires_grad)
        module.take_bias(linear)
        return module.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        return ops.sparse_linear(
            self.cast_for_autocast(x), self.weight, self.bias, self.activation, self.out_features, self.values
        )

    def to_linear(self) -> nn.Linear:
        """The dense layer with these values: a copy, with exact zeros where there are none.

        Raises:
            ValueError: there is an activation, which an nn.Linear can't have.
        """
        if self.activation is not None:
            raise ValueError(f"TrainableSparseLinear.to_linear: activation must be None, got {self.activation!r}")
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        dense = ops.unpack(self.weight, values=self.values)
        linear.weight = nn.Parameter(dense, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def to_sparse(self, format: str = "auto", rows: Rows = None) -> SparseLinear:
        """The layer for inference with these values, a copy; format and rows as for `ops.pack`."""
        with torch.device("meta"):
            module = SparseLinear(self.in_features, self.out_features, self.bias is not None, self.activation)
        module.weight = ops.pack(ops.unpack(self.weight, values=self.values), format, rows)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return module.train(self.training)

    def state_problems(self, state: dict[str, Any], prefix: str = "") -> list[str]:
        """What keeps the tensors of `state` under `prefix` from being this layer's; absent ones are not its matter.

        A structure is validated to its last byte here.
        """
        n, k = self.out_features, self.in_features
        nonzeros = self.values.numel()

        def misfit(header: dict[str, Any]) -> str | None:
            nonlocal nonzeros
            nonzeros = header["nonzeros"]
            if (header["format"], header["n"], header["k"]) == ("structure", n, k):
                return None
            return f"got {header['format']} [N={header['n']}, K={header['k']}]"

        problems = pack_problems(state, prefix, f"a structure of [N={n}, K={k}]", misfit)
        weight = state.get(prefix + "weight")
        known = not (isinstance(weight, Tensor) and weight.is_meta)  # how many values there are to be
        return problems + vector_problems(
            self, state, prefix, {"values": nonzeros, "bias": n} if known else {"bias": n}
        )

    def make_room(self, weight: Tensor) -> None:
        """A structure and its values are as long as the zeros let them be."""
        if self.weight.shape != weight.shape:
            self.weight = self.weight.new_empty(weight.shape)
        if not weight.is_meta:
            nonzeros = read_header(weight)["nonzeros"]
            if self.values.numel() != nonzeros:
                self.values.data = self.values.new_empty(nonzeros)
