"""Runs test_cuda_*.py of this folder without pytest, which a machine with a GPU and no network may lack.

    python tests/cuda_on_cpu/plain.py [--small] [FILE ...]

Knows what these tests use of pytest: parametrize, skipif, raises, the fixture `kernels` (always the device, device.py).
--small runs each test with its first parameters only, for tools that slow everything down. Prints one line a test and
a JSON summary as the last line; exit status 1 if a test failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
NOT_HERE = tuple(f"test_cuda_{name}" for name in ("asan", "compiled", "defects", "status", "wrappers"))


class _Mark:
    """pytest.mark: remembers the parameters of a test, and skips by condition."""

    def parametrize(self, names: Any, values: Any, **_: Any) -> Callable[[Any], Any]:
        keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)

        def add(test: Any) -> Any:
            rows = [dict(zip(keys, row if len(keys) > 1 else (row,), strict=True)) for row in values]
            test.parameters = [*getattr(test, "parameters", []), rows]
            return test

        return add

    def skipif(self, condition: Any, **_: Any) -> Callable[[Any], Any]:
        def add(test: Any) -> Any:
            # A text is Python, evaluated with the modules that these tests use.
            skip = eval(condition, {"os": os, "sys": sys}) if isinstance(condition, str) else condition
            test.skip = getattr(test, "skip", False) or bool(skip)
            return test

        return add

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: lambda test: test


@contextlib.contextmanager
def _raises(kind: Any, match: str = "") -> Iterator[None]:
    try:
        yield
    except kind as error:
        if not re.search(match, str(error)):
            raise AssertionError(f"{error} does not match {match!r}") from error
    else:
        raise AssertionError(f"{kind} was not raised")


def install_stand_ins() -> None:
    """pytest, always this one, and hypothesis where the machine lacks it."""
    pytest: Any = types.ModuleType("pytest")
    pytest.mark = _Mark()
    pytest.raises = _raises
    pytest.fixture = lambda *_, **__: lambda function: function
    pytest.MonkeyPatch = pytest.FixtureRequest = object
    pytest.CaptureFixture = dict  # as a generic type in annotations
    sys.modules["pytest"] = pytest
    if importlib.util.find_spec("hypothesis") is None:
        for name in ("hypothesis", "hypothesis.strategies"):
            sys.modules[name] = mock.MagicMock()


def cases(test: Any, small: bool) -> Iterator[dict[str, Any]]:
    for combination in itertools.product(*reversed(getattr(test, "parameters", []))):
        yield {key: value for row in combination for key, value in row.items()}
        if small:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description="The tests of the CUDA kernels on a device, without pytest.")
    parser.add_argument("files", nargs="*", help="default: every test_cuda_*.py")
    parser.add_argument("--small", action="store_true", help="each test with its first parameters only")
    options = parser.parse_args()
    os.environ["CUDA_ON_CPU_BUILDS"] = "device"
    install_stand_ins()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import device
    import torch

    kernels = device.load()
    summary: dict[str, Any] = {"passed": 0, "failed": [], "skipped": []}
    # The compiler, the sanitizers and planted defects are the stand-in's own matter.
    files = options.files or sorted(path.name for path in HERE.glob("test_cuda_*.py") if path.stem not in NOT_HERE)
    for file in files:
        module = importlib.import_module(Path(file).stem)
        for name, test in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("test_") or test.__module__ != module.__name__:
                continue
            where = f"{module.__name__}.{name}"
            given = {key for rows in getattr(test, "parameters", []) for key in rows[0]}
            fixtures = set(inspect.signature(test).parameters) - given
            if getattr(test, "skip", False) or fixtures != {"kernels"}:
                summary["skipped"].append(where)
                continue
            begin, failed = time.perf_counter(), 0
            for arguments in cases(test, options.small):
                torch.manual_seed(0)
                try:
                    test(kernels=kernels, **arguments)
                    summary["passed"] += 1
                except Exception as error:
                    failed += 1
                    summary["failed"].append(f"{where} {arguments}: {type(error).__name__}: {str(error)[:300]}")
                    traceback.print_exc(limit=4)
            print(f"{where}: {'FAILED' if failed else 'ok'}, {time.perf_counter() - begin:.1f} s", flush=True)
    print(json.dumps(summary))
    return 1 if summary["failed"] or not summary["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
