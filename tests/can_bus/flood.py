"""A busy bus: `python -m tests.can_bus.flood RATE SECONDS CHANNEL…` sends numbered frames at a steady rate.

It says when it is ready and when it is done, and waits for a line each time: so whoever measures it loses nothing.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from tests.can_bus.bus import Sender, numbered

TICK_S = 0.005


def flood(rate: int, seconds: float, channels: list[str]) -> None:
    """`rate` frames a second on every channel; what is late is caught up."""
    with ExitStack() as stack:
        senders = [stack.enter_context(Sender(channel)) for channel in channels]
        total, sent = int(rate * seconds), 0
        say_and_wait("ready")
        start_s = time.monotonic()
        while sent < total:
            time.sleep(TICK_S)
            due = min(int((time.monotonic() - start_s) * rate), total)
            frames = numbered(due - sent, first=sent)
            for sender in senders:
                sender.send(frames)
            sent = due
        say_and_wait("done")


def say_and_wait(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    sys.stdin.readline()


if __name__ == "__main__":
    flood(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
