"""The same tests with AddressSanitizer and UndefinedBehaviorSanitizer, which need a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import builds
import pytest

HERE = Path(__file__).parent


@pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="this is that process")
def test_the_kernels_under_sanitizers() -> None:
    builds.build("asan")
    environment = {**os.environ, **builds.sanitizer_environment(), "CUDA_ON_CPU_BUILDS": "asan"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(HERE), "-p", "no:cacheprovider", "-x"],
        capture_output=True,
        text=True,
        env=environment,
    )
    output = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0, output
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, output
    assert int(passed[1]) > 50, output
