"""Loads `libfastsparse.so` and `_C`, or says in one sentence why it can't.

`fastsparse info` must work with a torch that is missing, too old or foreign to the binary, so nothing here runs at
import: `load()` is called by the first module that needs a kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pathlib
import re
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

OLDEST_TORCH = (2, 11)


class LibraryError(ImportError):
    """fastsparse's kernels can't be loaded; the message says why and what to do."""


def torch_version() -> str | None:
    """The version of the installed torch, not imported; None if there is none."""
    try:
        return version("torch")
    except PackageNotFoundError:
        return None


def torch_problem() -> str | None:
    """What is wrong with the installed torch, in one sentence, or None. Does not load the kernels."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'torch>=2.11', then install fastsparse again"
    have = torch_version() or "of unknown version"
    match = re.match(r"(\d+)\.(\d+)", have)
    if match and (int(match[1]), int(match[2])) < OLDEST_TORCH:
        return f"torch {have} is too old: fastsparse needs 2.11 or newer (pip install -U 'torch>=2.11')"
    try:
        importlib.import_module("torch")
    except Exception as error:
        return f"torch {have} is installed but can't be imported: {type(error).__name__}: {error}"
    return None


@functools.cache
def load() -> ModuleType:
    """Loads the kernels once and returns `_C`. Raises LibraryError."""
    problem = torch_problem()
    if problem is not None:
        raise LibraryError(problem)
    import torch

    path = library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise LibraryError(
            f"libfastsparse.so does not fit torch {torch.__version__} ({error}); reinstall fastsparse beside this "
            "torch: pip install --no-build-isolation --force-reinstall --no-deps fastsparse"
        ) from error
    try:
        return importlib.import_module("fastsparse._C")
    except ImportError as error:
        raise LibraryError(
            f"fastsparse._C was built for another Python ({error}); reinstall fastsparse with this one"
        ) from error


def library_path() -> pathlib.Path:
    """Where libfastsparse.so is. It stands beside `_C`, which in an editable install is not beside this file."""
    spec = importlib.util.find_spec("fastsparse._C")
    if spec is None or spec.origin is None:
        raise LibraryError("fastsparse is not built here: run `make test`, or install it with pip")
    return pathlib.Path(spec.origin).parent / "libfastsparse.so"
