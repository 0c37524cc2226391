"""The bench itself: registry, phases, bars, processes. Nothing here depends on how fast anything is."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    bars,
    break_even,
    ceilings,
    encoder,
    machine,
    measure,
    medians,
    registry,
    report,
    rows,
    runner,
    sparse_bars,
    worker,
)

TOY = str(Path(__file__).with_name("toy_family.py"))
CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 32 << 20}


class FakeClock:
    """Advances only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- registry ----


@pytest.fixture
def toy() -> dict[str, registry.Case]:
    return registry.load_family(TOY)


def test_family_registers_cases_and_peers(toy: dict[str, registry.Case]) -> None:
    assert list(toy) == ["toy", "toy_hang"]
    names = [i.name for i in toy["toy"].implementations]
    assert names[:2] == [registry.OURS, "good"]
    assert toy["toy"].implementations[0].kind == "ours"
    assert toy["toy"].value(2.0, {"m": 4}) == 2e-9
    assert toy["toy_hang"].value(2e-6, {"m": 1}) == pytest.approx(2.0)  # unit us: microseconds a call


def test_loading_again_registers_once() -> None:
    for _ in range(2):
        assert len(registry.load_family("int8_gemm")["int8_linear"].shapes) == 30


def test_registry_refuses_contradictions(toy: dict[str, registry.Case]) -> None:
    with pytest.raises(registry.RegistryError, match="toy is registered twice"):
        registry.case("toy", shapes=[])(lambda m: lambda: m)
    with pytest.raises(registry.RegistryError, match="case nothing is not registered"):
        registry.peer("nothing", "x")(lambda m: lambda: m)
    with pytest.raises(registry.RegistryError, match="has a peer good already"):
        registry.peer("toy", "good")(lambda m: lambda: m)
    with pytest.raises(registry.RegistryError, match="needs work"):
        registry.case("other", shapes=[], unit="GB/s")
    with pytest.raises(registry.RegistryError, match=r"known: .*int8_gemm"):
        registry.load_family("no_such_family")


def test_grid_and_label() -> None:
    shapes = registry.grid(m=[1, 2], k=[3])
    assert shapes == [{"m": 1, "k": 3}, {"m": 2, "k": 3}]
    assert registry.label(shapes[0]) == "M=1 K=3"


def test_only_and_quick_select(toy: dict[str, registry.Case]) -> None:
    settings = runner.Settings(TOY, only="toy M=2")
    assert [(c.name, dict(s)) for c, s in runner.selected(toy, settings)] == [("toy", {"m": 2})]
    toy["toy"].quick = lambda m: m == 1
    quick = runner.selected(toy, runner.quick(runner.Settings(TOY)))
    assert [(c.name, dict(s)) for c, s in quick] == [("toy", {"m": 1}), ("toy_hang", {"m": 1})]


def test_a_check_of_nan_is_not_ok() -> None:
    assert registry.Check(0.1, 0.1, "").ok
    assert not registry.Check(float("nan"), 1.0, "").ok


# ---- measure ----


def test_percentile_interpolates() -> None:
    assert measure.percentile([3, 1, 2], 50) == 2
    assert measure.percentile([1, 2], 20) == pytest.approx(1.2)
    assert measure.percentile([5], 80) == 5
    with pytest.raises(ValueError, match="no values"):
        measure.percentile([], 50)


@pytest.mark.parametrize(
    ("size", "level", "copies"),
    [
        (16 << 10, "L1", 1),
        (589824, "L2", 1),  # fits L2: one copy
        (900 << 10, "L3", 5),  # would half lie in L2 if it were alone
        (16 << 20, "L3", 1),
        (30 << 20, "DRAM", 5),
        (2 << 30, "DRAM", 1),  # larger than any set
    ],
)
def test_level_and_copies(size: int, level: str, copies: int) -> None:
    assert measure.level_of(size, CACHES) == level
    assert measure.copies_for(size, CACHES) == copies


def test_copies_stay_in_their_level() -> None:
    for size in range(1 << 10, 64 << 20, 777_777):
        level, copies = measure.level_of(size, CACHES), measure.copies_for(size, CACHES)
        assert copies >= 1
        if level != "DRAM":
            assert size * copies <= CACHES[level]


