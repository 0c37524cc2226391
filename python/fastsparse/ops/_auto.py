"""How `pack` chooses where the format is "auto" (float32 and bfloat16) or "sparse" (int8): by measurement, remembered
per machine.

What was measured lies in formats.json in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, /fastsparse), or in the
folder that FASTSPARSE_CACHE names; FASTSPARSE_CACHE=0 or off measures nothing, and a rule of thumb decides. A file that
is damaged or can't be written costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

FOLDER = "FASTSPARSE_CACHE"
OFF = ("0", "off")
FILE = "formats.json"
SCHEMA = 1

# Rows of x that are measured; others count as the next of these, more (and None) as the last.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128)
LEAST_WEIGHTS = 4096  # a smaller weight is all overhead, whatever its format
SAMPLE_WEIGHTS = 1 << 19
SAMPLE_OUTPUTS = 16  # chunks begin at a multiple of so many: no block is cut
# In a model a layer finds its weights where the others left them. So copies go round, as much as no L2 holds; of a
# sample as much as the whole would be, up to what no common L3 holds.
SET_BYTES, LARGEST_SET = 8 << 20, 64 << 20
ROUNDS, ROUND_SECONDS = 3, 1e-3
# On a busy machine: what is CLOSE to the fastest is timed until two of its phases are alike, and at most so often.
MOST_ROUNDS, ALIKE, CLOSE = 9, 1.05, 1.3
HOPELESS = (3.0, 1.5)  # what is this much slower than the fastest after one phase, after more, is not timed again
# Stored weights for each that is not zero, at most: of blocks, and of nm, which costs the same whatever is stored.
BLOCKS_STORE, NM_STORES = 1.15, 1.5
UNEVEN, UNEVEN_OUTPUTS = 1.4, 16  # the longest output has so many times the non-zeros of the one after so many

Seconds = dict[str, float]


@dataclass(frozen=True)
class Weight:
    """What is to be packed, and how: f32, bf16 or s8[N, K], and the part of it that is not zero."""

    dense: Tensor
    density: float
    pack: Callable[[Tensor, str], Tensor]  # (weight, format): the pack
    rule: Callable[[int | None], str]  # the format for these rows where nothing can be measured
    formats: tuple[str, ...] = ()  # to choose from; none: any
    candidates: tuple[Candidate, ...] = ()  # none: CANDIDATES
    linear: Callable[[int], Callable[[Tensor, Tensor], Tensor]] | None = None  # by N: (x, pack); none: sparse_linear
    layers: int = 1  # of this size that go round when it is measured
    stored: tuple[float, ...] = ()  # the part that layouts in blocks store: equal densities may differ in these

    @functools.cached_property
    def fitting(self) -> list[Candidate]:
        found: list[Candidate] = []
        for c in self.candidates or CANDIDATES:
            named = not self.formats or c.format in self.formats
            if named and all(c.unless != other.format for other in found) and c.fits(self.dense, self.density):
                found.append(c)
        return found


@dataclass(frozen=True)
class Candidate:
    """A format worth timing, and where: up to so many rows of x, for (weight, density), unless another one fits."""

    format: str
    most_rows: int = ROWS[-1]
    fits: Callable[[Tensor, float], bool] = lambda weight, density: True
    unless: str = ""


def _in_blocks(height: int, width: int) -> Callable[[Tensor, float], bool]:
    """Zeros come in blocks of outputs x k, as far as a sample says."""

    def fits(weight: Tensor, density: float) -> bool:
        if weight.shape[1] > 65536 or density == 0:
            return False
        live = _sample(weight) != 0
        nonzeros, (n, k) = int(live.count_nonzero()), live.shape
        live = functional.pad(live, (0, -k % width, 0, -n % height))
        blocks = live.reshape(live.shape[0] // height, height, -1, width).any(1).any(-1)
        return int(blocks.count_nonzero()) * height * width <= BLOCKS_STORE * nonzeros

    return fits


def _n_of(most: int, of: int) -> Callable[[Tensor, float], bool]:
    """At most so many of every so many consecutive k are not zero, anywhere."""

    def fits(weight: Tensor, density: float) -> bool:
        return most / of <= NM_STORES * density and all(_holds(part, most, of) for part in (_sample(weight), weight))

    return fits


def _holds(weight: Tensor, most: int, of: int) -> bool:
    """In parts that a cache holds. Groups of 4 or 8 are counted as one integer: the highest byte of a product that adds
    all of them."""
    whole, ones, high = (torch.int32, 0x01010101, 24) if of == 4 else (torch.int64, 0x0101010101010101, 56)
    for part in weight.split(max(1, SAMPLE_WEIGHTS // max(weight.shape[1], 1))):
        live = functional.pad((part != 0).byte(), (0, -weight.shape[1] % of))
        if live.numel() > 0 and int((live.contiguous().view(whole) * ones >> high).max()) > most:
            return False
    return True


def two_of_four(weight: Tensor) -> bool:
    """2:4, of any dtype; where nothing can be read, yes."""
    return not _plain(weight) or _holds(weight, 2, 4)


def avx512() -> bool:
    """The level in force has registers of 512 bits."""
    from fastsparse import _C

    try:
        return _C.isa() in ("avx512", "amx")
    except ValueError:  # FASTSPARSE_ISA names a level that is not here: the first call will say so
        return False


def _sell(wide: bool) -> Callable[[Tensor, float], bool]:
    """sell8 where registers have 512 bits, sell4 and sell16 elsewhere: neither wins on the other's ground."""
    return lambda weight, density: weight.shape[1] <= 65536 and density <= 0.6 and avx512() == wide


