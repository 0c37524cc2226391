"""The bars a family is held to, as data, and their verdicts.

Met, met within noise (by how much it falls short, at most the machine's noise), missed (by how much), not measurable
here (why).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bench import ceilings, machine
from bench.registry import OURS
from bench.rows import CEILING_BROKEN, Row, best, find, geomean

Status = Literal["met", "met within noise", "missed", "not measurable"]

MET: Status = "met"
NEARLY: Status = "met within noise"
MISSED: Status = "missed"
NOT_MEASURABLE: Status = "not measurable"

# Two runs of the same code on the same machine differ by as much.
NOISE = 0.05


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
    noise: float = 0.0  # falling short by this share still counts as met, and the verdict says so


@dataclass(frozen=True)
class Verdict:
    key: str
    text: str
    status: Status
    measured: float | None
    target: str
    detail: str


def status_of(bar: Bar, measured: float) -> Status:
    """Whether a figure meets a bar. Raises ValueError if the bar has no target."""
    if bar.at_least is not None:
        short = 1 - measured / bar.at_least
    elif bar.at_most is not None:
        short = measured / bar.at_most - 1
    else:
        raise ValueError(f"bar {bar.key} has neither at_least nor at_most")
    return MET if short <= 0 else NEARLY if short <= bar.noise else MISSED


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
        return verdict(
            NOT_MEASURABLE, None, missing[0].why if missing else "no shape's weights lie there on this machine"
        )

    worst, where = min(known) if least else max(known)
    measured = geomean([value for value, _ in known]) if bar.mean else worst
    place = f"worst {worst:.3g} at {where}" if len(known) > 1 else f"at {where}"
    off = measured / goal - 1
    status = status_of(bar, measured)
    gap = f"{abs(off):.1%} {'below' if off < 0 else 'above'} the bar"
    bad = [where for value, where in known if (value < goal if least else value > goal)]
    count = f"{len(known) - len(bad)} of {len(known)} reach it" if len(known) > 1 and not bar.mean else ""
    if missing and (status != MISSED or bar.mean):
        first = f"{len(missing)} of {len(parts)} figures are missing ({missing[0].where}: {missing[0].why})"
        return verdict(NOT_MEASURABLE, measured, first, place, bar.note(context))
    return verdict(status, measured, "" if status == MET else gap, place, count, bar.note(context))


def judge_all(family: str, context: Context) -> list[Verdict]:
    return [judge(bar, context) for bar in bars_of(family)]


def bars_of(family: str) -> list[Bar]:
    from bench import sparse_bars  # its bars are made of what stands here

    return [bar for bar in (*BARS, *sparse_bars.BARS) if bar.family == family]


# ---- what several bars share ----


def one_thread(context: Context) -> str | None:
    return None if context.threads == 1 else f"the bar is for one thread, this run used {context.threads}"


def vnni512(context: Context) -> str | None:
    if machine.above("avx512", context.cpu_level):
        return "not measurable: this CPU has no AVX-512-VNNI"
    if machine.above("avx512", context.isa):
        return f"not measurable: the level in use is {context.isa}, the bar is for avx512 and amx"
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

INT8_WEIGHTS = ((384, 1536), (768, 768), (768, 3072), (4096, 4096), (4096, 11008))  # (K, N)
INT8_ROWS = (1, 4, 16, 64, 128, 512)  # M
LAYERS, LAYERS_SHAPE = "int8_linear 40 layers", (4096, 4096)  # read from DRAM whatever the caches are
OURS_TWO = "fastsparse, two threads"
PLAIN_READS = "plain reads"  # a row of kind "read"


def _linear(context: Context, m: int, k: int, n: int, malloc: str = "default") -> tuple[str, Row | None]:
    return f"M={m} K={k} N={n}", context.ours("int8_linear", malloc, m=m, k=k, n=n)


def _linears(context: Context, rows: Sequence[int], level: str | None = None) -> list[tuple[str, Row | None]]:
    """int8_linear at these M; with `level`, where the weights lie there or it is not known where.

    Only the 40 layers are judged as DRAM: what exceeds a cache by little is partly in it.
    """
    if level == "DRAM":
        k, n = LAYERS_SHAPE
        return [(f"40 layers M={m}", context.ours(LAYERS, m=m, k=k, n=n)) for m in rows]
    found = [_linear(context, m, k, n) for m in rows for k, n in INT8_WEIGHTS]
    return [(where, row) for where, row in found if level is None or row is None or row.level in (None, level)]


def _vnni(row: Row) -> float | None:
    """Of the VNNI ceiling, under AMX too; no figure where a ceiling that cannot be passed is."""
    return row.fractions.get("vnni", row.fractions.get("compute")) if _fraction("compute")(row) is not None else None


def _roofline(row: Row) -> float | None:
    """Of what the nearer of both ceilings allows, VNNI's and the read bandwidth's."""
    compute, read = _vnni(row), _fraction("read")(row)
    return max(compute, read) if compute is not None and read is not None else None


def int8_compute(context: Context) -> list[Part]:
    return [_part(where, row, _vnni) for where, row in _linears(context, (64, 128, 512))]


def int8_sixteen(level: str) -> Callable[[Context], list[Part]]:
    value = _roofline if level == "DRAM" else _vnni

    def parts(context: Context) -> list[Part]:
        return [_part(where, row, value) for where, row in _linears(context, (16,), level)]

    return parts


def int8_sixteen_note(level: str) -> Callable[[Context], str]:
    """Where reading is nearer than arithmetic, no kernel reaches the VNNI ceiling: the roofline stands beside."""

    def note(context: Context) -> str:
        parts = [_part(where, row, _roofline) for where, row in _linears(context, (16,), level)]
        known = [f"{part.where} {part.value:.2f}" for part in parts if part.value is not None]
        return "of the roofline: " + ", ".join(known) if known else ""

    return note


def int8_read(level: str) -> Callable[[Context], list[Part]]:
    """The time of a plain loop over as many bytes, measured in turn, over ours: the kernels' own."""

    def parts(context: Context) -> list[Part]:
        found = []
        for where, row in _linears(context, (1,), level):
            reads = find(context.rows, row, PLAIN_READS) if row is not None else None

            def share(r: Row, reads: Row | None = reads) -> float | None:
                return reads.kernel / r.kernel if reads is not None and reads.ok else None

            found.append(_part(where, row, share, f"{PLAIN_READS}: {_missing(reads)}"))
        return found

    return parts


