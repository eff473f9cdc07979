"""The fault campaign in its short form; `make torture` is the long one."""

from __future__ import annotations

import os
import random
import sys

import pytest

from tests.torture.campaign import run
from tests.torture.server import own_server

KILLS = 14


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_every_phase_while_all_around_it_fails() -> None:
    """Fourteen lives and deaths of a daemon: every frame is in SQL once, with its number, and the books say so."""
    seed = int(os.environ.get("INGESTD_TEST_SEED", random.randrange(2**32)))
    sys.stdout.write(f"seed {seed}\n")  # INGESTD_TEST_SEED rolls the same dice again.
    with own_server() as server:
        tally = run(server, seed=seed, kills=KILLS, seconds=600, lives=KILLS, say=print)
    assert tally.kills.total() == KILLS, tally.report()
    assert tally.frames > 1000, tally.report()
