"""`fastsparse.info()`: what runs here and why; works, and says what is wrong, where the kernels can't be loaded."""

from __future__ import annotations

import os
import platform
from typing import Any

import fastsparse
from fastsparse import _library


def info() -> dict[str, Any]:
    """Facts about this installation.

    Returns:
        version, python, cpu; torch (its version, or None); problem (why the kernels can't be used, or None); isa (the
        level in use, or None), isa_reason, isa_available; cuda_built (the toolkit's version, or None), cuda_available,
        cuda_device, cuda_driver, cuda_unproven (CUDA kernels that never ran on hardware, and are off unless
        FASTSPARSE_UNPROVEN=1); num_threads; formats_file (where the measured choices of sparse formats are
        remembered, or None: the rule of thumb decides), formats_measured (how many); build (how the binary was built).
    """
    facts: dict[str, Any] = {
        "version": fastsparse.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "torch": None,
        "problem": None,
        "isa": None,
        "isa_reason": None,
        "isa_available": [],
        "cuda_built": None,
        "cuda_available": False,
        "cuda_device": None,
        "cuda_driver": None,
        "cuda_unproven": [],
        "num_threads": None,
        "formats_file": None,
        "formats_measured": 0,
        "build": {},
    }
    try:
        extension = _library.load()
    except _library.LibraryError as error:
        facts["problem"] = str(error)
        facts["torch"] = _library.torch_version()
        return facts
    import torch

    facts["torch"] = torch.__version__
    facts["num_threads"] = torch.get_num_threads()
    from fastsparse.ops import _auto

    path = _auto.file()
    facts["formats_file"], facts["formats_measured"] = (None if path is None else str(path)), _auto.remembered()
    build = extension.build_info()
    facts["build"] = build
    facts["cuda_built"] = None if build["cuda"] == "off" else build["cuda"]
    facts["isa_available"] = extension.isa_available()
    try:
        facts["isa"] = extension.isa()
        facts["isa_reason"] = extension.isa_reason()
        facts["cuda_unproven"] = [k["name"] for k in extension.kernels() if k["level"] == "cuda" and not k["proven"]]
    except ValueError as error:  # FASTSPARSE_ISA names a level that is not here
        facts["problem"] = str(error)
    facts["cuda_available"] = torch.cuda.is_available()
    if facts["cuda_available"]:
        facts["cuda_device"] = torch.cuda.get_device_name()
        facts["cuda_driver"] = _cuda_driver()
    return facts


def cpu_name() -> str:
    """The CPU's model as the system calls it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cuda_driver() -> str | None:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            return file.readline().strip() or None
    except OSError:
        return None


def info_text() -> str:
    """info() for people, one fact a line."""
    facts = info()
    lines = [f"fastsparse {facts['version']}, Python {facts['python']}, {facts['cpu']}, {os.cpu_count()} CPUs"]
    lines.append(f"torch       {facts['torch'] or 'not usable'}")
    if facts["problem"]:
        lines.append(f"PROBLEM     {facts['problem']}")
    if facts["isa"]:
        available = ", ".join(facts["isa_available"])
        lines.append(f"ISA level   {facts['isa']}: {facts['isa_reason']} (available: {available})")
    if facts["build"]:
        build = facts["build"]
        lines.append(f"built with  torch {build['built_with_torch']}, compiler {build['compiler']}")
        lines.append(f"CUDA build  {facts['cuda_built'] or 'no (FASTSPARSE_CUDA=ON at build time makes one)'}")
        device = f"{facts['cuda_device']}, {facts['cuda_driver']}" if facts["cuda_available"] else "none for torch"
        lines.append(f"CUDA device {device}")
        for name in facts["cuda_unproven"]:
            lines.append(f"            {name}: never ran on hardware; off unless FASTSPARSE_UNPROVEN=1")
        lines.append(f"threads     {facts['num_threads']}")
        remembered = f"{facts['formats_measured']} measured choices in {facts['formats_file']}"
        rule = "by a rule of thumb (FASTSPARSE_CACHE is off)"
        lines.append(f"formats     {remembered if facts['formats_file'] else rule}")
    return "\n".join(lines)