def int8_read_note(level: str) -> Callable[[Context], str]:
    """Of the ceiling, the best burst of reads of a set that fits the level well."""

    def note(context: Context) -> str:
        fraction = _fraction("kernel_read", "read")
        parts = [_part(where, row, fraction) for where, row in _linears(context, (1,), level)]
        known = [f"{part.where} {part.value:.2f}" for part in parts if part.value is not None]
        return "of the best burst of reads: " + ", ".join(known) if known else ""

    return note


def int8_read_condition(context: Context) -> str | None:
    """The bar is for AVX-512-VNNI; without it one row of x is bound by arithmetic, not by reading."""
    why = vnni512(context)
    key = ceilings.compute_ceiling("int8", context.isa)
    compute, read = context.ceilings.get(key or ""), context.ceilings.get("read_L3")
    if why and compute and read:
        why += f" (at M = 1 the {key} ceiling is {compute / 2 / read:.2f} of L3's read bandwidth)"
    return why


def _over_best(
    context: Context, kinds: Sequence[str], malloc: str = "default", weights: Sequence[tuple[int, int]] = INT8_WEIGHTS
) -> list[Part]:
    parts = []
    for m in INT8_ROWS:
        for k, n in weights:
            where, row = _linear(context, m, k, n, malloc)
            other = best(context.rows, row, *kinds) if row is not None else None

            def ratio(r: Row, other: Row | None = other) -> float | None:
                return other.median / r.median if other is not None else None

            name = f" ({other.name})" if other is not None else ""
            parts.append(_part(where + name, row, ratio, f"no {' or '.join(kinds)} peer with a right result"))
    return parts


def int8_fused(context: Context) -> list[Part]:
    return _over_best(context, ("fused",))


def int8_any(context: Context) -> list[Part]:
    return _over_best(context, ("fused", "bare"))


def int8_fused_note(context: Context) -> str:
    """The same mean per (K, N), and with freed memory kept."""
    notes = []
    for k, n in INT8_WEIGHTS:
        values = [p.value for p in _over_best(context, ("fused",), weights=[(k, n)]) if p.value is not None]
        if values:
            notes.append(f"{k}x{n}: {geomean(values):.2f}")
    kept = [p.value for p in _over_best(context, ("fused",), "keep") if p.value is not None]
    if kept:
        notes.append(f"with freed memory kept, torch's engines alone: {geomean(kept):.2f}")
    return ", ".join(notes)


def int8_threads(rows: Sequence[int], *levels: str | None) -> Callable[[Context], list[Part]]:
    """One thread's time over that of two."""

    def parts(context: Context) -> list[Part]:
        found = []
        for level in levels:
            for where, row in _linears(context, rows, level):
                two = _two_threads(context, row)

                def ratio(r: Row, two: Row | None = two) -> float | None:
                    return r.median / two.median if two is not None and two.right and not two.disturbed else None

                why = "no round was undisturbed" if two is not None and two.right else f"two threads: {_missing(two)}"
                found.append(_part(where, row, ratio, why))
        return found

    return parts


