"""The bars a family is held to, as data, and their verdicts: met, missed (by how much), not measurable here (why)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bench import ceilings, machine
from bench.registry import OURS
from bench.rows import CEILING_BROKEN, Row, best, find, geomean

Status = Literal["met", "missed", "not measurable"]

MET: Status = "met"
MISSED: Status = "missed"
NOT_MEASURABLE: Status = "not measurable"


@dataclass(frozen=True)
class Context:
    """What a bar is judged on."""

    rows: Sequence[Row]
    isa: str  # the level in use
    cpu_level: str  # the level this CPU reaches
    beyond_avx2: bool = False  # it has more than AVX2
    threads: int = 1
    ceilings: dict[str, float] = field(default_factory=dict)

    def ours(self, case: str, malloc: str = "default", **shape: int) -> Row | None:
        return next((row for row in self.rows if row.name == OURS and row.case == case and row.malloc == malloc
                     and row.shape == shape), None)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One number a bar looks at, or why there is none."""

    where: str
    value: float | None
    why: str = ""


@dataclass(frozen=True)
class Bar:
    """`at_least` or `at_most`, for every part or (`mean`) for their geometric mean."""

    key: str
    family: str
    text: str
    parts: Callable[[Context], list[Part]]
    at_least: float | None = None
    at_most: float | None = None
    mean: bool = False
    condition: Callable[[Context], str | None] = lambda _: None  # None, or why it can't be measured here
    note: Callable[[Context], str] = lambda _: ""


@dataclass(frozen=True)
class Verdict:
    key: str
    text: str
    status: Status
    measured: float | None
    target: str
    detail: str


def judge(bar: Bar, context: Context) -> Verdict:
    """The verdict of one bar. A part that is missing leaves the bar open, unless another part misses it anyway."""
    least = bar.at_least is not None
    goal = bar.at_least if bar.at_least is not None else bar.at_most
    if goal is None:
        raise ValueError(f"bar {bar.key} has neither at_least nor at_most")
    target = f"{'>=' if least else '<='} {goal:g}"

    def verdict(status: Status, measured: float | None, *details: str) -> Verdict:
        return Verdict(bar.key, bar.text, status, measured, target, "; ".join(d for d in details if d))

    why_not = bar.condition(context)
    if why_not:
        return verdict(NOT_MEASURABLE, None, why_not)
    parts = bar.parts(context)
    known = [(part.value, part.where) for part in parts if part.value is not None]
    missing = [part for part in parts if part.value is None]
    if not known:
        return verdict(NOT_MEASURABLE, None, missing[0].why if missing else "no rows")

    worst, where = min(known) if least else max(known)
    measured = geomean([value for value, _ in known]) if bar.mean else worst
    place = f"worst {worst:.3g} at {where}" if len(known) > 1 else f"at {where}"
    good = measured >= goal if least else measured <= goal
    off = measured / goal - 1
    gap = f"{abs(off):.1%} {'below' if off < 0 else 'above'} the bar"
    bad = [where for value, where in known if (value < goal if least else value > goal)]
    count = f"{len(known) - len(bad)} of {len(known)} reach it" if len(known) > 1 and not bar.mean else ""
    if missing and (good or bar.mean):
        first = f"{len(missing)} of {len(parts)} figures are missing ({missing[0].where}: {missing[0].why})"
        return verdict(NOT_MEASURABLE, measured, first, place, bar.note(context))
    return verdict(MET if good else MISSED, measured, "" if good else gap, place, count, bar.note(context))


def judge_all(family: str, context: Context) -> list[Verdict]:
    return [judge(bar, context) for bar in BARS if bar.family == family]


# ---- what several bars share ----


def one_thread(context: Context) -> str | None:
    return None if context.threads == 1 else f"the bar is for one thread, this run used {context.threads}"


def vnni512(context: Context) -> str | None:
    if machine.above("avx512", context.cpu_level):
        return "not measurable: this CPU has no AVX-512-VNNI"
    if context.isa != "avx512":
        return f"not measurable: the level in use is {context.isa}, the bar is for avx512"
    return one_thread(context)


def _missing(row: Row | None) -> str:
    return "not among the measured shapes" if row is None else row.error or "its result failed the check"


