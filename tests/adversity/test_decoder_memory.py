"""A daemon that is killed between a header and its rows: the rows get their names all the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingestd.journal import Kind, Record
from ingestd.journal.segment import list_folder, read_segment
from ingestd.model import SerialFlag
from ingestd.store import embedded
from tests.conftest import psql
from tests.recorder import Instrument, Recorder, stored, wait_until

HEADER = b'"Logger 1.0"\r\nTime\tRPM\tTPS\r\n'
UNITS = b"s\t1/min\t%\r\n"


class Logger:
    """An instrument that says its header when it is told to, then its units, then row after row.

    Opening a port throws away what was said before.
    """

    def __init__(self, link: Path) -> None:
        self.header, self.units, self.rows = threading.Event(), threading.Event(), threading.Event()
        self._unsaid = [(self.header, HEADER), (self.units, UNITS)]
        self.instrument = Instrument(link, say=self._say)

    def _say(self, number: int) -> bytes:
        if self._unsaid and self._unsaid[0][0].is_set():
            return self._unsaid.pop(0)[1]
        return b"%d\t%d\t%d.5\r\n" % (number, number * 2, number % 100) if self.rows.is_set() else b""


@pytest.fixture
def logger(tmp_path: Path) -> Iterator[Logger]:
    """A logger that says nothing yet."""
    device = Logger(tmp_path / "ecu")
    device.instrument.start()
    yield device
    device.instrument.close()


def source(logger: Logger) -> str:
    return f'[[serial]]\nname = "ecu"\nport = "{logger.instrument.link}"\nprotocol = "csv"\n'


def restart(recorder: Recorder) -> None:
    begun = len(recorder.log())
    recorder.start()
    recorder.wait_for("link up", after=begun)


def whole_lines(journal: Path) -> list[tuple[int, bytes]]:
    """Stamp and text of every line but those that a port had open before it was opened."""
    items = [item for name in list_folder(journal)[0] if name.number for item in read_segment(name.path)]
    batches = [item.frames() for item in items if isinstance(item, Record) and item.kind is Kind.FRAMES]
    return [
        (int(batch.ts_ns[row]), bytes(batch.data[row, : batch.length[row]]))
        for batch in batches
        for row in range(len(batch))
        if not batch.flags[row] & SerialFlag.FIRST
    ]


def assert_rows_have_their_names(recorder: Recorder, dsn: str) -> None:
    """Every whole row in the journal is three signals in SQL, with its values and the header's units."""
    rows = [(ts_ns, line.split(b"\t")) for ts_ns, line in whole_lines(recorder.journal)]
    expected = sorted(
        f"{ts_ns}|{channel}|{unit}|{float(cell):.1f}"
        for ts_ns, cells in rows
        if len(cells) == 3 and cells[0].isdigit()
        for channel, unit, cell in zip(("Time", "RPM", "TPS"), ("s", "1/min", "%"), cells, strict=True)
    )
    assert len(expected) > 300
    query = "SELECT ts_mono_ns, channel, unit, to_char(value_num, 'FM9999999990.0') FROM signals WHERE source = 'ecu'"
    assert sorted(psql(dsn, query).splitlines()) == expected
    assert psql(dsn, "SELECT count(*) FROM signal_groups WHERE source = 'ecu'") == "1"


@pytest.mark.slow
def test_killed_between_header_and_rows_again_and_again(tmp_path: Path, migrated: str, logger: Logger) -> None:
    """Header, SIGKILL, units, SIGKILL, nothing, SIGKILL, rows, SIGKILL, rows: with a database that has all of it."""
    recorder = Recorder(tmp_path, migrated, source(logger))
    try:
        restart(recorder)
        logger.header.set()
        wait_until(lambda: sum(stored(migrated).values()) >= 2, "header in SQL", more=recorder.log)
        recorder.kill()
        restart(recorder)
        logger.units.set()
        wait_until(lambda: sum(stored(migrated).values()) >= 3, "units in SQL", more=recorder.log)
        recorder.kill()
        restart(recorder)
        recorder.kill()
        logger.rows.set()
        restart(recorder)
        wait_until(lambda: sum(stored(migrated).values()) >= 100, "rows in SQL", more=recorder.log)
        recorder.kill()
        restart(recorder)
        wait_until(lambda: sum(stored(migrated).values()) >= 250, "more rows in SQL", more=recorder.log)
        logger.instrument.stop()
        recorder.stop()
        assert stored(migrated) == recorder.journalled()
        assert_rows_have_their_names(recorder, migrated)
    finally:
        recorder.close()


@pytest.mark.slow
def test_killed_between_header_and_rows_while_the_database_is_away(
    tmp_path: Path, own_server: Path, logger: Logger
) -> None:
    """The same with no database until the end: nothing but the journal knows the header, four stretches back."""
    dsn = embedded.start(own_server)
    embedded.stop(own_server)
    recorder = Recorder(tmp_path, dsn, source(logger))
    try:
        restart(recorder)
        logger.header.set()
        wait_until(lambda: len(recorder.journalled()) >= 2, "header in the journal", more=recorder.log)
        recorder.kill()
        restart(recorder)
        logger.units.set()
        wait_until(lambda: len(recorder.journalled()) >= 3, "units in the journal", more=recorder.log)
        recorder.kill()
        restart(recorder)
        recorder.kill()
        logger.rows.set()
        for count in (100, 200):
            restart(recorder)
            wait_until(lambda wanted=count: len(recorder.journalled()) >= wanted, "rows in it", more=recorder.log)  # type: ignore[misc]
            recorder.kill()
        assert embedded.start(own_server) == dsn
        restart(recorder)
        wait_until(lambda: sum(stored(dsn).values()) >= 250, "rows in SQL", more=recorder.log)
        logger.instrument.stop()
        recorder.stop()
        assert stored(dsn) == recorder.journalled()
        assert_rows_have_their_names(recorder, dsn)
    finally:
        recorder.close()