def _two_threads(context: Context, like: Row | None) -> Row | None:
    return next((row for row in context.rows if like is not None and row.name == OURS_TWO
                 and (row.case, row.shape, row.malloc) == (like.case, like.shape, like.malloc)), None)  # fmt: skip


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
            key,
            "int8_gemm",
            f"int8_linear, one thread, M = 64, 128, 512: {which} fraction of the VNNI ceiling, quantize and epilogue "
            "included",
            int8_compute,
            at_least=goal,
            mean=mean,
            condition=vnni512,
            noise=NOISE,
        )
        for key, which, goal, mean in (
            ("int8-compute", "geometric mean of the", 0.92, True),
            ("int8-compute-least", "least", 0.87, False),
        )
    ),
    *(
        Bar(
            f"int8-m16-{level}",
            "int8_gemm",
            f"int8_linear, one thread, M = 16, weights in {level}: fraction of {of}, quantize and epilogue included",
            int8_sixteen(level),
            at_least=goal,
            condition=vnni512,
            note=int8_sixteen_note(level) if level != "DRAM" else lambda _: "",
            noise=NOISE,
        )
        for level, of, goal in (
            ("L2", "the VNNI ceiling", 0.92),
            ("L3", "the VNNI ceiling", 0.87),
            ("DRAM", "the roofline (VNNI and read)", 0.72),
        )
    ),
    *(
        Bar(
            f"int8-read-{level}",
            "int8_gemm",
            f"int8_linear, one thread, M = 1, weights in {level}: fraction of its read bandwidth, a plain loop in turn",
            int8_read(level),
            at_least=goal,
            condition=int8_read_condition,
            note=int8_read_note(level),
            noise=NOISE,
        )
        for level, goal in (("L2", 0.92), ("L3", 0.95), ("DRAM", 0.95))
    ),
    *(
        Bar(
            f"int8-{key}{'' if mean else '-least'}",
            "int8_gemm",
            f"int8_linear, one thread: {'geometric mean' if mean else 'least'} over all M and shapes of the ratio to "
            f"the best {peers}",
            parts,
            at_least=goal,
            mean=mean,
            condition=one_thread,
            note=int8_fused_note if mean and key == "fused" else lambda _: "",
            noise=NOISE,
        )
        for key, peers, parts, goal, mean in (
            ("fused", "fused peer", int8_fused, 1.7, True),
            ("fused", "fused peer", int8_fused, 1.13, False),
            ("any", "peer, bare torch._int_mm among them", int8_any, 1.38, True),
            ("any", "peer, bare torch._int_mm among them", int8_any, 0.97, False),
        )
    ),
    *(
        Bar(
            key,
            "int8_gemm",
            f"int8_linear on AVX2, one thread: {which} ratio to torch fp32 (MKL) held to AVX2, over all M and shapes",
            int8_avx2,
            at_least=goal,
            mean=mean,
            condition=int8_avx2_condition,
            note=int8_avx2_note,
            noise=NOISE,
        )
        for key, which, goal, mean in (
            ("int8-avx2", "geometric mean of the", 2.2, True),
            ("int8-avx2-least", "least", 1.45, False),
        )
    ),
    *(
        Bar(
            key,
            "int8_gemm",
            f"int8_linear, two threads over one, {what}",
            int8_threads(rows, *levels),
            at_least=goal,
            mean=mean,
            condition=one_thread,
            noise=NOISE,
        )
        for key, what, rows, levels, goal, mean in (
            ("int8-threads", "M = 128, 512: geometric mean", (128, 512), (None,), 1.9, True),
            ("int8-threads-least", "M = 128, 512: least", (128, 512), (None,), 1.85, False),
            ("int8-threads-m16-L2", "M = 16, weights in L2", (16,), ("L2",), 1.75, False),
            ("int8-threads-far", "M = 1, 16, weights in L3 or DRAM", (1, 16), ("L3", "DRAM"), 1.9, False),
            ("int8-threads-m1-L2", "M = 1, weights in L2", (1,), ("L2",), 1.25, False),
        )
    ),
    Bar(
        "int8-call",
        "int8_gemm",
        "one call on 16x16, no gradient needed, default mode: time over torch.nn.functional.linear",
        int8_call,
        at_most=1.2,
        condition=one_thread,
        noise=NOISE,
    ),
    *(
        Bar(
            f"int4-g{group}",
            "int8_gemm",
            f"weight_only_linear, one thread, M = 1 from DRAM, 4 bits in groups of {group}: ratio to int8_linear",
            _int4_over_int8(group),
            at_least=goal,
            condition=vnni512,
            noise=NOISE,
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
