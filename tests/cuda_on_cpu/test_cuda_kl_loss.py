"""The CUDA kernels of kl_loss on the CPU stand-in, against the float64 oracle.

Bounds: 4e-6 of a loss (2e-5 on a device); of a gradient 4e-6 of the probabilities that an element is
the difference of, and its rounding.
On a device exp2f may be wrong by two units in the last place, here by one half: one test makes it as wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builds
import pytest
import torch
from standin import SEEDS, Finding, StandIn
from torch import Tensor
from torch.nn import functional

from fastsparse import reference
from ops.test_kl_loss import DTYPES, INF, NAN, REDUCTIONS, assert_gradient, logits, shares, with_gradient
from support import same_bits, strided

# Round a group of 8 and a lane's first, a warp's pass of 256, the row where a block takes over from a warp (1024), a
# block's pass of 2048.
CLASSES = [1, 2, 7, 8, 9, 31, 32, 33, 255, 257, 1000, 1024, 1025, 2047, 2049, 5003]
LONG = 65539  # four times kLongRow: a block of 1024 threads
LOSS = 4e-6
LOSS_ON_A_DEVICE = 2e-5


def assert_loss(got: Tensor, want: Tensor, what: Any = "", part: float = LOSS) -> None:
    assert got.shape == want.shape, what
    finite = want.isfinite()
    assert torch.equal(got[~finite].isnan(), want[~finite].isnan()), what
    assert torch.equal(got[want.isinf()].double(), want[want.isinf()].double()), what
    error = (got.double() - want.double())[finite].abs()
    assert (error <= part * want[finite].abs() + 1e-12).all(), (what, got, want)


def oracle(loss: Callable[..., Any], student: Tensor, *rest: Any) -> tuple[Any, Tensor]:
    return with_gradient(loss, student.double(), *rest)


def offsets(i: int) -> tuple[int, bool]:
    """(offset of all tensors, whether rows lie apart): of every few cases another."""
    return (0, 1, 0, 3)[i % 4], i % 4 == 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("close", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_div(kernels: StandIn, dtype: torch.dtype, close: float, seed: int) -> None:
    for i, classes in enumerate(CLASSES):
        temperature, reduction = (1.0, 2.5, 0.7)[i % 3], REDUCTIONS[(i + seed) % 4]
        student, teacher = logits(3, classes, dtype=dtype, close=close)
        offset, apart = offsets(i + seed)
        given = (strided(student), strided(teacher, 5)) if apart else (student, teacher)
        with kernels.launches(seed, offset):
            got, gradient = kernels.kl_div(*given, temperature, reduction)
            if (i + seed) % 3 == 0:
                alone, _ = kernels.kl_div(*given, temperature, reduction, with_grad=False)
                assert same_bits(got, alone)
            assert kernels.bank_conflicts() == 0, kernels.conflict_places()
        want, wanted = oracle(reference.kl_div, student, teacher, temperature, reduction)
        assert_loss(got, want, (classes, temperature, reduction))
        divisor = {"batchmean": 3, "sum": 1, "mean": 3 * classes, "none": 1}[reduction]
        assert gradient is not None
        assert gradient.dtype == kernels.gradient_dtype(dtype)
        assert_gradient(gradient, wanted, shares(student, teacher, temperature, 1 / divisor), (classes, temperature))


@pytest.mark.parametrize("apart", [0.0, -5.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_kl_of_logits_a_constant_apart(kernels: StandIn, dtype: torch.dtype, apart: float) -> None:
    # The difference of such logits is rounded to the size of the constant.
    for i, (classes, rows) in enumerate([(1, 2), (2, 60), (3, 40), (7, 20), (1000, 2), (1500, 2)] * 2):
        temperature, close = (0.5, 1.0, 8.0)[i % 3], (1.0, 0.1, 1e-3)[(i // 3 + i // 6) % 3]
        student = torch.randn(rows, classes) * 2
        teacher = (student + close * torch.randn(rows, classes) + apart).to(dtype)
        student = student.to(dtype)
        with kernels.launches():
            got, _ = kernels.kl_div(student, teacher, temperature, "none", with_grad=False)
        want = reference.kl_div(student, teacher, temperature, "none")
        small = want < 0.1 * temperature**2
        assert_loss(got[small], want[small], (classes, temperature, close))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_distill_loss(kernels: StandIn, dtype: torch.dtype, seed: int) -> None:
    for i, classes in enumerate(CLASSES):
        temperature, alpha = (1.0, 4.0)[i % 2], (0.3, 1.0, 0.0)[i % 3]
        rows = 10 if classes < 100 else 4  # 10: more than the 8 warps of a block
        student, teacher = logits(rows, classes, dtype=dtype)
        target = torch.randint(0, classes, (rows,))
        target[1], target[0], target[2] = -100, 0, classes - 1
        arguments = (target, temperature, alpha)
        offset, apart = offsets(i + seed)
        given = (strided(student), strided(teacher, 5)) if apart else (student, teacher)
        with kernels.launches(seed, offset):
            got, gradient = kernels.distill_loss(*given, *arguments)
            if (i + seed) % 3 == 0:
                alone, _ = kernels.distill_loss(*given, *arguments, with_grad=False)
                assert all(same_bits(a, b) for a, b in zip(got, alone, strict=True))
        want, wanted = oracle(reference.distill_loss, student, teacher, *arguments)
        for part, expected in zip(got, want, strict=True):
            assert abs(part.item() - expected.item()) <= LOSS * expected.item() + 2e-7, (classes, got, want)
        assert gradient is not None
        assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))
        p1, share = (
            torch.softmax(student.double(), -1) + functional.one_hot(target.clamp_min(0), classes),
            1 / (rows - 1),
        )
        assert_gradient(
            gradient, wanted, alpha * shares(student, teacher, temperature, share) + (1 - alpha) * p1 * share
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row(kernels: StandIn, dtype: torch.dtype) -> None:
    for classes, close in ((LONG, 0.0), (LONG - 1, 0.02), (16385, 0.0)):
        student, teacher = logits(1, classes, dtype=dtype, close=close)
        target = torch.tensor([classes - 1])
        with kernels.launches(1, offset=1):
            got, gradient = kernels.kl_div(student, teacher, 2.0)
            parts, both = kernels.distill_loss(student, teacher, target, 2.0, 0.3)
        want, wanted = oracle(reference.kl_div, student, teacher, 2.0)
        assert_loss(got, want)
        assert_gradient(gradient, wanted, shares(student, teacher, 2.0, 1.0))
        want, wanted = oracle(reference.distill_loss, student, teacher, target, 2.0, 0.3)
        for part, expected in zip(parts, want, strict=True):
            assert abs(part.item() - expected.item()) <= LOSS * expected.item() + 2e-7
        p1 = torch.softmax(student.double(), -1) + functional.one_hot(target, classes)
        assert_gradient(both, wanted, 0.3 * shares(student, teacher, 2.0, 1.0) + 0.7 * p1)


def test_seeds_give_the_same_bits(kernels: StandIn) -> None:
    student, teacher = logits(13, 1500)
    target = torch.randint(0, 1500, (13,))
    found = []
    for seed in range(4):
        with kernels.launches(seed):
            rows, gradient = kernels.kl_div(student, teacher, 2.0, "none")
            parts, both = kernels.distill_loss(student, teacher, target, 2.0)
        found.append((rows, gradient, *parts, both))
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


def test_more_rows_than_threads_in_the_sum(kernels: StandIn) -> None:
    student, teacher = logits(1100, 3)
    target = torch.randint(0, 3, (1100,))
    target[::7] = 5
    with kernels.launches():
        total, _ = kernels.kl_div(student, teacher, 1.0, "sum", with_grad=False)
        parts, _ = kernels.distill_loss(student, teacher, target, 1.0, 0.5, 5, with_grad=False)
    assert_loss(total, reference.kl_div(student, teacher, 1.0, "sum"))
    for part, expected in zip(parts, reference.distill_loss(student, teacher, target, 1.0, 0.5, 5), strict=True):
        assert_loss(part, expected)


def test_equal_logits_give_exactly_nothing(kernels: StandIn) -> None:
    for classes in (9, 1030):
        student, _ = logits(3, classes)
        with kernels.launches():
            got, gradient = kernels.kl_div(student, student.clone(), 3.0)
        assert float(got) == 0
        assert gradient is not None
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("classes", [5, 1040])
@pytest.mark.parametrize("close", [0.0, 0.01])
def test_masked_classes(kernels: StandIn, classes: int, close: float) -> None:
    student, teacher = logits(4, classes, close=close)
    teacher[:3, 1] = -INF
    student[:3, 1] = -9.0
    student[1, 1] = -INF  # both: adds 0 and has no gradient
    student[2, 2] = -INF  # the student alone: inf
    if classes > 1000:  # whole groups of whole threads
        teacher[3, : classes // 2] = student[3, : classes // 2] = -INF
    with kernels.launches():
        got, gradient = kernels.kl_div(student, teacher, 2.0, "none")
    finite = [0, 1, 3]
    masked = student.double().masked_fill(student == -INF, -1e9)
    want, wanted = oracle(reference.kl_div, masked[finite], teacher[finite], 2.0, "none")
    assert gradient is not None
    assert_loss(got[finite], want)
    assert_gradient(gradient[finite], wanted, shares(student, teacher, 2.0, 1.0)[finite])
    assert gradient[1, 1] == 0
    assert got[2] == INF


@pytest.mark.parametrize("value", [NAN, INF, "masked"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("classes", [9, 1500])
def test_errors_surface(kernels: StandIn, classes: int, which: int, value: float | str) -> None:
    pair = logits(3, classes)
    pair[which][1, classes - 2] = NAN if value == "masked" else value
    if value == "masked":
        pair[which][1] = -INF
    target = torch.zeros(3, dtype=torch.int64)
    with kernels.launches():
        got, gradient = kernels.kl_div(*pair, 2.0, "none")
        parts, whole = kernels.distill_loss(*pair, target)
    assert got.isnan().tolist() == [False, True, False]
    assert parts[0].isnan()
    for g in (gradient, whole):
        assert g is not None
        assert g[1].isnan().all()
        assert g[[0, 2]].isfinite().all()


@pytest.mark.parametrize("bad", [-1, 5, 2**62])
def test_a_target_that_is_no_class_reads_nothing_and_gives_nan(kernels: StandIn, bad: int) -> None:
    student, teacher = logits(3, 5)
    with kernels.launches():
        (loss, kl, ce), gradient = kernels.distill_loss(student, teacher, torch.tensor([0, bad, 4]))
    assert loss.isnan()
    assert ce.isnan()
    assert_loss(kl, reference.kl_div(student, teacher))
    assert gradient is not None
    assert gradient[1].isnan().all()
    assert gradient[[0, 2]].isfinite().all()


def test_a_masked_target_and_huge_logits(kernels: StandIn) -> None:
    student, teacher = logits(2, 5)
    student[0, 2] = teacher[0, 2] = -INF
    with kernels.launches():
        (_, kl, ce), _ = kernels.distill_loss(student, teacher, torch.tensor([2, 1]))
        assert kl.isfinite()
        assert ce == INF
        for factor in (1e4, 1e33):
            student, teacher = (factor * x for x in logits(2, 1700))
            got, gradient = kernels.kl_div(student, teacher, 1.0, "none")
            assert_loss(got, reference.kl_div(student, teacher, 1.0, "none"))
            assert gradient is not None
            assert gradient.isfinite().all()


def test_nothing_to_average_is_zero(kernels: StandIn) -> None:
    student, teacher = logits(0, 5)
    with kernels.launches():
        for reduction in REDUCTIONS:
            got, gradient = kernels.kl_div(student, teacher, 2.0, reduction)
            assert got.shape == ((0,) if reduction == "none" else ())
            assert float(got.sum()) == 0
            assert gradient is not None
            assert gradient.shape == (0, 5)
        for classes in (5, 1027):
            student, teacher = logits(4, classes)
            student[0, 0] = NAN  # an ignored row is not read
            parts, gradient = kernels.distill_loss(student, teacher, torch.full((4,), -100))
            assert [float(p) for p in parts] == [0, 0, 0]
            assert gradient is not None
            assert torch.equal(gradient, torch.zeros(4, classes))


# --- The kernels' own source, changed: a device's exp2f, planted defects --------------------------------------------

SOURCE = builds.ROOT / "csrc" / "kl_loss" / "cuda" / "sm80.cu"


def float32_only(text: str) -> str:
    """Without the other types, which is three times faster to compile; no line before the launchers moves."""
    return re.sub(r"    case DType::(bf16|f16):.*\n", "", text)


# What CUDA promises of exp2f: two units in the last place; here any of -2 .. 2, scattered, and 2^0 is 1.
ROUGH_EXP2F = """
inline float rough_exp2f(float x) {
  const unsigned bits = __float_as_uint(exp2f(x));
  return x == 0.0f ? 1.0f : __uint_as_float(bits + (bits * 2654435761u >> 16) % 5 - 2);
}
"""


@pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="numbers only: the fast build is enough")
def test_the_bounds_hold_with_a_rough_exp2f(tmp_path: Path) -> None:
    text = float32_only(SOURCE.read_text()).replace("exp2f(", "rough_exp2f(")
    assert text.count("rough_exp2f(") == 2
    begin = text.index("namespace fs::kl_loss::sm80 {")
    kernels = StandIn("fast", builds.variant("fast", SOURCE, text[:begin] + ROUGH_EXP2F + text[begin:], tmp_path))
    for i, classes in enumerate([2, 3, 5, 9, 31, 100, 1000, 1025, 5003] * 4):
        temperature, close = (1.0, 2.5)[i % 2], (0.0, 0.4, 0.1, 0.01)[i // 9]
        rows = 64 if classes < 200 else 8
        student, teacher = logits(rows, classes, close=close)
        target = torch.randint(0, classes, (rows,))
        with kernels.launches():
            got, gradient = kernels.kl_div(student, teacher, temperature, "none")
            parts, _ = kernels.distill_loss(student, teacher, target, temperature, 0.3, with_grad=False)
        want, wanted = oracle(reference.kl_div, student, teacher, temperature, "none")
        assert_loss(got, want, (classes, close), LOSS_ON_A_DEVICE)
        assert_gradient(gradient, wanted, shares(student, teacher, temperature, 1.0), (classes, close))
        for part, expected in zip(
            parts, reference.distill_loss(student, teacher, target, temperature, 0.3), strict=True
        ):
            assert abs(part.item() - expected.item()) <= LOSS_ON_A_DEVICE * expected.item() + 2e-7, (classes, close)


WRONG = "wrong result"

# name: (function that holds the line, the line, what stands there instead, {build: what it must say}, lines that a
# report must name)
Defect = tuple[str, str, str, dict[str, str], tuple[str, ...]]
DEFECTS: dict[str, Defect] = {
    "no barrier between the warps' sums and their reader": (
        "void sum(double (&x)[kCount]) const {\n#pragma unroll\n    for (int i = 0; i < kCount; ++i) {",
        "__syncthreads();",
        ";",
        {"race": "race: "},
        ("shared.sum[i][warp()] = x[i]", "shared.sum[i][lane()]"),
    ),
    "no barrier before the facts of a row are read": (
        "void share(Facts& facts) const {\n    if",
        "__syncthreads();",
        ";",
        {"race": "race: "},
        ("facts = shared.facts",),  # what is read too early leads to other races: which is found first, is the seed's
    ),
    "a tail that is read past its end": (
        "void load_group(",
        "j >= g.first && j < g.last ?",
        "j >= g.first ?",
        {"race": "out of bounds: read of global"},
        (),
    ),
    "maxima of the row taken without rescaling the sums": (
        "void row_of(",
        "sums.rescale(s_max, t_max, by);",
        "sums.s_max = s_max, sums.t_max = t_max;",
        {"fast": WRONG},
        (),
    ),
    "a lane that leaves before its warp sums": (
        "void row_of(",
        "team.sum(all);",
        "if (team.rank == 7) return;\n  team.sum(all);",
        {"fast": "exited lane in mask|deadlock|divergent"},
        (),
    ),
}


def planted(defect: Defect) -> tuple[str, dict[str, int]]:
    """(the source with the defect, the numbers of its lines by their text)."""
    function, line, instead, _, marks = defect
    text = SOURCE.read_text()
    begin = text.index(function)
    at = text.index(line, begin)
    text = text[:at] + instead + text[at + len(line) :]
    text = float32_only(text)
    numbers = {}
    for mark in marks:
        (numbers[mark],) = [i for i, source in enumerate(text.splitlines(), 1) if mark in source]
    return text, numbers


@pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="fast and race, in the process without sanitizers")
@pytest.mark.parametrize(
    ("name", "build"), [(name, b) for name, d in DEFECTS.items() for b in ("fast", "race") if b in d[3]]
)
def test_planted_defects_are_caught(name: str, build: str, tmp_path: Path) -> None:
    text, lines = planted(DEFECTS[name])
    expected = DEFECTS[name][3][build]
    kernels = StandIn(build, builds.variant(build, SOURCE, text, tmp_path))
    student, teacher = logits(3, 1501)
    report = None
    with kernels.launches(1):
        try:
            got, _ = kernels.kl_div(student, teacher, 2.0, "none")
        except Finding as finding:
            report = str(finding)
    if report is None:
        assert expected == WRONG, "nothing was found"
        right = reference.kl_div(student, teacher, 2.0, "none")
        assert ((got.double() - right).abs() > LOSS * right).any()
        return
    assert re.search(expected, report), report
    named = {int(n) for n in re.findall(r"kl_loss/cuda/sm80\.cu:(\d+)", report)}
    assert named, report
    assert set(lines.values()) <= named, f"{lines} wanted in: {report}"
