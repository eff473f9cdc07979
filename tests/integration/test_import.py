"""Importing captures: what is in the database afterwards, and what importing again does."""

from __future__ import annotations

import asyncio
import csv
import math
import os
import random
import struct
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
import pytest

from ingestd import imports
from ingestd.decode.databases import Match, load
from ingestd.decode.layout import float8_text
from ingestd.errors import CaptureError, FeedError, IngestdError
from ingestd.imports import ImportOptions, ImportSummary, import_file
from ingestd.pipeline import Binding
from ingestd.sources.captures import open_capture

DBC = """VERSION ""

NS_ :

BS_:

BU_: ECU

BO_ 256 Engine: 8 ECU
 SG_ Rpm : 0|16@1+ (0.25,0) [0|8000] "rpm" ECU
 SG_ Gear : 16|4@1+ (1,0) [0|6] "" ECU
 SG_ Big : 24|40@1+ (1,0) [0|0] "" ECU

VAL_ 256 Gear 0 "neutral" 1 "first" ;
"""


def options(*databases: tuple[Path, Match], **more: Any) -> ImportOptions:
    return ImportOptions([Binding(None, load(path, match)) for path, match in databases], **more)


async def fetch(dsn: str, query: str, *arguments: Any) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(query, *arguments)
    finally:
        await connection.close()


