"""A day without a database: what was recorded meanwhile goes in, all of it and in order, while recording goes on.

The day is compressed in time: the journal itself writes it, with stamps over 24 hours, as three lives of the daemon
would have. Every frame, on two buses and a serial line, holds its number; the line goes on where the day ended, live.
Batches are made small, so that emptying the journal takes as many transactions as that of a real day.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import asyncpg
import numpy as np
import pytest

from ingestd.journal import Journal, SessionInfo
from ingestd.model import Clock, ClockState, FrameBatch, SerialFlag
from ingestd.store import embedded
from ingestd.store.sessions import machine_id, new_session_id
from tests.books import assert_books, in_metrics
from tests.conftest import psql
from tests.journals import BOOT_ID
from tests.recorder import Instrument, Recorder, lines_of, wait_until

DAY = "a day without a database"  # the name of its session
DAY_NS = 24 * 3600 * 10**9
LIVES = 3
READ_EVERY_NS = 60 * 10**9  # So often each source says something in the compressed day: …
FRAMES_A_READ = 12  # … a bus that many frames in 20 ms, the line one line.
READS = DAY_NS // READ_EVERY_NS
SENT = {"can0": READS * FRAMES_A_READ, "can1": READS * FRAMES_A_READ, "line": READS}
SMALL_BATCHES = "import ingestd.delivery.sending as sending; sending.BATCH_BYTES_MAX = 2_000"


def can(source: str, first: int, at_ns: int) -> FrameBatch:
    """What a bus carries in 20 ms, from frame number `first` on."""
    data = np.frombuffer(b"".join(b"n=%06d" % (first + n) for n in range(FRAMES_A_READ)), np.uint8)
    stamps = at_ns + np.arange(FRAMES_A_READ) * 1_500_000
    ids = np.arange(FRAMES_A_READ, dtype=np.uint32) + 0x100
    flags, lengths = np.zeros(FRAMES_A_READ, np.uint8), np.full(FRAMES_A_READ, 8, np.uint16)
    return FrameBatch(source, stamps, ids, flags, lengths, data.reshape(-1, 8))


def line(number: int, at_ns: int) -> FrameBatch:
    """A line of the serial device, as its source gives it."""
    text = b"n=%d" % number
    data = np.frombuffer(text.ljust(16, b"\0"), np.uint8).reshape(1, -1)
    flags = np.array([SerialFlag.SERIAL | SerialFlag.TEXT], np.uint8)
    return FrameBatch("line", np.array([at_ns]), np.zeros(1, np.uint32), flags, np.array([len(text)], np.uint16), data)


def record_a_day(folder: Path) -> None:
    """The journal of a day without a database, in lives of which none ended well, on a boot that is over."""
    clock = Clock(time.time_ns() - DAY_NS, ClockState.SET)
    session = SessionInfo(new_session_id(), {"name": DAY, "time_base": BOOT_ID})
    for life in range(LIVES):
        journal = Journal.open(
            folder, session=session, machine_id=machine_id(), boot_id=BOOT_ID, max_bytes=1 << 28, segment_bytes=1 << 19
        )
        journal.recover()
        for read in range(READS * life // LIVES, READS * (life + 1) // LIVES):
            at_ns = read * READ_EVERY_NS
            journal.append_frames(can("can0", read * FRAMES_A_READ, at_ns), clock)
            journal.append_frames(can("can1", read * FRAMES_A_READ, at_ns + 7_000), clock)
            journal.append_frames(line(read, at_ns + 90_000), clock)
            if read % 100 == 0:
                journal.sync()
        journal.close(ended=False)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Instrument]:
    """What is on the line: it goes on with the numbers where the day ended. Not started yet."""
    found = Instrument(tmp_path / "device", say=lambda number: b"n=%d\n" % (READS + number))
    yield found
    found.close()


def a_day_later(folder: Path, dsn: str, device: Instrument) -> Recorder:
    """The daemon on that journal; not started yet."""
    recorder = Recorder(folder, dsn, lines_of(device), changes=SMALL_BATCHES)
    record_a_day(recorder.journal)
    return recorder


def pending(recorder: Recorder) -> int:
    """Frames of the two buses that wait: nothing but the day."""
    books = in_metrics(recorder)
    return sum(books[source].pending for source in ("can0", "can1") if source in books)


def lines_recorded(recorder: Recorder) -> int:
    """How many lines the daemon has recorded."""
    return in_metrics(recorder)["line"].received


def committed(dsn: str) -> int:
    """Frames of the day that are in SQL."""
    return int(psql(dsn, "SELECT coalesce(sum(frame_count), 0) FROM frame_chunks WHERE source IN ('can0', 'can1')"))


def newest_line(dsn: str) -> int:
    """The number of the last line of now that is in SQL."""
    last = psql(
        dsn, "SELECT data FROM frame_chunks WHERE source = 'line' ORDER BY utc_offset_ns + mono_end_ns DESC LIMIT 1"
    )
    numbers = re.findall(rb"n=(\d+)", bytes.fromhex(last.removeprefix("\\x")))
    return int(numbers[-1]) if numbers else -1


def assert_in_order(dsn: str, *, restarts: int = 0) -> None:
    """In the order of commits, numbers and stamps of each source rise.

    In the session of now they may fall once for each restart: the newest stretch goes first.
    """

    async def fetch() -> list[asyncpg.Record]:
        connection = await asyncpg.connect(dsn)
        try:
            return await connection.fetch(
                "SELECT name = $1, source, ts_mono_ns, data"
                " FROM frame_chunks JOIN sessions ON sessions.id = session_id ORDER BY frame_chunks.id",
                DAY,
            )
        finally:
            await connection.close()

    seen: dict[tuple[bool, str], list[tuple[int, int]]] = {}
    for is_of_day, source, stamps, data in asyncio.run(fetch()):
        numbers = [int(each) for each in re.findall(rb"n=(\d+)", data)]
        seen.setdefault((is_of_day, source), []).extend(zip(stamps, numbers, strict=True))
    assert seen.keys() == {*((True, source) for source in SENT), (False, "line")}
    for (is_of_day, _), frames in seen.items():
        falls = sum(one[0] > two[0] or one[1] >= two[1] for one, two in pairwise(frames))
        assert falls <= (0 if is_of_day else restarts)


@pytest.mark.slow
def test_a_day_drains_while_recording_goes_on(tmp_path: Path, migrated: str, device: Instrument) -> None:
    """A day's backlog of three lives goes in exactly once and in order, and lines of now do not wait for its end."""
    psql(  # A slow database: the day is to take some seconds, on a fast machine, too.
        migrated,
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN IF NEW.source = 'can0' THEN PERFORM pg_sleep(0.02); END IF; RETURN NEW; END$$",
        "CREATE TRIGGER dawdle BEFORE INSERT ON frame_chunks FOR EACH ROW EXECUTE FUNCTION dawdle()",
    )
    recorder = a_day_later(tmp_path, migrated, device)
    try:
        recorder.start()
        recorder.wait_for("link up")
        device.start()
        wait_until(lambda: committed(migrated) > 0, "the first of the day", more=recorder.log)
        rounds, waiting = 0, True
        while waiting:
            said = READS + device.sent
            wait_until(lambda said=said: newest_line(migrated) >= said, f"line {said}", more=recorder.log)
            waiting = pending(recorder) > 0
            rounds += waiting  # What was said just now is there, and the day is not yet.
        assert rounds >= 3
        sent = {**SENT, "line": READS + device.stop()}
        books = assert_books(recorder, migrated, sent)
        assert {source: said.committed for source, said in books.items()} == sent
        assert_in_order(migrated)
        assert psql(migrated, "SELECT count(*), count(completed_utc) FROM feeds") == f"{LIVES + 1}|{LIVES + 1}"
    finally:
        recorder.close()


