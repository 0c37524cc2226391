"""The tests of this folder in a process of their own, with AddressSanitizer and UndefinedBehaviorSanitizer.

Started at the begin of the session where it is asked for, so that it runs beside the others on a second core.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import builds

_started: Future[subprocess.CompletedProcess[str]] | None = None


def _run() -> subprocess.CompletedProcess[str]:
    builds.build("asan")  # not in that process: compilers don't run under the sanitizers' preload
    environment = {**os.environ, **builds.sanitizer_environment(), "CUDA_ON_CPU_BUILDS": "asan"}
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-p", "no:cacheprovider", "-x"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def start() -> None:
    global _started
    if _started is None:
        pool = ThreadPoolExecutor(1)
        _started = pool.submit(_run)
        pool.shutdown(wait=False)


def result() -> subprocess.CompletedProcess[str]:
    start()
    assert _started is not None
    return _started.result()
