"""Sources that begin and end while others record."""

from __future__ import annotations

import asyncio

from ingestd.daemon.attendance import Attendance
from ingestd.model import Recorder, SourceStatus


class Slow:
    """A source that takes its time to hand over the last that it has."""

    name = "slow"

    def __init__(self) -> None:
        self.status = SourceStatus()
        self.has_ended = False
        self.may_end = asyncio.Event()

    async def run(self, recorder: Recorder) -> None:
        del recorder
        try:
            await asyncio.Event().wait()
        finally:
            await self.may_end.wait()
            self.has_ended = True


async def test_a_stop_waits_for_what_a_reload_has_told_to_end() -> None:
    """Else the journal would be closed before it has the last frames."""
    source = Slow()
    attendance = Attendance([source], None, lambda task: None)  # type: ignore[arg-type]
    attendance.begin_all()
    await asyncio.sleep(0)
    reloading = asyncio.create_task(attendance.end(["slow"]))
    await asyncio.sleep(0)
    stopping = asyncio.create_task(attendance.end_all())
    await asyncio.sleep(0.05)
    assert not stopping.done()
    source.may_end.set()
    await stopping
    assert source.has_ended
    await reloading
