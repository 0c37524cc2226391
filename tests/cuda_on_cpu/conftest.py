"""The builds that the tests of this folder run in: fast and race here, asan in a process of its own (test_asan.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import standin

BUILDS = os.environ.get("CUDA_ON_CPU_BUILDS", "fast,race").split(",")


@pytest.fixture(params=BUILDS)
def kernels(request: pytest.FixtureRequest) -> standin.StandIn:
    return standin.load(request.param)
