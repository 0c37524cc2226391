"""Compiles the CUDA kernels with g++ against the stand-in: a shared library each for the builds fast, asan and race.

    python tests/cuda_on_cpu/builds.py [fast] [asan] [race]

What did not change is not compiled again; `changed` is decided by content. Two compilers at a time at most.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "build" / "cuda_on_cpu"
CXX = os.environ.get("CXX", "g++")

BUILDS = ("fast", "asan", "race")
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
COMMON = ["-std=c++17", "-fPIC", "-g1", "-DFS_SIMT", "-ffp-contract=off", "-fvisibility=hidden", *WARNINGS]
# tsan-instrument-func-entry-exit=0: entries and exits of functions are of no interest, only accesses.
KERNEL = {
    "fast": ["-O2"],
    "asan": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "race": ["-O2", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"],
}
# The stand-in itself is not instrumented; what it is told of the build.
RUNTIME = {
    "fast": ["-O3"],
    "asan": ["-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "race": ["-O3", "-DFS_SIMT_RACE"],
}
LINK = {"fast": [], "asan": ["-fsanitize=address,undefined"], "race": []}


@dataclass(frozen=True)
class Unit:
    source: Path
    flags: tuple[str, ...]

    def name(self) -> str:
        return str(self.source.relative_to(ROOT)).replace("/", "_") + ".o"


def units(build: str) -> list[Unit]:
    kernels = [*sorted((ROOT / "csrc").glob("*/cuda/*.cu")), *sorted(HERE.glob("*.cu"))]
    runtime = [*sorted((HERE / "runtime").glob("*.cpp")), *sorted((HERE / "entries").glob("*.cpp"))]
    # What launchers call of their families' torch-free host code.
    runtime += sorted((ROOT / "csrc").glob("*/formats/*.cpp"))
    return [
        *(Unit(s, ("-x", "c++", *COMMON, *KERNEL[build])) for s in kernels),
        *(Unit(s, (*COMMON, *RUNTIME[build])) for s in runtime),
    ]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "gone"


def compile_unit(unit: Unit, folder: Path) -> bool:
    """True if it had to be compiled."""
    target, record = folder / unit.name(), folder / (unit.name() + ".json")
    if target.exists() and record.exists():
        known = json.loads(record.read_text())
        if known["flags"] == [CXX, *unit.flags] and all(digest(Path(p)) == d for p, d in known["files"].items()):
            return False
    depfile = folder / (unit.name() + ".d")
    command = [CXX, *unit.flags, "-MMD", "-MF", str(depfile), "-c", str(unit.source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        target.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    needs = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    files = {p: digest(Path(p)) for p in needs if str(ROOT) in str(Path(ROOT, p).resolve())}
    record.write_text(json.dumps({"flags": [CXX, *unit.flags], "files": files}))
    return True


def build(name: str) -> Path:
    """The library of this build, up to date."""
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "libcuda_on_cpu.so"
    todo = units(name)
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda unit: compile_unit(unit, folder), todo))
    objects = [str(folder / unit.name()) for unit in todo]
    listing = folder / "objects.txt"
    if any(compiled) or not library.exists() or not listing.exists() or listing.read_text() != "\n".join(objects):
        temporary = folder / f"linking-{os.getpid()}.so"
        # Our own __tsan_* come from the runtime, so nothing is linked for the race build.
        command = [CXX, "-shared", *LINK[name], "-o", str(temporary), *objects, "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        temporary.replace(library)
        listing.write_text("\n".join(objects))
    return library


def variant(name: str, source: Path, text: str, folder: Path) -> Path:
    """The library of build `name` with `text` compiled in the place of `source`, a kernel file; made in `folder`.

    Reports name the lines of `text` as lines of `source`.
    """
    objects = build(name).parent
    (unit,) = [u for u in units(name) if u.source == source]
    changed, target, library = folder / source.name, folder / "changed.o", folder / f"{name}.so"
    changed.write_text(f'#line 1 "{source}"\n{text}')
    others = [str(objects / u.name()) for u in units(name) if u.source != source]
    for command in (
        [CXX, *unit.flags, "-iquote", str(source.parent), "-c", str(changed), "-o", str(target)],
        [CXX, "-shared", *LINK[name], "-o", str(library), str(target), *others, "-ldl"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return library


def sanitizer_environment() -> dict[str, str]:
    """What a process needs to load the asan build: the sanitizers' libraries before everything else."""

    def library(name: str) -> str:
        found = subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not os.path.exists(found):
            raise RuntimeError(f"{CXX} has no {name}; on Debian: apt install libasan8 libubsan1")
        return found

    # libstdc++ too: without it AddressSanitizer can't intercept exceptions.
    preload = ":".join(library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    return {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


if __name__ == "__main__":
    for wanted in sys.argv[1:] or BUILDS:
        print(build(wanted))
