"""The measured ceilings of the machine: FMA, int8 products, reads per level, copies. `python -m bench.ceilings`.

ceilings.cpp is compiled once per source and compiler into build/bench/, and runs in a process of its own. A ceiling is
the best of several bursts and, for reads, of several sizes and access patterns: a ceiling that another process pulled
down would flatter every fraction.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import machine

SOURCE = Path(__file__).with_name("ceilings.cpp")
BUILD = machine.ROOT / "build" / "bench"
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-pthread", "-ffp-contract=off")

# Bits of ceil_features().
AVX2, AVXVNNI, AVX512F, AVX512VNNI, AMXINT8 = 1, 2, 4, 8, 16


@dataclass(frozen=True)
class Ceiling:
    """`value` in `unit`, or None and why."""

    key: str
    text: str
    unit: str
    value: float | None
    note: str = ""


COMPUTE = (
    # key, kind in ceil_compute, feature, text, unit, what is missing
    ("fma_avx2", 0, AVX2, "fp32 FMA, AVX2", "GFLOP/s", "AVX2 with FMA"),
    ("fma_avx512", 1, AVX512F, "fp32 FMA, AVX-512", "GFLOP/s", "AVX-512"),
    ("madd_avx2", 2, AVX2, "int8 by vpmaddwd + vpaddd, AVX2", "GOP/s", "AVX2"),
    ("vnni_avxvnni", 3, AVXVNNI, "int8 by vpdpbusd, AVX-VNNI", "GOP/s", "AVX-VNNI"),
    ("vnni_avx512", 4, AVX512VNNI, "int8 by vpdpbusd, AVX-512-VNNI", "GOP/s", "AVX-512-VNNI"),
    ("amx_int8", 5, AMXINT8, "int8 by tdpbusd, AMX", "GOP/s", "AMX-INT8 that may be used"),
)

# Which ceiling a kernel of this ISA level is held against.
INT8_CEILING = {"amx": "amx_int8", "avx512": "vnni_avx512", "avxvnni": "vnni_avxvnni", "avx2": "madd_avx2"}
FP32_CEILING = {"amx": "fma_avx512", "avx512": "fma_avx512", "avxvnni": "fma_avx2", "avx2": "fma_avx2"}


def compute_ceiling(compute: str | None, isa: str) -> str | None:
    """The key of the ceiling for "int8" or "fp32" work at this level; None where there is none (scalar)."""
    return {"int8": INT8_CEILING, "fp32": FP32_CEILING}.get(compute or "", {}).get(isa)


def build() -> Path:
    """Compiles ceilings.cpp unless that was done; raises RuntimeError with the compiler's message."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise RuntimeError(f"ceilings are written for x86-64, this machine is {platform.machine()}")
    compiler = os.environ.get("CXX", "c++")
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
        key = hashlib.sha256("\n".join((version, *FLAGS, SOURCE.read_text())).encode()).hexdigest()[:16]
        library = BUILD / f"ceilings-{key}.so"
        if not library.exists():
            BUILD.mkdir(parents=True, exist_ok=True)
            fresh = BUILD / f"ceilings-{key}.{os.getpid()}.tmp"  # renamed when complete: two benches may build
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(fresh)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode != 0:
                raise RuntimeError(f"{compiler} failed on ceilings.cpp: {done.stderr.strip()[-500:]}")
            fresh.replace(library)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise RuntimeError(f"ceilings.cpp can't be compiled with {compiler}: {e}") from e
    return library


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    size, number = ctypes.c_size_t, ctypes.c_double
    library.ceil_features.restype = ctypes.c_uint
    time: list[Any] = [number, ctypes.c_int, ctypes.c_int]  # seconds a burst, bursts, threads
    library.ceil_compute.argtypes = [ctypes.c_int, *time]
    library.ceil_read.argtypes = [ctypes.c_int, ctypes.c_int, size, *time]
    library.ceil_copy.argtypes = [ctypes.c_int, size, *time]
    library.ceil_pass.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, size]
    library.ceil_pass.restype = None
    library.ceil_pass_seconds.argtypes = [ctypes.c_int, ctypes.c_int, size, ctypes.c_int, ctypes.c_int]
    for function in (library.ceil_compute, library.ceil_read, library.ceil_copy, library.ceil_pass_seconds):
        function.restype = number
    return library


@functools.cache
def _passes() -> tuple[ctypes.CDLL, int]:
    """The library, and the widest loads of this CPU as ceil_read knows them."""
    library = _load(build())
    features = int(library.ceil_features())
    if not features & AVX2:
        raise RuntimeError("this CPU has no AVX2")
    return library, 1 if features & AVX512F else 0


