"""Settings for all tests."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

# The same examples in every run, and no verdict that depends on timing.
hypothesis.settings.register_profile("fastsparse", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("fastsparse")

# Formats by the rule of thumb, also in child processes; tests of the measured choice say otherwise.
os.environ["FASTSPARSE_CACHE"] = "off"


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
