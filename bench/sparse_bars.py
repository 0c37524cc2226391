"""The bars of sparse_matmul, and the points at which they are measured. Against dense float32, one thread, unless said.

Of int8 and training the cases stand in modules of their own (bench/cases/sparse_matmul.py, EXTRA); the names and
shapes that their bars look for are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench import machine
from bench.bars import FP32, NOISE, OURS_TWO, Bar, Context, Part, _missing, _part, one_thread, vnni512
from bench.rows import Row, find, geomean

SMALL = ((384, 1536), (768, 768))  # (K, N)
LARGE = ((768, 3072), (4096, 4096), (4096, 11008))
WEIGHTS = (*SMALL, *LARGE)
FAR = ((4096, 4096), (4096, 11008))  # read from DRAM, several in turn


class Z:
    """Percent of zeros at which something beside speed over dense is measured."""

    AVX2 = 80
    THREADS = (50, 90)
    MEMORY = 50
    TRAINING = 90


# Least speed-up by M and percent of zeros; at M = 1 for small weights and for large ones.
ONE_ROW = ((50, 1.9, 1.9), (70, 2.8, 2.8), (80, 3.4, 3.4), (90, 6.0, 7.0), (95, 11.0, 14.0))
GOALS = {
    4: {50: 3.0, 90: 6.0},
    16: {30: 1.0, 50: 2.0, 80: 4.5, 90: 7.8, 95: 12.0},
    64: {30: 1.0, 50: 1.9, 80: 3.9, 90: 6.2, 95: 9.0},
    128: {30: 1.0, 50: 1.65, 80: 3.4, 90: 5.5, 95: 8.0},
    512: {30: 1.0, 50: 1.5, 80: 3.1, 90: 5.0, 95: 7.2},
}
DRAM_GOALS = {80: 3.9}
DRAM_POINTS = [{"m": 1, "k": k, "n": n, "zeros": zeros} for k, n in FAR for zeros in (50, 70, 80, 90, 95)]
SKEWED = [
    {"m": m, "k": k, "n": n, "zeros": zeros}
    for k, n in ((768, 768), (4096, 4096))
    for zeros in (50, 80, 90)
    for m in (1, 16, 128)
]
PRUNED = [
    {"m": m, "k": k, "n": n, "zeros": zeros, "layer": layer}
    for k, n in ((384, 1536), (1536, 384))
    for layer in (0, 5)
    for zeros in (50, 80, 90)
    for m in (1, 16, 128, 512)
]


def at_a_bar(m: int, zeros: int) -> bool:
    return zeros in {z for z, *_ in ONE_ROW} if m == 1 else zeros in GOALS[m]


POINTS = [(m, zeros) for m in (1, *GOALS) for zeros in range(100) if at_a_bar(m, zeros)]

Ratio = Callable[[Row], float | None]


def over(context: Context, name: str) -> Ratio:
    """How many times as long the other implementation takes."""

    def ratio(row: Row) -> float | None:
        other = find(context.rows, row, name)
        return other.median / row.median if other is not None and other.right else None

    return ratio


def _at(row: Row | None, m: int, k: int, n: int, zeros: int) -> str:
    note = f" ({row.note})" if row is not None and row.note else ""
    return f"M={m} K={k} N={n} {zeros}%{note}"


def points(
    case: str, other: str, shapes: Sequence[tuple[int, int, int, int]], **axes: int
) -> Callable[[Context], list[Part]]:
    """Ours at these (m, k, n, zeros) over another implementation of the same case."""

    def parts(context: Context) -> list[Part]:
        found = []
        for m, k, n, zeros in shapes:
            row = context.ours(case, "default", m=m, k=k, n=n, zeros=zeros, **axes)
            found.append(_part(_at(row, m, k, n, zeros), row, over(context, other), f"no right figure of {other}"))
        return found

    return parts


def dense(m: int, zeros: int, weights: Sequence[tuple[int, int]] = WEIGHTS) -> Callable[[Context], list[Part]]:
    return points("sparse_linear", FP32, [(m, k, n, zeros) for k, n in weights])


def every_row(other: str, ms: Sequence[int]) -> Callable[[Context], list[Part]]:
    """At all points that have a bar."""
    return points("sparse_linear", other, [(m, k, n, zeros) for m, zeros in POINTS if m in ms for k, n in WEIGHTS])


def mean_of(parts: Callable[[Context], list[Part]]) -> Callable[[Context], str]:
    """The geometric mean, beside the worst."""

    def note(context: Context) -> str:
        values = [part.value for part in parts(context) if part.value is not None]
        return f"geometric mean {geomean(values):.3g}" if len(values) > 1 else ""

    return note


def against_shuffled(case: str, shapes: Sequence[dict[str, int]]) -> Callable[[Context], list[Part]]:
    """The speed of this pattern over that of the same values at random places."""

    def parts(context: Context) -> list[Part]:
        ratio = over(context, "fastsparse, shuffled")
        found = []
        for shape in shapes:
            row = context.ours(case, "default", **shape)
            where = _at(row, *(shape[axis] for axis in ("m", "k", "n", "zeros")))
            where += f" layer {shape['layer']}" if "layer" in shape else ""
            found.append(_part(where, row, ratio, "no right figure of random places"))
        return found

    return parts


def two_threads(case: str, shapes: Sequence[dict[str, int]]) -> Callable[[Context], list[Part]]:
    """One thread's time over that of two; disturbed rows prove nothing."""

    def parts(context: Context) -> list[Part]:
        found = []
        for shape in shapes:
            one = context.ours(case, "default", **shape)
            two = next((row for row in context.rows if one is not None and row.name == OURS_TWO
                        and (row.case, row.shape, row.malloc) == (one.case, one.shape, one.malloc)), None)  # fmt: skip

            def ratio(row: Row, two: Row | None = two) -> float | None:
                return row.median / two.median if two is not None and two.right and not two.disturbed else None

            why = "no round was undisturbed" if two is not None and two.right else f"two threads: {_missing(two)}"
            where = _at(one, *(shape[axis] for axis in ("m", "k", "n", "zeros")))
            found.append(_part(where, one, ratio, why))
        return found

    return parts


