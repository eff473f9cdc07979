"""What no decoder and no database likes: it costs what it is itself, and never its neighbours.

What PostgreSQL can never take is in test_daemon.py; decoders by themselves are in tests/unit and tests/property.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.books import Said, assert_books, in_metrics
from tests.conftest import on_database, psql
from tests.recorder import Instrument, Recorder, lines_of, stored, wait_until
from tests.torture.instruments import DBC, number_in, slcan

HOSTILE_TEXTS = (
    b"\0",
    b"\xff\xfe",
    b"\xc0\x80",  # a NUL as it should not be written
    b"\xed\xa0\x80",  # half of a surrogate pair
    "é€😀\u2028".encode(),
    b"\"\\'$1;--",
    b"\\x00\\u0000",
    b'{"a":[],NULL\\N\t',
    b"x" * 70_000,  # longer than a frame may be
)
# A double that a message is made of, bit by bit; none of them in decimal digits alone, like a number of the instrument.
HOSTILE_DOUBLES = ("7ff8000000000000", "fff8000000000001", "7ff0000000000000", "fff0000000000000", "7fefffffffffffff",
                   "ffefffffffffffff", "000000000000000a", "800000000000000f")  # fmt: skip
DOUBLE = 'BO_ 292 Hostile: 8 X\n SG_ Double : 7|64@0- (1,0) [0|0] "" X\nSIG_VALTYPE_ 292 Double : 2;\n'
FRAMES_IN_TIME = 50  # in a chunk; the server takes more than it has for a larger one.
# A decoder that cannot bear some frames of the bus: one in a hundred.
DECODER_RAISES = """
from ingestd.decode.can import Decoder
decode = Decoder.decode
def raises(self, frames, memory):
    if (frames.data[:, 7] == 7).any():
        raise ZeroDivisionError("seven")
    return decode(self, frames, memory)
