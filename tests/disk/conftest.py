"""These tests need a kernel of their own; tests/integration/test_own_kernel.py gives it to them."""

from __future__ import annotations

import os

import pytest

from tests.disk.devices import load_modules


@pytest.fixture(autouse=True)
def _own_kernel() -> None:
    if "WITH_CAN" not in os.environ:
        pytest.skip("tests/integration/test_own_kernel.py runs this in a kernel of its own")
    load_modules()