def test_plan_spends_the_budget() -> None:
    assert measure.plan(2.0, 1, budget=1.0, rounds=7) is None  # that call is the measurement
    fast = measure.plan(1e-6, 4, budget=0.7, rounds=7)
    assert fast == measure.Plan(7, pytest.approx(0.1), 4)
    slow = measure.plan(0.3, 4, budget=0.7, rounds=7)
    assert slow is not None
    assert (slow.rounds, slow.warm_calls) == (3, 1)  # three rounds at least, the warm pass cut


@pytest.mark.parametrize(
    ("calls", "one_call", "rounds"),
    [
        ([0.9, 0.01], 0.01, 7),  # the first one imports something
        ([0.9, 0.8], 0.8, 0),
        ([9.0], 9.0, 0),  # not again
    ],
)
def test_one_time_costs_are_not_measured(
    calls: list[float], one_call: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, left = FakeClock(), list(calls)

    def call() -> None:
        clock.now += left.pop(0)

    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=clock))
    case = registry.Case("toy", [{}], "us", None, lambda: True, "m")
    case.implementations.append(registry.Implementation("fastsparse", "ours", lambda: call))
    found = worker.Worker({"toy": case}, "fastsparse", 1).setup("toy", {}, budget=0.5, rounds=7)
    assert found["one_call"] == pytest.approx(one_call)
    assert found["rounds"] == rounds
    assert not left


def test_burst_is_one_phase_over_rotating_copies() -> None:
    clock, order = FakeClock(), []

    def copy(i: int) -> Any:
        def call() -> None:
            order.append(i)
            clock.now += 1.0

        return call

    found = measure.burst([copy(i) for i in range(3)], seconds=6.0, warm_calls=3, clock=clock)
    assert order == list(itertools.islice(itertools.cycle(range(3)), 9))  # 3 warm, 6 measured, no gap
    assert found.calls == 6
    assert found.seconds == 1.0


def test_burst_takes_the_median_sample_and_batches_fast_calls() -> None:
    clock = FakeClock()
    stalls = iter([0.0] * 4 + [10.0] + [0.0] * 10**6)

    def slow() -> None:
        clock.now += 1.0 + next(stalls)

    assert measure.burst([slow], seconds=15.0, warm_calls=2, clock=clock).seconds == 1.0  # one sample was robbed

    def fast() -> None:
        clock.now += 1e-6

    found = measure.burst([fast] * 3, seconds=1e-3, warm_calls=3, clock=clock)
    assert found.calls % 3 == 0  # whole passes
    assert found.seconds == pytest.approx(1e-6)


def _load(wall: float, own: float, busy: float | None) -> measure.Load:
    return measure.Load(wall, own, busy)


def test_disturbance() -> None:
    start = _load(0, 0, 0)
    assert not measure.disturbance(start, _load(1, 1, 2), threads=1).disturbed  # the other core's load is not ours
    assert measure.disturbance(start, _load(1, 0.5, 1), threads=1).disturbed  # robbed of its core
    assert measure.disturbance(start, _load(1, 2, 3), threads=2).disturbed
    quiet = measure.disturbance(start, _load(1, 1.99, 2), threads=2)
    assert not quiet.disturbed
    assert quiet.others == pytest.approx(0.01)
    assert not measure.disturbance(start, _load(1, 2, None), threads=2).disturbed  # no /proc/stat


# ---- machine, ceilings ----


def test_short_names() -> None:
    assert machine.short_name("AMD EPYC 7763 64-Core Processor", "25", "1") == "amd-epyc-7763"
    assert machine.short_name("Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz", "6", "106") == "intel-xeon-gold-6338"
    assert machine.short_name("AMD EPYC", "23", "1") == "amd-epyc-family23-model1"


def test_scrub_removes_folders() -> None:
    text = machine.scrub(f"{ROOT}/bench/x.py, {Path.home()}/y, /some/where/else/lib.so and 3/4")
    assert text.startswith("<repo>/bench/x.py, ")
    assert str(Path.home()) + "/" not in text
    assert "<path>/lib.so" in text
    assert text.endswith("3/4")


def test_read_sizes_lie_between_levels() -> None:
    sizes = ceilings.read_sizes(CACHES, threads=1)
    assert all(4 * CACHES["L1"] <= size < CACHES["L2"] for size in sizes["L2"])
    assert all(4 * CACHES["L2"] <= size < CACHES["L3"] for size in sizes["L3"])
    assert sizes["DRAM"][0] >= 4 * CACHES["L3"]


