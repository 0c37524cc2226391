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
import standin

BUILDS = os.environ.get("CUDA_ON_CPU_BUILDS", "fast,race").split(",")


if BUILDS == ["device"]:  # the other files are about the stand-in itself
    collect_ignore = [
        f"test_cuda_{name}.py" for name in ("asan", "compiled", "defects", "status", "weight_only", "wrappers")
    ]


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> Any:
    return device.load() if request.param == "device" else standin.load(request.param)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == 0:
        standin.record(standin.builds.OUT)