THREAD_SHAPES = [
    {"m": m, "k": k, "n": n, "zeros": zeros}
    for k, n in WEIGHTS
    for zeros in Z.THREADS
    for m in GOALS
    if m >= 16 and at_a_bar(m, zeros)
]


def held_to_avx2(context: Context) -> list[Part]:
    """Beyond AVX2 both sides run under caps; on an AVX2 CPU they are what runs anyway."""
    held = context.beyond_avx2
    found = []
    for k, n in WEIGHTS:
        for m in (1, 64, 128, 512):
            row = context.ours("sparse_linear", m=m, k=k, n=n, zeros=Z.AVX2)
            ours = find(context.rows, row, "fastsparse held to AVX2") if row is not None and held else row
            mkl = over(context, "torch fp32 held to AVX2" if held else FP32)
            found.append(_part(_at(ours, m, k, n, Z.AVX2), ours, mkl, "no right figure of dense float32"))
    return found


def avx2_condition(context: Context) -> str | None:
    if machine.above("avx2", context.cpu_level):
        return "not measurable: this CPU has no AVX2"
    if not context.beyond_avx2 and context.isa != "avx2":
        return f"not measurable: the level in use is {context.isa}"
    return one_thread(context)


def bitmap_memory(context: Context) -> list[Part]:
    """Bytes of the pack over those of the dense weight."""
    found = []
    for k, n in ((768, 768), (4096, 4096)):
        rows = [r for r in context.rows if r.case == "sparse_linear" and r.name == "fastsparse bitmap32"]
        row = next((r for r in rows if r.shape == {"m": 1, "k": k, "n": n, "zeros": Z.MEMORY}), None)
        found.append(_part(f"K={k} N={n}", row, lambda r: (r.weight_bytes or 0) / (4 * r.shape["k"] * r.shape["n"])))
    return found