async def contents(dsn: str) -> dict[str, list[tuple[Any, ...]]]:
    """Everything the views show, apart from ids, as a sorted multiset."""
    signals = await fetch(
        dsn,
        "SELECT session_id::text, source, channel, ts_utc, ts_mono_ns, value_num, value_text, unit, quality"
        " FROM signals",
    )
    frames = await fetch(dsn, "SELECT session_id::text, ts_utc, ts_mono_ns, payload_json FROM frames")
    return {
        "signals": sorted((tuple(row) for row in signals), key=repr),
        "frames": sorted((tuple(row) for row in frames), key=repr),
    }


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A capture of three data frames, one of an unknown id and one remote, and its database."""
    log, dbc = tmp_path / "small.log", tmp_path / "small.dbc"
    log.write_text(
        "(1436509052.249713) can0 100#A00F010000000000\n"
        "(1436509052.250713) can0 100#A10F000500000000\n"
        "(1436509052.251713) can0 101#01\n"
        "(1436509052.252713) can0 100#R\n"
        "(1436509052.253713) can1 100#A20F\n"
    )
    dbc.write_text(DBC)
    return log, dbc


async def test_a_small_capture_is_all_there(migrated: str, small: tuple[Path, Path]) -> None:
    """Signals and raw frames of a capture written by hand are in the views, with exact stamps and labels."""
    log, dbc = small
    summary = await import_file(log, options((dbc, "auto")), migrated)
    assert summary.as_json() | {"seconds": 0, "session_id": ""} == {
        "file": str(log), "session_id": "", "session_name": "small.log", "already_imported": False, "resumed_at": 0,
        "frames": 5, "decoded_frames": 3, "unknown_frames": 1, "undecoded_frames": 0, "remote_frames": 1,
        "error_frames": 0, "short_frames": 1, "damaged": 0, "damage": [], "signals": 7, "chunks": 2, "seconds": 0,
        "warnings": [],
    }  # fmt: skip
    rows = await fetch(
        migrated,
        "SELECT source, channel, ts_mono_ns, ts_utc::text, value_num, value_text, unit, quality FROM signals"
        " WHERE channel <> 'Engine.Big' ORDER BY ts_mono_ns, channel",
    )
    assert [tuple(row) for row in rows] == [
        ("can0", "Engine.Gear", 1436509052249713000, "2015-07-10 06:17:32.249713+00", 1.0, "first", None, 0),
        ("can0", "Engine.Rpm", 1436509052249713000, "2015-07-10 06:17:32.249713+00", 1000.0, None, "rpm", 0),
        ("can0", "Engine.Gear", 1436509052250713000, "2015-07-10 06:17:32.250713+00", 0.0, "neutral", None, 0),
        ("can0", "Engine.Rpm", 1436509052250713000, "2015-07-10 06:17:32.250713+00", 1000.25, None, "rpm", 0),
        ("can1", "Engine.Rpm", 1436509052253713000, "2015-07-10 06:17:32.253713+00", 1000.5, None, "rpm", 8),
    ]
    frames = await fetch(
        migrated,
        "SELECT payload_json ->> 'source', payload_json ->> 'data', payload_json ->> 'remote' FROM frames ORDER BY id",
    )
    assert [tuple(row) for row in frames] == [
        ("can0", "a00f010000000000", "false"),
        ("can0", "a10f000500000000", "false"),
        ("can0", "01", "false"),
        ("can0", "", "true"),
        ("can1", "a20f", "false"),
    ]


PAIRS: list[tuple[str, list[tuple[str, Match]], dict[str, str], int, int]] = [
    ("can/subaru.log", [("subaru_sample", "auto")], {"subaru_sample": "subaru__subaru_sample"}, 82558, 38015),
    (
        "can/subaru.log",
        [("subaru_outback_2015_generated", "auto")],
        {"subaru_outback_2015_generated": "subaru__subaru_outback_2015_generated"},
        82558,
        64875,
    ),
    (
        "can/car_obd2_gps_part1.mf4",
        [("css_canmod_gps", "auto")],
        {"css_canmod_gps": "car_obd2_gps_part1__css_canmod_gps"},
        65296,
        57604,
    ),
    (
        "can/truck_j1939_gps.mf4",
        [("css_j1939_demo", "auto"), ("css_canmod_gps", "auto")],
        {
            "css_j1939_demo": "truck_j1939_gps__css_j1939_demo",
            "css_canmod_gps": "truck_j1939_gps__css_canmod_gps",
        },
        57849,
        13991 + 12278,
    ),
    (
        "can/boat_nmea2000_gps.mf4",
        [("canboat_nmea2000", "pgn"), ("css_canmod_gps", "pgn")],
        {
            "canboat_nmea2000": "boat_nmea2000_gps__canboat_nmea2000",
            "css_canmod_gps": "boat_nmea2000_gps__css_canmod_gps",
        },
        84730,
        50821 + 32213,
    ),
    (
        "can/boat_garmin_pcan.trc",
        [("canboat_nmea2000", "pgn")],
        {"canboat_nmea2000": "boat_garmin_pcan__canboat_nmea2000"},
        12274,
        12274 - 141,
    ),
]


@pytest.mark.parametrize(("capture", "databases", "expected", "frames", "decoded"), PAIRS, ids=lambda v: str(v)[:40])
async def test_real_captures_equal_other_peoples_decoding(
    migrated: str,
    shared_data: Path,
    capture: str,
    databases: list[tuple[str, Match]],
    expected: dict[str, str],
    frames: int,
    decoded: int,
) -> None:
    """Per signal: count, minimum, maximum and mean of real captures equal the summaries made with other libraries."""
    how = options(*((shared_data / "dbc" / f"{name}.dbc", match) for name, match in databases), keep_not_available=True)
    summary = await import_file(shared_data / capture, how, migrated)
    assert (summary.counts.frames, summary.counts.decoded) == (frames, decoded)
    rows = await fetch(
        migrated,
        "SELECT channel, count(*) AS n, min(value_num) AS min, max(value_num) AS max, avg(value_num) AS mean"
        " FROM signals GROUP BY channel",
    )
    ours = {row["channel"]: row for row in rows}
    checked = 0
    for name in expected.values():
        with (shared_data / "expected" / "derived" / f"{name}.csv").open() as file:
            for theirs in csv.DictReader(file):
                row = ours[f"{theirs['message']}.{theirs['signal']}"]
                assert row["n"] == int(theirs["n"]), theirs
                for key in ("min", "max", "mean"):
                    assert math.isclose(row[key], float(theirs[key]), rel_tol=1e-11, abs_tol=1e-11), (theirs, row)
                checked += 1
    assert checked == len(ours)


async def test_transport_segments_are_not_decoded(migrated: str, shared_data: Path) -> None:
    """Every frame of the UDS capture has a known id, yet none is decoded: frames alone mean nothing."""
    how = options((shared_data / "dbc/css_tp_uds.dbc", "auto"))
    counts = (await import_file(shared_data / "can/kona_ev_uds.mf4", how, migrated)).counts
    assert (counts.frames, counts.decoded, counts.undecoded, counts.signals) == (2010, 0, 2010, 0)


async def test_raw_frames_come_back_as_they_were(migrated: str, shared_data: Path) -> None:
    """The `frames` view gives each frame of a mixed capture, in wire order, with the bytes and flags of the file."""
    path = shared_data / "can/formats/mdf4conv_multiple_can.log"
    await import_file(path, options(), migrated)
    expected = [
        (batch.source, int(ts), int(identifier), bool(flags & 1), bool(flags & 8), bytes(row[:length]).hex())
        for each in open_capture(path).batches()
        for batch in each.by_source()
        for ts, identifier, flags, length, row in zip(
            batch.ts_ns, batch.arbitration_id, batch.flags, batch.length, batch.data, strict=True
        )
    ]
    rows = await fetch(
        migrated,
        "SELECT payload_json ->> 'source', ts_mono_ns, (payload_json ->> 'id')::int, (payload_json ->> 'ext')::bool,"
        " (payload_json ->> 'fd')::bool, payload_json ->> 'data' FROM frames ORDER BY id",
    )
    assert [tuple(row) for row in rows] == expected


async def test_importing_twice_changes_nothing(migrated: str, small: tuple[Path, Path], tmp_path: Path) -> None:
    """The second time, also under another name, it says which session has the file, and the database stays the same."""
    log, dbc = small
    first = await import_file(log, options((dbc, "auto")), migrated)
    before = await contents(migrated)
    renamed = tmp_path / "renamed.log"
    log.rename(renamed)
    second = await import_file(renamed, options((dbc, "auto")), migrated)
    assert (second.already_imported, second.session_id) == (True, first.session_id)
    assert (second.counts, second.chunks) == (first.counts, first.chunks)
    assert await contents(migrated) == before


async def test_another_database_is_refused_unless_again(
    migrated: str, small: tuple[Path, Path], tmp_path: Path
) -> None:
    """The same file with another DBC names the session it is in; --again imports it anew, once."""
    log, dbc = small
    first = await import_file(log, options((dbc, "auto")), migrated)
    other = tmp_path / "other.dbc"
    other.write_text(DBC.replace("0.25", "0.5"))
    with pytest.raises(FeedError, match=str(first.session_id)):
        await import_file(log, options((other, "auto")), migrated)
    second = await import_file(log, options((other, "auto"), again=True), migrated)
    assert second.session_id != first.session_id
    third = await import_file(log, options((other, "auto")), migrated)
    assert (third.already_imported, third.session_id) == (True, second.session_id)
    rows = await fetch(
        migrated, "SELECT max(value_num) AS high FROM signals WHERE channel = 'Engine.Rpm' GROUP BY session_id"
    )
    assert sorted(row["high"] for row in rows) == [1000.5, 2001.0]


async def test_a_capture_without_frames_is_complete(migrated: str, shared_data: Path) -> None:
    """A valid file without CAN frames is an empty, completed feed, not an error."""
    path = shared_data / "can/formats/vblf_J1708Message.blf"
    assert (await import_file(path, options(), migrated)).counts.frames == 0
    assert (await import_file(path, options(), migrated)).already_imported


async def test_damage_is_counted_and_remembered(migrated: str, small: tuple[Path, Path]) -> None:
    """Good frames around a bad line go in; the line is named, and still is when the file is imported again."""
    log, dbc = small
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "(1436509052.25) can0 100#A0Z", *lines[1:]]))
    for _ in range(2):
        summary: ImportSummary = await import_file(log, options((dbc, "auto")), migrated)
        assert (summary.counts.frames, summary.damaged) == (5, 1)
        assert "line 2" in summary.damage[0]


async def test_two_imports_of_one_file_at_once(migrated: str, small: tuple[Path, Path]) -> None:
    """Whoever comes second either waits and finds it done or is told; nothing is doubled."""
    log, dbc = small
    results = await asyncio.gather(
        *(import_file(log, options((dbc, "auto")), migrated) for _ in range(3)), return_exceptions=True
    )
    assert any(isinstance(result, ImportSummary) for result in results)
    assert all(isinstance(result, ImportSummary | IngestdError) for result in results)
    [row] = await fetch(migrated, "SELECT count(*) AS n FROM signals")
    assert row["n"] == 7


async def test_labels_are_keyed_as_postgresql_prints_numbers(migrated: str) -> None:
    """Labels are looked up by the text of the value: ours is the server's, for numbers of every size."""
    rng = random.Random(8)
    values = [
        0.0,
        1.0,
        -1.0,
        0.1,
        1e14,
        1e15,
        1e16,
        -1e15,
        1e-4,
        1e-5,
        5e-324,
        1.7976931348623157e308,
        0.30000000000000004,
    ]
    values += [rng.randint(-(2**40), 2**40) * rng.choice([1.0, 0.1, 0.25, 1e-7, 0.001]) for _ in range(2000)]
    values += [float(np.float32(rng.uniform(-1e6, 1e6))) for _ in range(500)]
    values += [struct.unpack("d", rng.randbytes(8))[0] for _ in range(2000)]
    values = [value for value in values if not math.isnan(value)]
    rows = await fetch(
        migrated, "SELECT v::text FROM unnest($1::float8[]) WITH ORDINALITY AS u(v, n) ORDER BY n", values
    )
    assert [row[0] for row in rows] == [float8_text(value) for value in values]