def test_merge_takes_the_better_ceiling() -> None:
    def ceiling(key: str, value: float | None) -> ceilings.Ceiling:
        return ceilings.Ceiling(key, key, "GB/s", value)

    merged = ceilings.merge([ceiling("a", 1), ceiling("b", 3), ceiling("c", None)], [ceiling("a", 2), ceiling("b", 2)])
    assert [c.value for c in merged] == [2, 3, None]


# ---- rows and bars ----


def _row(case: str, seconds: float, name: str = registry.OURS, kind: str = "ours", **shape: int) -> rows.Row:
    row = rows.Row(case, shape, name, kind, "default", 2 if kind == "threads" else 1, "GOP/s", check={"ok": True})
    row.seconds = {"median": seconds, "p20": seconds, "p80": seconds}
    if case.startswith("int8_linear"):
        times = 40 if case == bars.LAYERS else 1
        row.weight_bytes = times * shape["k"] * shape["n"]
        row.work, row.compute = 2.0 * shape["m"] * row.weight_bytes, "fp32" if "fp32" in name else "int8"
        row.level = measure.level_of(row.weight_bytes, MACHINE)
    return row


MACHINE = {"L1": 48 << 10, "L2": 2 << 20, "L3": 480 << 20}
VALUES = {
    "amx_int8": 5500.0,
    "vnni_avx512": 750.0,
    "madd_avx2": 130.0,
    "fma_avx2": 95.0,
    "fma_avx512": 180.0,
    "read_L2": 140.0,
    "read_L3": 30.0,
    "read_DRAM": 16.0,
}


def _context(
    found: list[rows.Row], isa: str = "avx512", cpu: str = "avx512", threads: int = 1, held: bool = False
) -> bars.Context:
    rows.add_fractions(found, VALUES, isa, cpu, held)
    rows.add_ratios(found)
    return bars.Context(found, isa, cpu, cpu != "avx2", threads, VALUES)


def _grid(
    fraction: float = 0.95,
    fused: float = 1.8,
    held: float = 2.3,
    read: float = 0.97,
    two: float = 1.95,
    bare: float = 1.4,
) -> list[rows.Row]:
    """A whole run in which every bar's number is known."""
    found = []
    shapes = [("int8_linear", m, k, n) for k, n in bars.INT8_WEIGHTS for m in bars.INT8_ROWS]
    for case, m, k, n in [*shapes, *((bars.LAYERS, m, *bars.LAYERS_SHAPE) for m in (1, 16))]:
        shape = {"m": m, "k": k, "n": n}
        like = _row(case, 1.0, **shape)
        assert like.work is not None
        assert like.weight_bytes is not None
        reading = like.weight_bytes / VALUES[f"read_{like.level}"] / 1e9
        seconds = reading / read if m == 1 else max(like.work / 750e9, reading) / fraction
        found += [
            _row(case, seconds, **shape),
            _row(case, seconds / two, bars.OURS_TWO, "threads", **shape),
            _row(case, seconds * fused, "torch x86 dynamic", "fused", **shape),
            _row(case, seconds * fused * 2, "torch onednn dynamic", "fused", **shape),
            _row(case, seconds * bare, "torch._int_mm", "bare", **shape),
            _row(case, seconds * held, "torch fp32", "fp32", **shape),
            _row(case, seconds, bars.OURS_AVX2, "held", **shape),
            _row(case, seconds * held, bars.MKL_AVX2, "held", **shape),
        ]
        if m == 1:
            found.append(_row(case, reading, bars.PLAIN_READS, "read", **shape))
    for bias in (0, 1):
        shape = {"m": 16, "k": 16, "n": 16, "bias": bias}
        found += [_row("call_cost", 1.1, **shape), _row("call_cost", 1.0, "torch fp32", "fp32", **shape)]
    for k, n in bars.WEIGHT_ONLY_WEIGHTS:
        for group in (32, 64, 128):
            shape = {"m": 1, "k": k, "n": n, "bits": 4, "group": group}
            case = "weight_only_linear from DRAM"
            found += [_row(case, 1.0, **shape), _row(case, 1.9, "fastsparse int8_linear", "fused", **shape)]
    return found


def _verdicts(context: bars.Context) -> dict[str, bars.Verdict]:
    return {verdict.key: verdict for verdict in bars.judge_all("int8_gemm", context)}


