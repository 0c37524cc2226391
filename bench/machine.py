"""What a result was measured on: CPU, caches, ISA level, versions. Nothing that names a host, a user or a path."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Best last; the names fastsparse uses for the caps in FASTSPARSE_ISA.
LEVELS = ("scalar", "avx2", "avxvnni", "avx512", "amx")

# Sizes where the system does not say: common, and marked as assumed in the result.
ASSUMED_CACHES = {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


def cache_sizes() -> dict[str, int]:
    """Bytes of the data caches that core 0 sees, by level; empty where the system does not say."""
    sizes: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "type").read_text().strip() == "Instruction":
                continue
            text = (index / "size").read_text().strip()
            unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1])
            sizes["L" + (index / "level").read_text().strip()] = int(text[:-1]) * unit if unit else int(text)
        except (OSError, ValueError, IndexError):
            continue
    return {level: sizes[level] for level in ("L1", "L2", "L3") if level in sizes}


def caches() -> dict[str, int]:
    """`cache_sizes`, or common ones."""
    return cache_sizes() or dict(ASSUMED_CACHES)


def _cpuinfo() -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return found
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        found[key.strip()] = value.strip()
    return found


def cpu_level() -> str:
    """The best level this CPU reaches, whatever FASTSPARSE_ISA says (from the kernel's flags)."""
    flags = set(_cpuinfo().get("flags", "").split())
    avx2 = {"avx2", "fma", "f16c"} <= flags
    if avx2 and {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"} <= flags:
        return "amx" if {"amx_tile", "amx_int8"} <= flags else "avx512"
    if avx2 and "avx_vnni" in flags:
        return "avxvnni"
    return "avx2" if avx2 else "scalar"


def beyond_avx2() -> bool:
    """Has this CPU more than AVX2, so that something that is to be compared on AVX2 must be held to it?"""
    return bool({"avx512f", "avx_vnni"} & set(_cpuinfo().get("flags", "").split()))


def level_in_use(info: dict[str, Any] | None = None) -> str:
    """What fastsparse says it uses; without it, the CPU's best level capped by FASTSPARSE_ISA."""
    if info and info.get("isa") in LEVELS:
        return str(info["isa"])
    best, cap = cpu_level(), os.environ.get("FASTSPARSE_ISA", "")
    return cap if cap in LEVELS and LEVELS.index(cap) < LEVELS.index(best) else best


def above(level: str, other: str) -> bool:
    """Is `level` better than `other`?"""
    return LEVELS.index(level) > LEVELS.index(other)


# Torch's and OpenVINO's int8 go through oneDNN, which takes AMX where it finds it.
_ONEDNN = {"avx512": "AVX512_CORE_VNNI", "avxvnni": "AVX2_VNNI", "avx2": "AVX2"}


def hold(isa: str, best: str) -> dict[str, str]:
    """The environment that holds peers to the level `isa`; empty where that is the best this CPU has."""
    return {"ONEDNN_MAX_CPU_ISA": _ONEDNN[isa]} if above(best, isa) and isa in _ONEDNN else {}


def loadavg() -> list[float] | None:
    return [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None


def short_name(model: str, family: str, number: str) -> str:
    """A file-name part: `amd-epyc-7763`; with family and model number where the name tells models not apart."""
    name = re.sub(r"\((r|tm)\)|@.*|\b(cpu|processor|\d+-core)\b", " ", model.lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "cpu"
    return slug if re.search(r"\d", slug) or not family else f"{slug}-family{family}-model{number}"


def scrub(text: str) -> str:
    """Takes this machine's folders, host and user out of a message that goes into a result."""
    folders = {
        str(ROOT): "<repo>",
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
        str(Path.home()): "~",
    }
    for folder in sorted(folders, key=len, reverse=True):
        if len(folder) > 1:
            text = text.replace(folder, folders[folder])
    text = re.sub(r"(?<![\w.<>~])/(?:[\w.+@-]+/)+", "<path>/", text)
    host = platform.node()
    return text.replace(host, "<host>") if len(host) > 2 else text


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


# In a process of its own: an import that fails, or crashes, must not end the bench.
_PROBE = """
import json, sys
found = {"python": sys.version.split()[0]}
try:
    import torch
    found["torch"] = torch.__version__
    found["torch_cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    found["mkl"] = torch.backends.mkl.is_available()
except Exception as e:
    found["torch_error"] = f"{type(e).__name__}: {e}"
try:
    import fastsparse
    found["fastsparse"] = fastsparse.info()
    found["fastsparse"].pop("formats_file", None)
except Exception as e:
    found["fastsparse_error"] = f"{type(e).__name__}: {e}"
print("PROBE" + json.dumps(found, default=str))
"""


def software() -> dict[str, Any]:
    """Versions of Python, torch and fastsparse, or why one of the two can't be imported."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"fastsparse_error": "importing it took more than 120 s"}
    for line in done.stdout.splitlines():
        if line.startswith("PROBE"):
            found: dict[str, Any] = json.loads(scrub(line[len("PROBE") :]))
            return found
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"fastsparse_error": scrub(f"importing torch and fastsparse ended with code {done.returncode}: {last}")}


def describe() -> dict[str, Any]:
    """Everything a result says about the machine it comes from."""
    cpu, found = _cpuinfo(), software()
    info = found.get("fastsparse")
    model = cpu.get("model name") or platform.processor() or platform.machine()
    compiler = _run(os.environ.get("CXX", "c++"), "--version")
    return {
        "cpu": model,
        "cpu_family": cpu.get("cpu family"),
        "cpu_model": cpu.get("model"),
        "name": short_name(model, cpu.get("cpu family", ""), cpu.get("model", "")),
        "cores": os.cpu_count(),
        "caches": caches(),
        "caches_assumed": not cache_sizes(),
        "cpu_level": cpu_level(),
        "beyond_avx2": beyond_avx2(),
        "isa": level_in_use(info),
        "software": found,
        "compiler": compiler.splitlines()[0] if compiler else None,
        "kernel": " ".join([platform.system(), *re.findall(r"^\d+\.\d+", platform.release())]),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "commit": _run("git", "rev-parse", "--short=12", "HEAD"),
        "uncommitted_changes": bool(_run("git", "status", "--porcelain")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "loadavg_start": loadavg(),
    }