async def test_a_file_that_grows_is_not_completed(
    migrated: str, small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture that is still being written is refused, and imported whole, once, when it is complete."""
    log, dbc = small
    hashed = imports.sha256_of

    def hash_then_grow(path: Path) -> str:
        digest = hashed(path)
        with path.open("a") as file:
            file.write("(1436509052.263713) can0 100#A00F010000000000\n")
        return digest

    monkeypatch.setattr(imports, "sha256_of", hash_then_grow)
    with pytest.raises(CaptureError, match="changed while it was read"):
        await import_file(log, options((dbc, "auto")), migrated)
    monkeypatch.undo()
    assert await fetch(migrated, "SELECT FROM sessions") == []
    summary = await import_file(log, options((dbc, "auto")), migrated)
    [row] = await fetch(migrated, "SELECT count(*) AS frames FROM frames")
    assert (summary.counts.frames, row["frames"]) == (6, 6)


async def test_impossible_dates_are_refused(migrated: str, tmp_path: Path) -> None:
    """A stamp that no bigint of nanoseconds holds is an error that names it, and other files go on."""
    asc = tmp_path / "far.asc"
    asc.write_text(
        "date Tue Sep 30 03:06:13 pm 2200\nbase hex  timestamps absolute\ninternal events logged\n"
        "9000000000.000000 1  100             Rx   d 1 01\n"
    )
    with pytest.raises(CaptureError, match="no such time"):
        await import_file(asc, options(), migrated)


async def test_file_names_that_are_not_utf8(migrated: str, small: tuple[Path, Path]) -> None:
    """A capture named in another encoding is imported; its name is stored with replacement characters."""
    log, dbc = small
    odd = Path(os.fsdecode(os.fsencode(log.parent) + b"/caf\xe9.log"))
    log.rename(odd)
    assert (await import_file(odd, options((dbc, "auto")), migrated)).session_name == "caf\ufffd.log"


async def test_a_dbc_that_fits_nothing_is_a_warning(migrated: str, small: tuple[Path, Path], tmp_path: Path) -> None:
    """No frame decoded: said, with the command that shows why."""
    other = tmp_path / "other.dbc"
    other.write_text(DBC.replace("256", "512"))
    summary = await import_file(small[0], options((other, "auto"), source_names={"can7": "x"}), migrated)
    assert any("no frame was decoded" in warning for warning in summary.warnings)
    assert any("--map can7=x" in warning for warning in summary.warnings)


async def test_signals_without_raw_frames(migrated: str, small: tuple[Path, Path]) -> None:
    """`--no-frames` stores half as much: the signals are those that they are with the frames, and all are counted."""
    log, dbc = small
    summary = await import_file(log, options((dbc, "auto"), store_frames=False), migrated)
    without = await contents(migrated)
    assert (summary.counts.frames, without["frames"]) == (5, [])
    again = await import_file(log, options((dbc, "auto"), again=True), migrated)
    both = [row[1:] for row in (await contents(migrated))["signals"]]
    assert sorted(map(repr, both)) == sorted(2 * [repr(row[1:]) for row in without["signals"]])
    assert again.session_id != summary.session_id