# ---- int8: case "sparse_int8_linear", axes m, k, n, r, c, zeros: in blocks of r outputs x c k, 1 x 1: anywhere ----

INT8, INT8_DRAM = "sparse_int8_linear", "sparse_int8_linear from DRAM"
INT8_DENSE, INT_MM = "fastsparse int8_linear", "torch._int_mm"
INT4_DRAM, INT8_BITMAP = "weight_only_linear without zeros, from DRAM", "fastsparse bitmap_s8"
INT8_BLOCKS: tuple[tuple[str, int, int, int, float, float | None], ...] = (  # over INT_MM and over INT8_DENSE
    ("1x4", 1, 4, 75, 2.3, 1.9),
    ("4x4", 4, 4, 75, 2.9, None),
    ("4x4", 4, 4, 50, 1.75, 1.45),
    ("unstructured", 1, 1, 90, 1.75, 1.4),
)
INT8_WIDE = (3.4, 2.4)  # 4x4 at 75%, 4096 wide


def int8(
    case: str, other: str, ms: Sequence[int], r: int, c: int, zeros: int, weights: Sequence[tuple[int, int]]
) -> Callable[[Context], list[Part]]:
    return points(case, other, [(m, k, n, zeros) for m in ms for k, n in weights], r=r, c=c)


def int8_memory(context: Context) -> list[Part]:
    """Bytes of the pack over those of the dense one (vnni16: a byte a weight, 4 an output)."""
    found = []
    for k, n in WEIGHTS:
        row = context.ours(INT8, "default", m=1, k=k, n=n, r=1, c=1, zeros=Z.MEMORY)
        found.append(_part(f"K={k} N={n}", row, lambda r: (r.weight_bytes or 0) / ((r.shape["k"] + 4) * r.shape["n"])))
    return found


def int8_bars() -> list[Bar]:
    found = [
        bar(
            f"int8-m1-z{zeros}",
            f"int8, M = 1, {zeros}% zeros: times over our own int8_linear",
            int8(INT8, INT8_DENSE, (1,), 1, 1, zeros, WEIGHTS),
            goal,
            condition=vnni512,
        )
        for zeros, goal in ((50, 1.5), (70, 2.0))
    ]
    found.append(
        bar(
            "int8-m1-z70-DRAM",
            "int8, M = 1, 70% zeros, from DRAM: times over our own int8_linear",
            int8(INT8_DRAM, INT8_DENSE, (1,), 1, 1, 70, FAR),
            2.2,
            condition=vnni512,
        )
    )
    found.append(
        bar(
            "int4-bitmap-m1-z50-DRAM",
            "int4 bitmap over int8 bitmap, M = 1 from DRAM, 50%",
            int8(INT4_DRAM, INT8_BITMAP, (1,), 1, 1, 50, FAR),
            1.2,
            condition=vnni512,
        )
    )
    many: list[tuple[str, int, int, int, str, float, Sequence[tuple[int, int]]]] = []
    wide = [(k, n) for k, n in WEIGHTS if k == 4096]
    narrow = [weight for weight in WEIGHTS if weight not in wide]
    for name, r, c, zeros, int_mm, own in INT8_BLOCKS:
        if own is None:  # 4096 wide has bars of its own
            many.append((name, r, c, zeros, INT_MM, int_mm, narrow))
        else:
            many.append((name, r, c, zeros, INT_MM, int_mm, WEIGHTS))
            many.append((name, r, c, zeros, INT8_DENSE, own, WEIGHTS))
    for other, goal in zip((INT_MM, INT8_DENSE), INT8_WIDE, strict=True):
        many.append(("4x4, 4096 wide", 4, 4, 75, other, goal, wide))
    for name, r, c, zeros, other, goal, weights in many:
        key = f"int8-{name.split(',')[0]}-z{zeros}{'-wide' if 'wide' in name else ''}"
        found.append(
            bar(
                f"{key}-{'int-mm' if other == INT_MM else 'own'}",
                f"int8, M = 128, 512, {zeros}% zeros, {name}: times over {other}",
                int8(INT8, other, (128, 512), r, c, zeros, weights),
                goal,
                condition=vnni512,
            )
        )
    return found