def test_bars_met() -> None:
    found = _verdicts(_context(_grid()))
    assert {key: v.status for key, v in found.items()} == dict.fromkeys(found, bars.MET)
    assert found["int8-compute"].measured == pytest.approx(0.95)
    assert found["int8-m16-DRAM"].measured == pytest.approx(0.95)
    assert found["int8-fused"].measured == pytest.approx(1.8)
    assert found["int8-any"].measured == pytest.approx(1.4)
    assert found["int8-threads"].measured == pytest.approx(1.95)


def test_each_level_has_its_own_bar() -> None:
    """Of the five weights two lie in L2 and three in L3; the 40 layers are the only ones in DRAM."""
    found = _verdicts(_context(_grid(fraction=0.5, read=0.5, two=1.0)))
    counts = {"int8-m16-L2": 2, "int8-m16-L3": 3, "int8-read-L2": 2, "int8-read-L3": 3}
    counts |= {"int8-threads-m16-L2": 2, "int8-threads-m1-L2": 2, "int8-threads-far": 8, "int8-compute-least": 15}
    for key, count in counts.items():
        assert f"0 of {count} reach it" in found[key].detail, key
    assert found["int8-read-DRAM"].measured == pytest.approx(0.5)


def test_bars_met_within_noise_say_so() -> None:
    found = _verdicts(_context(_grid(fraction=0.90, fused=1.65)))
    assert found["int8-compute"].status == bars.NEARLY == "met within noise"
    assert found["int8-compute"].detail.startswith("2.2% below the bar")
    assert found["int8-compute-least"].status == bars.MET
    assert found["int8-fused"].status == bars.NEARLY
    assert found["int8-fused-least"].status == bars.MET
    exact = bars.Bar("x", "toy", "", lambda _: [bars.Part("here", 0.99)], at_least=1.0)
    assert bars.judge(exact, _context([])).status == bars.MISSED  # only where a bar says so


def test_bars_missed_say_how_much() -> None:
    found = _verdicts(_context(_grid(fraction=0.783, fused=1.0, held=1.0, read=0.7, two=1.0)))
    for key in ("int8-compute-least", "int8-read-L2", "int8-fused", "int8-avx2", "int8-threads-m1-L2"):
        assert found[key].status == bars.MISSED
    assert found["int8-compute-least"].detail.startswith("10.0% below the bar")
    assert "0 of 15 reach it" in found["int8-compute-least"].detail


def test_under_amx_the_bars_stay_those_of_vnni() -> None:
    found = _grid(fraction=2.0)
    verdicts = _verdicts(_context(found, isa="amx", cpu="amx"))
    assert verdicts["int8-compute"].status == bars.MET
    assert verdicts["int8-compute"].measured == pytest.approx(2.0)
    ours = next(row for row in found if row.name == registry.OURS and row.shape["m"] == 64)
    assert ours.ceilings["compute"] == "amx_int8"
    assert ours.fractions["vnni"] == pytest.approx(2.0)
    beyond = _verdicts(_context(_grid(fraction=9.0, read=0.9), isa="amx", cpu="amx"))  # more than AMX can do
    assert beyond["int8-compute"].status == bars.NOT_MEASURABLE


