"""The builds that the tests of this folder run in: fast and race here, asan in a process of its own (test_asan.py).

With CUDA_ON_CPU_BUILDS=device the same tests run on a GPU, by torch (device.py; `make gpu-check`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import device
import sanitized
import standin

BUILDS = os.environ.get("CUDA_ON_CPU_BUILDS", "fast,race").split(",")


if BUILDS == ["device"]:  # the other files are about the stand-in itself
    collect_ignore = [f"test_cuda_{name}.py" for name in ("asan", "compiled", "defects", "status", "wrappers")]


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Any:
    return device.load() if request.param == "device" else standin.load(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The process with sanitizers takes as long as all else: it starts first, and is asked for its result last."""
    last = [item for item in items if item.name == "test_the_kernels_under_sanitizers"]
    items[:] = [item for item in items if item not in last] + last


def pytest_collection_finish(session: pytest.Session) -> None:
    wanted = any(item.name == "test_the_kernels_under_sanitizers" for item in session.items)
    if wanted and "CUDA_ON_CPU_BUILDS" not in os.environ and not session.config.option.collectonly:
        sanitized.start()


_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # The page of docs/gpu-status.md may wait for what this session records.
    if report.failed and "test_cuda_status.py" not in report.nodeid:
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not _failed:
        standin.record(standin.builds.OUT)
