"""These tests need SocketCAN and the right to add interfaces; tests/integration/test_own_kernel.py gives them both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache

import pytest

from tests.can_bus.bus import Bus, has_vcan

_HAS_VCAN = cache(has_vcan)


@pytest.fixture(autouse=True)
def _vcan() -> None:
    if not _HAS_VCAN():
        pytest.skip("no vcan here: tests/integration/test_own_kernel.py runs this in a kernel of its own")


@pytest.fixture
def bus() -> Iterator[Bus]:
    """A bus that is up."""
    with Bus() as made:
        yield made


@pytest.fixture
def buses() -> Iterator[list[Bus]]:
    """Four of them."""
    made = [Bus() for _ in range(4)]
    for one in made:
        one.add()
    yield made
    for one in made:
        one.delete()


@pytest.fixture
def own_machine() -> None:
    """A kernel whose wall clock may be set and whose processor is ours."""
    if "WITH_CAN" not in os.environ:
        pytest.skip("only in tests/with_can: the wall clock of this machine is not ours to set")
