"""CUDA kernels on the CPU from Python: device memory, seeds, and each kernel as a function of torch tensors.

    kernels = standin.load("race")       # or "fast", "asan"
    with kernels.launches(seed=1):
        codes, scale = kernels.quantize_per_token(x)

Arguments are copied into the stand-in's device memory, results out of it. A finding is a Finding, whose text names the
lines. `offset` shifts where every copy begins, in elements: what torch does with a slice of a tensor.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import builds
import torch
from torch import Tensor

from fastsparse.ops._pack import kind_of

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}


_loaded: dict[str, StandIn] = {}
# Orders of threads and blocks. The sanitizers see the same in each, so one is enough there.
SEEDS = [0] if os.environ.get("CUDA_ON_CPU_BUILDS") == "asan" else [0, 1, 2]


class Finding(RuntimeError):
    """What the stand-in found wrong with a kernel."""


class StandIn:
    def __init__(self, build: str, library: Path | None = None) -> None:
        """`library`: another than that of the build, made like it."""
        self.build = build
        self.library = ctypes.CDLL(str(library or builds.build(build)))
        self.library.simt_allocate.restype = ctypes.c_void_p
        self.library.simt_allocate.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self.library.simt_initialised.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.library.simt_bank_conflicts.restype = ctypes.c_int64
        self.library.simt_launches.restype = ctypes.c_char_p
        self.library.simt_conflict_places.restype = ctypes.c_char_p
        self.offset = 0
        self.tally: dict[int, dict[str, Any]] = {}  # by the kernel's place in the library

    @contextlib.contextmanager
    def launches(self, seed: int = 0, offset: int = 0) -> Iterator[None]:
        """Device memory for the launches inside, which is freed at the end; they run in the order of `seed`."""
        self.library.simt_set_seed(seed)
        self.library.simt_bank_conflicts()  # forgets what was before
        self.offset = offset
        try:
            yield
        finally:
            self.offset = 0
            self.library.simt_free_all()
            for line in self.library.simt_launches().decode().splitlines():
                place, count = map(int, line.split())
                tally = self.tally.setdefault(place, {"launches": 0, "seeds": set()})
                tally["launches"] += count
                tally["seeds"].add(seed)

    def bank_conflicts(self) -> int:
        """Extra passes over shared memory since the last call: of all accesses in the race build, else of ldmatrix."""
        return self.library.simt_bank_conflicts()

    def conflict_places(self) -> str:
        """Where they were that bank_conflicts() counted last, in the race build."""
        return self.library.simt_conflict_places().decode()

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """Device memory, not initialised: a kernel that reads it before it writes is found."""
        size = torch.Size(shape).numel()
        item = torch.empty(0, dtype=dtype).element_size()
        address = self.library.simt_allocate(size * item, self.offset * item)
        assert address, "the stand-in's memory is full"
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        memory = (ctypes.c_char * (size * item)).from_address(address)
        return torch.frombuffer(memory, dtype=dtype, count=size).view(shape)

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        """A contiguous copy in device memory."""
        if tensor is None:
            return None
        there = self.empty(tensor.shape, tensor.dtype)
        if there.numel():
            there.copy_(tensor)
            self.library.simt_initialised(there.data_ptr(), there.numel() * there.element_size())
        return there

    def strided_copy(self, tensor: Tensor) -> Tensor:
        """A copy of a matrix with its stride between rows; nothing behind its last element may be touched."""
        rows, columns = tensor.shape
        if rows == 0 or columns == 0 or tensor.stride(0) == columns:
            copied = self.copy(tensor)
            assert copied is not None
            return copied
        span = (rows - 1) * tensor.stride(0) + columns
        return torch.as_strided(self.copy(torch.as_strided(tensor, (span,), (1,))), tensor.shape, tensor.stride())

    def call(self, name: str, *arguments: Any) -> None:
        """An entry of the library; tensors are passed as pointers, None as null, int as int64, float as float.

        A c_double is passed as it is.
        """
        function = getattr(self.library, name)
        function.restype = ctypes.c_char_p
        report = function(*(self._as_c(a) for a in arguments))
        if report is not None:
            raise Finding(report.decode())

    @staticmethod
    def _as_c(argument: Any) -> Any:
        if argument is None:
            return ctypes.c_void_p(None)
        if isinstance(argument, Tensor):
            return ctypes.c_void_p(argument.data_ptr() if argument.numel() else None)
        if isinstance(argument, float):
            return ctypes.c_float(argument)
        if isinstance(argument, ctypes.c_double):
            return argument
        return ctypes.c_int64(argument)

    # --- qdq ---------------------------------------------------------------------------------------------------------

    def quantize_per_token(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As ops.quantize_per_token, for a matrix."""
        there = self.strided_copy(x)
        codes, scale = self.empty(x.shape, torch.int8), self.empty((len(x), 1), torch.float32)
        stride = x.stride(0) if x.shape[1] else 0
        self.call("qdq_quantize_per_token", there, _FLOATS[x.dtype], stride, *x.shape, codes, scale)
        return codes.clone(), scale.clone()

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int | None = None) -> Tensor:
        codes = self.empty(x.shape, torch.int8)
        there = [self.copy(t) for t in (x, scale, zero)]
        self.call("qdq_quantize", there[0], _FLOATS[x.dtype], *_channels(x, scale, axis), *there[1:], codes)
        return codes.clone()

    def dequantize(
        self,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        axis: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        y = self.empty(codes.shape, dtype)
        there = [self.copy(t) for t in (codes, scale, zero)]
        self.call("qdq_dequantize", there[0], _FLOATS[dtype], *_channels(codes, scale, axis), *there[1:], y)
        return y.clone()

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        bits: int = 8,
        axis: int | None = None,
        with_mask: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """(y, mask)."""
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        outer, channels, inner = _channels(x, scale, axis)
        rows, length = _rows(outer, channels, inner)
        y = self.empty(x.shape, x.dtype)
        mask = self.empty((rows, -(-length // 8)), torch.uint8) if with_mask else None
        there = [self.copy(t) for t in (x, scale, zero)]
        dtype = _FLOATS[x.dtype]
        self.call("qdq_fake_quantize", there[0], dtype, outer, channels, inner, *there[1:], low, high, y, mask)
        return y.clone(), None if mask is None else mask.clone()

    def fake_quantize_backward(self, grad: Tensor, mask: Tensor) -> Tensor:
        out = self.empty(grad.shape, grad.dtype)
        rows = len(mask)
        length = grad.numel() // rows if rows else 0
        self.call("qdq_fake_quantize_grad", self.copy(grad), _FLOATS[grad.dtype], rows, length, self.copy(mask), out)
        return out.clone()

    # --- kl_loss -----------------------------------------------------------------------------------------------------

    @staticmethod
    def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
        """Of a gradient to logits of that dtype: the kernel writes float32 for float16, which autograd rounds."""
        return torch.float32 if dtype == torch.float16 else dtype

    def kl_div(
        self,
        student: Tensor,
        teacher: Tensor,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        with_grad: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """(loss, gradient of the loss or of the sum of the losses), for matrices."""
        rows, classes = student.shape
        divisor = {"batchmean": rows, "sum": 1, "mean": rows * classes, "none": 1}[reduction] or 1
        row_loss = self.empty((rows,), torch.float32) if reduction == "none" else None
        total = self.empty((1,), torch.float32) if row_loss is None else None
        logits, grad, scratch = self._logits(student, teacher, with_grad)
        numbers = (ctypes.c_double(temperature), ctypes.c_double(divisor))
        self.call("kl_loss_kl_div", *logits, *numbers, row_loss, total, grad, scratch)
        loss = total[0] if row_loss is None else row_loss
        return loss.clone(), None if grad is None else grad.clone()

    def distill_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        alpha: float = 0.5,
        ignore_index: int = -100,
        with_grad: bool = True,
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
        """((loss, kl, ce), gradient), for matrices."""
        means = self.empty((3,), torch.float32)
        logits, grad, scratch = self._logits(student, teacher, with_grad)
        there = self.copy(target)
        numbers = (ctypes.c_double(temperature), there, ignore_index, ctypes.c_double(alpha))
        self.call("kl_loss_distill_loss", *logits, *numbers, means, grad, scratch)
        loss, kl, ce = means.clone()
        return (loss, kl, ce), None if grad is None else grad.clone()

    def _logits(self, student: Tensor, teacher: Tensor, with_grad: bool) -> tuple[list[Any], Tensor | None, Tensor]:
        """(what both entries begin with, memory for the gradient, scratch)."""
        rows, classes = student.shape
        dtype = torch.bfloat16 if student.dtype == torch.bfloat16 else torch.float32
        grad = self.empty(student.shape, dtype) if with_grad else None
        there = [self.strided_copy(t) for t in (student, teacher)]
        self.library.kl_loss_scratch_bytes.restype = ctypes.c_int64
        offset, self.offset = self.offset, 0  # torch's allocator aligns what ops.cpp asks for
        scratch = self.empty((self.library.kl_loss_scratch_bytes(ctypes.c_int64(rows)),), torch.uint8)
        self.offset = offset
        strides = (student.stride(0), teacher.stride(0))
        return [*there, _FLOATS[student.dtype], *strides, rows, classes], grad, scratch

    # --- int8_gemm ---------------------------------------------------------------------------------------------------

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
        y_zero_point: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As ops.int8_linear, for a matrix x."""
        m, k = x.shape
        n = len(weight_scale)
        codes = x.dtype == torch.int8
        floats = dtype or (torch.float32 if codes else x.dtype)
        y = self.empty((m, n), torch.int8 if y_scale is not None else floats)
        self.library.int8_gemm_scratch_bytes.restype = ctypes.c_int64
        offset, self.offset = self.offset, 0  # torch's allocator aligns what ops.cpp asks for, and packs
        scratch = self.empty((self.library.int8_gemm_scratch_bytes(*map(ctypes.c_int64, (m, k))),), torch.uint8)
        weight = self.copy(pack)
        self.offset = offset
        per_row = codes and x_scale is not None and x_scale.dim() == 2
        scale = 1.0 if x_scale is None or per_row else float(x_scale)
        zero = 0 if x_zero_point is None else int(x_zero_point)
        self.call(
            "int8_gemm_linear",
            *(self.strided_copy(x), -1 if codes else _FLOATS[x.dtype], x.stride(0) if k else 0, m, n, k),
            *(weight, self.copy(weight_scale), self.copy(bias), _ACTIVATIONS[activation]),
            *(int(x_scale is None), scale, zero, self.copy(x_scale) if per_row else None),
            None if residual is None else self.strided_copy(residual),
            0 if residual is None or n == 0 else residual.stride(0),
            *(_FLOATS[floats], int(y_scale is not None), 1.0 if y_scale is None else float(y_scale), y_zero_point),
            *(y, scratch),
        )
        return y.clone()

    def weight_only_linear(
        self,
        x: Tensor,
        pack: Tensor,
        bias: Tensor | None,
        activation: str | None,
        weight_scale: Tensor | None,
        out_features: int,
    ) -> Tensor:
        """As ops.weight_only_linear, for a matrix x."""
        m, k = x.shape
        y = self.empty((m, out_features), x.dtype)
        self.library.int8_gemm_weight_only_scratch_bytes.restype = ctypes.c_int64
        offset, self.offset = self.offset, 0  # torch's allocator aligns what ops.cpp asks for, and packs
        size = self.library.int8_gemm_weight_only_scratch_bytes(*map(ctypes.c_int64, (m, k)))
        scratch, weight = self.empty((size,), torch.uint8), self.copy(pack)
        self.offset = offset
        there, stride = self.strided_copy(x), x.stride(0) if k else 0
        parameters = [weight, self.copy(weight_scale), self.copy(bias), _ACTIVATIONS[activation], y, scratch]
        self.call("int8_gemm_weight_only", there, _FLOATS[x.dtype], stride, m, out_features, k, *parameters)
        return y.clone()

    # --- sparse_matmul -----------------------------------------------------------------------------------------------

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
        """As ops.sparse_linear, for a matrix x and a pack of `format`."""
        m, k = x.shape
        y = self.empty((m, out_features), x.dtype)
        offset, self.offset = self.offset, 0  # torch's allocator aligns packs
        weight = self.copy(pack)
        self.offset = offset
        there, stride = self.strided_copy(x), x.stride(0) if k else 0
        kind = -1 if header is None else kind_of(header)
        parameters = [weight, pack.numel(), kind, out_features, k, self.copy(bias), _ACTIVATIONS[activation], y]
        self.call(f"sparse_matmul_{format}", there, _FLOATS[x.dtype], stride, m, *parameters)
        return y.clone()

    def spmm(self, crow: Tensor, col: Tensor, values: Tensor, x: Tensor, out_features: int) -> Tensor:
        """y [M, N] = x [M, K] W^T, W [N, K] in CSR: crow int32 [N + 1], col int32, values float32."""
        m, k = x.shape
        y, scratch = self.empty((m, out_features), torch.float32), self._csr_scratch(out_features, k, m, 0)
        there, stride = self.strided_copy(x), x.stride(0) if k else 0
        structure = [self.copy(crow), self.copy(col), self.copy(values), len(col)]
        self.call("sparse_matmul_spmm", *structure, out_features, k, there, stride, m, y, scratch)
        return y.clone()

    def sddmm(self, crow: Tensor, col: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        """[len(col)]: the sum over rows of dy [M, N] at a value's row times x [M, K] at its column."""
        (m, n), k = dy.shape, x.shape[1]
        grad, scratch = self.empty((len(col),), torch.float32), self._csr_scratch(n, k, m, 1)
        sides = [self.strided_copy(dy), dy.stride(0) if n else 0, self.strided_copy(x), x.stride(0) if k else 0]
        structure = [self.copy(crow), self.copy(col), len(col)]
        self.call("sparse_matmul_sddmm", *structure, n, k, *sides, m, grad, scratch)
        return grad.clone()

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
        """fastsparse::sparse_values_linear, for a matrix x; n: the columns of y."""
        m, inner = x.shape
        sides = (inner, n) if transposed else (n, inner)
        y = self.empty((m, n), torch.float32)
        scratch, there = self._structure_scratch(*sides, len(values), m, int(transposed)), self._aligned(structure)
        self.call(
            "sparse_matmul_product",
            *(there, structure.numel(), *sides, self.copy(values), len(values), int(transposed)),
            *(self._either_way(x), *_strides(x), m, self.copy(bias), _ACTIVATIONS[activation], y, scratch),
        )
        return y.clone()

    def values_gradient(self, p: Tensor, q: Tensor, structure: Tensor, nonzeros: int) -> Tensor:
        """fastsparse::sparse_sddmm."""
        (m, n), k = p.shape, q.shape[1]
        grad, there = self.empty((nonzeros,), torch.float32), self._aligned(structure)
        scratch = self._structure_scratch(n, k, nonzeros, m, 2)
        sides = [self._either_way(p), *_strides(p), self._either_way(q), *_strides(q)]
        self.call("sparse_matmul_sample", there, structure.numel(), n, k, nonzeros, *sides, m, grad, scratch)
        return grad.clone()

    def _either_way(self, t: Tensor) -> Tensor:
        """A copy of a matrix whose rows or whose columns lie together."""
        return self.strided_copy(t) if t.stride(1) == 1 else self.strided_copy(t.t()).t()

    def _aligned(self, tensor: Tensor) -> Tensor | None:
        offset, self.offset = self.offset, 0  # torch's allocator aligns packs
        there = self.copy(tensor)
        self.offset = offset
        return there

    def _structure_scratch(self, n: int, k: int, nonzeros: int, m: int, what: int) -> Tensor:
        self.library.sparse_matmul_structure_scratch.restype = ctypes.c_int64
        offset, self.offset = self.offset, 0  # torch's allocator aligns what ops.cpp asks for
        size = self.library.sparse_matmul_structure_scratch(*map(ctypes.c_int64, (n, k, nonzeros, m)), what)
        scratch = self.empty((size,), torch.uint8)
        self.offset = offset
        return scratch

    def _csr_scratch(self, n: int, k: int, m: int, sddmm: int) -> Tensor:
        self.library.sparse_matmul_scratch_floats.restype = ctypes.c_int64
        offset, self.offset = self.offset, 0  # torch's allocator aligns what ops.cpp asks for
        size = self.library.sparse_matmul_scratch_floats(*map(ctypes.c_int64, (n, k, m)), sddmm)
        scratch = self.empty((size,), torch.float32)
        self.offset = offset
        return scratch


def _channels(x: Tensor, scale: Tensor, axis: int | None) -> tuple[int, int, int]:
    """x as [outer, channels, inner], as ops.cpp sees it."""
    if axis is not None:
        axis %= x.dim()
        outer, inner = torch.Size(x.shape[:axis]).numel(), torch.Size(x.shape[axis + 1 :]).numel()
        return outer, x.shape[axis], inner
    return (1, 1, x.numel()) if scale.numel() == 1 else (1, scale.numel(), x.shape[-1])


def _strides(t: Tensor) -> tuple[int, int]:
    """Of a matrix as ops.cpp hands them on: one of them is 1, also of an empty one."""
    return (t.stride(0), 1) if t.stride(1) == 1 else (1, t.stride(1))


def _rows(outer: int, channels: int, inner: int) -> tuple[int, int]:
    """rows_of() of csrc/qdq/qdq.h."""
    if channels == 1:
        return 1, outer * inner
    return (outer * channels, inner) if inner >= 64 else (outer, channels * inner)


def record(folder: Path) -> None:
    """Writes what ran without a finding in each build that was loaded: folder/tally-BUILD.json, for docs/gpu-status.md.

    {"kernels": {"csrc/qdq/cuda/sm80.cu token_by_warp": {"launches": 30, "seeds": [0, 1, 2]}}}; instances of a template
    count together.
    """
    for kernels in list(_loaded.values()):
        found: dict[str, dict[str, Any]] = {}
        for place, tally in kernels.tally.items():
            name = _name_of(builds.OUT / kernels.build / "libcuda_on_cpu.so", place)
            if name is not None:
                entry = found.setdefault(name, {"launches": 0, "seeds": []})
                entry["launches"] += tally["launches"]
                entry["seeds"] = sorted({*entry["seeds"], *tally["seeds"]})
        (folder / f"tally-{kernels.build}.json").write_text(
            json.dumps({"kernels": found}, indent=2, sort_keys=True) + "\n"
        )


def _name_of(library: Path, place: int) -> str | None:
    """ "csrc/qdq/cuda/sm80.cu token_by_warp"; None for a kernel that is none of the library's."""
    command = ["addr2line", "-f", "-C", "-e", str(library), hex(place)]
    # Under a sanitizer's preload, addr2line would be sanitized too.
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    lines = subprocess.run(command, capture_output=True, text=True, env=environment).stdout.splitlines()
    file = re.search(r"csrc/\w+/cuda/\w+\.cu", lines[1]) if len(lines) == 2 else None
    name = re.search(r"(\w+)(<.*>)?(\(.*)?$", lines[0]) if file else None
    return f"{file[0]} {name[1]}" if file and name else None


@functools.cache
def load(build: str) -> StandIn:
    _loaded[build] = StandIn(build)
    return _loaded[build]
