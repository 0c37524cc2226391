"""The same tests with AddressSanitizer and UndefinedBehaviorSanitizer, which need a process of their own."""

from __future__ import annotations

import os
import re

import pytest
import sanitized


@pytest.mark.skipif("CUDA_ON_CPU_BUILDS" in os.environ, reason="this is that process")
def test_the_kernels_under_sanitizers() -> None:
    done = sanitized.result()
    output = done.stdout[-6000:] + done.stderr[-6000:]
    assert done.returncode == 0, output
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, output
    assert int(passed[1]) > 50, output