def _uneven(weight: Tensor, density: float) -> bool:
    """A few outputs have many more non-zeros than the others, which would set the steps of a whole slice of sell8."""
    if not _sell(wide=True)(weight, density) or weight.shape[0] <= UNEVEN_OUTPUTS:
        return False
    live = torch.cat([(part != 0).sum(1) for part in weight.split(max(1, SAMPLE_WEIGHTS // max(weight.shape[1], 1)))])
    counts = live.sort(descending=True).values
    return bool(counts[0] >= UNEVEN * counts[UNEVEN_OUTPUTS])


# A new format is a line here. What cannot win is left out, so that it costs no time.
CANDIDATES = (
    Candidate("bitmap32", most_rows=16),
    Candidate("sell8", most_rows=16, fits=_sell(wide=True)),
    Candidate("sell8x32", most_rows=16, fits=_sell(wide=True)),
    Candidate("sell8x16", most_rows=2, fits=_uneven),
    Candidate("sell4", most_rows=16, fits=_sell(wide=False)),
    Candidate("sell16", most_rows=16, fits=_sell(wide=False)),
    Candidate("panels128"),
    Candidate("blocks4x4", fits=_in_blocks(4, 4)),
    Candidate("blocks16x16", fits=_in_blocks(16, 16)),
    Candidate("nm1:4", fits=_n_of(1, 4)),
    Candidate("nm2:4", fits=_n_of(2, 4)),
    Candidate("nm4:8", fits=_n_of(4, 8), unless="nm2:4"),
)


def choose(weight: Weight, rows: int | None) -> str:
    """The format for so many rows of x."""
    if not _measurable(weight.dense):
        return weight.rule(rows)
    at = ROWS[_place(rows)]
    seconds = _seconds(weight, at, [c.format for c in weight.fitting if at <= c.most_rows])
    return weight.rule(rows) if seconds is None else min(seconds, key=lambda name: seconds[name])


def choose_two(weight: Weight, few: int, many: int | None) -> tuple[str, str, int]:
    """The formats for few and for many rows, and the rows up to which the first is the faster one."""
    first, second = choose(weight, few), choose(weight, many)
    low, high = _place(few), _place(many)
    if first == second:
        return first, second, ROWS[low]
    while high - low > 1:
        middle = (low + high) // 2
        seconds = _seconds(weight, ROWS[middle], [first, second])
        wins = weight.rule(ROWS[middle]) == first if seconds is None else seconds[first] <= seconds[second]
        low, high = (middle, high) if wins else (low, middle)
    return first, second, ROWS[low]


def _place(rows: int | None) -> int:
    return next((i for i, measured in enumerate(ROWS) if rows is not None and rows <= measured), len(ROWS) - 1)


def _plain(dense: Tensor) -> bool:
    plain = type(dense) is Tensor and dense.device.type == "cpu" and dense.layout == torch.strided
    return plain and not torch.compiler.is_compiling()


def _measurable(dense: Tensor) -> bool:
    return _plain(dense) and dense.numel() >= LEAST_WEIGHTS and not off()


def _seconds(weight: Weight, rows: int, formats: Sequence[str]) -> Seconds | None:
    """What a call takes by format: remembered, or measured and remembered; None where the rule decides."""
    if not formats or not _measurable(weight.dense):
        return None
    if len(formats) == 1:
        return {formats[0]: 1.0}
    key = _key(weight, rows, formats)
    if key is None:
        return None
    with _lock:
        known = _recall(key, formats)
        if known is None:
            known = measure(weight, rows, formats)
            _remember(key, known)
    return known


# ---- measuring ----


def measure(weight: Weight, rows: int, formats: Sequence[str]) -> Seconds:
    """Seconds of a call."""
    sample = _sample(weight.dense)
    whole = weight.dense.numel() / sample.numel()
    x = torch.randn(
        rows, sample.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    linear = (weight.linear or _sparse_linear)(sample.shape[0])
    packs: dict[str, list[Tensor]] = {}
    for format in formats:
        pack = weight.pack(sample, format)
        size = max(SET_BYTES, min(LARGEST_SET, int(pack.numel() * whole) * weight.layers))
        packs[format] = [pack] + [pack.clone() for _ in range(min(size // pack.numel(), 64 * weight.layers - 1))]

    def phase(format: str) -> float:
        """The least of some passes over the copies, of which the first brings them to where the others find them."""
        passes: list[float] = []
        copies, begin = packs[format], time.perf_counter()
        while len(passes) < 2 or sum(passes) < ROUND_SECONDS:
            for pack in copies:
                linear(x, pack)
            passes.append(time.perf_counter() - begin - sum(passes))
        return min(passes[1:]) / len(copies)

    return compare(formats, phase, weight.rule(rows))


def _sparse_linear(n: int) -> Callable[[Tensor, Tensor], Tensor]:
    linear = torch.ops.fastsparse.sparse_linear.default
    return lambda x, pack: linear(x, pack, n)


def compare(formats: Sequence[str], phase: Callable[[str], float], rule: str) -> Seconds:
    """The least of a few phases in turn: what other processes take only adds. What the rule of thumb says is timed in
    every round."""
    found: dict[str, list[float]] = {format: [] for format in formats}
    for turn in range(MOST_ROUNDS):
        best = min((min(times) for times in found.values() if times), default=math.inf)
        for name, times in found.items():
            if turn == 0 or name == rule or min(times) <= HOPELESS[len(times) > 1] * best:
                times.append(phase(name))
        if turn + 1 >= ROUNDS and all(_settled(times, found) for times in found.values()):
            break
    return {name: min(times) for name, times in found.items()}


def _settled(times: Sequence[float], found: dict[str, list[float]]) -> bool:
    first, second = sorted((*times, math.inf))[:2]
    return second <= ALIKE * first or first > CLOSE * min(map(min, found.values()))


def _sample(weight: Tensor) -> Tensor:
    """All of it, or chunks of 256 outputs from end to end."""
    n, k = weight.shape
    chunks = max(1, SAMPLE_WEIGHTS // (256 * k))
    if weight.numel() <= SAMPLE_WEIGHTS or n <= 256 * chunks:
        return weight
    starts = torch.linspace(0, (n - 256) // SAMPLE_OUTPUTS, chunks, device="cpu").long() * SAMPLE_OUTPUTS
    return torch.cat([weight[start : start + 256] for start in starts.tolist()])


# ---- remembering ----

_lock = threading.RLock()
_memory: dict[Path | None, dict[str, Seconds]] = {}  # by file


def off() -> bool:
    return os.environ.get(FOLDER, "").strip().lower() in OFF


def file() -> Path | None:
    """Where choices are remembered beyond this process; None: nowhere."""
    if off():
        return None
    named = os.environ.get(FOLDER, "").strip()
    if named:
        return Path(named) / FILE
    with contextlib.suppress(RuntimeError):  # a user without a home
        base = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(base) if base else Path.home() / ".cache") / "fastsparse" / FILE
    return None


def remembered() -> int:
    """How many choices the file holds."""
    return len(_read(file()))


def _key(weight: Weight, rows: int, formats: Sequence[str]) -> str | None:
    from fastsparse import _C

    try:
        level = _C.isa()
    except ValueError:  # FASTSPARSE_ISA names a level that is not here: the first call will say so
        return None

    def bucket(density: float) -> str:  # those within a fifth of each other are alike
        return str(round(4 * math.log2(density))) if density > 0 else "none"

    facts = {
        "cpu": _cpu(),
        "isa": level,
        "threads": torch.get_num_threads(),
        "version": _version(),
        "n": weight.dense.shape[0],
        "k": weight.dense.shape[1],
        "density": " ".join(map(bucket, (weight.density, *weight.stored))),
        "dtype": str(weight.dense.dtype).removeprefix("torch."),
        "rows": rows,
        "formats": " ".join(formats),
    }
    return ", ".join(f"{name} {value}" for name, value in facts.items())


@functools.lru_cache(maxsize=1)
def _cpu() -> str:
    from fastsparse import _info

    return _info.cpu_name()


@functools.lru_cache(maxsize=1)
def _version() -> str:
    import fastsparse

    return str(fastsparse.__version__)


def _recall(key: str, names: Sequence[str]) -> Seconds | None:
    path = file()
    if path not in _memory:
        _memory[path] = _read(path)
    found = _memory[path].get(key)
    return found if found is not None and set(found) == set(names) else None


def _remember(key: str, seconds: Seconds) -> None:
    """In memory, and in the file as whole: others may write it at the same time, and the last one wins."""
    path = file()
    _memory.setdefault(path, {})[key] = seconds
    if path is None:
        return
    with contextlib.suppress(OSError):
        merged = {**_read(path), **_memory[path]}
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole(path) as temporary:
            temporary.write_text(json.dumps({"schema": SCHEMA, "seconds": merged}, indent=1) + "\n")


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place at the end, or is gone."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path | None) -> dict[str, Seconds]:
    """What the file holds and makes sense; nothing where it can't be read."""
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text())
        entries = content["seconds"].items() if content["schema"] == SCHEMA else ()
        return {key: found for key, value in entries if (found := _sound(value)) is not None}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def _sound(value: object) -> Seconds | None:
    numbers = isinstance(value, dict) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v < math.inf for v in value.values()
    )
    return value if numbers else None  # type: ignore[return-value]
