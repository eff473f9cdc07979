"""Every protocol at once, from the bytes on a pty to SQL, through the daemon as a process."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from functools import reduce
from operator import xor
from pathlib import Path

import pytest

from ingestd.framing.ubx import checksum
from tests.conftest import psql
from tests.plugins import install_example
from tests.recorder import Instrument, Recorder, stored, wait_until
from tests.unit.test_decode_cobs import stuff

FRAMES = 60


def nmea(number: int) -> bytes:
    body = b"GPVTG,%d.5,T,,M,1.0,N,1.9,K,A" % (number % 360)
    return b"$" + body + b"*%02X\r\n" % reduce(xor, body)


def ubx(number: int) -> bytes:
    """NAV-POSLLH, every fourth time with a sentence behind it."""
    content = b"\x01\x02\x1c\x00" + struct.pack("<IiiiiII", number, 93_117_328, 487_409_605, 311_221, 263_610, 9, 11)
    return b"\xb5\x62" + content + checksum(content) + (nmea(number) if number % 4 == 0 else b"")


def keyvalue(number: int) -> bytes:
    return b"n=%d rpm=%d\r\n" % (number, number * 2) + (b"booting\r\n" if number == 5 else b"")


def json_lines(number: int) -> bytes:
    row = {"n": number, "acc": {"x": number / 4}} | ({"t": "hot" if number % 2 else number} if number % 3 else {})
    return json.dumps(row).encode() + b"\n"


def csv_rows(number: int) -> bytes:
    head = b"Log 1.0\r\nn;RPM;TPS\r\n;1/min;%\r\n" if number % 40 == 0 else b""
    return head + b"%d;%d;%d,25\r\n" % (number, number * 2, number)


def cobs(number: int) -> bytes:
    content = struct.pack("<IHh", number, number * 4, number - 7)
    return stuff(content + struct.pack("<I", zlib.crc32(content))) + b"\0"


@pytest.mark.slow
def test_every_protocol_from_the_wire_to_sql(
    tmp_path: Path, migrated: str, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven devices talk at once; what each said is in SQL, number for number, and the books balance."""
    monkeypatch.setenv("PYTHONPATH", str(install_example(tmp_path / "packages")))
    capture = (shared_data / "serial" / "actisense_dle_raymarine_ev1.dle").read_bytes()[2:200_000]
    messages = [b"\x10\x02" + each.removeprefix(b"\x10\x02") for each in capture.split(b"\x10\x03")[1:-1]]
    says: dict[str, tuple[Callable[[int], bytes], str]] = {
        "nmea": (nmea, ""),
        "ubx": (ubx, ""),
        "keyvalue": (keyvalue, ""),
        "json": (json_lines, ""),
        "csv": (csv_rows, ""),
        "cobs": (cobs, 'fields = ["n:u32", "rpm:u16*0.5:1/min", "t:i16+7"]\ncrc = "crc32"\n'),
        "actisense": (
            lambda number: messages[number] + b"\x10\x03",
            f'dbc = [{{ file = "{shared_data / "dbc" / "canboat_nmea2000.dbc"}", match = "pgn" }}]\n',
        ),
    }
    devices = {name: Instrument(tmp_path / name, say=say) for name, (say, _) in says.items()}
    sources = "".join(
        f'[[serial]]\nname = "{name}"\nport = "{devices[name].link}"\nprotocol = "{name}"\n{keys}'
        for name, (_, keys) in says.items()
    )
    recorder = Recorder(tmp_path, migrated, sources)
    try:
        recorder.start()
        for name in says:
            recorder.wait_for(f"link up source={name} ")
            devices[name].start()
        wait_until(lambda: least(migrated, set(says)) >= FRAMES, f"{FRAMES} frames of each", more=recorder.log)
        sent = {name: device.stop() for name, device in devices.items()}
        wait_until(lambda: len(recorder.journalled()) >= sum(sent.values()), "the last in the journal")
        log = recorder.stop()
        assert log.count("balanced=True") == len(says)
        assert stored(migrated) == recorder.journalled()
        for name in says:
            check(migrated, name, sent[name])
        assert psql(migrated, "SELECT count(*) FROM signal_groups WHERE source IN ('keyvalue', 'csv', 'cobs')") == "3"
        assert psql(migrated, "SELECT count(*) FROM signal_groups WHERE source = 'json'") == "2"
    finally:
        recorder.close()
        for device in devices.values():
            device.close()


def least(dsn: str, names: set[str]) -> int:
    """How many frames there are of the source with the fewest."""
    rows = psql(dsn, "SELECT source, sum(frame_count) FROM frame_chunks GROUP BY source").splitlines()
    return min(int(row.partition("|")[2]) for row in rows) if {row.partition("|")[0] for row in rows} == names else 0


def column(dsn: str, source: str, channel: str, what: str = "value_num") -> list[str]:
    return psql(
        dsn, f"SELECT {what} FROM signals WHERE source = '{source}' AND channel = '{channel}' ORDER BY ts_mono_ns, id"
    ).splitlines()


def check(dsn: str, name: str, sent: int) -> None:
    """Every number that a device said, in order."""
    numbers = range(sent)

    def numbers_of(source: str, channel: str) -> list[float]:
        return [float(each) for each in column(dsn, source, channel)]

    if name == "nmea":
        assert numbers_of("nmea/GP", "VTG.cogt") == [n % 360 + 0.5 for n in numbers]
    elif name == "ubx":
        assert numbers_of("ubx", "NAV-POSLLH.iTOW") == list(numbers)
        assert set(numbers_of("ubx", "NAV-POSLLH.lat")) == {48.7409605}
        assert numbers_of("ubx/GP", "VTG.cogt") == [n % 360 + 0.5 for n in numbers if n % 4 == 0]
    elif name == "keyvalue":
        assert numbers_of("keyvalue", "rpm") == [n * 2 for n in numbers][1:]  # The first line may have begun before.
    elif name == "json":
        assert numbers_of("json", "acc.x") == [n / 4 for n in numbers]
        said = column(dsn, "json", "t", "coalesce(value_text, value_num::text, '-')")
        expected = ["-" if n % 3 == 0 else "hot" if n % 2 else str(n) for n in numbers]
        assert said == expected[1:]  # The first line of all lacks the key: it is of the group before.
    elif name == "csv":
        assert numbers_of("csv", "n") == list(numbers)
        assert numbers_of("csv", "TPS") == [n + 0.25 for n in numbers]
        assert set(column(dsn, "csv", "RPM", "unit")) == {"1/min"}
    elif name == "cobs":
        assert numbers_of("cobs", "rpm") == [n * 2 for n in numbers]
        assert numbers_of("cobs", "t") == list(numbers)
    else:
        assert int(psql(dsn, "SELECT count(DISTINCT channel) FROM signals WHERE source LIKE 'actisense/%'")) > 5