NO_CEILING = "no ceiling, or one that was measured while other processes ran"


def _part(where: str, row: Row | None, value: Callable[[Row], float | None], why: str = NO_CEILING) -> Part:
    if row is None or not row.right:
        return Part(where, None, _missing(row))
    found = value(row)
    return Part(where, found, "" if found is not None else why)


def _fraction(*keys: str) -> Callable[[Row], float | None]:
    """The first of these fractions that a row has; one far above 1 tells that the ceiling was measured under load."""

    def fraction(row: Row) -> float | None:
        found = next((row.fractions[key] for key in keys if key in row.fractions), None)
        return found if found is None or found <= CEILING_BROKEN else None

    return fraction


# ---- int8_gemm ----

INT8_WEIGHTS = ((384, 1536), (768, 768), (768, 3072), (4096, 4096))  # (K, N)
INT8_ROWS = (1, 4, 16, 64, 128, 512)  # M


def _linear(context: Context, m: int, k: int, n: int, malloc: str = "default") -> tuple[str, Row | None]:
    return f"M={m} K={k} N={n}", context.ours("int8_linear", malloc, m=m, k=k, n=n)


def int8_compute(context: Context) -> list[Part]:
    return [
        _part(where, row, _fraction("compute"))
        for m in (64, 128, 512)
        for k, n in INT8_WEIGHTS
        for where, row in [_linear(context, m, k, n)]
    ]


def int8_read(context: Context) -> list[Part]:
    """The kernel's own time where it is known, else whole calls (which can only look worse)."""
    return [
        _part(
            f"{where} ({row.level if row else '?'}, {'kernel' if row and row.kernel_seconds else 'whole call'})",
            row,
            _fraction("kernel_read", "read"),
        )
        for k, n in INT8_WEIGHTS
        for where, row in [_linear(context, 1, k, n)]
    ]


def int8_read_condition(context: Context) -> str | None:
    """The bar is for AVX-512-VNNI; without it one row of x is bound by arithmetic, not by reading."""
    why = vnni512(context)
    key = ceilings.compute_ceiling("int8", context.isa)
    compute, read = context.ceilings.get(key or ""), context.ceilings.get("read_L3")
    if why and compute and read:
        why += f" (at M = 1 the {key} ceiling is {compute / 2 / read:.2f} of L3's read bandwidth)"
    return why


def _over_best_fused(context: Context, malloc: str, weights: Sequence[tuple[int, int]] = INT8_WEIGHTS) -> list[Part]:
    def ratio(row: Row) -> float | None:
        fused = best(context.rows, row, "fused")
        return fused.median / row.median if fused else None

    return [
        _part(where, row, ratio, "no fused peer with a right result")
        for m in INT8_ROWS
        for k, n in weights
        for where, row in [_linear(context, m, k, n, malloc)]
    ]


def int8_fused(context: Context) -> list[Part]:
    return _over_best_fused(context, "default")


def int8_fused_note(context: Context) -> str:
    """The same mean per (K, N), and with freed memory kept."""
    notes = []
    for k, n in INT8_WEIGHTS:
        values = [p.value for p in _over_best_fused(context, "default", [(k, n)]) if p.value is not None]
        if values:
            notes.append(f"{k}x{n}: {geomean(values):.2f}")
    kept = [p.value for p in _over_best_fused(context, "keep") if p.value is not None]
    if kept:
        notes.append(f"with freed memory kept: {geomean(kept):.2f}")
    return ", ".join(notes)


OURS_AVX2, MKL_AVX2, FP32 = "fastsparse held to AVX2", "torch fp32 held to AVX2", "torch fp32"


def int8_avx2(context: Context) -> list[Part]:
    """Beyond AVX2 both sides run under caps; on an AVX2 CPU they are what runs anyway."""
    held = context.beyond_avx2
    parts = []
    for m in INT8_ROWS:
        for k, n in INT8_WEIGHTS:
            where, row = _linear(context, m, k, n)
            like = row or Row("int8_linear", {"m": m, "k": k, "n": n}, OURS, "ours", "default", context.threads, "")
            ours = find(context.rows, like, OURS_AVX2) if held else row
            mkl = find(context.rows, like, MKL_AVX2 if held else FP32)

            def ratio(r: Row, mkl: Row | None = mkl) -> float | None:
                return mkl.median / r.median if mkl is not None and mkl.ok else None

            parts.append(_part(where, ours, ratio, f"fp32: {_missing(mkl)}"))
    return parts


