"""Rows under a header to signals: the shared logs as a plain csv.reader has them, and what else loggers print."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingestd.chunks import encode_signals
from ingestd.decode.can import Counts, Decoded
from ingestd.decode.csv_rows import CsvDecoder
from ingestd.framing import LineFramer, SerialFrame
from ingestd.model import FrameBatch, Memory, SerialFlag
from ingestd.sources.serial import columns
from tests.unit.test_decode_keyed import PLACEMENT, batch, samples, values


def decode(*lines: bytes, memory: Memory | None = None, **options: Any) -> Decoded:
    return CsvDecoder("ecu", **options).decode(batch(*lines), {} if memory is None else memory)


def units(decoded: Decoded) -> dict[str, str | None]:
    return {channel.name: channel.unit for each in decoded.batches for channel in each.group.channels}


def framed(data: bytes) -> FrameBatch:
    framer = LineFramer()
    frames = framer.feed(data, 0) + framer.flush()
    return columns("ecu", [frame._replace(ts_ns=n) for n, frame in enumerate(frames)])


@pytest.mark.parametrize(
    ("name", "delimiter", "preamble", "rows", "last_channel"),
    [("megasquirt_ms1.msl", "\t", 4, 7977, "rpm/s"), ("cobb_accessport_wrx.csv", ",", 1, 18033, "AP Info")],
)
def test_the_shared_logs_are_what_csv_reads(
    shared_data: Path, name: str, delimiter: str, preamble: int, rows: int, last_channel: str
) -> None:
    """Every number of every row, bit for bit; the header and all before it are no rows."""
    path = shared_data / "serial" / name
    with path.open(newline="") as file:
        table = list(csv.reader(file, delimiter=delimiter))[preamble:]
    expected = np.array([[float(cell) for cell in row] for row in table])
    decoded = CsvDecoder("ecu").decode(framed(path.read_bytes()), {})
    assert decoded.counts == Counts(frames=rows + preamble, decoded=rows, unknown=preamble, signals=expected.size)
    [found] = decoded.batches
    assert found.value.T.tobytes() == expected.tobytes()
    assert (found.text, found.quality) == (None, None)
    assert found.ts_ns.tolist() == list(range(preamble, preamble + rows))
    assert found.group.channels[-1].name == last_channel


def test_names_and_units_of_the_shared_logs(shared_data: Path) -> None:
    """MegaSquirt's are in a row of their own, COBB's in brackets."""
    megasquirt, cobb = (
        units(CsvDecoder("ecu").decode(framed((shared_data / "serial" / name).read_bytes()[:8000]), {}))
        for name in ("megasquirt_ms1.msl", "cobb_accessport_wrx.csv")
    )
    assert {name: megasquirt[name] for name in ("Time", "MAP", "TPS DOT", "CLT")} == {
        "Time": None, "MAP": "kpa", "TPS DOT": "%/s", "CLT": None,
    }  # fmt: skip
    assert {name: cobb[name] for name in ("Time", "Coolant Temp", "Vehicle Speed", "AP Info")} == {
        "Time": "sec", "Coolant Temp": "C", "Vehicle Speed": "kph", "AP Info": None,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["megasquirt_ms1.msl", "cobb_accessport_wrx.csv"])
def test_a_log_cut_anywhere_needs_only_its_memory(shared_data: Path, name: str) -> None:
    """New decoders, which know nothing but the JSON that the last one left, give the same signals."""
    frames = framed((shared_data / "serial" / name).read_bytes()[:20_000])
    whole = list(samples(CsvDecoder("ecu").decode(frames, {})))
    parts: list[Any] = []
    memory: Memory = {}
    for at in range(0, len(frames), 3):
        parts += samples(CsvDecoder("ecu").decode(frames[at : at + 3], memory))
        memory = json.loads(json.dumps(memory))
    assert sorted(map(repr, parts)) == sorted(map(repr, whole))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([b"t,rpm", b"1,2", b"3,4"], [{"t": 1, "rpm": 2}, {"t": 3, "rpm": 4}]),
        ([b"t;rpm", b"1,5;2", b"3,5;4"], [{"t": 1.5, "rpm": 2}, {"t": 3.5, "rpm": 4}]),
        ([b"t\trpm", b"1,5\t2"], [{"t": 1.5, "rpm": 2}]),
        ([b"# t, rpm", b"1, 2", b"# 3, 4"], [{"t": 1, "rpm": 2}]),
        ([b"t,rpm,", b"1,2,", b"3,4"], [{"t": 1, "rpm": 2}, {"t": 3, "rpm": 4}]),
        ([b'"t","rpm, engine"', b'"1","2"'], [{"t": 1, "rpm, engine": 2}]),
        ([b"temp", b"21.5"], [{"temp": 21.5}]),
        ([b"booting", b"SD card ok", b"t,rpm", b"1,2"], [{"t": 1, "rpm": 2}]),
        ([b"t,gear", b"1,N", b"2,1"], [{"t": 1, "gear": "N"}, {"t": 2, "gear": 1}]),
        ([b"t,a,b", b"1,nan,inf", b"2,,ovf"], [{"t": 1}, {"t": 2}]),
        ([b"a,a,,b", b"1,2,3,4"], [{"a": 1, "a_2": 2, "column_3": 3, "b": 4}]),
        ([b"t,rpm", b"1,2", b"rpm,2", b"3,4"], [{"t": 1, "rpm": 2}, {"t": "rpm", "rpm": 2}, {"t": 3, "rpm": 4}]),
        ([b"t,rpm", b"1,2", b"sensor lost", b"3,4"], [{"t": 1, "rpm": 2}, {"t": 3, "rpm": 4}]),
        ([b"t,state", b"1,run", b"x,idle"], [{"t": 1, "state": "run"}, {"t": "x", "state": "idle"}]),
        ([b"t,rpm", b"s,1/min", b"1,2", b"t,rpm", b"s,1/min", b"3,4"], [{"t": 1, "rpm": 2}, {"t": 3, "rpm": 4}]),
        ([b"t,rpm", b"1,2", b"t,rpm,map", b"3,4,5"], [{"t": 1, "rpm": 2}, {"t": 3, "rpm": 4, "map": 5}]),
        ([b"t,rpm", b"1,2", b"t,map", b"3,4"], [{"t": 1, "rpm": 2}, {"t": 3, "map": 4}]),
        ([b"t,rpm", b"1,2", b"t,map", b"WATCHDOG", b"a,b,c", b"3,4"], [{"t": 1, "rpm": 2}, {"t": 3, "map": 4}]),
        (
            [b"t,rpm,st", b"1,2,3", b"ERR", b"off,on,auto", b"4,5,6"],
            [{"t": 1, "rpm": 2, "st": 3}, {"t": "off", "rpm": "on", "st": "auto"}, {"t": 4, "rpm": 5, "st": 6}],
        ),
        ([b"t,rpm", b"t,rpm", b"1,2"], [{"t": 1, "rpm": 2}]),
        ([b"t,rpm", b"1", b"1,2", b"1,2,3", b"3,4"], [{"t": 1, "rpm": 2}, {"t": 3, "rpm": 4}]),
        ([b"t,rpm", b"1\xff,2", b"1_0,9007199254740993"], [{"t": "1_0", "rpm": 9007199254740992}]),
    ],
)  # fmt: skip
def test_what_loggers_print(lines: list[bytes], expected: list[dict[str, Any]]) -> None:
    """Delimiters, greetings, comments, headers that come again or change, text, partial rows: whole, and in pieces."""
    decoded = decode(*lines)
    assert values(decoded) == [each for each in expected if each]
    counts = decoded.counts
    assert counts.frames == len(lines) == counts.decoded + counts.unknown + counts.undecoded
    memory: Memory = {}
    singly = [CsvDecoder("ecu").decode(batch(line), memory) for line in lines]
    assert [line for each in singly for line in values(each)] == values(decoded)


def test_a_header_says_nothing_new_when_it_comes_again() -> None:
    """A logger that is switched off and on goes on in the same signal group; other units are another one."""
    head = [b"t,rpm", b"s,1/min", b"1,2"]
    groups = {each.group.id for each in decode(*head, *head, *head).batches}
    assert len(groups) == 1
    groups |= {each.group.id for each in decode(*head, b"t,rpm", b"ms,1/min", b"1,2").batches}
    assert len(groups) == 2


def test_rows_without_a_header_are_not_decoded() -> None:
    """Numbers without names are only recorded, and counted as such."""
    assert decode(b"1,2", b"3,4").counts == Counts(frames=2, undecoded=2)


@pytest.mark.parametrize(
    ("options", "lines", "expected"),
    [
        ({"columns": ("t (s)", "rpm")}, [b"1,2", b"3;4"], [{"t": 1, "rpm": 2}, {"t": 3, "rpm": 4}]),
        ({"columns": ("t", "rpm")}, [b"t,rpm", b"s,1/min", b"1,2"], [{"t": 1, "rpm": 2}]),
        ({"columns": ("t", "rpm")}, [b"a,b", b"1,2"], [{"t": "a", "rpm": "b"}, {"t": 1, "rpm": 2}]),
        ({"columns": ("t", "rpm"), "delimiter": "semicolon"}, [b"1,5;2", b"1,2"], [{"t": 1.5, "rpm": 2}]),
        ({"delimiter": "comma"}, [b"a;b,c", b"1,2"], [{"a;b": 1, "c": 2}]),
        ({"units_row": "never"}, [b"t,rpm", b"x,y", b"1,2"], [{"x": 1, "y": 2}]),
        ({"units_row": "always"}, [b"t,rpm", b"s,1", b"1,2"], [{"t": 1, "rpm": 2}]),
        (
            {"columns": ("t", "rpm"), "units_row": "always"},
            [b"1,2", b"x,y", b"3,4"],
            [{"t": 1, "rpm": 2}, {"t": "x", "rpm": "y"}, {"t": 3, "rpm": 4}],
        ),
        ({"time_field": "at"}, [b"at,rpm", b"2026-11-25T10:00:00Z,2"], [{"at": 1795600800.0, "rpm": 2}]),
    ],
)
def test_configured(options: dict[str, Any], lines: list[bytes], expected: list[dict[str, Any]]) -> None:
    """What the configuration says goes before what the lines say."""
    decoded = decode(*lines, **options)
    assert values(decoded) == expected
    if "columns" in options and "(s)" in options["columns"][0]:
        assert units(decoded) == {"t": "s", "rpm": None}


def test_many_columns_are_several_groups() -> None:
    """Seventy columns are three groups of one time."""
    decoded = decode(b",".join(b"c%d" % n for n in range(70)), b",".join(b"%d" % n for n in range(70)))
    assert [len(each.group.channels) for each in decoded.batches] == [32, 32, 6]
    assert values(decoded) == [{f"c{n}": n for n in range(70)}]


LINES = st.one_of(
    st.sampled_from([b"t,rpm", b"s,1/min", b"a\tb", b"#x;y", b"1,2", b"3\t4", b"5;6", b"1", b"x", b"rpm,q"]),
    st.binary(max_size=20),
    st.text(st.sampled_from("ab,;\t\"1.- #[("), max_size=12).map(str.encode),
)  # fmt: skip


@settings(deadline=None)
@given(st.lists(LINES, max_size=25), st.integers(0, 25), st.sampled_from(["auto", "always", "never"]))
def test_any_lines_cut_anywhere(lines: Sequence[bytes], at: int, units_row: str) -> None:
    """Every line is counted once, batches cut otherwise give the same samples, and all of it can be stored."""
    frames = framed(b"".join(line + b"\n" for line in lines))
    if not len(frames):
        return
    memory: Memory = {}
    whole = CsvDecoder("ecu", units_row=units_row).decode(frames, memory)
    counts = whole.counts
    assert counts.frames == len(frames) == counts.decoded + counts.unknown + counts.undecoded
    parted: Memory = {}
    parts = []
    for part in (frames[:at], frames[at:]):
        if len(part):
            parts.append(CsvDecoder("ecu", units_row=units_row).decode(part, parted))
            parted = json.loads(json.dumps(parted))
    assert parted == memory
    assert sorted(map(repr, samples(whole))) == sorted(repr(each) for part in parts for each in samples(part))
    encode_signals(whole.batches, PLACEMENT)


@pytest.mark.parametrize("name", ["megasquirt_ms1.msl", "cobb_accessport_wrx.csv"])
def test_remembering_is_what_decoding_would_remember(shared_data: Path, name: str) -> None:
    """Passing over the rows of a log leaves the same memory, also where a stray text stands in the middle of it."""
    lines = (shared_data / "serial" / name).read_bytes()[:200_000].splitlines(keepends=True)
    lines[500:500] = [b"WATCHDOG RESET\n", b"temp, cold\n"]
    frames = framed(b"".join(lines))
    decoded: Memory = {}
    CsvDecoder("ecu").decode(frames, decoded)
    remembered: Memory = {}
    for at in range(0, len(frames), 333):
        CsvDecoder("ecu").remember(frames[at : at + 333], remembered)
    assert remembered == decoded


def test_frames_of_a_bus_are_not_decoded() -> None:
    """A batch of anything else counts, and raises nothing."""
    frames = columns("can0", [SerialFrame(0, b"\0\1\2", SerialFlag(0))])
    assert CsvDecoder("can0").decode(frames, {}).counts.undecoded == 1


def test_the_first_line_may_be_the_rest_of_one() -> None:
    """A row that lacks the beginning of its first number looks like any other: it is not decoded; a header is taken."""
    memory: Memory = {}
    CsvDecoder("ecu").decode(framed(b"t,rpm\n126853,900\n"), memory)
    again = CsvDecoder("ecu").decode(framed(b"53,900\n126854,901\n"), memory)
    assert values(again) == [{"t": 126854, "rpm": 901}]
    assert again.counts.undecoded == 1


@pytest.mark.parametrize("rest", [b"Time,rpm,map", b"me,rpm,map", b"rpm,map", b"pm,map", b"p"])
def test_the_first_line_may_be_the_rest_of_the_header(rest: bytes) -> None:
    """It is completed from the header in force: no channel is named by half of its name."""
    memory: Memory = {}
    CsvDecoder("ecu").decode(framed(b"Time,rpm,map\ns,1/min,kPa\n1,900,80\n"), memory)
    known = json.loads(json.dumps(memory))
    again = CsvDecoder("ecu").decode(framed(rest + b"\ns,1/min,kPa\n2,901,81\n"), memory)
    assert values(again) == [{"Time": 2, "rpm": 901, "map": 81}]
    assert memory == known


def test_the_end_of_a_row_that_is_the_end_of_the_header() -> None:
    """A cell of text at the end of a row may say what the last column is called: names and units stay as they are."""
    memory: Memory = {}
    CsvDecoder("gps").decode(framed(b"time,lat,N\ns,deg,-\n1,48.1,N\n"), memory)
    known = json.loads(json.dumps(memory))
    again = CsvDecoder("gps").decode(framed(b"N\n2,48.2,N\n"), memory)
    assert values(again) == [{"time": 2, "lat": 48.2, "N": "N"}]
    assert memory == known
    assert [channel.unit for channel in again.batches[0].group.channels][:2] == ["s", "deg"]


def test_another_header_on_the_first_line_is_taken() -> None:
    """Many devices say theirs exactly when they are opened."""
    memory: Memory = {}
    CsvDecoder("ecu").decode(framed(b"Time,rpm,map\n1,900,80\n"), memory)
    assert values(CsvDecoder("ecu").decode(framed(b"Time,rpm\n2,901\n"), memory)) == [{"Time": 2, "rpm": 901}]
    assert values(CsvDecoder("ecu").decode(framed(b"t,afr\n3,14.7\n"), {})) == [{"t": 3, "afr": 14.7}]
