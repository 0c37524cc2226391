"""Settings for all tests."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# The same examples in every run, and no verdict that depends on timing.
hypothesis.settings.register_profile("fastsparse", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("fastsparse")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)
