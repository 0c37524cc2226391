"""kl_div and distill_loss against float64: losses relative, gradients per element against the probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from fastsparse import _C, ops, reference
from support import cpu_rows, forced, guarded, isa_levels, same_bits, strided, threads

FAMILY = "kl_loss"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
REDUCTIONS = ["batchmean", "sum", "mean", "none"]
# Round the group of 16 lanes, two of them, the chunk of 1024.
CLASSES = [1, 2, 7, 15, 16, 17, 31, 32, 33, 49, 1000, 1023, 1024, 1025, 1056, 2049, 17003]
KEPT = 262144  # rows of so many logits keep their exponentials for the gradient; longer ones compute them again
INF, NAN = float("inf"), float("nan")

raw = torch.ops.fastsparse


def logits(*shape: int, dtype: torch.dtype = torch.float32, close: float = 0.0) -> tuple[Tensor, Tensor]:
    """(student, teacher); `close`: how far the teacher is from the student, 0: anywhere."""
    student = torch.randn(shape) * 2
    teacher = student + close * torch.randn(shape) if close else torch.randn(shape) * 2
    return student.to(dtype), teacher.to(dtype)


def with_gradient(loss: Callable[..., Any], student: Tensor, *rest: Any, weight: Tensor | None = None) -> Any:
    student = student.detach().clone().requires_grad_()
    result = loss(student, *rest)
    value = result[0] if isinstance(result, tuple) else result
    value.backward(torch.ones_like(value) if weight is None else weight.to(value.dtype))
    return result, student.grad


def assert_gradient(got: Tensor, want: Tensor, shares: Tensor, what: Any = "") -> None:
    """Each element against the probabilities it is the difference of; half precision rounds the result once."""
    assert got.shape == want.shape, what
    allowed = 4e-6 * shares + ROUNDING[got.dtype] * want.abs()
    if got.dtype == torch.float16:
        allowed = allowed + 2.0**-25  # half of the smallest float16
    worst = ((got.double() - want).abs() / allowed.clamp_min(1e-35)).max() if got.numel() else torch.zeros(())
    assert worst <= 1, (what, float(worst))


def shares(student: Tensor, teacher: Tensor, temperature: float, weight: float | Tensor) -> Tensor:
    p = torch.softmax(student.double() / temperature, -1) + torch.softmax(teacher.double() / temperature, -1)
    return p * temperature * weight


@pytest.mark.parametrize("close", [0.0, 0.01])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_kl_div(isa: str, dtype: torch.dtype, close: float) -> None:
    for i, classes in enumerate(CLASSES):
        temperature = (1.0, 2.5, 0.7)[i % 3]
        student, teacher = logits(3, classes, dtype=dtype, close=close)
        with forced(isa, FAMILY):
            got, gradient = with_gradient(ops.kl_div, student, teacher, temperature)
            plain = ops.kl_div(student, teacher, temperature)
        want, wanted = with_gradient(reference.kl_div, student.double(), teacher, temperature)
        assert got.dtype == torch.float32
        assert got.shape == ()
        assert gradient.dtype == dtype
        assert abs(got.item() - want.item()) <= 2e-6 * want.item() + 1e-12, classes
        assert float(plain) == pytest.approx(float(got), rel=1e-6, abs=1e-12)
        assert_gradient(gradient, wanted, shares(student, teacher, temperature, 1 / 3), classes)


@pytest.mark.parametrize("isa", isa_levels())
def test_small_kl_keeps_its_digits(isa: str) -> None:
    for close in (1e-1, 1e-2, 1e-3, 3e-4):
        for classes in (50, 1000, 20000, KEPT + 50):
            student, teacher = logits(1, classes, close=close)
            with forced(isa, FAMILY):
                got = float(ops.kl_div(student, teacher))
            want = float(reference.kl_div(student, teacher))
            # The logits are differences of float32: at 3e-4 apart they have 12 bits less; the form itself loses none.
            assert abs(got - want) <= 2e-6 * want, (close, classes, got, want)


@pytest.mark.parametrize("classes", [KEPT, KEPT + 1, KEPT + 1025])
@pytest.mark.parametrize("isa", isa_levels())
def test_long_rows(isa: str, classes: int) -> None:
    student, teacher = logits(2, classes)
    target = torch.tensor([classes - 1, 5])
    with forced(isa, FAMILY):
        got, gradient = with_gradient(ops.kl_div, student, teacher, 2.0, "sum")
        both, whole = with_gradient(ops.distill_loss, student, teacher, target, 2.0, 0.5)
    want, wanted = with_gradient(reference.kl_div, student.double(), teacher, 2.0, "sum")
    assert abs(got.item() - want.item()) <= 2e-6 * want.item()
    assert_gradient(gradient, wanted, shares(student, teacher, 2.0, 1.0))
    want, wanted = with_gradient(reference.distill_loss, student.double(), teacher, target, 2.0, 0.5)
    assert both.item() == pytest.approx(want[0].item(), rel=2e-6)
    p1 = torch.softmax(student.double(), -1) + functional.one_hot(target, classes)
    assert_gradient(whole, wanted, shares(student, teacher, 2.0, 0.25) + p1 / 4)


@pytest.mark.parametrize("spread", [60.0, 85.0, 87.0, 100.0, 3000.0])
@pytest.mark.parametrize("isa", isa_levels())
def test_far_apart_logits(isa: str, spread: float) -> None:
    # A chunk whose exponentials reach below 2^-124 is computed another way than the others; here it is the second of 3.
    for which in (0, 1):
        pair = logits(2, 3000)
        pair[which][:, 1500] = -spread
        target = torch.tensor([1500, 7])
        with forced(isa, FAMILY):
            got, gradient = with_gradient(ops.kl_div, *pair, 1.0, "none")
            loss, _ = with_gradient(ops.distill_loss, *pair, target, 2.0, 0.5)
        want, wanted = with_gradient(reference.kl_div, pair[0].double(), pair[1], 1.0, "none")
        torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=0)
        assert_gradient(gradient, wanted, shares(*pair, 1.0, 1.0))
        both = reference.distill_loss(*pair, target, 2.0, 0.5)[0]
        torch.testing.assert_close(loss, both.float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("isa", isa_levels())
def test_rising_and_falling_logits(isa: str) -> None:
    # The maximum of one grows from chunk to chunk, by more than float32 holds in the end; that of the other stays.
    rise = torch.linspace(0, 300, 6000)
    for classes in (3000, 6000):
        student, teacher = logits(2, classes)
        student, teacher = student + rise[:classes], teacher + rise[:classes].flip(0) / 10
        for pair in ((student, teacher), (teacher, student)):
            with forced(isa, FAMILY):
                got, gradient = with_gradient(ops.kl_div, *pair, 1.5, "none")
            want, wanted = with_gradient(reference.kl_div, pair[0].double(), pair[1], 1.5, "none")
            torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=0)
            assert_gradient(gradient, wanted, shares(*pair, 1.5, 1.0) * (1 + rise[-1]))


@pytest.mark.parametrize("offset", [1000.0, -1000.0, 2.0**18, -(2.0**21), 2.0**22])
@pytest.mark.parametrize("isa", isa_levels())
def test_a_constant_moves_nothing(isa: str, offset: float) -> None:
    # Logits in steps of 1/2: the sum with the offset is exact.
    student, teacher = (torch.round(2 * x) / 2 for x in logits(3, 1500))
    for close in (False, True):
        if close:
            student = torch.where(torch.rand(3, 1500) < 0.01, teacher + 0.5, teacher)  # KL below 0.1
        want, wanted = with_gradient(reference.kl_div, student.double(), teacher, 1.0, "none")
        assert bool((want < 0.1).all()) == close
        for pair in ((student + offset, teacher + offset), (student + offset, teacher), (student, teacher + offset)):
            with forced(isa, FAMILY):
                got, gradient = with_gradient(ops.kl_div, *pair, 1.0, "none")
            torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=0)
            assert_gradient(gradient, wanted, shares(student, teacher, 1.0, 1.0))


@pytest.mark.parametrize("offset", [0.0, 1.0, -5.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_small_kl_of_logits_a_constant_apart(isa: str, dtype: torch.dtype, offset: float) -> None:
    # The difference of such logits is rounded to the size of the constant. Few classes: a class of tiny probability may
    # be all of the KL, with terms anywhere on either side of where the Bregman form changes its way.
    for classes, rows in ((1, 4), (2, 2000), (3, 1000), (7, 500), (50, 50), (1000, 8), (30522, 1)):
        for temperature in (0.5, 1.0, 8.0):
            for close in (1.0, 0.1, 1e-3):
                student = torch.randn(rows, classes) * 2
                teacher = (student + close * torch.randn(rows, classes) + offset).to(dtype)
                student = student.to(dtype)
                with forced(isa, FAMILY):
                    got = ops.kl_div(student, teacher, temperature, "none")
                want = reference.kl_div(student, teacher, temperature, "none")
                off = ((got.double() - want).abs() - 1e-12) / want.clamp_min(1e-30)
                assert (off <= 4e-6)[want < 0.1 * temperature**2].all(), (classes, temperature, close)


def test_equal_logits_give_exactly_nothing() -> None:
    student, _ = logits(3, 1030)
    got, gradient = with_gradient(ops.kl_div, student, student.clone(), 3.0)
    assert float(got) == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_and_leading_dimensions(reduction: str) -> None:
    for shape in [(4, 9), (2, 3, 9), (2, 1, 2, 17), (9,)]:
        if shape == (9,) and reduction == "batchmean":
            continue  # refused: test_bad_input
        student, teacher = logits(*shape)
        weight = torch.randn(shape[:-1] if reduction == "none" else ())
        got, gradient = with_gradient(ops.kl_div, student, teacher, 2.0, reduction, weight=weight)
        want, wanted = with_gradient(reference.kl_div, student.double(), teacher, 2.0, reduction, weight=weight)
        torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=0)
        scale = gradient.new_tensor(1.0 if reduction in ("sum", "none") else 1 / student.shape[0])
        by = weight[..., None].abs() if reduction == "none" else weight.abs()
        assert_gradient(gradient, wanted, shares(student, teacher, 2.0, by.double() * scale.double()), shape)
        if reduction != "none":  # the formula that the documentation gives
            log_p, q = functional.log_softmax(student.double() / 2, -1), functional.softmax(teacher.double() / 2, -1)
            assert float(got) == pytest.approx(4 * float(functional.kl_div(log_p, q, reduction=reduction)), rel=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_distill_loss(isa: str, dtype: torch.dtype) -> None:
    for i, classes in enumerate(CLASSES):
        temperature, alpha = (1.0, 4.0)[i % 2], (0.3, 1.0, 0.0)[i % 3]
        student, teacher = logits(2, 3, classes, dtype=dtype)
        target = torch.randint(0, classes, (2, 3))
        target[0, 1] = -100
        arguments = (teacher, target, temperature, alpha)
        with forced(isa, FAMILY):
            got, gradient = with_gradient(lambda *a: ops.distill_loss(*a, return_parts=True), student, *arguments)
            alone = ops.distill_loss(student, *arguments)
        want, wanted = with_gradient(reference.distill_loss, student.double(), *arguments)
        for part, expected in zip(got, want, strict=True):
            assert abs(float(part) - float(expected)) <= 2e-6 * float(expected) + 2e-7, (classes, got, want)
        assert float(alone) == pytest.approx(float(got[0]), rel=1e-6, abs=1e-7)
        assert torch.equal(gradient[0, 1], torch.zeros_like(gradient[0, 1]))
        p1 = torch.softmax(student.double(), -1) + functional.one_hot(target.clamp_min(0), classes)
        assert_gradient(gradient, wanted, alpha * shares(student, teacher, temperature, 0.2) + (1 - alpha) * p1 / 5)


def test_distill_loss_is_the_sum_of_torchs_two() -> None:
    student, teacher = logits(7, 33)
    target = torch.randint(0, 33, (7,))
    kl = ops.kl_div(student, teacher, 3.0)
    ce = functional.cross_entropy(student, target)
    torch.testing.assert_close(ops.distill_loss(student, teacher, target, 3.0, 0.25), 0.25 * kl + 0.75 * ce)


@pytest.mark.parametrize("isa", isa_levels())
def test_nothing_outside_is_read(isa: str) -> None:
    with forced(isa, FAMILY):
        for dtype in DTYPES:
            for classes in (1, 5, 16, 17, 1025, 16390, KEPT + 7):
                student, teacher = logits(2, classes, dtype=dtype)
                target = torch.randint(0, classes, (2,))
                want = ops.kl_div(student, teacher), ops.distill_loss(student, teacher, target, 2.0)
                for side in ("end", "begin"):
                    s, t, y = guarded(student, side), guarded(teacher, side), guarded(target, side)
                    got = with_gradient(ops.kl_div, s, t)[0], ops.distill_loss(s, t, y, 2.0)
                    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
                    guarded_student = s.requires_grad_()
                    ops.kl_div(guarded_student, t).backward()


def test_gradient_past_the_caches_equals_the_one_in_them() -> None:
    # Above 4 L2 caches the gradient is streamed; a row's values must not depend on that.
    student, teacher = logits(1301, 1999)
    _, whole = with_gradient(ops.kl_div, student, teacher, 2.0, "sum")
    for at in (0, 1, 650, 1300):
        _, row = with_gradient(ops.kl_div, student[at : at + 1], teacher[at : at + 1], 2.0, "sum")
        assert same_bits(whole[at : at + 1], row)


@pytest.mark.parametrize("dtype", DTYPES)
def test_levels_and_threads_give_the_same_bits(dtype: torch.dtype) -> None:
    student, teacher = logits(13, 2051, dtype=dtype)
    teacher[3, ::7] = -INF
    target = torch.randint(0, 2051, (13,))
    found = []
    for isa in isa_levels():
        for count in (1, 2):
            with forced(isa, FAMILY), threads(count):
                kl = with_gradient(ops.kl_div, student, teacher, 2.0, "none")
                both = with_gradient(ops.distill_loss, student, teacher, target, 2.0)
            found.append([*kl, *both])
    for other in found[1:]:
        assert all(same_bits(a, b) for a, b in zip(found[0], other, strict=True))


@given(
    isa=st.sampled_from(isa_levels()),
    leading=st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=1, max_size=3),
    classes=st.sampled_from([1, 2, 3, 13, 16, 31, 67, 1031]),
    layout=st.sampled_from(["contiguous", "strided", "transposed", "expanded"]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 2**32 - 1),
)
@example("scalar", [2], 2, "expanded", 0.5, "none", 128)  # KL of 3e-6 with logits 5 apart
def test_kl_div_on_whatever(
    isa: str, leading: list[int], classes: int, layout: str, temperature: float, reduction: str, seed: int
) -> None:
    torch.manual_seed(seed)
    student, teacher = logits(*leading, classes)
    if layout == "strided":
        student, teacher = strided(student), strided(teacher, 5)
    elif layout == "transposed":
        student = student.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "expanded":
        teacher = teacher[..., :1].expand(student.shape)
    with forced(isa, FAMILY):
        got, gradient = with_gradient(ops.kl_div, student, teacher, temperature, reduction)
        untouched = ops.kl_div(student, teacher, temperature, reduction)
    want, wanted = with_gradient(reference.kl_div, student.double(), teacher, temperature, reduction)
    torch.testing.assert_close(got, want.float(), rtol=4e-6, atol=1e-12)
    torch.testing.assert_close(untouched, want.float(), rtol=4e-6, atol=1e-12)
    assert_gradient(gradient, wanted, shares(student, teacher, temperature, 1.0))


# --- what has no ordinary value -----------------------------------------------------------------------------------------  # noqa: E501


def test_nothing_to_average_is_zero() -> None:
    for shape in [(0, 5), (0, 3, 5), (2, 0, 5)]:
        student, teacher = logits(*shape)
        for reduction in ("batchmean", "sum", "mean"):
            got, gradient = with_gradient(ops.kl_div, student, teacher, 2.0, reduction)
            assert float(got) == 0
            assert gradient.shape == shape
        assert ops.kl_div(student, teacher, 2.0, "none").shape == shape[:-1]
    student, teacher = logits(4, 5)
    student[0, 0] = NAN  # an ignored row is not read
    got, gradient = with_gradient(ops.distill_loss, student, teacher, torch.full((4,), -100))
    assert float(got) == 0
    assert torch.equal(gradient, torch.zeros(4, 5))
    assert float(with_gradient(ops.distill_loss, student[1:], teacher[1:], torch.full((3,), 7), 1.0, 0.5, 7)[0]) == 0


@pytest.mark.parametrize("classes", [5, 1040, 17000, KEPT + 40])
@pytest.mark.parametrize("isa", isa_levels())
def test_masked_classes(isa: str, classes: int) -> None:
    student, teacher = logits(3, classes)
    teacher[:, 1] = -INF
    student[1, 1] = -INF  # both: adds 0 and has no gradient
    student[2, 2] = -INF  # the student alone: inf
    with forced(isa, FAMILY):
        got, gradient = with_gradient(ops.kl_div, student, teacher, 2.0, "none")
    want, wanted = with_gradient(reference.kl_div, student[:2].double(), teacher[:2], 2.0, "none")
    torch.testing.assert_close(got[:2], want.float(), rtol=2e-6, atol=0)
    assert_gradient(gradient[:2], wanted, shares(student, teacher, 2.0, 1.0)[:2])
    assert gradient[1, 1] == 0
    assert got[2] == INF
    # torch agrees where it has a value
    torch_rows = functional.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(got[[0, 2]], 4 * torch_rows[[0, 2]], rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", isa_levels())
def test_a_whole_chunk_may_be_masked(isa: str) -> None:
    student, teacher = logits(2, 3000)
    teacher[0, :1024] = -INF
    teacher[1, 1024:] = -INF
    student[1, 1024:] = -INF
    with forced(isa, FAMILY):
        got, gradient = with_gradient(ops.kl_div, student, teacher, 1.5, "none")
    want, wanted = with_gradient(
        reference.kl_div, student.double().masked_fill(student == -INF, -1e9), teacher, 1.5, "none"
    )
    torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=0)
    assert_gradient(gradient, wanted, shares(student, teacher, 1.5, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", isa_levels())
def test_small_kl_with_masked_classes(isa: str, dtype: torch.dtype) -> None:
    student, teacher = logits(2, 40, close=0.01)
    teacher[:, 3] = -INF
    student[:, 3] = -9.0
    student[1, 3] = -INF
    student, teacher = student.to(dtype), teacher.to(dtype)
    with forced(isa, FAMILY):
        got = ops.kl_div(student, teacher, 1.0, "none")
    torch.testing.assert_close(got, reference.kl_div(student, teacher, 1.0, "none").float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("value", [NAN, INF, "masked"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("classes", [9, 1500, 16500, KEPT + 100])
@pytest.mark.parametrize("isa", isa_levels())
def test_errors_surface(isa: str, classes: int, which: int, value: float | str) -> None:
    pair = logits(3, classes)
    pair[which][1, classes - 2] = NAN if value == "masked" else value
    if value == "masked":
        pair[which][1] = -INF
    with forced(isa, FAMILY):
        got, gradient = with_gradient(ops.kl_div, *pair, 2.0, "none")
        loss, whole = with_gradient(ops.distill_loss, *pair, torch.zeros(3, dtype=torch.int64))
    assert got.isnan().tolist() == [False, True, False]
    assert loss.isnan()
    for g in (gradient, whole):
        assert g[1].isnan().all()
        assert g[[0, 2]].isfinite().all()


def test_the_payload_of_a_nan_does_not_matter() -> None:
    for bits in (0x7F800001, 0x7FC00123, 0x7FFFFFFF, -1):
        student, teacher = logits(1, 20)
        student[0, 4] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
        teacher[0, 4] = -INF
        got, gradient = with_gradient(ops.kl_div, student, teacher)
        assert got.isnan()
        assert gradient.isnan().all()


def test_cross_entropy_of_a_masked_target_is_infinite() -> None:
    student, teacher = logits(2, 5)
    student[0, 2] = teacher[0, 2] = -INF
    _, kl, ce = ops.distill_loss(student, teacher, torch.tensor([2, 1]), return_parts=True)
    assert kl.isfinite()
    assert ce == INF


def test_huge_logits() -> None:
    student, teacher = logits(2, 700)
    student, teacher = student * 1e4, teacher * 1e4
    got, gradient = with_gradient(ops.kl_div, student, teacher, 1.0, "none")
    want = reference.kl_div(student, teacher, 1.0, "none")
    torch.testing.assert_close(got, want.float(), rtol=2e-6, atol=0)
    assert gradient.isfinite().all()


def test_float16_gradients_survive_the_mean() -> None:
    # 1 / rows would push them below float16; a GradScaler's factor comes only in backward.
    student, teacher = logits(64, 1000, dtype=torch.float16)
    _, gradient = with_gradient(ops.kl_div, student, teacher, weight=torch.tensor(65536.0))
    _, wanted = with_gradient(reference.kl_div, student.double(), teacher, weight=torch.tensor(65536.0))
    assert_gradient(gradient, wanted, shares(student, teacher, 1.0, 1024.0))


# --- torch.library, torch.compile, autograd ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    student, teacher = logits(2, 3, 9, dtype=dtype)
    target = torch.randint(0, 9, (2, 3))
    grown = student.clone().requires_grad_()
    for reduction in range(4):
        torch.library.opcheck(raw.kl_div.default, (student, teacher, 2.0, reduction))
    for reduction in (0, 3):
        torch.library.opcheck(raw.kl_div_train.default, (grown, teacher, 2.0, reduction))
    torch.library.opcheck(raw.distill_loss.default, (student, teacher, target, 2.0, 0.3, -100))
    torch.library.opcheck(raw.distill_loss_train.default, (grown, teacher, target, 2.0, 0.3, -100))


def chain(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    loss = ops.kl_div(student * 1.5, teacher, 2.0, "none").mean() * 3
    return loss + ops.distill_loss(student, teacher, target, 2.0) + ops.kl_div(student, teacher)


def test_compile_forward_and_backward() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        student, teacher = logits(rows, 23)
        target = torch.randint(0, 23, (rows,))
        got, gradient = with_gradient(compiled, student, teacher, target)
        want, wanted = with_gradient(chain, student, teacher, target)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(compiled(student, teacher, target), want, rtol=1e-6, atol=0)


@pytest.mark.inductor
def test_inductor_forward_and_backward() -> None:
    torch._dynamo.reset()
    student, teacher = logits(6, 23)
    target = torch.randint(0, 23, (6,))
    got, gradient = with_gradient(torch.compile(chain, fullgraph=True), student, teacher, target)
    want, wanted = with_gradient(chain, student, teacher, target)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_backward_twice_gives_the_same_again() -> None:
    student, teacher = logits(3, 40)
    leaf = student.clone().requires_grad_()
    loss = ops.kl_div(leaf, teacher, 2.0)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    loss.backward(torch.tensor(3.0), retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 5 * first)


def test_there_is_no_second_derivative() -> None:
    student, teacher = logits(3, 4)
    loss = ops.kl_div(student.requires_grad_(), teacher)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_the_parts_carry_no_gradient() -> None:
    student, teacher = logits(3, 4)
    target = torch.tensor([0, 1, 2])
    loss, kl, ce = ops.distill_loss(student.requires_grad_(), teacher, target, return_parts=True)
    assert (loss.requires_grad, kl.requires_grad, ce.requires_grad) == (True, False, False)


# --- the table, CUDA, bad input -----------------------------------------------------------------------------------------  # noqa: E501


def test_a_spoiled_kernel_is_seen() -> None:
    student, teacher = logits(2, 5)
    right = ops.kl_div(student, teacher, 1.0, "sum")
    name = next(row["name"] for row in cpu_rows(FAMILY) if row["selected"])
    try:
        _C.spoil_kernel(FAMILY, name)
        assert float(ops.kl_div(student, teacher, 1.0, "sum")) == pytest.approx(float(right) + 1)
    finally:
        _C.spoil_kernel(FAMILY, "")
    assert torch.equal(ops.kl_div(student, teacher, 1.0, "sum"), right)
    with pytest.raises(ValueError, match="kl_loss has no kernel named neon"):
        _C.spoil_kernel(FAMILY, "neon")


@pytest.mark.skipif(_C.build_info()["cuda"] != "off", reason="this build has CUDA kernels")
@pytest.mark.parametrize("op", ["kl_div", "kl_div_train", "distill_loss", "distill_loss_train"])
def test_cuda_has_no_kernel_and_says_so(op: str) -> None:
    rest = (1.0, 0) if op.startswith("kl") else (Y, 1.0, 0.5, -100)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    sentence = f"^{op.removesuffix('_train')}: an argument is on cuda, and this build of fastsparse has no CUDA kernels"
    with pytest.raises(RuntimeError, match=sentence):
        getattr(raw, op).default.redispatch(cuda, S, T, *rest)


def test_time_hook() -> None:
    assert _C.time_kl_div(2, 17, 1) > 0
    with pytest.raises(ValueError, match="time_kl_div: rows, classes and repeats must be positive"):
        _C.time_kl_div(0, 1, 1)


S, T = torch.zeros(2, 5), torch.ones(2, 5)
Y = torch.tensor([0, 4])

BAD_INPUT: dict[str, tuple[Callable[[], Any], str, str]] = {
    "direction": (lambda: ops.kl_div(S, T, direction="reverse"), "kl_div: direction must be 'forward'", "'reverse'"),
    "reduction": (lambda: ops.kl_div(S, T, reduction="max"), "kl_div: reduction must be 'batchmean'", "got 'max'"),
    "reduction list": (lambda: ops.kl_div(S, T, reduction=[]), "kl_div: reduction must be 'batchmean'", "got []"),  # type: ignore[arg-type]
    "code": (lambda: raw.kl_div(S, T, 1.0, 4), "kl_div: reduction must be 0 (batchmean)", "got 4"),
    "batchmean": (lambda: ops.kl_div(S[0], T[0]), "kl_div: student_logits must have a batch dimension", "student_logits[5]"),  # noqa: E501
    "double": (lambda: ops.kl_div(S.double(), T.double()), "must be float32, bfloat16 or float16", "got float64"),
    "dtypes": (lambda: ops.kl_div(S, T.half()), "kl_div: teacher_logits must be float32", "got float16"),
    "shapes": (lambda: ops.kl_div(S, T[:1]), "teacher_logits must have the shape of student_logits[2, 5]", "[1, 5]"),
    "number": (lambda: ops.kl_div(S[0, 0], T[0, 0]), "student_logits must have at least one dimension", "[]"),
    "no class": (lambda: ops.kl_div(S[:, :0], T[:, :0]), "student_logits must have at least one class", "[2, 0]"),
    "temperature 0": (lambda: ops.kl_div(S, T, 0.0), "kl_div: temperature must be in [1e-6, 1e6]", "got 0"),
    "temperature -1": (lambda: ops.kl_div(S, T, -1.0), "kl_div: temperature must be in [1e-6, 1e6]", "got -1"),
    "temperature nan": (lambda: ops.kl_div(S, T, NAN), "kl_div: temperature must be in [1e-6, 1e6]", "got nan"),
    "teacher": (lambda: ops.kl_div(S, T.clone().requires_grad_()), "teacher_logits must not require a gradient", "got one"),  # noqa: E501
    "teacher 2": (
        lambda: ops.distill_loss(S, T.clone().requires_grad_(), Y),
        "distill_loss: teacher_logits must not require a gradient",
        "there is none for the teacher",
    ),
    "alpha": (lambda: ops.distill_loss(S, T, Y, alpha=1.5), "distill_loss: alpha must be in [0, 1]", "got 1.5"),
    "alpha nan": (lambda: ops.distill_loss(S, T, Y, alpha=NAN), "distill_loss: alpha must be in [0, 1]", "got nan"),
    "target int32": (lambda: ops.distill_loss(S, T, Y.int()), "distill_loss: target must be int64", "got int32"),
    "target shape": (
        lambda: ops.distill_loss(S, T, Y[:1]),
        "target must have the leading shape of student_logits[2, 5]",
        "got target[1]",
    ),
    "target 5": (lambda: ops.distill_loss(S, T, Y + 1), "target must be in [0, 5) or ignore_index=-100", "got 5 at row 1"),  # noqa: E501
    "target -1": (lambda: ops.distill_loss(S, T, Y - 1), "target must be in [0, 5) or ignore_index=-100", "got -1 at row 0"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str) -> None:
    call, wanted, got = BAD_INPUT[case]
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert wanted in message
    assert got in message
    assert "/" not in message, "no path of the build in a user's message"


@pytest.mark.parametrize("grad", [False, True])
def test_another_device_is_refused(grad: bool) -> None:
    student = S.clone().requires_grad_(grad)
    with pytest.raises(ValueError, match=r"kl_div: teacher_logits must be on cpu.*got meta"):
        ops.kl_div(student, T.to("meta"))
    with pytest.raises(ValueError, match=r"distill_loss: target must be on cpu.*got meta"):
        ops.distill_loss(student, T, Y.to("meta"))


def test_losses_are_of_the_right_size() -> None:
    # Uniform teacher and student: no divergence, and a cross-entropy of log C.
    loss, kl, ce = ops.distill_loss(S, S, Y, 2.0, 0.5, return_parts=True)
    assert float(kl) == 0
    assert float(ce) == pytest.approx(math.log(5))
    assert float(loss) == pytest.approx(math.log(5) / 2)


@pytest.mark.parametrize("count", [1, 2])
def test_warm_calls_allocate_no_scratch(count: int) -> None:
    pairs = [logits(700, 33), logits(5, 3000), logits(64, 1000)]
    with threads(count):
        for _ in range(2):
            for student, teacher in pairs:
                with_gradient(ops.kl_div, student, teacher)
        before = _C.scratch_allocations()
        for _ in range(5):
            for student, teacher in pairs:
                with_gradient(ops.kl_div, student, teacher)
                ops.kl_div(student, teacher)
        assert _C.scratch_allocations() == before