def test_peers_are_held_where_we_are_capped() -> None:
    assert machine.hold("amx", "amx") == {}
    assert machine.hold("avx512", "amx") == {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}
    assert machine.hold("avxvnni", "avx512") == {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI"}
    assert machine.hold("avx2", "avxvnni") == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    for held, ceiling in ((True, "vnni_avx512"), (False, "amx_int8")):
        found = _grid()
        _context(found, isa="avx512", cpu="amx", held=held)
        peer = next(row for row in found if row.name == "torch._int_mm")
        assert peer.ceilings["compute"] == ceiling


def test_bars_not_measurable_on_avx2() -> None:
    found = _verdicts(_context(_grid(), isa="avx2", cpu="avx2"))
    for key in ("int8-compute", "int8-m16-L3", "int8-read-L2"):
        assert found[key].status == bars.NOT_MEASURABLE
        assert found[key].detail.startswith("not measurable: this CPU has no AVX-512-VNNI")
        assert found[key].measured is None
    assert found["int8-avx2"].status == bars.MET  # fp32 as it runs there anyway
    assert found["int8-call"].status == bars.MET


def test_bars_under_a_cap_and_with_threads() -> None:
    capped = _verdicts(_context(_grid(), isa="avx2"))
    assert "level in use is avx2" in capped["int8-compute"].detail
    threads = _verdicts(_context(_grid(), threads=2))
    assert {v.status for v in threads.values()} == {bars.NOT_MEASURABLE}


def test_bars_with_missing_rows_are_open_unless_missed_anyway() -> None:
    grid = [row for row in _grid() if row.shape["m"] != 512]
    assert _verdicts(_context(grid))["int8-compute-least"].status == bars.NOT_MEASURABLE
    assert "5 of 15 figures are missing" in _verdicts(_context(grid))["int8-compute-least"].detail
    bad = [row for row in _grid(fraction=0.1) if row.shape["m"] != 512]
    assert _verdicts(_context(bad))["int8-compute-least"].status == bars.MISSED
    assert _verdicts(_context([]))["int8-call"].status == bars.NOT_MEASURABLE


def test_disturbed_rows_of_two_threads_prove_nothing() -> None:
    grid = _grid(two=0.1)
    for row in grid:
        row.disturbed = row.name == bars.OURS_TWO
    verdict = _verdicts(_context(grid))["int8-threads"]
    assert (verdict.status, verdict.detail) == (bars.NOT_MEASURABLE, "no round was undisturbed")
    one = [row for row in _grid() if row.name != bars.OURS_TWO]
    assert _verdicts(_context(one))["int8-threads"].detail == "two threads: not among the measured shapes"


def test_wrong_results_count_for_nobody() -> None:
    grid = _grid()
    for row in grid:
        if row.name == "torch x86 dynamic":
            row.check = {"ok": False, "error": 9.0, "tolerance": 0.1, "measure": ""}
    assert _verdicts(_context(grid))["int8-fused"].measured == pytest.approx(3.6)  # the slower, right peer
    for row in grid:
        if row.name == registry.OURS:
            row.check = {"ok": False, "error": 9.0, "tolerance": 0.1, "measure": ""}
    assert _verdicts(_context(grid))["int8-fused"].status == bars.NOT_MEASURABLE


def test_the_read_bar_is_held_against_the_kernels_own_time() -> None:
    grid = _grid(read=0.5)
    for row in grid:
        if row.name == registry.OURS and row.shape["m"] == 1:
            row.kernel_seconds = row.median / 1.94
        if row.name == bars.PLAIN_READS:
            row.kernel_seconds = row.median * 2  # another's time slice: the whole call had less
    verdict = _verdicts(_context(grid))["int8-read-L3"]
    assert verdict.status == bars.MET
    assert verdict.measured == pytest.approx(0.97)
    assert "of the best burst of reads: M=1 K=768 N=3072 0.97" in verdict.detail


def test_the_read_bar_needs_the_plain_reads() -> None:
    grid = [row for row in _grid() if row.name != bars.PLAIN_READS]
    verdict = _verdicts(_context(grid))["int8-read-L3"]
    assert verdict.status == bars.NOT_MEASURABLE
    assert "plain reads: not among the measured shapes" in verdict.detail


def test_a_row_above_a_ceiling_is_no_proof() -> None:
    context = _context(_grid(fraction=1.3))
    assert _verdicts(context)["int8-compute"].status == bars.NOT_MEASURABLE
    assert "measured while other processes ran" in _verdicts(context)["int8-compute"].detail

    def notes(found: list[rows.Row]) -> list[str]:
        _context(found)
        return report.ceiling_table([], [row for row in found if row.name == registry.OURS]).notes

    assert len(notes(_grid(fraction=1.3))) == 2
    assert len(notes(_grid())) == 1


def test_ratios_and_bounds() -> None:
    found = _grid()
    _context(found)
    ours = next(row for row in found if row.name == registry.OURS and row.shape["m"] == 64)
    assert ours.ratios["torch x86 dynamic"] == pytest.approx(1.8)
    assert rows.bound(ours) == "compute"
    fp32 = rows.find(found, ours, "torch fp32")
    assert fp32 is not None
    assert fp32.ceilings["compute"] == "fma_avx512"
    held = rows.find(found, ours, bars.MKL_AVX2)
    assert held is not None
    assert held.ceilings["compute"] == "fma_avx2"


# ---- sparse_matmul ----


def _sparse_grid(scale: float = 1.0) -> list[rows.Row]:
    """Every point that has a bar, ours as fast as the bar asks times `scale`."""
    found = []
    for m, zeros in sparse_bars.POINTS:
        for k, n in sparse_bars.WEIGHTS:
            if m == 1:
                goal = next(
                    large if (k, n) in sparse_bars.LARGE else small
                    for z, small, large in sparse_bars.ONE_ROW
                    if z == zeros
                )
            else:
                goal = sparse_bars.GOALS[m][zeros]
            shape = {"m": m, "k": k, "n": n, "zeros": zeros}
            found += [
                _row("sparse_linear", 1.0, **shape),
                _row("sparse_linear", goal * scale, "torch fp32", "fp32", **shape),
                _row("sparse_linear", 3.1 * scale, "torch csr", "bare", **shape),
            ]
    return found


def _sparse_verdicts(found: list[rows.Row]) -> dict[str, bars.Verdict]:
    context = bars.Context(found, isa="avx512", cpu_level="avx512", beyond_avx2=True)
    return {verdict.key: verdict for verdict in bars.judge_all("sparse_matmul", context)}


def test_sparse_bars_are_those_of_their_points() -> None:
    met, missed, near = (_sparse_verdicts(_sparse_grid(scale)) for scale in (1.0, 0.9, 0.96))
    dense = [key for key in met if key.startswith("sparse-m") and key[8].isdigit() and "DRAM" not in key]
    assert len(dense) == 29
    assert {met[key].status for key in (*dense, "sparse-over-csr")} == {bars.MET}
    assert {missed[key].status for key in (*dense, "sparse-over-csr")} == {bars.MISSED}
    assert {near[key].status for key in dense} == {bars.NEARLY}
    assert {met[key].status for key in ("sparse-training", "sparse-int8-m1-z50", "sparse-over-mkl")} == {
        bars.NOT_MEASURABLE
    }
    one = _sparse_grid()
    next(row for row in one if row.shape["m"] == 64 and row.shape["zeros"] == 80).seconds = {"median": 2.0}
    assert [key for key, v in _sparse_verdicts(one).items() if v.status == bars.MISSED] == [
        "sparse-m64-z80",
        "sparse-over-csr",
    ]


def test_every_sparse_bar_has_its_points_in_the_grid() -> None:
    cases = registry.load_family("sparse_matmul")
    shapes = {registry.label(shape) for shape in cases["sparse_linear"].shapes}
    assert {row.label for row in _sparse_grid()} <= shapes
    assert len(cases["sparse_linear"].shapes) == len(shapes)
    wants = {i.name: i.wants for i in cases["sparse_linear"].implementations}
    for name, m, zeros, wanted in (
        ("fastsparse held to AVX2", 64, 80, True),
        ("fastsparse held to AVX2", 16, 80, False),
        ("fastsparse, two threads", 16, 50, True),
        ("fastsparse, two threads", 4, 50, False),
        ("fastsparse bitmap32", 16, 50, True),
        ("fastsparse bitmap32", 64, 50, False),
    ):
        assert wants[name](m=m, k=768, n=768, zeros=zeros) == wanted, name
    assert not wants["fastsparse bitmap32"](m=1, k=768, n=3072, zeros=50)


def test_break_even_lies_between_two_measured_points(tmp_path: Path) -> None:
    assert break_even.break_even([(30, 0.8), (50, 1.2), (90, 4.0)]) == pytest.approx(40)
    assert break_even.break_even([(30, 1.1), (50, 2.0)]) == 30
    assert break_even.break_even([(30, 0.5), (50, 0.9)]) is None
    assert break_even.break_even([(30, 1.1), (50, 0.9), (70, 1.1)]) == pytest.approx(60)
    assert break_even.break_even([]) is None
    cases = registry.load_family("sparse_matmul")
    found = []
    for zeros in (30, 50, 80, 90):
        shape = {"m": 16, "k": 768, "n": 768, "zeros": zeros}
        found += [
            _row("sparse_linear", 100.0 - zeros, **shape),
            _row("sparse_linear", 120.0 - zeros, "fastsparse sell16", "ours", **shape),
            _row("sparse_linear", 60.0, "torch fp32", "fp32", **shape),
        ]
    ((title, header, cells),) = break_even.tables(cases, found)
    assert "K=768 N=768" in title
    assert header == ["zeros", "M=16"]
    assert cells[1] == ["50%", "1.20"]
    assert break_even.draw(cases, found, "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert not break_even.draw(cases, found[:3], "title", tmp_path / "none.png")  # one point is no line


# ---- processes ----


@pytest.fixture(scope="module")
def toy_rows() -> dict[tuple[str, int], rows.Row]:
    """One run of the toy family, with every way of failing in it."""
    settings = replace(runner.quick(runner.Settings(TOY, only="toy M")), budget={"default": 0.1}, timeout=100)
    found = runner.run(registry.load_family(TOY), settings, beyond_avx2=False)
    return {(row.name, row.shape["m"]): row for row in found}


def test_good_rows_have_figures(toy_rows: dict[tuple[str, int], rows.Row]) -> None:
    for name in (registry.OURS, "good", "prints"):
        for m in (1, 2):
            row = toy_rows[name, m]
            assert row.right
            assert row.seconds is not None
            assert 0 < row.seconds["p20"] <= row.seconds["median"] <= row.seconds["p80"]
            assert row.calls >= row.rounds >= 1  # how many rounds were quiet is the machine's business
    assert toy_rows[registry.OURS, 1].level == "L1"
    assert toy_rows[registry.OURS, 1].kernel_seconds in (1e-7, None)  # None: a single call outlasted the budget
    assert toy_rows["good", 1].kernel_seconds is None


def test_failures_are_rows(toy_rows: dict[tuple[str, int], rows.Row]) -> None:
    assert toy_rows["raises in build", 1].error == "RuntimeError: no such kernel"
    assert toy_rows["raises in call", 2].error == "ValueError: cannot do 2"
    assert toy_rows["not here", 1].error == "not available: needs another machine"
    wrong = toy_rows["wrong", 1]
    assert wrong.ok
    assert not wrong.right
    assert ("only beyond AVX2", 1) not in toy_rows


def test_an_implementation_may_want_more_threads(
    toy: dict[str, registry.Case], toy_rows: dict[tuple[str, int], rows.Row]
) -> None:
    row = toy_rows["two threads", 1]
    assert row.threads == 2
    if (os.cpu_count() or 1) > 1 and len(os.sched_getaffinity(0)) > 1:
        assert row.right
    else:
        assert row.error == "not available: needs 2 cores, this process may use 1"
    names = [i.name for i, _ in runner._who(toy["toy"], {"m": 1}, runner.Settings(TOY, threads=2), beyond_avx2=False)]
    assert "good" in names
    assert "two threads" not in names


def test_peers_get_the_hold_and_ours_does_not(toy: dict[str, registry.Case], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(
        runner, "Child", lambda name, malloc, env, settings, threads: seen.update({name: (env, threads)})
    )
    children = runner.Children(runner.Settings(TOY, hold={"A": "1"}))
    for implementation in toy["toy"].implementations:
        children.get(replace(implementation, env={"B": "2"}), "default")
    assert seen["good"] == ({"A": "1", "B": "2"}, None)
    assert seen[registry.OURS] == ({"B": "2"}, None)
    assert seen["two threads"] == ({"B": "2"}, 2)


def test_a_crash_is_reported_and_the_run_goes_on(toy_rows: dict[tuple[str, int], rows.Row]) -> None:
    assert toy_rows["crashes at 1", 1].error == "its process ended with exit code 3"
    assert toy_rows["crashes at 1", 2].right  # in a new process


def test_a_child_that_hangs_is_ended() -> None:
    settings = runner.Settings(TOY, timeout=100)
    child = runner.Child(registry.OURS, "default", {}, settings)
    try:
        assert child.ask(do="drop") == {"ok": True}
        child.settings = replace(settings, timeout=0.1)
        with pytest.raises(runner.ChildDied, match=r"no answer within 0\.1 s"):
            child.ask(do="setup", case="toy_hang", shape={"m": 1}, budget=1, rounds=3)
    finally:
        child.close()


def test_children_are_given_up_after_three_deaths(toy: dict[str, registry.Case]) -> None:
    children = runner.Children(runner.Settings(TOY))
    implementation = toy["toy"].implementations[0]
    for _ in range(3):
        children.bury(implementation, "default", "a reason")
    with pytest.raises(runner.ChildDied, match="given up after 3 dead processes; the last: a reason"):
        children.get(implementation, "default")


def test_a_family_that_cannot_be_imported_is_a_row(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("from bench.registry import case\ncase('c', shapes=[{'m': 1}])(lambda m: lambda: m)\n")
    cases = registry.load_family(str(broken))
    broken.write_text("import a_module_that_does_not_exist\n")  # now only the children fail
    (row,) = runner.run(cases, runner.quick(runner.Settings(str(broken))), beyond_avx2=False)
    assert row.error == "ModuleNotFoundError: No module named 'a_module_that_does_not_exist'"


# ---- the encoder's bars ----


def test_bars_of_the_encoder() -> None:
    times = {encoder.FLOAT32: (6.6, 24.0, 700.0), encoder.OURS: (2.0, 10.0, 360.0), encoder.PEERS[0]: (2.2, 9.7, 300.0)}
    ways: dict[str, dict[str, Any]] = {
        name: {
            "name": name,
            "problem": None,
            "seconds": dict(zip(encoder.GOALS, seconds, strict=True)),
            "cosine_mean": 0.998,
            "cosine_least": 0.9949,
        }
        for name, seconds in times.items()
    }
    ways[encoder.PEERS[1]] = {"name": encoder.PEERS[1], "problem": "it is not installed", "seconds": {}}
    found = encoder.verdicts(ways)
    assert [v.status for v in found] == [
        *(bars.MET, bars.MET, bars.NEARLY),  # 3.3, 2.4, 1.94
        *(bars.MISSED, bars.NOT_MEASURABLE),
        *(bars.MET, bars.MISSED),  # a cosine has no noise
    ]
    assert "it is not installed" in found[4].detail
    described = {"cpu": "a CPU", "isa": "avx512", "date": "today"}
    text = encoder.markdown({"ways": list(ways.values()), "machine": described, "peers_held_by": {"A": "1"},
                             "bars": [vars(v) for v in found]})  # fmt: skip
    assert "| fastsparse int8, compiled | 2000.0 (3.30x) | 10000.0 (2.40x) |" in text
    assert "A=1" in text


# ---- end to end ----


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def _forbidden(text: str) -> list[str]:
    """Names of this machine that must not stand in a result."""
    names = [str(ROOT), str(Path.home()) + os.sep, sys.prefix]
    return [name for name in names if len(name) > 2 and name in text]


def test_medians_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, measured: float | None, machine: str = "m") -> str:
        verdict = "not measurable" if measured is None else "missed"
        path = tmp_path / name
        path.write_text(
            json.dumps(
                {
                    "family": "int8_gemm",
                    "options": {"threads": 1},
                    "machine": {"name": machine, "cpu": "CPU", "isa": "avx512"},
                    "bars": [{"key": "int8-compute", "measured": measured, "status": verdict}],
                }
            )
        )
        return str(path)

    runs = [run("a", 0.85), run("b", 0.95), run("c", 0.88), run("d", None)]
    assert medians.main(runs) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "geometric mean of the fraction" in line)
    assert line.split(" | ")[1:] == [">= 0.92", "0.88", "0.85 / 0.95 / 0.88", "met within noise |"]
    assert medians.main([runs[0], run("other", 0.9, machine="n")]) == 2
    assert "run 2 has machine 'n', the first has 'm'" in capsys.readouterr().err
    assert medians.main([str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_quick_run_of_a_family_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = _bench("--family", TOY, "--quick", "--only", "^toy M", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["schema"] == report.SCHEMA
    assert result["family"] == "toy_family"
    assert result["options"] == {
        "threads": 1,
        "quick": True,
        "only": "^toy M",
        "mallocs": ["default"],
        "peers_held_by": {},
    }
    assert {row["shape"]["m"] for row in result["rows"]} == {1, 2}
    assert result["machine"]["isa"] in machine.LEVELS
    assert result["ceilings"]
    text = path.with_suffix(".md").read_text()
    assert "no such kernel" in text
    assert not _forbidden(text + path.read_text())


def test_quick_run_of_int8_gemm(tmp_path: Path) -> None:
    """Torch's peers run wherever torch does; ours may be a row that says why it is missing."""
    path = tmp_path / "out.json"
    done = _bench("--family", "int8_gemm", "--quick", "--only", "call_cost|int8_linear M=1 ", "--json", str(path))
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    fp32 = [row for row in result["rows"] if row["name"] == "torch fp32"]
    assert fp32
    assert all(row["seconds"] and row["check"]["ok"] for row in fp32)
    for row in result["rows"]:
        assert row["kind"] != "ours" or row["error"] or row["check"]["ok"]
    assert {bar["key"] for bar in result["bars"]} == {bar.key for bar in bars.bars_of("int8_gemm")}
    assert {bar["status"] for bar in result["bars"]} <= set(get_args(bars.Status))
    assert path.with_suffix(".md").exists()
    assert not _forbidden(path.read_text() + path.with_suffix(".md").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "nothing"], "no family 'nothing'"),
        (["--family", "int8_gemm", "--only", "zzz"], "no shape matches"),
    ],
)
def test_bad_arguments_are_one_sentence(arguments: list[str], message: str) -> None:
    done = _bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