Decoder.decode = raises
"""


class Bus:
    """A CAN bus through an slcan adapter, and the signal database that describes it."""

    def __init__(self, folder: Path) -> None:
        self.device = Instrument(folder / "can0", say=slcan)
        self.dbc = folder / "bus.dbc"
        self.dbc.write_text(DBC)

    @property
    def configuration(self) -> str:
        return (
            f'[[can]]\nname = "can0"\ninterface = "slcan"\nchannel = "{self.device.link}"\nbitrate = 500000\n'
            f'dbc = ["{self.dbc}"]\noptions = {{ sleep_after_open = 0.0 }}\n'
        )


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    made = Bus(tmp_path)
    yield made
    made.device.close()


def wait_for_frames(recorder: Recorder, dsn: str, source: str, count: int = 100) -> None:
    """Until SQL has so many more of a source."""

    def of_source() -> int:
        return sum(1 for name, _, _ in stored(dsn) if name == source)

    before = of_source()
    wait_until(lambda: of_source() >= before + count, f"{count} frames of {source}", more=recorder.log)


@pytest.mark.slow
def test_texts_and_numbers_that_nothing_likes(tmp_path: Path, migrated: str, bus: Bus) -> None:
    """NUL, broken UTF-8, lines without end, NaN, infinities and denormals: stored to the bit, nothing rejected."""

    def text(number: int) -> bytes:
        return b"n=%d %s\n" % (number, HOSTILE_TEXTS[number % len(HOSTILE_TEXTS)])

    def numbered_and_hostile(number: int) -> bytes:
        double = HOSTILE_DOUBLES[number % len(HOSTILE_DOUBLES)].upper().encode()
        return slcan(number) + b"t1248%s\r" % double

    def number(payload: bytes) -> int | None:
        if payload.startswith(b"n=") or (payload[:2] == bytes(2) and payload.hex().isdecimal()):
            return number_in(payload)
        return None

    line = Instrument(tmp_path / "line", pause_s=0.02, say=text)
    bus.device.say = numbered_and_hostile
    bus.dbc.write_text(DBC + DOUBLE)
    recorder = Recorder(tmp_path, migrated, lines_of(line) + bus.configuration)
    try:
        recorder.start()
        line.start()
        bus.device.start()
        wait_for_frames(recorder, migrated, "line", 2 * len(HOSTILE_TEXTS))
        wait_for_frames(recorder, migrated, "can0", 200)
        sent = {"line": line.stop(), "can0": bus.device.stop()}
        books = assert_books(recorder, migrated, sent, number=number)
        assert all(said.rejected == 0 and not said.dropped for said in books.values()), books
        payloads = Counter(bytes.fromhex(payload) for source, _, payload in stored(migrated) if source == "can0")
        expected = Counter({payload: count for payload, count in payloads.items() if number(payload) is None})
        assert len(expected) == len(HOSTILE_DOUBLES)
        decoded = psql(
            migrated,
            "SELECT encode(float8send(value), 'hex') FROM signal_chunks c JOIN channels h ON h.group_id = c.group_id,"
            " unnest(value_num) AS value WHERE h.channel = 'Hostile.Double'",
        )
        assert _bits(bytes.fromhex(each) for each in decoded.split()) == _bits(expected.elements())
        assert "Traceback" not in recorder.log()
    finally:
        recorder.close()
        line.close()


def _bits(doubles: Iterator[bytes]) -> Counter[str]:
    """How often there is each double. One NaN is as good as another."""
    return Counter("nan" if value != value else value.hex() for (value,) in (struct.unpack(">d", b) for b in doubles))


@pytest.mark.slow
def test_frames_that_make_a_decoder_raise(tmp_path: Path, migrated: str, bus: Bus) -> None:
    """They are stored without their signals; all others have theirs, and the log says it once a batch."""
    recorder = Recorder(tmp_path, migrated, bus.configuration, changes=DECODER_RAISES)
    try:
        recorder.start()
        recorder.wait_for("the database takes data")  # Or the first batch would have more than are sought out in one.
        bus.device.start()
        wait_for_frames(recorder, migrated, "can0", 300)
        books = assert_books(recorder, migrated, {"can0": bus.device.stop()}, number=number_in)
        assert books["can0"].rejected == 0
        numbers = {int(payload) for _, _, payload in stored(migrated)}
        assert decoded(migrated) == sorted(number for number in numbers if number % 100 != 7)
        assert "frames make the decoder fail: stored undecoded source=can0" in recorder.log()
        assert "ZeroDivisionError: seven" in recorder.log()
    finally:
        recorder.close()


REFUSES_MANY = (
    "CREATE FUNCTION take_long() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
    f" IF NEW.frame_count > {FRAMES_IN_TIME} THEN PERFORM pg_sleep(60); END IF; RETURN NEW; END$$",
    "CREATE TRIGGER take_long BEFORE INSERT ON frame_chunks FOR EACH ROW EXECUTE FUNCTION take_long()",
)


@pytest.mark.slow
def test_a_batch_that_always_takes_too_long(tmp_path: Path, migrated: str) -> None:
    """What cannot be stored within the server's statement_timeout is halved until it can; nothing is rejected."""
    name = urlsplit(migrated).path.removeprefix("/")
    line = Instrument(tmp_path / "line", filler=b"." * 100)  # No record of one read has too many for the server.
    recorder = Recorder(tmp_path, migrated, lines_of(line))
    try:
        psql(migrated, *REFUSES_MANY, f"ALTER DATABASE {name} SET statement_timeout = '500ms'",
             f"ALTER DATABASE {name} SET default_transaction_read_only = on")  # fmt: skip
        line.start()
        recorder.start()
        recorder.wait_for("is read-only")
        wait_until(lambda: in_metrics(recorder).get("line", Said(0, 0, 0, 0)).pending > 5 * FRAMES_IN_TIME, "a backlog")
        psql(on_database(migrated, "postgres"), f"ALTER DATABASE {name} RESET default_transaction_read_only",
             f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = '{name}'")  # fmt: skip
        books = assert_books(recorder, migrated, {"line": line.stop()})
        assert books["line"].rejected == 0
        assert int(psql(migrated, "SELECT max(frame_count) FROM frame_chunks")) <= FRAMES_IN_TIME
        assert int(psql(migrated, "SELECT count(*) FROM frame_chunks")) > 5
    finally:
        recorder.close()
        line.close()


@pytest.mark.slow
def test_a_signal_database_that_changes(tmp_path: Path, migrated: str, bus: Bus) -> None:
    """Between runs its scale changes, then it breaks: each run is decoded with what it had, and nothing is lost."""
    recorder = Recorder(tmp_path, migrated, bus.configuration)
    try:
        bus.device.start()
        for scale in (1, 2):
            bus.dbc.write_text(DBC.replace("(1,0)", f"({scale},0)"))
            recorder.start()
            wait_for_frames(recorder, migrated, "can0")
            recorder.stop()
        bus.dbc.write_text(DBC.replace("BO_ 291", "BO_ two hundred and ninety-one"))
        recorder.start()
        recorder.wait_for("nothing is sent until the file is corrected")
        wait_until(lambda: in_metrics(recorder).get("can0", Said(0, 0, 0, 0)).pending > 100, "a backlog")
        before = len(stored(migrated))
        bus.dbc.write_text(DBC.replace("(1,0)", "(4,0)"))
        recorder.wait_for("in order again")
        wait_until(lambda: len(stored(migrated)) > before, "what waited for the file", more=recorder.log)
        books = assert_books(recorder, migrated, {"can0": bus.device.stop()}, number=number_in)
        assert books["can0"].rejected == 0
        sessions = psql(migrated, "SELECT id FROM sessions ORDER BY created_utc").split()
        for scale, session in zip((1, 2, 4), sessions, strict=True):
            of_session = f"FROM {{}} WHERE session_id = '{session}'"
            values = psql(migrated, "SELECT value_num::bigint " + of_session.format("signals")).split()
            frames = psql(migrated, "SELECT payload_json ->> 'data' " + of_session.format("frames")).split()
            assert sorted(map(int, values)) == sorted(scale * int(data, 16) for data in frames)
        assert int(psql(migrated, "SELECT count(*) FROM signal_groups")) == 3
    finally:
        recorder.close()


def decoded(dsn: str) -> list[int]:
    """The numbers that the signals say, which are the digits of the frames in hexadecimal."""
    values = psql(dsn, "SELECT value_num::bigint FROM signals WHERE channel = 'Counter.Number' ORDER BY 1").split()
    return [int(f"{int(value):x}") for value in values]
