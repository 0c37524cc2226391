"""sparse_matmul: how "auto" chooses and remembers, and the pack of two formats. No verdict depends on timing."""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastsparse
from fastsparse import _C, ops
from fastsparse.convert import convert_
from fastsparse.nn import SparseLinear
from fastsparse.ops import _auto, _packs, sparse_int8, sparse_matmul
from fastsparse.prune import Sparse, to_sparse_
from tests.support import forced, guarded, isa_levels, same_bits, threads

HEADER = struct.Struct("<4sHHIIqqqQ16s")
SELL = sparse_matmul.choose_format(0.1, 100, 1)  # what the rule takes here, "sell8" or "sell4"
ALL = _auto.CANDIDATES
TWO = [(SELL, "panels128"), ("bitmap32", "panels128"), ("panels128", SELL), ("nm2:4", "panels128"),
       ("blocks16x16", "blocks4x4")]  # fmt: skip


def sparse(n: int, k: int, zeros: float = 0.9) -> Tensor:
    return torch.randn(n, k) * (torch.rand(n, k) >= zeros)


def patterned(n: int, k: int, pattern: str) -> Tensor:
    """A weight of which 3 of 4 blocks "RxC" are zero, or with "N:M": N of every M consecutive k are not."""
    w = torch.rand(n, k) + 0.5
    if ":" in pattern:
        most, of = map(int, pattern.split(":"))
        return w * (torch.rand(n, -(-k // of), of).argsort(-1).flatten(1)[:, :k] < most)
    height, width = map(int, pattern.split("x"))
    live = torch.rand(-(-n // height), -(-k // width)) >= 0.75
    return w * live.repeat_interleave(height, 0).repeat_interleave(width, 1)[:n, :k]


def pair(w: Tensor, first: str = SELL, second: str = "panels128", rows: int = 2) -> Tensor:
    return sparse_matmul._pack_two(w, first, second, rows)


class Timings:
    """In the place of the clock: seconds by (format, rows), and what was asked for."""

    def __init__(self, seconds: Callable[[str, int], float]) -> None:
        self.seconds, self.asked = seconds, []  # type: ignore[var-annotated]

    def __call__(self, weight: _auto.Weight, rows: int, formats: Sequence[str]) -> dict[str, float]:
        self.asked.append((rows, list(formats)))
        return {format: self.seconds(format, rows) for format in formats}


@pytest.fixture(autouse=True)
def _candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of them, whatever else is there: what is asked for stays countable."""
    known = ("bitmap32", SELL, "panels128")
    monkeypatch.setattr(_auto, "CANDIDATES", tuple(c for c in _auto.CANDIDATES if c.format in known))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder; what is known is forgotten before and after."""
    monkeypatch.setattr(_auto, "_memory", {})
    monkeypatch.setenv(_auto.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache" / _auto.FILE


def clock(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, int], float]) -> Timings:
    timings = Timings(seconds)
    monkeypatch.setattr(_auto, "measure", timings)
    return timings


def fastest(name: str) -> Callable[[str, int], float]:
    return lambda format, rows: 1.0 if format == name else 2.0


# --- The choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bitmap32", SELL, "panels128"])
def test_the_fastest_is_taken_and_remembered(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings, w = clock(monkeypatch, fastest(name)), sparse(64, 100)
    for _ in range(2):
        assert ops.describe(ops.pack(w, rows=3))["format"] == name
    assert timings.asked == [(3, ["bitmap32", SELL, "panels128"])]
    monkeypatch.setattr(_auto, "_memory", {})  # as a new process
    assert ops.describe(ops.pack(w, rows=3))["format"] == name
    assert len(timings.asked) == 1
    ((key, seconds),) = json.loads(cache.read_text())["seconds"].items()
    assert seconds[name] == 1.0
    for fact in (
        f"isa {_C.isa()}",
        f"threads {torch.get_num_threads()}",
        fastsparse.__version__,
        "n 64, k 100",
        "rows 3",
    ):
        assert fact in key
    assert [file.name for file in cache.parent.iterdir()] == [_auto.FILE]  # nothing beside it


def test_what_was_measured_holds_for_its_like_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = clock(monkeypatch, fastest(SELL))
    ops.pack(sparse(64, 100), rows=1)
    ops.pack(sparse(64, 100), rows=1)  # other values, density alike
    assert len(timings.asked) == 1
    ops.pack(sparse(64, 101), rows=1)
    ops.pack(sparse(64, 100), rows=2)
    ops.pack(sparse(64, 100, 0.5), rows=1)
    with threads(2 if torch.get_num_threads() == 1 else 1):
        ops.pack(sparse(64, 100), rows=1)
    with forced("scalar", "sparse_matmul"):
        ops.pack(sparse(64, 100), rows=1)
    assert len(timings.asked) == 6
    assert _auto.remembered() == 6


def test_what_cannot_win_is_not_timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = clock(monkeypatch, fastest("bitmap32"))
    for rows in (17, 128, 1000, None):
        assert ops.describe(ops.pack(sparse(64, 100), rows=rows))["format"] == "panels128"  # nothing else is left
    assert timings.asked == []
    ops.pack(sparse(64, 100, 0.2), rows=1)  # too dense for the second, then too wide
    ops.pack(sparse(1, 65537, 0.9), rows=1)
    ops.pack(sparse(64, 100, 1.0), rows=5)
    two = ["bitmap32", "panels128"]
    assert timings.asked == [(1, two), (1, two), (6, ["bitmap32", SELL, "panels128"])]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 2, "seconds": {}}', '{"schema": 1, "seconds": [1]}', "\xff"],
)
def test_a_damaged_file_is_written_anew(content: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.mkdir()
    cache.write_text(content, encoding="latin-1")
    clock(monkeypatch, fastest(SELL))
    assert ops.describe(ops.pack(sparse(64, 100), rows=1))["format"] == SELL
    assert _auto.remembered() == 1


@pytest.mark.parametrize("value", [3, [], {SELL: "fast"}, {SELL: 1}, {SELL: -1, "bitmap32": 1}, {"x": 1}])
def test_a_damaged_entry_is_measured_anew(value: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings, w = clock(monkeypatch, fastest("bitmap32")), sparse(64, 100)
    ops.pack(w, rows=1)
    content = json.loads(cache.read_text())
    content["seconds"] = dict.fromkeys(content["seconds"], value)
    cache.write_text(json.dumps(content))
    monkeypatch.setattr(_auto, "_memory", {})
    assert ops.describe(ops.pack(w, rows=1))["format"] == "bitmap32"
    assert len(timings.asked) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(_auto.FOLDER, str(tmp_path / "file"))
    timings = clock(monkeypatch, fastest("bitmap32"))
    for _ in range(2):  # remembered in this process all the same
        assert ops.describe(ops.pack(sparse(64, 100), rows=1))["format"] == "bitmap32"
    assert len(timings.asked) == 1


def test_the_rule_decides_where_nothing_is_measured(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = clock(monkeypatch, fastest("bitmap32"))
    assert ops.describe(ops.pack(sparse(8, 10), rows=1))["format"] == SELL  # too small to matter
    for value in ("off", "0", " OFF "):
        monkeypatch.setenv(_auto.FOLDER, value)
        assert ops.describe(ops.pack(sparse(64, 100), rows=1))["format"] == SELL
        assert ops.describe(ops.pack(sparse(64, 100), rows=(1, 64)))["formats"] == (SELL, "panels128")
        assert _auto.file() is None
    assert timings.asked == []
    assert not cache.parent.exists()


def test_where_the_file_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(_auto.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _auto.file() == tmp_path / "fastsparse" / _auto.FILE
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _auto.file() == tmp_path / ".cache" / "fastsparse" / _auto.FILE
    assert fastsparse.info()["formats_file"] == str(_auto.file())


def test_the_clock_measures_all_candidates_of_a_sample(cache: Path) -> None:
    before = torch.random.get_rng_state()
    w = sparse(2048, 512, 0.8)  # twice the sample
    assert _auto._sample(w).shape == (1024, 512)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # whatever the defaults are
            pack = ops.pack(w, rows=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert ops.describe(pack)["format"] in ("bitmap32", SELL, "panels128")
    ((seconds,),) = [json.loads(cache.read_text())["seconds"].values()]
    assert set(seconds) == {"bitmap32", SELL, "panels128"}
    assert all(0 < value < 1 for value in seconds.values())
    torch.random.set_rng_state(before)
    assert torch.equal(sparse(2048, 512, 0.8), w)  # torch's random state is left alone
    assert same_bits(ops.unpack(pack), w + 0.0)


class Phases:
    """What a phase of each format takes, the last one again and again."""

    def __init__(self, **seconds: list[float]) -> None:
        self.seconds, self.taken = seconds, dict.fromkeys(seconds, 0)

    def __call__(self, format: str) -> float:
        turn = self.taken[format]
        self.taken[format] += 1
        return self.seconds[format][min(turn, len(self.seconds[format]) - 1)]


def test_a_disturbed_phase_decides_nothing() -> None:
    phases = Phases(a=[1.0], b=[2.9, 0.9])
    assert _auto.compare(["a", "b"], phases, "a") == {"a": 1.0, "b": 0.9}
    assert phases.taken == {"a": 3, "b": 3}
    phases = Phases(a=[1.0], b=[2.9, 1.2, 1.1, 0.8, 0.8])  # phases that disagree: on until two are alike
    assert _auto.compare(["a", "b"], phases, "a") == {"a": 1.0, "b": 0.8}
    assert phases.taken == {"a": 5, "b": 5}
    phases = Phases(a=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])  # never: not for ever
    assert _auto.compare(["a"], phases, "a") == {"a": 0.2}
    assert phases.taken == {"a": _auto.MOST_ROUNDS}
    phases = Phases(a=[1.0], b=[2.0], c=[9.0, 2.0, 0.7], d=[9.0])  # hopeless; what the rule says gets its chance
    assert _auto.compare(["a", "b", "c", "d"], phases, "c") == {"a": 1.0, "b": 2.0, "c": 0.7, "d": 9.0}
    assert (phases.taken["b"], phases.taken["d"]) == (2, 1)


def test_groups_are_counted_whatever_the_width() -> None:
    for n, k in ((0, 5), (5, 0), (3, 7), (17, 65), (600, 1030)):
        for of in (4, 8):
            w = sparse(n, k, 0.6)
            groups = torch.nn.functional.pad((w != 0).int(), (0, -k % of)).unflatten(1, (-1, of)).sum(-1)
            most = int(groups.max()) if groups.numel() else 0
            assert _auto._holds(w, most, of)
            assert groups.numel() == 0 or not _auto._holds(w, most - 1, of)
            assert _auto._holds(w.bfloat16().t().contiguous().t(), most, of)


def test_every_candidate_is_a_format() -> None:
    w = torch.zeros(1, 4)
    assert all(ops.describe(sparse_matmul._pack_as(w, c.format))["format"] == c.format for c in ALL)
    assert sorted(_auto.ROWS) == list(_auto.ROWS)
    for rows in _auto.ROWS:  # at density 1 and any K something is left
        assert any(rows <= c.most_rows and c.fits(torch.zeros(1, 70000), 1.0) for c in ALL)


PATTERNS = [
    ("4x4", {"blocks4x4"}),
    ("16x16", {"blocks4x4", "blocks16x16"}),
    ("1x4", set()),
    ("2x4", set()),
    ("1:4", {"nm1:4"}),
    ("2:4", {"nm2:4"}),
    ("4:8", {"nm4:8"}),
    ("1:2", {"nm2:4"}),
    ("5:8", set()),
    ("1x1", set()),
]


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS)
def test_formats_of_a_pattern_are_candidates_where_the_zeros_have_it(
    pattern: str, expected: set[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_auto, "CANDIDATES", ALL)
    for n, k in ((1000, 600), (219, 301)):  # a sample is looked at, or all
        w = patterned(n, k, pattern)
        for weight in (w, w.t().contiguous().t()):
            fitting = _auto.Weight(
                weight, int(w.count_nonzero()) / w.numel(), sparse_matmul._pack_as, lambda _: ""
            ).fitting
            assert {c.format for c in fitting if c.format.startswith(("blocks", "nm"))} == expected, (n, k)
    for format in sorted(expected):
        clock(
            monkeypatch, lambda named, rows, first=format: 1.0 if named == (first if rows < 9 else "panels128") else 2.0
        )
        monkeypatch.setattr(_auto, "_memory", {})
        cache.unlink(missing_ok=True)
        for rows, formats in ((5, format), ((1, 64), (format, "panels128"))):
            header = ops.describe(ops.pack(w, rows=rows))
            assert header.get("formats", header["format"]) == formats


def test_one_group_beyond_the_sample_makes_no_nm() -> None:
    w = patterned(3000, 512, "2:4")
    fits = next(c for c in ALL if c.format == "nm2:4").fits
    assert fits(w, 0.5)
    outside = next(row for row in range(len(w)) if not (_auto._sample(w) == w[row]).all(1).any())
    w[outside, 508:] = 1
    assert not fits(w, 0.5)


# --- int8, "sparse" ---------------------------------------------------------------------------------------------------


def sparse_s8(n: int, k: int, zeros: float = 0.9) -> Tensor:
    return torch.randint(1, 128, (n, k), dtype=torch.int8) * (torch.rand(n, k) >= zeros)


def int8_candidates(rows: int, zeros: float) -> list[str]:
    windows = ["windows_s8"] if zeros > 0.5 and sparse_int8.windows_are_fast() else []
    return [*(["bitmap_s8"] if rows <= 4 else []), *windows, "blocks1x4", "blocks4x4"]


@pytest.mark.parametrize("name", ["bitmap_s8", "blocks1x4", "blocks4x4"])
def test_the_fastest_int8_format_is_taken_and_remembered(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timings, w = clock(monkeypatch, fastest(name)), sparse_s8(64, 100)
    for _ in range(2):
        assert torch.equal(ops.pack(w, "sparse", 3), ops.pack(w, name))
    assert timings.asked == [(3, int8_candidates(3, 0.9))]
    ((key, _),) = json.loads(cache.read_text())["seconds"].items()
    assert "dtype int8" in key
    ops.pack(sparse(64, 100), rows=3)  # floats of this size are another matter
    assert len(timings.asked) == 2


def test_int8_formats_are_candidates_by_rows_zeros_and_cpu(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = clock(monkeypatch, fastest("blocks1x4"))
    for rows, at in ((4, 4), (5, 6), (None, 128), ((1, 64), 64)):
        ops.pack(sparse_s8(64, 100), "sparse", rows)
        assert timings.asked[-1] == (at, int8_candidates(at, 0.9))
    ops.pack(sparse_s8(64, 100, 0.1), "sparse", 1)
    assert timings.asked[-1] == (1, int8_candidates(1, 0.1))
    with forced("scalar", "sparse_int8"):
        ops.pack(sparse_s8(64, 100), "sparse", 1)
    assert "windows_s8" not in timings.asked[-1][1]
    monkeypatch.setenv(_auto.FOLDER, "off")
    count = len(timings.asked)
    ops.pack(sparse_s8(64, 100), "sparse", 1)
    assert len(timings.asked) == count


def test_equal_densities_in_other_blocks_are_measured_apart(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quarter(r: int, c: int) -> Tensor:
        """A quarter of the blocks of r x c, at random."""
        blocks = 64 * 128 // (r * c)
        live = (torch.randperm(blocks) < blocks // 4).view(64 // r, 128 // c)
        return live.repeat_interleave(r, 0).repeat_interleave(c, 1).to(torch.int8)

    timings = clock(monkeypatch, fastest("blocks1x4"))
    for rows in (1, 64):
        for r, c in ((1, 1), (1, 4), (4, 4), (1, 4)):  # the last is remembered
            ops.pack(quarter(r, c), "sparse", rows)
    assert [rows for rows, _ in timings.asked] == [1, 1, 1, 64, 64, 64]


@pytest.mark.parametrize("layers", [1, 8])
def test_as_many_copies_go_round_as_layers(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_auto, "SET_BYTES", 1)
    seen: set[int] = set()

    def linear(n: int) -> Callable[[Tensor, Tensor], Tensor]:
        def call(x: Tensor, pack: Tensor) -> Tensor:
            seen.add(pack.data_ptr())
            return x

        return call

    weight = _auto.Weight(sparse(64, 100), 0.1, sparse_matmul._pack_as, lambda _: SELL, linear=linear, layers=layers)
    _auto.measure(weight, 1, [SELL])
    assert len(seen) == layers + 1  # the pack itself, and its copies


def test_the_clock_measures_int8(cache: Path) -> None:
    w = sparse_s8(2048, 512, 0.8)
    with torch.device("meta"):  # whatever the default is
        pack = ops.pack(w, "sparse", 2)
    ((seconds,),) = [json.loads(cache.read_text())["seconds"].values()]
    assert list(seconds) == int8_candidates(2, 0.8)
    assert all(0 < value < 1 for value in seconds.values())
    assert torch.equal(pack, ops.pack(w, ops.describe(pack)["format"]))


# --- Two formats in one pack ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 2, 4, 6, 12])
def test_the_rows_where_they_change_are_found(last: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = clock(monkeypatch, lambda format, rows: 1.0 if (format == "bitmap32") == (rows <= last) else 2.0)
    header = ops.describe(ops.pack(sparse(64, 100), rows=(1, None)))
    assert (header["format"], header["formats"], header["block"]) == ("pair", ("bitmap32", "panels128"), last)
    assert len(timings.asked) <= 1 + math.ceil(math.log2(len(_auto.ROWS)))
    assert ops.describe(ops.pack(sparse(64, 100), rows=(1, 1)))["format"] == "bitmap32"
    assert ops.describe(ops.pack(sparse(64, 100), rows=(32, 64)))["format"] == "panels128"


def test_a_pair_is_as_documented_and_back() -> None:
    for n, k in ((1, 1), (19, 23), (300, 130), (0, 4), (4, 0)):
        w = sparse(n, k, 0.8)
        got = pair(w, rows=7)
        few, many = ops.pack(w, SELL), ops.pack(w, "panels128")
        nonzeros, size = int(w.count_nonzero()), 64 + few.numel() + many.numel()
        header = HEADER.pack(b"fspk", 13, 1, 2, 7, n, k, nonzeros, size, bytes(16))
        assert got.numpy().tobytes() == header + few.numpy().tobytes() + many.numpy().tobytes()
        assert same_bits(ops.unpack(got), w + 0.0)
        assert torch.equal(_packs.repack(got), got)
        described = ops.describe(got)
        assert (described["n"], described["k"], described["nonzeros"], described["bytes"]) == (n, k, nonzeros, size)
        assert described["dtype"] == "float32"


@pytest.mark.parametrize(("first", "second"), TWO)
def test_a_pair_gives_the_bits_of_any_format(first: str, second: str) -> None:
    w, x, bias = patterned(270, 139, "2:4"), torch.randn(9, 139), torch.randn(270)
    packed, single = pair(w, first, second, 2), ops.pack(w, "panels128")
    for isa in isa_levels():
        with forced(isa, "sparse_matmul"):
            for m in (0, 1, 2, 3, 9):
                assert same_bits(
                    ops.sparse_linear(x[:m], packed, bias, "gelu"), ops.sparse_linear(x[:m], single, bias, "gelu")
                )
    assert same_bits(ops.sparse_linear(x.view(3, 3, 139), packed), ops.sparse_linear(x, single).view(3, 3, 270))


def test_each_half_serves_its_rows() -> None:
    w = sparse(40, 50)
    packed, x = pair(w, SELL, "panels128", 2).clone(), torch.randn(3, 50)
    right = ops.sparse_linear(x, packed)
    value = w[w != 0][7]
    at = packed.numpy().tobytes().index(struct.pack("<f", float(value)))  # in the first half
    packed[at + 2] ^= 1
    assert not same_bits(ops.sparse_linear(x[:2], packed), right[:2])
    assert same_bits(ops.sparse_linear(x, packed), right)


def test_a_weight_too_empty_for_a_pair_gets_one_format() -> None:
    w = torch.zeros(16, 65536)
    w[3, 5] = 1
    assert ops.describe(pair(w, SELL, "panels128"))["format"] == "pair"  # panels128 has 9/8 of a byte per 192 weights
    assert ops.describe(sparse_matmul._pack_two(w, SELL, SELL, 1))["format"] == SELL


def test_gradients_of_a_pair() -> None:
    w = sparse(19, 23)
    grads = []
    for weight in (pair(w), ops.pack(w, "panels128")):
        x = torch.linspace(-1, 1, 69).view(3, 23).requires_grad_()
        ops.sparse_linear(x, weight).square().sum().backward()
        grads.append(x.grad)
    assert same_bits(*grads)  # type: ignore[arg-type]


def test_rows_are_checked() -> None:
    w = sparse(4, 4)
    for rows in ((1,), (None, 4), (4, 1), (-1, 4), (1, 2, 3), 1.5, (1.0, 2), True):
        with pytest.raises(ValueError, match="pack: rows must be None or at least 0, or two of these"):
            ops.pack(w, rows=rows)  # type: ignore[arg-type]
    ops.pack(w.to(torch.int8), rows=(1, 64))  # one format serves all there
    assert ops.describe(ops.pack(w.to(torch.int8), "sparse", (1, 64)))["format"].startswith("blocks")
    assert ops.describe(ops.pack(w, SELL, (1, 64)))["format"] == SELL


def test_layers_keep_two_formats(tmp_path: Path) -> None:
    linear = nn.Linear(100, 64)
    with torch.no_grad():
        linear.weight.copy_(sparse(64, 100))
    layer = SparseLinear.from_linear(linear, rows=(1, 64))
    assert ops.describe(layer.weight)["formats"] == (SELL, "panels128")
    x = torch.randn(5, 100)
    assert same_bits(layer(x), SparseLinear.from_linear(linear)(x))
    fastsparse.save(nn.Sequential(layer), tmp_path / "two.safetensors")
    back = fastsparse.load(tmp_path / "two.safetensors", nn.Sequential(nn.Linear(100, 64)))
    assert torch.equal(back[0].weight, layer.weight)
    for convert in (
        lambda model: to_sparse_(model, rows=(1, 64), measure=lambda c: 2.0 if c.implementation == "dense" else 1.0),
        lambda model: convert_(
            model, [Sparse()], rows=(1, 64), measure=lambda c: 2.0 if c.implementation == "dense" else 1.0
        ),
        lambda model: to_sparse_(model, Sparse(measure=False), rows=(1, 64)),
    ):
        model = nn.Sequential(linear)
        report = convert(model)
        assert "M=1,64" in str(report)
        assert torch.equal(model[0].weight, layer.weight)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.linear(x[:1])

    twice = Twice()
    to_sparse_(twice, data=torch.randn(64, 100), measure=lambda c: 2.0 if c.implementation == "dense" else 1.0)
    assert torch.equal(twice.linear.weight, layer.weight)  # one row and 64 were seen


# --- Damage -----------------------------------------------------------------------------------------------------------


def refused_or_harmless(pack: Tensor, k: int) -> None:
    """On guarded memory, where an access outside is a crash."""
    weight = guarded(pack)
    for isa in isa_levels():
        for m in (1, 5):
            with forced(isa, "sparse_matmul"), contextlib.suppress(ValueError):
                ops.sparse_linear(guarded(torch.randn(m, k)), weight)
    with contextlib.suppress(ValueError):
        ops.unpack(weight)


@given(data=st.data())
def test_damaged_pairs_never_read_outside(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    n, k = data.draw(st.sampled_from([(3, 5), (40, 140)]))
    pack = pair(patterned(n, k, "1:4"), *data.draw(st.sampled_from(TWO))).clone()
    second = 64 + sum(int(b) << (8 * i) for i, b in enumerate(pack[112:120].tolist()))
    headers = st.integers(0, 191) | st.integers(second, second + 63)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(headers | st.integers(0, pack.numel() - 1))
        pack[at] = data.draw(st.integers(0, 255) | st.just(255))
    refused_or_harmless(pack, k)


def test_validate_sees_every_damaged_byte_of_a_pair() -> None:
    w = sparse(5, 6, 0.5)
    good = pair(w)
    passed = []
    for at in range(good.numel()):
        pack = good.clone()
        pack[at] ^= 0x41
        try:
            ops.describe(pack)
        except ValueError:
            continue
        passed.append(at)
    assert passed == [12, 13, 14, 15]  # the rows at which the formats change may be any


def test_pairs_that_are_none_are_refused() -> None:
    w = sparse(9, 11, 0.5)
    few, many = ops.pack(w, SELL), ops.pack(w, "panels128")

    def made(first: Tensor, second: Tensor, n: int = 9, k: int = 11, rows: int = 2) -> Tensor:
        size, nonzeros = 64 + first.numel() + second.numel(), int(w.count_nonzero())
        header = HEADER.pack(b"fspk", 13, 1, 2, rows, n, k, nonzeros, size, bytes(16))
        return torch.cat([torch.frombuffer(bytearray(header), dtype=torch.uint8), first, second])

    ops.describe(made(few, many))
    other = w.clone()
    other[tuple(w.nonzero()[3])] += 1
    for bad, why in (
        (made(few, few), "a pair of one layout"),
        (made(few, ops.pack(other, "panels128")), "not of one weight"),
        (made(few, ops.pack(sparse(9, 12), "panels128")), "not of one weight"),
        (made(made(few, many), many), "a pair inside a pair"),
        (made(few, many, k=12), "not of one weight"),
        (made(few, many, n=2**30), "for a pair of N"),
        (made(few, many)[:-64], "bytes"),
        (made(few, many)[:64], "bytes"),
        (made(few, many)[:150], "bytes"),
        (made(few[:-64], many), "not of one weight"),
        (made(ops.pack(w.to(torch.int8)), many), "pack"),
        (made(few, many, rows=0), "damaged header"),
    ):
        with pytest.raises(ValueError, match=why):
            ops.describe(bad.contiguous())
    for bad in (made(few, many)[:150], made(few, many, n=2**30)):
        with pytest.raises(ValueError, match="sparse_linear: weight must be a sparse float32 pack"):
            ops.sparse_linear(torch.randn(1, 11), bad.contiguous())


@pytest.mark.parametrize("isa", isa_levels())
def test_sell8x16_is_timed_where_outputs_are_uneven(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_auto, "CANDIDATES", ALL)
    even = sparse(200, 300)
    uneven = even.clone()
    uneven[3] = 1
    for weight, times in ((even, False), (uneven, isa in ("avx512", "amx")), (uneven[:16], False)):
        whole = _auto.Weight(weight, 0.1, lambda w, name: w, lambda rows: "bitmap32")
        with forced(isa):
            assert ("sell8x16" in [c.format for c in whole.fitting]) == times
    assert not _auto._uneven(torch.ones(200, 70000), 0.1), "K is too long for the format"