# ---- training: case "sparse training", axes m, k, n, zeros; the dense three are its peer "torch fp32" ----

TRAINING = points("sparse training", FP32, [(512, k, n, Z.TRAINING) for k, n in WEIGHTS])


def bar(
    key: str,
    text: str,
    parts: Callable[[Context], list[Part]],
    goal: float,
    at_most: bool = False,
    condition: Callable[[Context], str | None] = one_thread,
    noise: float = NOISE,
) -> Bar:
    return Bar(
        f"sparse-{key}",
        "sparse_matmul",
        text,
        parts,
        at_least=None if at_most else goal,
        at_most=goal if at_most else None,
        condition=condition,
        note=lambda _: "" if at_most else mean_of(parts)(_),
        noise=noise,
    )


def _one_row() -> list[Bar]:
    found = []
    for zeros, small, large in ONE_ROW:
        groups = [("", WEIGHTS, small)] if small == large else [("-small", SMALL, small), ("-large", LARGE, large)]
        for suffix, weights, goal in groups:
            which = {"": "", "-small": ", 590,000 weights", "-large": ", larger weights"}[suffix]
            found.append(bar(f"m1-z{zeros}{suffix}", f"M = 1, {zeros}% zeros{which}", dense(1, zeros, weights), goal))
    for zeros, goal in DRAM_GOALS.items():
        shapes = [(1, k, n, zeros) for k, n in FAR]
        found.append(
            bar(
                f"m1-z{zeros}-DRAM",
                f"M = 1, {zeros}% zeros, from DRAM",
                points("sparse_linear from DRAM", FP32, shapes),
                goal,
            )
        )
    return found


BARS: tuple[Bar, ...] = (
    *_one_row(),
    *(
        bar(f"m{m}-z{zeros}", f"M = {m}, {zeros}% zeros", dense(m, zeros), goal)
        for m, goals in GOALS.items()
        for zeros, goal in goals.items()
    ),
    *(
        bar(key, f"times over {name}, {where}", every_row(name, ms), goal)
        for key, name, where, ms, goal in (
            ("over-csr", "torch csr", "every point with a bar", (1, *GOALS), 3.0),
            ("over-scipy", "scipy csr", "every point with a bar", (1, *GOALS), 3.0),
            ("over-mkl", "MKL sparse handle", "every point with a bar", (1, *GOALS), 3.0),
            ("over-sparse-mm", "torch.sparse.mm", "M = 16, 64, 128", (16, 64, 128), 2.3),
        )
    ),
    *(
        bar(key, f"{what}: speed over that of the same values at random places", against_shuffled(case, shapes), 0.9)
        for key, what, case, shapes in (
            ("columns", "columns skewed", "sparse_linear, skewed columns", SKEWED),
            ("rows", "rows skewed", "sparse_linear, skewed rows", SKEWED),
            ("pruned", "a really pruned encoder", "sparse_linear, pruned encoder", PRUNED),
        )
    ),
    bar("avx2", "AVX2, 80% zeros, M = 1 and M >= 64: times over MKL held to AVX2", held_to_avx2, 1.5,
        condition=avx2_condition),
    bar("threads", "two threads over one, M >= 16", two_threads("sparse_linear", THREAD_SHAPES), 1.85),
    bar("threads-DRAM", "two threads over one, M = 1 from DRAM",
        two_threads("sparse_linear from DRAM", DRAM_POINTS), 1.85),
    bar("memory", "bitmap32 at 50% zeros: bytes over dense", bitmap_memory, 0.54, at_most=True, noise=0),
    bar("training", "training at 90% zeros, M = 512: forward, both gradients, refresh; over the dense three",
        TRAINING, 4.0),
    *int8_bars(),
    bar("int8-memory", "int8 bitmap at 50% zeros: bytes over the dense pack", int8_memory, 0.63, at_most=True, noise=0),
)  # fmt: skip
