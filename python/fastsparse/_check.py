"""`fastsparse.check()`: every kernel that this machine and device can run, against its oracle, in seconds.

One row per kernel of the table in `_C.kernels()`; a family adds its cases to CASES. Shapes are small and odd, values
reach the corners. It is what a user with hardware that we never had runs to tell us whether a kernel holds there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastsparse import _library, ops, reference
from fastsparse.report import Report

# (M, K, N): one row, few rows, tiles and a remainder, several K blocks, an empty side
_SHAPES = [(1, 5, 3), (1, 129, 65), (3, 64, 17), (7, 33, 66), (14, 260, 32), (15, 1030, 49), (61, 127, 130), (2, 0, 4)]
_ACTIVATIONS = (None, "relu", "gelu", "silu")

# Of the largest value of a row: the float32 epilogue rounds thrice, and the result to y's type once.
_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4.5e-3, torch.float16: 6e-4}

# A case yields (what was run, largest error as a fraction of its bound); exact cases yield 0 or infinity.
Case = Iterator[tuple[str, float]]


def _int8_mm(device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(0)
    for m, k, n in _SHAPES:
        for low, high in ((-128, 128), (-128, -127), (127, 128)):
            a = torch.randint(low, high, (m, k), dtype=torch.int8, generator=generator)
            b = torch.randint(-128, 128, (k, n), dtype=torch.int8, generator=generator)
            got = ops.int8_mm(a.to(device), b.to(device)).cpu()
            yield f"int8_mm M={m} N={n} K={k}", 0.0 if torch.equal(got, reference.int8_mm(a, b)) else float("inf")


def _int8_linear(device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(1)
    for i, (m, k, n) in enumerate(_SHAPES):
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        scale = torch.rand(n, generator=generator) * 0.01 + 0.001
        bias = torch.randn(n, generator=generator)
        pack = ops.pack(weight)
        for dtype, tolerance in _TOLERANCE.items():
            x = torch.randn(m, k, generator=generator).to(dtype)
            static: dict[str, Any] = {}
            if i % 2:
                static = {"x_scale": torch.tensor(0.03), "x_zero_point": torch.tensor(i - 4, dtype=torch.int32)}
            for activation in _ACTIVATIONS:
                got = ops.int8_linear(
                    x.to(device), pack.to(device), scale.to(device), bias.to(device), activation, **static
                )
                expected = reference.int8_linear(x, weight, scale, bias, activation, **static)
                what = f"int8_linear M={m} N={n} K={k} {str(dtype).removeprefix('torch.')} {activation}"
                yield what, _error(got.cpu(), expected) / tolerance


def _int8_gradients(device: torch.device) -> Case:
    """To x, of int8_linear and of weight_only_linear; the rounding of x counts as if it were none."""
    generator = torch.Generator().manual_seed(4)
    for m, k, n in _SHAPES:
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        scale = torch.rand(n, generator=generator) * 0.01 + 0.001
        grad = torch.randn(m, n, generator=generator)
        nibbles, scales, _ = ops.quantize_groups(torch.randn(n, k, generator=generator), 32, True)
        grouped = nibbles.double() * scales.double().repeat_interleave(32, 1)[:, :k]
        dense = weight.double() * scale.double()[:, None]
        pack, u4, there = ops.pack(weight), ops.pack(nibbles, "u4", scale=scales, group_size=32), scale.to(device)
        for name, expected, call in (
            ("int8_linear", dense, lambda x, p=pack, s=there: ops.int8_linear(x, p.to(x.device), s)),
            (
                "weight_only_linear int8",
                dense,
                lambda x, p=pack, s=there: ops.weight_only_linear(x, p.to(x.device), None, None, s),
            ),
            (
                "weight_only_linear int4",
                grouped,
                lambda x, p=u4, n=n: ops.weight_only_linear(x, p.to(x.device), out_features=n),
            ),
        ):
            x = torch.randn(m, k, generator=generator).to(device).requires_grad_()
            (got,) = torch.autograd.grad(call(x), x, grad.to(device))
            what = f"{name} M={m} N={n} K={k} gradient to x"
            yield what, _error(got.cpu(), grad.double() @ expected) / _SPARSE_TOLERANCE


def _int8_chain(device: torch.device) -> Case:
    """Codes in, a residual, codes out; the codes of y are those of its float32 value, or wrong."""
    generator = torch.Generator().manual_seed(3)
    for i, (m, k, n) in enumerate(_SHAPES):
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        scale = torch.rand(n, generator=generator) * 0.01 + 0.001
        bias = torch.randn(n, generator=generator)
        x = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
        x_scale = torch.rand(m, 1, generator=generator) * 0.03 if i % 2 else torch.tensor(0.03)
        on_device = x.to(device), ops.pack(weight).to(device), scale.to(device), bias.to(device)
        given_scale = x_scale.to(device) if i % 2 else x_scale
        for (dtype, tolerance), activation in itertools.product(_TOLERANCE.items(), _ACTIVATIONS):
            residual = torch.randn(m, n, generator=generator).to(dtype)
            rest = activation, given_scale, i - 4, residual.to(device)
            got = ops.int8_linear(*on_device, *rest, dtype=dtype).cpu()
            expected = reference.int8_linear(x, weight, scale, bias, activation, x_scale, i - 4, residual)
            what = f"int8_linear M={m} N={n} K={k} int8 x, residual {str(dtype).removeprefix('torch.')} {activation}"
            yield what, _error(got, expected) / tolerance
            codes = ops.int8_linear(*on_device, *rest, 0.05, 3 - i, dtype=dtype).cpu()
            y = ops.int8_linear(*on_device, *rest[:3], residual.float().to(device)).cpu()
            wanted = reference.quantize(y, torch.tensor(0.05), torch.tensor(3 - i, dtype=torch.int32))
            yield f"{what} int8 y", 0.0 if torch.equal(codes, wanted) else float("inf")


def _weight_only(device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(1)
    for i, (m, k, n) in enumerate(_SHAPES):
        x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
        codes = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
        scale = torch.rand(n, generator=generator) * 0.01 + 0.001
        activation = _ACTIVATIONS[i % len(_ACTIVATIONS)]
        got = ops.weight_only_linear(
            x.to(device), ops.pack(codes).to(device), bias.to(device), activation, scale.to(device)
        )
        expected = reference.weight_only_linear(x, codes, scale, bias, activation)
        what = f"weight_only_linear M={m} N={n} K={k}"
        yield f"{what} int8 {activation}", _error(got.cpu(), expected) / _WEIGHT_ONLY_TOLERANCE
        weight = torch.randn(n, k, generator=generator)
        for group, symmetric in itertools.product((32, 64, 128), (True, False)):
            nibbles, scales, zero_point = ops.quantize_groups(weight, group, symmetric)
            pack = ops.pack(nibbles, "u4", scale=scales, zero_point=zero_point, group_size=group)
            got = ops.weight_only_linear(x.to(device), pack.to(device), bias.to(device), activation)
            expected = reference.weight_only_linear(x, nibbles, scales, bias, activation, zero_point, group)
            kind = f"int4 in groups of {group}{'' if symmetric else ', zero points'}"
            yield f"{what} {kind} {activation}", _error(got.cpu(), expected) / _WEIGHT_ONLY_TOLERANCE
            if symmetric and device.type == "cpu":
                nibbles *= torch.rand(n, k, generator=generator) >= 0.5
                dense, sparse = (
                    ops.pack(nibbles, format, scale=scales, group_size=group) for format in ("u4", "bitmap_u4")
                )
                got, same = (ops.weight_only_linear(x, each, bias, activation) for each in (sparse, dense))
                expected = reference.weight_only_linear(x, nibbles, scales, bias, activation, None, group)
                error = _error(got, expected) / _WEIGHT_ONLY_TOLERANCE
                yield f"{what} {kind}, bitmap {activation}", error if torch.equal(got, same) else float("inf")


# (rows, classes): round the group of 16 lanes and the chunk of 1024, and beyond what a row keeps of its exponentials
_LOGITS = [(1, 1), (3, 5), (2, 16), (2, 17), (5, 1000), (3, 1025), (1, 262149), (0, 7)]


def _kl_loss(device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(2)
    for i, (rows, classes) in enumerate(_LOGITS):
        for dtype in _TOLERANCE if classes < 100_000 else (torch.float32,):
            student = (2 * torch.randn(rows, classes, generator=generator)).to(dtype)
            teacher = (2 * torch.randn(rows, classes, generator=generator)).to(dtype)
            target = torch.randint(0, classes, (rows,), generator=generator)
            temperature = (1.0, 2.5)[i % 2]
            given = student.to(device, copy=True).requires_grad_()
            got = ops.distill_loss(given, teacher.to(device), target.to(device), temperature, 0.7, return_parts=True)
            got[0].backward()
            exact = student.double().requires_grad_()
            expected = reference.distill_loss(exact, teacher, target, temperature, 0.7)
            expected[0].backward()
            what = f"distill_loss rows={rows} C={classes} T={temperature} {str(dtype).removeprefix('torch.')}"
            part = 2e-5 if device.type == "cuda" else 2e-6  # the device's exp2f has two units in the last place
            error = max(abs(g.item() - e.item()) / (part * e.item() + 1e-7) for g, e in zip(got, expected, strict=True))
            yield what, error if error == error else float("inf")
            if given.grad is None or exact.grad is None:
                yield f"{what} gradient", float("inf")
            else:  # a float32 gradient is a difference of probabilities: of the largest, a few roundings
                yield f"{what} gradient", _error(given.grad.cpu(), exact.grad) / max(_TOLERANCE[dtype], 4e-6)


def _sparse_linear(device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(2)
    for m, k, n in _SHAPES:
        for zeros in (0.0, 0.5, 0.9, 1.0):
            weight = torch.randn(n, k, generator=generator)
            weight *= torch.rand(n, k, generator=generator) >= zeros
            x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
            formats = ["bitmap32"]
            if device.type == "cpu":
                formats += [
                    "sell16",
                    "panels128",
                    "sell8",
                    "sell8x32",
                    "sell8x16",
                    "sell4",
                    "blocks1x4",
                    "blocks4x4",
                    "blocks16x16",
                ]
            packs = {name: ops.pack(weight, name).to(device) for name in formats}
            for activation in _ACTIVATIONS:
                expected = reference.sparse_linear(x, weight, bias, activation)
                for format, pack in packs.items():
                    got = ops.sparse_linear(x.to(device), pack, bias.to(device), activation)
                    what = f"sparse_linear M={m} N={n} K={k} zeros {zeros} {format} {activation}"
                    yield what, _error(got.cpu(), expected) / _SPARSE_TOLERANCE


def _sparse_int8(device: torch.device) -> Case:
    """Every format; what `int8_linear` gives for the dense weight, to the bit, and that against the oracle."""
    generator = torch.Generator().manual_seed(4)
    for i, (m, k, n) in enumerate(_SHAPES):
        for zeros in (0.0, 0.5, 0.9, 1.0):
            weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
            weight *= torch.rand(n, k, generator=generator) >= zeros
            scale = torch.rand(n, generator=generator) * 0.01 + 0.001
            bias = torch.randn(n, generator=generator)
            dtype = tuple(_TOLERANCE)[i % 3]
            x = torch.randn(m, k, generator=generator).to(dtype)
            activation = _ACTIVATIONS[i % 4]
            expected = reference.sparse_int8_linear(x, weight, scale, bias, activation)
            same = ops.int8_linear(x, ops.pack(weight), scale, bias, activation)
            for format in ("bitmap_s8", "windows_s8", "blocks1x4", "blocks4x4"):
                got = ops.sparse_int8_linear(x, ops.pack(weight, format), scale, bias, activation)
                name = str(dtype).removeprefix("torch.")
                what = f"sparse_int8_linear M={m} N={n} K={k} zeros {zeros} {format} {name} {activation}"
                error = _error(got, expected) / _TOLERANCE[dtype]
                yield what, error if torch.equal(got, same) else float("inf")


def _sparse_training(device: torch.device) -> Case:
    """Forward, and the gradients to x and to the live values alone."""
    generator = torch.Generator().manual_seed(3)
    for (m, k, n), zeros in itertools.product(_SHAPES, (0.0, 0.5, 0.9)):
        weight = torch.randn(n, k, generator=generator)
        weight *= torch.rand(n, k, generator=generator) >= zeros
        x, grad = torch.randn(m, k, generator=generator), torch.randn(m, n, generator=generator)
        structure, values = (each.to(device) for each in ops.sparse_structure(weight))
        there = x.to(device, copy=True).requires_grad_()
        y = ops.sparse_linear(there, structure, out_features=n, values=values.requires_grad_())
        got = [each.cpu() for each in (y, *torch.autograd.grad(y, (there, values), grad.to(device)))]
        mask = weight != 0
        wanted = (reference.spmm(weight, x.t()).t(), reference.spmm(weight.t(), grad.t()).t())
        for name, mine, theirs in zip(("forward", "gradient to x"), got, wanted, strict=False):
            what = f"sparse training M={m} N={n} K={k} zeros {zeros} {name}"
            yield what, _error(mine.detach(), theirs) / _SPARSE_TOLERANCE
        error = (got[2].double() - reference.sddmm(mask, grad.t(), x)).abs()
        part = error / (reference.sddmm_bound(mask, grad.t(), x) + 1e-45)
        what = f"sparse training M={m} N={n} K={k} zeros {zeros} gradient to the values"
        yield what, float(part.max()) if part.numel() > 0 else 0.0


def _sparse_linear_nm(device: torch.device) -> Case:
    """The formats for N of every M consecutive k."""
    generator = torch.Generator().manual_seed(2)
    for m, k, n in _SHAPES:
        x, bias = torch.randn(m, k, generator=generator), torch.randn(n, generator=generator)
        for kept, of in ((1, 4), (2, 4), (4, 8)):
            weight = torch.randn(n, k, generator=generator)
            weight[:, torch.arange(k) % of >= kept] = 0
            pack = ops.pack(weight, f"nm{kept}:{of}").to(device)
            for activation in _ACTIVATIONS:
                got = ops.sparse_linear(x.to(device), pack, bias.to(device), activation)
                expected = reference.sparse_linear(x, weight, bias, activation)
                what = f"sparse_linear M={m} N={n} K={k} nm{kept}:{of} {activation}"
                yield what, _error(got.cpu(), expected) / _SPARSE_TOLERANCE


def _sparse_linear_half(device: torch.device) -> Case:
    """Weights of 16 bits, which run on CUDA only."""
    generator = torch.Generator().manual_seed(2)
    for (m, k, n), dtype in itertools.product(_SHAPES, (torch.float16, torch.bfloat16)):
        dense = torch.randn(n, k, generator=generator).to(dtype)
        row, column = torch.arange(n)[:, None], torch.arange(k)
        kept = {
            "nm24": column % 4 < 2,
            "blocks16": (row // 32 + column // 32) % 2 == m % 2,
            "bitmap32": torch.rand(n, k, generator=generator) < 0.5,
        }
        x, bias = torch.randn(m, k, generator=generator).to(dtype), torch.randn(n, generator=generator)
        for (format, places), activation in itertools.product(kept.items(), _ACTIVATIONS):
            weight = torch.where(places, dense, 0)
            pack = ops.pack(weight, format).to(device)
            got = ops.sparse_linear(x.to(device), pack, bias.to(device), activation)
            expected = reference.sparse_linear(x, weight, bias, activation)
            what = f"sparse_linear M={m} N={n} K={k} {format} {str(dtype).removeprefix('torch.')} {activation}"
            yield what, _error(got.cpu(), expected) / _TOLERANCE[dtype]


def _error(got: Tensor, expected: Tensor) -> float:
    """The largest error as a fraction of the largest value expected."""
    if expected.numel() == 0:
        return 0.0
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


_QDQ_SHAPES = [(1, 1), (3, 7), (5, 33), (17, 64), (9, 65), (130, 20), (4, 1030), (0, 5), (2, 0)]


def _qdq(device: torch.device) -> Case:
    """Every op of the family, per tensor and along both axes: all are equal to the oracle, or wrong."""
    generator = torch.Generator().manual_seed(2)
    for (m, k), dtype, axis in itertools.product(_QDQ_SHAPES, _TOLERANCE, (None, 0, 1)):
        x = (torch.randn(m, k, generator=generator) * 2).to(dtype)
        channels = 1 if axis is None else x.shape[axis]
        scale = torch.rand(channels, generator=generator) * 0.03 + 0.005
        zero = torch.randint(-128, 128, (channels,), dtype=torch.int32, generator=generator)
        x_there, scale_there, zero_there = x.to(device), scale.to(device), zero.to(device)
        leaf = x_there.clone().requires_grad_()
        y = ops.fake_quantize(leaf, scale_there, zero_there, axis=axis)
        y.backward(torch.ones_like(y))
        codes, (expected, passes) = (
            reference.quantize(x, scale, zero, axis),
            reference.fake_quantize(x, scale, zero, 8, axis),
        )
        results = {
            "quantize": (ops.quantize(x_there, scale_there, zero_there, axis=axis), codes),
            "dequantize": (ops.dequantize(codes.to(device), scale_there, zero_there, axis, dtype=dtype), expected),
            "fake_quantize": (y.detach(), expected),
            "fake_quantize backward": (leaf.grad, passes.to(dtype)),
        }
        if axis is None:
            pair, wanted = ops.quantize_per_token(x_there), reference.quantize_per_token(x)
            results |= {"quantize_per_token": (pair[0], wanted[0]), "quantize_per_token scale": (pair[1], wanted[1])}
        for name, (got, want) in results.items():
            right = got is not None and torch.equal(got.cpu(), want)
            yield f"{name} [{m}, {k}] {str(dtype).removeprefix('torch.')} axis {axis}", 0.0 if right else float("inf")


# Of the largest value: a float32 rounding each group, of which there are at most 33 in the shapes.
_WEIGHT_ONLY_TOLERANCE = 3e-6

# Of the largest value: a chain of up to 1030 float32 roundings, which add up as a random walk does.
_SPARSE_TOLERANCE = 1e-5

CASES: dict[tuple[str, str], list[Callable[[torch.device], Case]]] = {
    ("int8_gemm", "cpu"): [_int8_mm, _int8_linear, _int8_chain, _int8_gradients, _weight_only],
    ("int8_gemm", "cuda"): [_int8_linear, _int8_chain, _int8_gradients, _weight_only],
    ("qdq", "cpu"): [_qdq],
    ("qdq", "cuda"): [_qdq],
    ("kl_loss", "cpu"): [_kl_loss],
    ("kl_loss", "cuda"): [_kl_loss],
    ("sparse_matmul", "cpu"): [_sparse_linear, _sparse_linear_nm, _sparse_training],
    ("sparse_int8", "cpu"): [_sparse_int8],
    ("sparse_matmul", "cuda"): [_sparse_linear, _sparse_linear_half, _sparse_training],
}


def check(device: str | torch.device | None = None) -> Report:
    """Holds every kernel that this machine and device can run against its float64 oracle.

    Args:
        device: "cpu" or "cuda"; None: the CPU, and CUDA where this build has kernels and torch a device.

    Returns:
        A Report, one row per kernel: family, kernel, cases, worst (the largest error as a fraction of what is allowed;
        integers allow none), result. `ok` is False, and the row and a note name the kernel and the first case, where
        one does not hold.

    Raises:
        ValueError: no such device here.
    """
    extension = _library.load()
    devices = _devices(device, extension)
    report = Report("fastsparse check", ["family", "kernel", "cases", "worst", "result"])
    for target in devices:
        for row in extension.kernels():
            if (row["level"] == "cuda") != (target.type == "cuda"):
                continue
            if target.type == "cpu" and not _runs_here(extension, row):
                continue
            with _running(extension, row):
                _check_row(report, row, target)
    rows = [row for row in extension.kernels() if row["level"] != "cuda"]
    absent = [row["name"] for row in rows if not _runs_here(extension, row)]
    if absent:
        report.notes.append(f"not on this CPU, not checked: {', '.join(dict.fromkeys(absent))}")
    return report


def _devices(device: str | torch.device | None, extension: Any) -> list[torch.device]:
    built = extension.build_info()["cuda"] != "off"
    usable = built and torch.cuda.is_available()
    if device is None:
        return [torch.device("cpu")] + ([torch.device("cuda")] if usable else [])
    target = torch.device(device)
    if target.type == "cuda" and not usable:
        why = "torch finds no CUDA device" if built else "this build of fastsparse has no CUDA kernels"
        raise ValueError(f"check: device must be one that this machine has, got {device!r}: {why}")
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"check: device must be 'cpu' or 'cuda', got {device!r}")
    return [target]


def _runs_here(extension: Any, row: dict[str, Any]) -> bool:
    """Whether this CPU has the row's level and what else it needs (VBMI2)."""
    if row["level"] not in extension.isa_available():
        return False
    extension.set_isa(row["level"])
    try:
        same = [k for k in extension.kernels() if (k["family"], k["name"]) == (row["family"], row["name"])]
        return bool(same[0]["usable"])
    finally:
        extension.set_isa("")


