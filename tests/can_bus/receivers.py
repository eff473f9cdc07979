"""What receiving costs, ours and others', as the host counts it for the guest that all this runs in.

The guest's own figures are of no use: it charges by the tick of 10 ms, and who sleeps until a tick is hardly charged at
all. So a receiver costs what the guest takes while frames are sent with the receiver there, less without it.

`python -m tests.can_bus.receivers RATE…`, in tests/with_can, prints a table; with a receiver's name and a channel it is
that one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop

from ingestd.model import Clock, Event, FrameBatch
from ingestd.sources.socketcan import SocketCan
from tests.can_bus.bus import SECONDS_MAX, Bus

RECEIVERS = ("ingestd", "candump -L", "python-can")
WARM_UP_S = 2.5  # Until a receiver waits for frames.
_QUESTIONS = itertools.count()


class Nowhere:
    """A recorder that lets nothing be lost and keeps nothing."""

    def frames(self, batch: FrameBatch, clock: Clock) -> None:
        pass

    def overflow(self, source: str, frames_count: int, from_ns: int, to_ns: int) -> None:
        raise AssertionError(f"{source} lost {frames_count} frames")

    def event(self, event: Event) -> None:
        pass


def python_can(channel: str) -> None:
    """What its documentation shows: a message at a time."""
    import can

    with can.Bus(channel, "socketcan", ignore_config=True) as bus:
        while True:
            bus.recv()


def guest_cpu_ns() -> int:
    """The processor time of the guest's living processes, and of its kernel."""
    question = Path(os.environ["WITH_CAN_CPU"]) / str(next(_QUESTIONS))
    question.with_suffix(".ask").touch()
    deadline_s = time.monotonic() + SECONDS_MAX
    while not question.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    return int(question.read_text())


@contextlib.contextmanager
def flooding(rate: int, seconds: float, *channels: str) -> Iterator[subprocess.Popen[str]]:
    """A flood that is ready and waits for a line."""
    command = [sys.executable, "-m", "tests.can_bus.flood", str(rate), str(seconds), *channels]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as flood:
        assert flood.stdout.readline() == "ready\n"
        yield flood
        flood.stdin.close()
        assert flood.wait(SECONDS_MAX) == 0


def spent_ns(channel: str, rate: int, seconds: float, receiver: str = "") -> int:
    """What the guest takes for that many frames, with that receiver or none."""
    with contextlib.ExitStack() as stack:
        if receiver:
            command = ["candump", "-L", channel]
            if receiver != "candump -L":
                command = [sys.executable, "-m", "tests.can_bus.receivers", receiver, channel]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL))
            stack.callback(process.kill)
            time.sleep(WARM_UP_S)
        flood = stack.enter_context(flooding(rate, seconds, channel))
        before_ns = guest_cpu_ns()
        flood.stdin.write("go\n")
        flood.stdin.flush()
        assert flood.stdout.readline() == "done\n"
        spent = guest_cpu_ns() - before_ns
        assert not receiver or process.poll() is None
    return spent


def cpu_us_per_frame(rate: int, seconds: float, receivers: tuple[str, ...] = RECEIVERS) -> dict[str, float]:
    """Microseconds of a processor that each of them takes for a frame, with wake-ups, system calls and the kernel."""
    bus = Bus()
    bus.add()
    try:
        for_sending = spent_ns(bus.channel, rate, seconds)
        return {
            name: (spent_ns(bus.channel, rate, seconds, name) - for_sending) / 1e3 / rate / seconds
            for name in receivers
        }
    finally:
        bus.delete()


def main(arguments: list[str]) -> None:
    if arguments[0] == "ingestd":
        uvloop.run(SocketCan("x", arguments[1]).run(Nowhere()))
    elif arguments[0] == "python-can":
        python_can(arguments[1])
    else:
        for rate in map(int, arguments):
            spent = cpu_us_per_frame(rate, 5.0)
            sys.stdout.write(f"{rate:6} frames/s: " + ", ".join(f"{k} {v:.2f} us" for k, v in spent.items()) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