@pytest.mark.slow
def test_the_database_goes_away_again_while_a_day_drains(tmp_path: Path, own_server: Path, device: Instrument) -> None:
    """Stopped twice in the middle of it, and the daemon killed once: all of it is there, once and in order."""
    dsn = embedded.start(own_server)
    recorder = a_day_later(tmp_path, dsn, device)
    try:
        recorder.start()
        recorder.wait_for("link up")
        device.start()
        for blow in range(3):
            before = committed(dsn)

            def more_of_the_day(before: int = before, blow: int = blow) -> bool:
                """Or all of it, which may be through before the last blow."""
                return committed(dsn) > before + 1000 or (blow > 0 and pending(recorder) == 0)

            wait_until(more_of_the_day, "some of the day", more=recorder.log)
            if blow == 1:
                recorder.kill()
                recorder.start()
                recorder.wait_for("link up", after=recorder.begun)
                continue
            embedded.stop(own_server)
            received = lines_recorded(recorder)
            wait_until(lambda received=received: lines_recorded(recorder) > received + 50, "more lines recorded")
            assert pending(recorder) > 0 or blow > 0
            embedded.start(own_server)
        sent = {**SENT, "line": READS + device.stop()}
        assert_books(recorder, dsn, sent)
        assert_in_order(dsn, restarts=1)
    finally:
        recorder.close()
