"""Four busy buses in one process, and what a frame costs; the figures are printed (`pytest -s`)."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import pytest

from ingestd.sources.socketcan import SocketCan
from tests.can_bus.bus import Bus, Recording, opened, running, until
from tests.can_bus.receivers import cpu_us_per_frame, flooding, guest_cpu_ns

RATE, SECONDS = 8_000, 20

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_machine")]


def say(figures: str) -> None:
    sys.stdout.write(f"\n{figures}\n")


class Numbers(Recording):
    """Keeps the number and the stamp of each frame, and not the batches: two and a half million frames."""

    def frames(self, batch, clock) -> None:
        self.batches.append((batch.ts_ns, np.ascontiguousarray(batch.data[:, :8]).view("<u8")[:, 0]))
        self.count += len(batch)


async def test_four_buses_at_8000_frames_a_second_lose_nothing(buses: list[Bus]) -> None:
    """For 20 s, with the default receive buffer: every number is there, once and in order, and no stamp goes back."""
    sent = RATE * SECONDS
    sources = [SocketCan(bus.channel, bus.channel) for bus in buses]
    recordings = [Numbers() for _ in buses]
    with flooding(RATE, SECONDS, *(bus.channel for bus in buses)) as flood:
        async with (
            running(sources[0], recordings[0]),
            running(sources[1], recordings[1]),
            running(sources[2], recordings[2]),
            running(sources[3], recordings[3]),
        ):
            for source in sources:
                await opened(source)
            began_s, began_ns = asyncio.get_running_loop().time(), guest_cpu_ns()
            flood.stdin.write("go\n")
            flood.stdin.flush()
            assert await asyncio.to_thread(flood.stdout.readline) == "done\n"
            took_s = asyncio.get_running_loop().time() - began_s
            await until(lambda: all(r.count + r.lost_count == sent for r in recordings), "every frame, or its loss")
            spent_s = (guest_cpu_ns() - began_ns) / 1e9
    rate = 4 * sent / took_s
    lost = [recording.lost_count for recording in recordings]
    say(
        f"4 buses, {rate:.0f} frames/s in all for {took_s:.1f} s: lost {sum(lost)}, {spent_s:.1f} s CPU with the sender"
    )
    assert lost == [0] * 4
    assert took_s < SECONDS * 1.2, "the sender did not keep its rate"
    for recording in recordings:
        assert (np.concatenate([numbers for _, numbers in recording.batches]) == np.arange(sent)).all()
        assert (np.diff(np.concatenate([ts_ns for ts_ns, _ in recording.batches])) >= 0).all()
        assert recording.events == []


def test_a_frame_costs_less_than_candump_takes() -> None:
    """Recording into nothing, beside `candump -L` to nowhere, at 8,000 frames a second."""
    spent = cpu_us_per_frame(8_000, 3.0, ("ingestd", "candump -L"))
    say(", ".join(f"{name} {us:.1f} us/frame" for name, us in spent.items()))
    assert spent["ingestd"] < spent["candump -L"]