@contextmanager
def _running(extension: Any, row: dict[str, Any]) -> Iterator[None]:
    """Makes the kernel of `row` the one that runs: caps the ISA level, or lets an unproven CUDA kernel start."""
    if row["level"] == "cuda":
        before = os.environ.get("FASTSPARSE_UNPROVEN")
        os.environ["FASTSPARSE_UNPROVEN"] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ["FASTSPARSE_UNPROVEN"]
            else:
                os.environ["FASTSPARSE_UNPROVEN"] = before
        return
    extension.set_isa(row["level"])
    try:
        if row["family"] == "sparse_int8":  # two rows of one level
            extension.pin_sparse_int8(row["name"])
        elif row["family"] == "sparse_matmul":
            extension.pin_sparse_matmul(row["name"])
        selected = [k["name"] for k in extension.kernels() if k["family"] == row["family"] and k["selected"]]
        if row["name"] not in selected:
            raise RuntimeError(f"check: {row['family']} {row['name']} should run at its level, {selected} would")
        yield
    finally:
        if row["family"] == "sparse_int8":
            extension.pin_sparse_int8("")
        extension.pin_sparse_matmul("")
        extension.set_isa("")


def _check_row(report: Report, row: dict[str, Any], device: torch.device) -> None:
    count, worst, first_failure = 0, 0.0, None
    try:
        for case in CASES[row["family"], device.type]:
            for what, error in case(device):
                count += 1
                worst = max(worst, error)
                if error > 1 and first_failure is None:
                    first_failure = what
    except Exception as error:  # the report must name the kernel, whatever it did
        first_failure = f"{type(error).__name__}: {error}"
        worst = float("inf")
    kernel = row["name"] if row["proven"] else f"{row['name']} (never run on hardware before)"
    result = "FAILED" if first_failure else "ok"
    report.add(family=row["family"], kernel=kernel, cases=count, worst=worst, result=result)
    if first_failure:
        report.ok = False
        report.notes.append(f"FAILED: {row['family']} {row['name']}, first at {first_failure}")