def int8_avx2_condition(context: Context) -> str | None:
    if machine.above("avx2", context.cpu_level):
        return "not measurable: this CPU has no AVX2"
    if not context.beyond_avx2 and context.isa != "avx2":
        return f"not measurable: the level in use is {context.isa}"
    return one_thread(context)


def int8_avx2_note(context: Context) -> str:
    values = [part.value for part in int8_avx2(context) if part.value is not None]
    note = f"geometric mean {geomean(values):.2f}" if values else ""
    madd, fma = context.ceilings.get("madd_avx2"), context.ceilings.get("fma_avx2")
    if madd and fma:
        note += f"; this CPU's vpmaddwd + vpaddd rate is {madd / fma:.2f} of its AVX2 FMA rate"
    return note.removeprefix("; ")


def int8_call(context: Context) -> list[Part]:
    def ratio(r: Row) -> float | None:
        linear = find(context.rows, r, FP32)
        return r.median / linear.median if linear is not None and linear.ok else None

    return [
        _part(where, context.ours("call_cost", m=16, k=16, n=16, bias=bias), ratio, "F.linear was not measured")
        for bias, where in ((1, "16x16 with bias"), (0, "16x16 without bias"))
    ]


WEIGHT_ONLY_WEIGHTS = ((4096, 4096), (4096, 11008))  # (K, N)


def _int4_over_int8(group: int) -> Callable[[Context], list[Part]]:
    """int8_linear's time over that of 4-bit weights, one row, from DRAM."""

    def parts(context: Context) -> list[Part]:
        def ratio(r: Row) -> float | None:
            int8 = find(context.rows, r, "fastsparse int8_linear")
            return int8.median / r.median if int8 is not None and int8.right else None

        return [
            _part(
                f"K={k} N={n}",
                context.ours("weight_only_linear from DRAM", m=1, k=k, n=n, bits=4, group=group),
                ratio,
                "no right int8 figure",
            )
            for k, n in WEIGHT_ONLY_WEIGHTS
        ]

    return parts


# ---- qdq ----

