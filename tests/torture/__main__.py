"""The long fault campaign, from the command line.

    python -m tests.torture [--kills 200] [--seconds 1800] [--seed N]

Ends with 1 and the reason if anything was lost, doubled or changed, or if a phase had fewer than ten kills.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.torture.campaign import run
from tests.torture.phases import PHASES
from tests.torture.server import own_server

KILLS_PER_PHASE = 10


def say(text: str) -> None:
    """At once, also into a pipe."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description="The long fault campaign.")
    parser.add_argument("--kills", type=int, default=200, help="how many times the daemon is killed")
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long at the most")
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="the same dice again")
    parser.add_argument("--lives", type=int, default=20, help="kills in a round")
    given = parser.parse_args()
    say(f"seed {given.seed}")
    began = time.monotonic()
    with own_server() as server:
        tally = run(
            server, seed=given.seed, kills=given.kills, seconds=given.seconds, lives=given.lives,
            say=say,
        )  # fmt: skip
    say(f"{tally.report()}\nseed {given.seed}, {time.monotonic() - began:.0f} s")
    few = [phase for phase in PHASES if tally.kills[phase] < KILLS_PER_PHASE]
    if few or tally.kills.total() < given.kills:
        say(f"not enough: {tally.kills.total()} kills of {given.kills}; fewer than {KILLS_PER_PHASE} in {few}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
