"""docs/gpu-status.md: which CUDA kernel was compiled, executed on the CPU stand-in and run on hardware.

    python tools/gpu_status.py           after the tests of tests/cuda_on_cpu passed here: takes over what they recorded
    python tools/gpu_status.py --render  writes the page again from docs/gpu-status.json

Every figure comes from a test: registers and spills from nvcc's report for sm_80, launches and seeds from the
stand-in's tallies (build/cuda_on_cpu/), the hardware's part from `make gpu-check`, which writes docs/gpu-status.json
on a machine with a GPU. A kernel is a __global__ function of csrc/*/cuda/*.cu; instances of a template share a row.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "cuda_on_cpu"
FACTS, PAGE = ROOT / "docs" / "gpu-status.json", ROOT / "docs" / "gpu-status.md"
BUILDS = ("fast", "race", "asan")
_KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^;{]*?\)\s+)?(\w+)\s*\(")

HEAD = """# CUDA kernels: what has run where

Written by `python tools/gpu_status.py` from what the tests recorded; do not edit.

| kernel | file | registers (sm_80) | spilled bytes | on the CPU stand-in | on hardware |
| --- | --- | --- | --- | --- | --- |
"""
TAIL = """
*On the CPU stand-in* means what [cuda-on-cpu.md](cuda-on-cpu.md) says, the logic and not the speed: launches without a
finding in each build, over all shapes, types and orders of the tests. What never ran on hardware is off by default: a
CUDA tensor gets an error that says so. `FASTSPARSE_UNPROVEN=1` turns the kernels on, `fastsparse check --device cuda`
holds them against the oracle, and `make gpu-check` runs all tests and timings on the device and fills the last column.
"""


def kernels_in_sources() -> dict[str, str]:
    """ "csrc/qdq/cuda/sm80.cu token_by_warp" -> "csrc/qdq/cuda/sm80.cu", in the order of the sources."""
    found = {}
    for source in sorted((ROOT / "csrc").glob("*/cuda/*.cu")):
        name = str(source.relative_to(ROOT))
        for kernel in _KERNEL.findall(source.read_text(encoding="utf-8")):
            found[f"{name} {kernel}"] = name
    return found


def compiled(report: str) -> dict[str, dict[str, list[int]]]:
    """kernel -> registers and spilled bytes of its instances, from what `nvcc -Xptxas -v` says."""
    found: dict[str, dict[str, list[int]]] = {}
    pattern = r"Function properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    for mangled, spills, registers in re.findall(pattern, report, flags=re.DOTALL):
        demangled = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
        name = re.search(r"(\w+)(?:<.*>)?\(", demangled.replace("(anonymous namespace)::", ""))
        if name is not None:
            entry = found.setdefault(name[1], {"registers": [], "spills": []})
            entry["registers"].append(int(registers))
            entry["spills"].append(int(spills))
    return found


def take_over(facts: dict[str, Any]) -> None:
    """Brings in the last test run's records; if one is missing, that is an error."""
    commit = _commit()
    tallies = {build: json.loads((OUT / f"tally-{build}.json").read_text())["kernels"] for build in BUILDS}
    kernels = facts.setdefault("kernels", {})
    for name, source in kernels_in_sources().items():
        record = OUT / "nvcc" / f"{source.replace('/', '_')}.json"
        resources = compiled(json.loads(record.read_text())["report"]).get(name.split()[1])
        if resources is None:
            raise SystemExit(f"gpu_status: nvcc's report does not name {name}")
        entry = kernels.setdefault(name, {})
        entry["registers"] = [min(resources["registers"]), max(resources["registers"])]
        entry["spills"] = max(resources["spills"])
        runs = {build: tallies[build].get(name) for build in BUILDS}
        entry["standin"] = {"commit": commit, "runs": runs}
    for gone in kernels.keys() - kernels_in_sources().keys():
        del kernels[gone]


def render(facts: dict[str, Any]) -> str:
    lines = []
    for name, source in kernels_in_sources().items():
        entry = facts["kernels"].get(name, {})
        low, high = entry.get("registers", ("?", "?"))
        registers = f"{low}" if low == high else f"{low} to {high}"
        cells = [f"`{name.split()[1]}`", f"`{source}`", registers, str(entry.get("spills", "?"))]
        lines.append(f"| {' | '.join([*cells, _standin(entry), _hardware(entry)])} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def _standin(entry: dict[str, Any]) -> str:
    standin = entry.get("standin")
    if standin is None:
        return "not yet"
    runs = []
    for build in BUILDS:
        run = standin["runs"][build]
        if run is None:
            runs.append(f"{build}: never")
        else:
            seeds = len(run["seeds"])
            runs.append(f"{build}: {run['launches']} launches, {seeds} seed{'s' if seeds != 1 else ''}")
    return f"{'; '.join(runs)} ({standin['commit']})"


def _hardware(entry: dict[str, Any]) -> str:
    found = entry.get("hardware")
    if found is None:
        return "never run"
    parts = [f"{found['device']}, {found['commit']}: {found['result']}"]
    if found.get("worst") is not None:
        parts.append(f"largest error {found['worst']:.2g} of what is allowed")
    for timing in found.get("timings", []):
        parts.append(
            f"{timing['what']} {timing['seconds'] * 1e6:.1f} us, {timing['fraction']:.2f} of {timing['ceiling']}"
        )
    return "; ".join(parts)


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    paths = ["csrc", "tests/cuda_on_cpu"]
    if git("status", "--porcelain", "--", *paths):
        raise SystemExit("gpu_status: csrc and tests/cuda_on_cpu must be committed first: the page names the commit")
    return git("log", "-1", "--format=%h", "--", *paths)


def load() -> dict[str, Any]:
    return json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else {}


def write(facts: dict[str, Any]) -> None:
    FACTS.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(render(facts), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--render", action="store_true", help="only write the page from docs/gpu-status.json")
    options = parser.parse_args()
    facts = load()
    if not options.render:
        missing = [str(path) for path in (OUT / f"tally-{build}.json" for build in BUILDS) if not path.exists()]
        if missing:
            raise SystemExit(f"gpu_status: run pytest tests/cuda_on_cpu first; there is no {', '.join(missing)}")
        take_over(facts)
    write(facts)
    print(f"{PAGE.relative_to(ROOT)}: {len(kernels_in_sources())} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
