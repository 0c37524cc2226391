"""fastsparse: PyTorch networks that are smaller and measurably faster.

Importing the package loads neither torch nor the kernels; the first use of a name below does.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("fastsparse")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_MODULES = ("convert", "distill", "io", "nn", "ops", "prune", "quantize", "reference", "report", "select")
_FUNCTIONS = {"info": "_info", "check": "_check", "save": "io", "load": "io"}

__all__ = [
    "__version__",
    "check",
    "convert",
    "distill",
    "info",
    "io",
    "load",
    "nn",
    "ops",
    "prune",
    "quantize",
    "reference",
    "report",
    "save",
    "select",
]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        value = getattr(importlib.import_module(f"fastsparse.{_FUNCTIONS[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"fastsparse.{name}")
    else:
        raise AttributeError(f"module 'fastsparse' has no attribute {name!r}")
    globals()[name] = value
    return value