QDQ_SHAPES = tuple(((1 << 24) // k, k) for k in (768, 4096, 11008))  # (M, K)


def qdq_token(context: Context) -> list[Part]:
    def ratio(r: Row) -> float | None:
        compiled = find(context.rows, r, "torch.compile")
        return compiled.median / r.median if compiled is not None and compiled.right else None

    return [
        _part(
            f"M={m} K={k}",
            context.ours("quantize_per_token into", m=m, k=k),
            ratio,
            "torch.compile has no right result",
        )
        for m, k in QDQ_SHAPES
    ]


# ---- sparse_matmul ----

SPARSE_WEIGHTS = ((768, 768), (768, 3072), (4096, 4096))  # (K, N)


def _sparse(m: int, zeros: int) -> Callable[[Context], list[Part]]:
    """Dense float32's time over ours."""

    def ratio_to(context: Context) -> list[Part]:
        def ratio(r: Row) -> float | None:
            dense = find(context.rows, r, FP32)
            return dense.median / r.median if dense is not None and dense.ok else None

        return [
            _part(f"K={k} N={n}", context.ours("sparse_linear", m=m, k=k, n=n, zeros=zeros), ratio, "no dense figure")
            for k, n in SPARSE_WEIGHTS
        ]

    return ratio_to


# ---- kl_loss ----

KL_SHAPES = ((1024, 1000), (4096, 1000), (32, 32000), (128, 32000))  # (M, C)
KL_CASES = ("kl_div both ways", "distill_loss both ways")


def _kl_parts(context: Context, value: Callable[[Row], float | None], why: str = "") -> list[Part]:
    return [
        _part(f"{case.split()[0]} M={m} C={c}", context.ours(case, m=m, c=c), value, why)
        for case in KL_CASES
        for m, c in KL_SHAPES
    ]


def kl_compiled(context: Context) -> list[Part]:
    def ratio(r: Row) -> float | None:
        compiled = best(context.rows, r, "fused")  # with log_target or without
        return compiled.median / r.median if compiled is not None else None

    return _kl_parts(context, ratio, "torch.compile has no right result")


def kl_compiled_note(context: Context) -> str:
    """What stands beside a missed ratio: the bytes that must move against the copy ceiling."""
    copy = max((context.ceilings.get(key, 0.0) for key in ("copy_plain", "copy_streaming")), default=0.0)
    if not copy:
        return ""
    shares = [p for p in _kl_parts(context, lambda r: r.value) if p.value is not None]
    return "of the copy ceiling: " + ", ".join(f"{p.where} {(p.value or 0) / copy:.2f}" for p in shares)


def kl_accuracy(context: Context) -> list[Part]:
    """A result that failed its check has an error too, and misses the bar with it."""
    parts = []
    for case in KL_CASES:
        for m, c in KL_SHAPES:
            row = context.ours(case, m=m, c=c)
            error = float(row.check["error"]) if row is not None and row.check else None
            parts.append(Part(f"{case.split()[0]} M={m} C={c}", error, "" if error is not None else _missing(row)))
    return parts


BARS: tuple[Bar, ...] = (
    *(
        Bar(
            f"sparse-m{m}-z{zeros}",
            "sparse_matmul",
            f"sparse_linear, one thread, M = {m}, {zeros}% zeros: speed-up over dense float32",
            _sparse(m, zeros),
            at_least=goal,
            condition=one_thread,
        )
        for m, zeros, goal in ((1, 50, 1.6), (1, 90, 5.0), (64, 50, 1.5), (64, 90, 5.0))
    ),
    Bar(
        "int8-compute",
        "int8_gemm",
        "int8_linear, one thread, M = 64, 128, 512: fraction of the VNNI ceiling, quantize and epilogue included",
        int8_compute,
        at_least=0.85,
        condition=vnni512,
    ),
    Bar(
        "int8-read",
        "int8_gemm",
        "int8_linear, one thread, M = 1: fraction of the read bandwidth of the level the weights lie in",
        int8_read,
        at_least=0.88,
        condition=int8_read_condition,
    ),
    Bar(
        "int8-fused",
        "int8_gemm",
        "int8_linear, one thread: geometric mean over all M and shapes of the ratio to the best fused torch peer",
        int8_fused,
        at_least=1.5,
        mean=True,
        condition=one_thread,
        note=int8_fused_note,
    ),
    Bar(
        "int8-avx2",
        "int8_gemm",
        "int8_linear on AVX2, one thread: ratio to torch fp32 (MKL) held to AVX2, every M and shape",
        int8_avx2,
        at_least=1.35,
        condition=int8_avx2_condition,
        note=int8_avx2_note,
    ),
    Bar(
        "int8-call",
        "int8_gemm",
        "one call on 16x16, no gradient needed, default mode: time over torch.nn.functional.linear",
        int8_call,
        at_most=1.2,
        condition=one_thread,
    ),
    *(
        Bar(
            f"int4-g{group}",
            "int8_gemm",
            f"weight_only_linear, one thread, M = 1 from DRAM, 4 bits in groups of {group}: ratio to int8_linear",
            _int4_over_int8(group),
            at_least=goal,
            condition=vnni512,
        )
        for group, goal in ((32, 1.66), (64, 1.76), (128, 1.83))
    ),
    Bar(
        "qdq-token",
        "qdq",
        "quantize_per_token of 16M elements into reused memory, one thread: ratio to torch.compile",
        qdq_token,
        at_least=3.0,
        condition=one_thread,
    ),
    Bar(
        "kl-compiled",
        "kl_loss",
        "kl_div and distill_loss, forward and backward, one thread: ratio to the faster torch.compile, every shape",
        kl_compiled,
        at_least=5.0,
        condition=one_thread,
        note=kl_compiled_note,
    ),
    Bar(
        "kl-accuracy",
        "kl_loss",
        "kl_div and distill_loss: error of the loss relative to float64",
        kl_accuracy,
        at_most=2e-6,
    ),
)
