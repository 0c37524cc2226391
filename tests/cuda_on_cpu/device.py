"""The methods of standin.StandIn, by torch on a real device: so the tests of this folder run there as they are.

FASTSPARSE_TEST_DEVICE names the device; "cpu" serves to try this file itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsparse import ops
from fastsparse.ops.int8_gemm import ACTIVATIONS

_values_linear = torch.ops.fastsparse.sparse_values_linear.default
_sddmm = torch.ops.fastsparse.sparse_sddmm.default
_fake_quantize_train = torch.ops.fastsparse.fake_quantize_train.default
_fake_quantize_backward = torch.ops.fastsparse.fake_quantize_backward.default


class Device:
    build = "device"

    def __init__(self, name: str) -> None:
        self.name = name
        self.offset = 0

    @contextlib.contextmanager
    def launches(self, seed: int = 0, offset: int = 0) -> Iterator[None]:
        """A device has its own order; `offset` shifts where tensors begin, as in the stand-in."""
        self.offset = offset
        try:
            yield
        finally:
            self.offset = 0

    def bank_conflicts(self) -> int:
        return 0  # not to be seen from here

    def conflict_places(self) -> str:
        return ""

    def place(self, tensor: Tensor | None, aligned: bool = False) -> Any:
        """A copy on the device with the same strides, at the offset in elements."""
        if tensor is None:
            return None
        offset = 0 if aligned else self.offset
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        memory = torch.empty(offset + span, dtype=tensor.dtype, device=self.name)
        there = torch.as_strided(memory, tensor.shape, tensor.stride(), offset)
        return there.copy_(tensor)

    def quantize_per_token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = ops.quantize_per_token(self.place(x))
        return codes.cpu(), scale.cpu()

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int | None = None) -> Tensor:
        return ops.quantize(self.place(x), self.place(scale), self.place(zero), axis=axis).cpu()

    def dequantize(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        axis: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        return ops.dequantize(self.place(codes), self.place(scale), self.place(zero), axis, dtype=dtype).cpu()

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        bits: int = 8,
        axis: int | None = None,
        with_mask: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        there = [self.place(t) for t in (x, scale, zero)]
        if not with_mask:
            return ops.fake_quantize(*there, bits, axis).cpu(), None
        y, mask = _fake_quantize_train(*there, bits, axis)
        return y.cpu(), mask.cpu()

    def fake_quantize_backward(self, grad: Tensor, mask: Tensor) -> Tensor:
        return _fake_quantize_backward(self.place(grad), self.place(mask, aligned=True)).cpu()

    def int8_linear(
        self,
        x: Tensor,
        pack: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        x_scale: Tensor | None = None,
        x_zero_point: Tensor | None = None,
        residual: Tensor | None = None,
        y_scale: float | None = None,
        y_zero_point: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        there = [self.place(pack, aligned=True), self.place(weight_scale), self.place(bias)]
        if x_scale is not None and x_scale.dim() == 2:
            x_scale = self.place(x_scale)
        if y_scale is None:
            y_zero_point = None
        result = [self.place(residual), y_scale, y_zero_point, dtype]
        return ops.int8_linear(self.place(x), *there, activation, x_scale, x_zero_point, *result).cpu()

    def weight_only_linear(
        self,
        x: Tensor,
        pack: Tensor,
        bias: Tensor | None,
        activation: str | None,
        weight_scale: Tensor | None,
        out_features: int,
    ) -> Tensor:
        there = [self.place(pack, aligned=True), self.place(bias), activation, self.place(weight_scale)]
        return ops.weight_only_linear(self.place(x), *there, out_features).cpu()

    def kl_div(
        self,
        student: Tensor,
        teacher: Tensor,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        with_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        there, taught = self.place(student).requires_grad_(with_grad), self.place(teacher)
        loss = ops.kl_div(there, taught, temperature, reduction)
        return loss.detach().cpu(), self._gradient(loss, there, student)

    def distill_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        alpha: float = 0.5,
        ignore_index: int = -100,
        with_grad: bool = True,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        there = self.place(student).requires_grad_(with_grad)
        given = there, self.place(teacher), self.place(target)
        parts: Any = ops.distill_loss(*given, temperature, alpha, ignore_index, return_parts=True)
        return tuple(part.detach().cpu() for part in parts), self._gradient(parts[0], there, student)

    def sparse_linear(
        self,
        x: Tensor,
        pack: Tensor,
        out_features: int,
        bias: Tensor | None = None,
        activation: str | None = None,
        format: str = "bitmap32",
        header: dict[str, Any] | None = None,
    ) -> Tensor:
        there = self.place(x), self.place(pack, aligned=True), self.place(bias)
        return ops.sparse_linear(*there, activation, out_features, header=header).cpu()

    def values_linear(
        self,
        x: Tensor,
        structure: Tensor,
        values: Tensor,
        n: int,
        transposed: bool = False,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        there = self.place(x), self.place(structure, aligned=True), self.place(values)
        return _values_linear(*there, n, transposed, self.place(bias), ACTIVATIONS[activation]).cpu()

    def values_gradient(self, p: Tensor, q: Tensor, structure: Tensor, nonzeros: int) -> Tensor:
        return _sddmm(self.place(p), self.place(q), self.place(structure, aligned=True), nonzeros).cpu()

    @staticmethod
    def _gradient(loss: Tensor, there: Tensor, student: Tensor) -> Tensor | None:
        """As autograd hands it on: in the student's dtype (gradient_dtype)."""
        if not there.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(loss.sum(), there)
        assert gradient.dtype == student.dtype
        return gradient.cpu()

    @staticmethod
    def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
        return dtype


@functools.cache
def load() -> Device:
    os.environ["FASTSPARSE_UNPROVEN"] = "1"
    return Device(os.environ.get("FASTSPARSE_TEST_DEVICE", "cuda"))