def _best_pattern(size: int) -> int:
    library, width = _passes()
    times = [library.ceil_pass_seconds(width, variant, size, 1, max(3, (4 << 20) // size)) for variant in range(4)]
    return times.index(min(times))


def plain_read(address: int, size: int) -> Callable[[], None]:
    """A call that does nothing but read `size` bytes, a multiple of 1024, by the fastest of the patterns."""
    library, width = _passes()
    read, pattern = library.ceil_pass, _best_pattern(size)
    return lambda: read(width, pattern, address, size)


def plain_read_seconds(size: int, copies: int, repeats: int) -> float:
    """Seconds of such a call without Python's part, over `copies` sets of bytes in turn."""
    library, width = _passes()
    return float(library.ceil_pass_seconds(width, _best_pattern(size), size, copies, repeats))


def read_sizes(caches: Mapping[str, int], threads: int) -> dict[str, list[int]]:
    """Bytes a thread reads, per level: several for a level whose best size is not known before."""
    sizes: dict[str, list[int]] = {}
    inner = 0
    for level in ("L1", "L2", "L3"):
        if level not in caches:
            continue
        share = caches[level] // (threads if level == "L3" else 1)
        # Four times the inner level, or its lines would serve part of the reads; half the level, or it would spill.
        smallest, largest = 4 * inner, share // 2
        if 0 < smallest < largest:
            sizes[level] = sorted({smallest, min(2 * smallest, largest), min(8 * smallest, largest)})
        else:
            sizes[level] = [largest]
        inner = share
    # Four times the last level would do; a gigabyte is enough where a virtual machine sees a huge one.
    sizes["DRAM"] = [max(64 << 20, min(1 << 30, 4 * max(caches.values(), default=0)) // threads)]
    return sizes


def measure(threads: int = 1, quick: bool = False) -> list[Ceiling]:
    """All ceilings of this machine; what it lacks is a Ceiling without a value."""
    try:
        library = _load(build())
    except (RuntimeError, OSError) as e:
        return [Ceiling("none", "ceilings", "", None, machine.scrub(str(e)))]
    features = int(library.ceil_features())
    time = (0.002, 15 if quick else 80, threads)

    found: list[Ceiling] = []
    for key, kind, feature, text, unit, missing in COMPUTE:
        if features & feature:
            value = library.ceil_compute(kind, *time) / 1e9
            found.append(Ceiling(key, text, unit, value))
        else:
            found.append(Ceiling(key, text, unit, None, f"not measurable: this CPU has no {missing}"))
    if not features & AVX2:
        return [
            *found,
            Ceiling("read", "reads and copies", "GB/s", None, "not measurable: this CPU has no AVX2"),
        ]

    patterns = ("1 stream", "1 stream + prefetch", "4 streams", "4 streams + prefetch")
    widths = (0, 1) if features & AVX512F else (0,)
    for level, level_sizes in read_sizes(machine.caches(), threads).items():
        top, note = 0.0, ""
        for size in level_sizes:
            for width in widths:
                for variant, pattern in enumerate(patterns):
                    if variant in (1, 3) and level in ("L1", "L2"):
                        continue  # prefetching what is near only costs
                    rate = library.ceil_read(width, variant, size, *time) / 1e9
                    if rate > top:
                        top, note = rate, f"{size >> 10} KB, {pattern}, {'AVX-512' if width else 'AVX2'}"
        found.append(Ceiling(f"read_{level}", f"read, {level}", "GB/s", top, note))
    size = read_sizes(machine.caches(), threads)["DRAM"][0] // 2
    for streaming, kind_name in ((0, "plain"), (1, "streaming")):
        rate = library.ceil_copy(streaming, size, *time) / 1e9
        found.append(
            Ceiling(
                f"copy_{kind_name}",
                f"copy, DRAM, {kind_name} stores",
                "GB/s",
                rate,
                "bytes read + bytes written",
            )
        )
    return found


def measure_in_child(threads: int, quick: bool) -> list[Ceiling]:
    """`measure` in a process of its own: a CPU that lies about its features must not end the bench."""
    command = [sys.executable, "-m", "bench.ceilings", "--json", "--threads", str(threads)]
    try:
        done = subprocess.run(
            command + ["--quick"] * quick, cwd=machine.ROOT, capture_output=True, text=True, timeout=600
        )
        return [Ceiling(**found) for found in json.loads(done.stdout)]
    except (OSError, subprocess.TimeoutExpired, ValueError) as e:
        return [Ceiling("none", "ceilings", "", None, machine.scrub(f"measuring the ceilings failed: {e}"))]


def merge(first: list[Ceiling], second: list[Ceiling]) -> list[Ceiling]:
    """The better of two measurements of each ceiling: one taken before the cases and one after."""
    later: dict[str, Ceiling] = {c.key: c for c in second}
    merged = []
    for ceiling in first:
        other = later.get(ceiling.key)
        better = other is not None and other.value is not None and other.value > (ceiling.value or 0)
        merged.append(other if better and other is not None else ceiling)
    return merged


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ceilings", description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = measure(options.threads, options.quick)
    if options.json:
        listed: list[dict[str, Any]] = [asdict(c) for c in found]
        print(json.dumps(listed))
        return
    for c in found:
        print(f"{c.text:36} {f'{c.value:8.1f} {c.unit}' if c.value is not None else '':18} {c.note}")


if __name__ == "__main__":
    main()
