"""Every damage of tests/journal_damages.py down to SQL: what survives is stored exactly once, what does not is counted.

Each is met by a daemon in this process, with a database for all of them; a few, and those that come together, by one in
a process of its own with a device that talks.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingestd.clock import boot_id
from ingestd.config import Batch, Config, Database
from ingestd.config import Journal as JournalConfig
from ingestd.daemon.service import Daemon
from ingestd.delivery.sending import Delivery
from ingestd.journal import Journal, Kind
from ingestd.journal.record import HEADER
from ingestd.model import Books
from ingestd.pipeline import Decoders
from ingestd.store.sessions import machine_id
from ingestd.store.writer import Writer
from tests import journal_damages
from tests.books import Said, in_log
from tests.conftest import _new_database, psql
from tests.journal_damages import DAMAGES, FOREIGN_SOURCE, Outcome, make, placed
from tests.journals import CLOCK, frames, kill, open_journal
from tests.recorder import Instrument, Recorder, lines_of, stored, wait_until

SECONDS_MAX = 120.0
TABLES = "feeds, sessions, signal_chunks, frame_chunks, signal_groups, events"


@pytest.fixture(scope="module")
def one_database(postgres_server: str, migrated_template: str) -> Iterator[str]:
    """A database for all tests of this file."""
    yield from _new_database(postgres_server, migrated_template)


@pytest.fixture
def emptied(one_database: str) -> str:
    """The same, with nothing in it."""
    psql(one_database, f"TRUNCATE {TABLES} CASCADE")
    return one_database


def deliver(journal: Journal, dsn: str) -> None:
    """Send everything there is."""

    async def send() -> None:
        writer = Writer(dsn, "", journal="damaged")
        delivery = Delivery(
            journal, writer, "machine-1", record_event=lambda event: journal.append_event(event, CLOCK), interval_s=0.01
        )
        delivery.decoders = Decoders([])
        recovered = asyncio.Event()
        recovered.set()
        delivery.stop()
        await asyncio.wait_for(delivery.run(recovered), SECONDS_MAX)

    asyncio.run(send())


def in_sql(dsn: str) -> dict[str, Counter[int]]:
    """The numbers of the frames in SQL by source, and how often each is there; their payloads are as they were made."""
    found: dict[str, Counter[int]] = {}
    for (source, ts_ns, payload), count in stored(dsn).items():
        number = ts_ns // 1000
        length = 33 if source == "gps" else 8
        assert payload == bytes((number + at) % 251 for at in range(length)).hex()
        found.setdefault(source, Counter())[number] += count
    return found


def once(count: int, gone: set[int]) -> Counter[int]:
    return Counter(number for number in range(count) if number not in gone)


def gaps(dsn: str) -> Counter[str]:
    """Frames that SQL says were damaged, by source."""
    text = psql(
        dsn,
        "SELECT coalesce(json_object_agg(source, frames), '{}') FROM (SELECT source,"
        " sum((payload->>'frames')::bigint) AS frames FROM events WHERE kind = 'gap' AND key = 'damage'"
        " GROUP BY source) AS found",
    )
    return Counter(json.loads(text))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_daemon_sends_what_survives(
    tmp_path: Path, emptied: str, damage: Callable[[Path], Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    """It starts, records on, and stores what survives, once; books, gap events in SQL and the log say what does not."""
    folder = tmp_path / "journal"
    count = make(folder, machine_id=machine_id(), boot_id=boot_id())
    outcome = damage(folder)
    expected = {}
    for source in ("can0", "gps"):
        lost = len(outcome.lost.get(source, ()))
        received = count + 5 - len(outcome.untold.get(source, ()))
        expected[source] = Books(received, received - lost, 0, 0, {"damage": lost} if lost else {})
    if outcome.gained:
        expected[FOREIGN_SOURCE] = Books(outcome.gained, outcome.gained, 0, 0)
    with caplog.at_level("INFO"):
        assert asyncio.run(records_on(folder, emptied, count, expected)) == expected
    found = in_sql(emptied)
    for source in ("can0", "gps"):
        gone = outcome.lost.get(source, set()) | outcome.untold.get(source, set())
        assert found[source] == once(count + 5, gone)
    assert found.get(FOREIGN_SOURCE, Counter()) == once(outcome.gained, set())
    assert gaps(emptied) == +Counter({source: len(lost) for source, lost in outcome.lost.items()})
    for text in outcome.says:
        assert text in caplog.text
    assert caplog.text.count("balanced=True") == len(expected)
    assert not [each for each in caplog.records if each.levelname in ("ERROR", "CRITICAL")]
    assert len(list(folder.glob("damaged-*"))) == outcome.aside
    assert all((folder / name).exists() or (folder / name).is_symlink() for name in outcome.kept)


async def records_on(folder: Path, dsn: str, count: int, expected: dict[str, Books]) -> dict[str, Books]:
    """Run a daemon on the journal: it records five frames more of each source, and has sent all. Its books."""
    config = Config(database=Database(dsn=dsn), journal=JournalConfig(path=folder), batch=Batch(interval_seconds=0.01))
    daemon = Daemon(config, [])
    running = asyncio.create_task(daemon.run())
    daemon.recording.frames(frames(count, 5), CLOCK)
    daemon.recording.frames(frames(count, 5, "gps", length=33), CLOCK)
    await asyncio.to_thread(wait_until, lambda: daemon.recovered and daemon.books() == expected, "books", SECONDS_MAX)
    daemon.stop("the test is over")
    await running
    assert daemon.exit_code == 0
    return dict(daemon.books())


@pytest.mark.parametrize("kind", [Kind.SETTLE, Kind.STATE], ids=lambda kind: kind.name)
def test_bookkeeping_that_is_damaged(tmp_path: Path, emptied: str, kind: Kind) -> None:
    """What the journal forgot of its sending the database knows: nothing is sent twice, and the books are whole."""
    folder = tmp_path / "journal"
    count = make(folder)
    journal = open_journal(folder)
    deliver(journal, emptied)
    before = journal.books()
    kill(journal)
    flipped = 0
    for path in sorted(folder.glob("0*.journal")):
        for each in placed(path):
            if each.record.kind is kind:
                each.flip(HEADER.size + 9)
                flipped += 1
    assert flipped > 0
    journal = open_journal(folder)
    deliver(journal, emptied)
    assert in_sql(emptied) == {source: once(count, set()) for source in ("can0", "gps")}
    assert journal.books() == before
    kill(journal)


def test_an_older_copy_of_the_journal_is_put_back(tmp_path: Path, emptied: str) -> None:
    """A snapshot of the disk from before: the database is further than the journal, which catches up and goes on."""
    folder, copy = tmp_path / "journal", tmp_path / "copy"
    count = make(folder)
    journal = open_journal(folder)
    shutil.copytree(folder, copy)
    journal.append_frames(frames(count, 50), CLOCK)
    deliver(journal, emptied)
    journal.begin_stretch()
    journal.append_frames(frames(count + 50, 50), CLOCK)
    deliver(journal, emptied)
    kill(journal)
    shutil.rmtree(folder)
    copy.rename(folder)

    journal = open_journal(folder)
    journal.append_frames(frames(count + 100, 50), CLOCK)
    deliver(journal, emptied)
    assert in_sql(emptied) == {"can0": once(count + 150, set()), "gps": once(count, set())}
    # The books are of what this copy has seen.
    assert journal.books() == {"can0": Books(count + 50, count + 50, 0, 0), "gps": Books(count, count, 0, 0)}
    kill(journal)


@pytest.fixture
def instrument(tmp_path: Path) -> Iterator[Instrument]:
    """Numbered lines; not begun yet."""
    device = Instrument(tmp_path / "instrument")
    yield device
    device.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["several_at_once", "newer_format"])
def test_a_daemon_starts_on_a_damaged_journal(tmp_path: Path, emptied: str, instrument: Instrument, name: str) -> None:
    """It starts, sends what survives, says what does not and where, keeps it aside, and records what comes."""
    recorder = Recorder(tmp_path, emptied, lines_of(instrument))
    count = make(recorder.journal, machine_id=machine_id(), boot_id=boot_id())
    outcome: Outcome = getattr(journal_damages, name)(recorder.journal)
    verified = subprocess.run(
        [sys.executable, "-m", "ingestd", "journal", "verify", str(recorder.journal)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.found is not None
    assert f"{outcome.found[0]} at {outcome.found[1]}: " in verified.stdout + verified.stderr
    assert verified.returncode == 1
    try:
        recorder.start()
        recorder.wait_for("link up")
        instrument.start()
        wait_until(lambda: stored(emptied).total() >= 2 * count // 3 + 100, "frames in SQL", more=recorder.log)
        sent = instrument.stop()
        wait_until(lambda: lines(emptied) == once(sent, set()), f"all {sent} lines in SQL", more=recorder.log)
        for source in ("can0", "gps"):
            gone = outcome.lost.get(source, set()) | outcome.untold.get(source, set())
            wait_until(lambda s=source, g=gone: frames_of(emptied, s) == once(count, g), "frames", more=recorder.log)
        log = recorder.stop()
    finally:
        recorder.close()
    books = in_log(log)
    assert books["line"] == Said(sent, sent, 0, 0)
    for source in ("can0", "gps"):
        lost, received = len(outcome.lost.get(source, ())), count - len(outcome.untold.get(source, ()))
        assert books[source] == Said(received, received - lost, 0, 0, {"damage": lost} if lost else {})
    assert gaps(emptied) == Counter({source: len(lost) for source, lost in outcome.lost.items()})
    for text in outcome.says:
        assert text in log
    assert len(list(recorder.journal.glob("damaged-*"))) == outcome.aside
    assert all((recorder.journal / kept).exists() for kept in outcome.kept)


def lines(dsn: str) -> Counter[int]:
    """The numbers that the instrument's lines in SQL bear."""
    found: Counter[int] = Counter()
    for (source, _, payload), count in stored(dsn).items():
        if source == "line":
            found[int(bytes.fromhex(payload).removeprefix(b"n="))] += count
    return found


def frames_of(dsn: str, source: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for (of, ts_ns, _), count in stored(dsn).items():
        if of == source:
            found[ts_ns // 1000] += count
    return found
