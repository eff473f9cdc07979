"""`ingestd journal` as a user meets it: status, verify and export, and the way back through `ingestd import`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ingestd.journal import Kind
from ingestd.journal.segment import HEADER_BYTES, read_segment
from ingestd.model import Clock, ClockState, Event, Flag, FrameBatch, SerialFlag
from ingestd.sources.captures import open_capture
from tests.conftest import psql
from tests.integration.test_cli import ingestd
from tests.journals import CLOCK, open_journal, read_all, send_all

HOLD = """
import sys
from pathlib import Path
from tests.journals import CLOCK, frames, open_journal
journal = open_journal(Path(sys.argv[1]))
journal.append_frames(frames(0, 50), CLOCK)
print("held", flush=True)
sys.stdin.read()
"""

# arbitration id, flags, payload: every kind of frame that candump text knows.
WIRE: list[tuple[int, int, bytes]] = [
    (0x100, 0, bytes(range(8))),
    (0x7FF, 0, b""),
    (0x18FEF100, Flag.EXTENDED, b"\x01\x02\x03"),
    (0x123, Flag.REMOTE, b""),
    (0x1ABCDEF0, Flag.EXTENDED | Flag.REMOTE, b""),
    (0x4, Flag.ERROR, bytes((0, 4, 0, 0, 0, 0, 96, 96))),
    (0x222, Flag.FD, bytes(range(12))),
    (0x222, Flag.FD | Flag.BITRATE_SWITCH, bytes(range(64))),
    (0x18DA10F1, Flag.EXTENDED | Flag.FD | Flag.BITRATE_SWITCH | Flag.ERROR_STATE, bytes(range(48))),
    (0x321, Flag.TRANSMITTED, b"\xff"),
]


def wire(source: str, first_ns: int, count: int = len(WIRE)) -> FrameBatch:
    """Frames of every kind, a microsecond and some apart; the second is stamped before the first."""
    rows = [WIRE[number % len(WIRE)] for number in range(count)]
    stamps = first_ns + np.arange(count) * 1_001
    stamps[:2] = stamps[:2][::-1]
    data = np.array([np.frombuffer(payload.ljust(64, b"\0"), np.uint8) for _, _, payload in rows])
    return FrameBatch(
        source, stamps, np.array([row[0] for row in rows], np.uint32), np.array([row[1] for row in rows], np.uint8),
        np.array([len(row[2]) for row in rows], np.uint16), data,
    )  # fmt: skip


def line(text: bytes, ts_ns: int) -> FrameBatch:
    """A line of a serial port; what is not UTF-8 is not text."""
    kind = SerialFlag.SERIAL if b"\xff" in text else SerialFlag.SERIAL | SerialFlag.TEXT
    batch = wire("gps", ts_ns, 1)
    data = np.frombuffer(text.ljust(64, b"\0"), np.uint8)[None]
    return replace(
        batch, arbitration_id=batch.arbitration_id * 0, flags=np.array([kind], np.uint8), data=data,
        length=np.array([len(text)], np.uint16),
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A journal of two stretches: buses, a GPS, an event; the first stretch is sent, one record of it refused."""
    folder = tmp_path / "journal"
    journal = open_journal(folder)
    for number in range(100):
        journal.append_frames(wire("can0", number * 1_000_000, 40), CLOCK)
        journal.append_frames(wire("can1", number * 1_000_000), CLOCK)
        journal.sync()
    journal.append_event(Event("can1", "bus_off", 77, "k", {"tec": 256}), CLOCK, lost={"overflow": 3})
    first = journal.stretches()[0].id
    journal.reject(next(record for record in read_all(journal, first)[0] if record.frames_count), "22P05: no")
    send_all(journal)
    journal.begin_stretch()
    journal.append_frames(wire("can0", 200_000_000, 20), CLOCK)
    journal.append_frames(line(b"$GPRMC,\xc3\xa9*00", 200_000_500), CLOCK)
    journal.append_frames(line(b"\xff\x01", 200_000_600), CLOCK)
    journal.close(ended=True)
    return folder


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Path]:
    """A journal that another process holds."""
    folder = tmp_path / "held"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield folder
        process.communicate()


def damage(folder: Path) -> tuple[str, int, int]:
    """Spoil the third record of frames; returns where it was and how large."""
    path, offset, seen = folder / "00000001.journal", HEADER_BYTES, 0
    for item in read_segment(path):
        seen += item.kind is Kind.FRAMES  # type: ignore[union-attr]
        if seen == 3:
            break
        offset += item.size  # type: ignore[union-attr]
    with path.open("r+b") as file:
        file.seek(offset + 100)
        file.write(b"spoiled")
    return path.name, offset, item.size  # type: ignore[union-attr]


def test_status_of_a_configuration_says_its_budget(folder: Path, tmp_path: Path) -> None:
    """How much of the room is used up."""
    file = tmp_path / "car.toml"
    line = 'name = "gps"\nport = "/dev/null"\nprotocol = "lines"\nbaudrate = 9600\n'
    file.write_text(f'[journal]\npath = "{folder}"\nmax_bytes = "2GiB"\n[[serial]]\n{line}')
    assert "of 2.1 GB that it may take" in ingestd("journal", "status", "-c", str(file)).stdout
    assert json.loads(ingestd("journal", "status", "-c", str(file), "--json").stdout)["bytes_max"] == 2 << 30


def test_status_says_where_everything_is(folder: Path) -> None:
    """Stretches, books and what was refused, for people and for programs; exit code 0."""
    shown = ingestd("journal", "status", folder).stdout
    for text in ("nobody holds it", "shakedown", "2023-11-14 22:13:20.", "balanced", "overflow 3", "export --rejected"):
        assert text in shown
    assert "NOT" not in shown
    told = json.loads(ingestd("journal", "status", folder, "--json").stdout)
    first, second = told["stretches"]
    assert first["frames"] == {"can0": 4000, "can1": 1000}
    assert (sum(first["pending"].values()), second["pending"]) == (0, {"can0": 20, "gps": 2})
    assert first["begun_utc"] == "2023-11-14T22:13:20+00:00"
    assert first["feed"] == first["id"]
    assert told["held_by"] is None
    assert told["books"]["can0"] == {
        "received": 4020, "committed": 4000, "pending": 20, "rejected": 0, "dropped": {}, "balanced": True,
    }  # fmt: skip
    assert told["books"]["can1"]["dropped"] == {"overflow": 3}
    assert [each["file"] for each in told["rejected_files"]] == [path.name for path in folder.glob("rejected-*")]


def test_a_held_journal_is_shown_verified_and_exported(holder: Path) -> None:
    """A daemon that holds the journal is named, and does not stand in the way."""
    assert "held by pid " in ingestd("journal", "status", holder).stdout
    assert "no damage" in ingestd("journal", "verify", holder).stdout
    done = ingestd("journal", "export", holder, "--format", "jsonl")
    assert sum('"frame"' in line for line in done.stdout.splitlines()) == 50


def test_another_feed_is_shown(tmp_path: Path) -> None:
    """A stretch that is sent under another name says so."""
    journal = open_journal(tmp_path)
    journal.append_frames(wire("can0", 0), CLOCK)
    stretch = journal.stretches()[0].id
    journal.assign_feed(stretch, "f" * 32, 0)
    journal.close(ended=True)
    assert f"stretch {stretch[:8]} is sent as feed {'f' * 32}" in ingestd("journal", "status", tmp_path).stdout


def test_which_journal_is_meant(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH, the one of a configuration (which needs no database for that), or the default; never two."""
    config = tmp_path / "car.toml"
    config.write_text(f'[journal]\npath = "{folder}"\n[[can]]\nname = "can0"\n')
    assert str(folder) in ingestd("journal", "status", "-c", config).stdout
    assert "leave one" in ingestd("journal", "status", folder, "-c", config, exit_code=2).stderr
    assert "nowhere.toml" in ingestd("journal", "verify", "-c", tmp_path / "nowhere.toml", exit_code=2).stderr
    monkeypatch.setenv("INGESTD_HOME", str(tmp_path))
    assert str(folder) in ingestd("journal", "status").stdout


@pytest.mark.parametrize("command", ["status", "verify", "export"])
def test_what_is_no_journal_is_said(tmp_path: Path, command: str) -> None:
    """No folder, a file and a folder of something else are wrong usage; an empty folder is an empty journal."""
    assert "no journal in" in ingestd("journal", command, tmp_path / "nowhere", exit_code=2).stderr
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("x")
    assert "not a journal" in ingestd("journal", command, tmp_path / "notes", exit_code=2).stderr
    assert "is a file" in ingestd("journal", command, tmp_path / "notes" / "a.txt", exit_code=2).stderr
    (tmp_path / "empty").mkdir()
    ingestd("journal", command, tmp_path / "empty")


def test_verify_names_damage_and_its_cost(folder: Path) -> None:
    """File, offset, bytes and frames lost, and exit code 1; a whole journal is 0. The way out goes on behind it."""
    whole = ingestd("journal", "verify", folder)
    assert "no damage" in whole.stdout
    assert whole.stderr == ""
    name, offset, size = damage(folder)
    shown = ingestd("journal", "verify", folder, exit_code=1).stdout
    assert f"damaged: {name} at {offset}: {size:,} bytes are no record; lost: 1 record, 40 frames of can0" in shown
    told = json.loads(ingestd("journal", "verify", folder, "--json", exit_code=1).stdout)
    (found,) = told["damage"]
    assert (found["file"], found["offset"], found["bytes"], found["frames_lost"]) == (name, offset, size, {"can0": 40})
    assert told["frames"] == {"can0": 3980, "can1": 1000, "gps": 2}
    done = ingestd("journal", "export", folder)
    assert len(done.stdout.splitlines()) == 3980 + 1000
    assert f"{name} at {offset}" in done.stderr


def columns(batch: FrameBatch) -> list[tuple[Any, ...]]:
    rows = zip(batch.ts_ns, batch.arbitration_id, batch.flags, batch.length, batch.data, strict=True)
    return [(int(ts), int(number), int(flags), data[:length].tobytes()) for ts, number, flags, length, data in rows]


def in_microseconds(batch: FrameBatch, clock: Clock = CLOCK) -> list[tuple[Any, ...]]:
    return [((ts + clock.utc_offset_ns) // 1000 * 1000, *rest) for ts, *rest in columns(batch)]


def test_candump_text_reads_back_equal(folder: Path, tmp_path: Path) -> None:
    """Every kind of frame is the same after export and reading, in wire order, to the microsecond."""
    out = tmp_path / "out.log"
    done = ingestd("journal", "export", folder, "-o", out)
    assert "2 frames of gps left out: candump text cannot hold them; use --format jsonl" in done.stderr
    assert done.stdout == ""
    read: dict[str, list[tuple[Any, ...]]] = {}
    capture = open_capture(out)
    for batch in capture.batches():
        for frames in batch.by_source():
            read.setdefault(frames.source, []).extend(columns(frames))
    can0 = [row for number in range(100) for row in in_microseconds(wire("can0", number * 1_000_000, 40))]
    can1 = [row for number in range(100) for row in in_microseconds(wire("can1", number * 1_000_000))]
    assert read == {"can0": can0 + in_microseconds(wire("can0", 200_000_000, 20)), "can1": can1}
    assert capture.damage.count == 0


def test_export_and_import(migrated: str, folder: Path, tmp_path: Path) -> None:
    """What comes out of a journal goes into PostgreSQL by `ingestd import`, frame by frame the same."""
    out = tmp_path / "out.log"
    ingestd("journal", "export", folder, "--source", "can1", "-o", out)
    told = json.loads(ingestd("import", out, "--json", dsn=migrated).stdout)
    assert (told["frames"], told["damaged"]) == (1000, 0)
    stored = psql(
        migrated,
        "SELECT ts_mono_ns || ' ' || (payload_json ->> 'source') || ' ' || (payload_json ->> 'id') || ' '"
        " || (payload_json ->> 'ext') || (payload_json ->> 'fd') || (payload_json ->> 'remote')"
        " || (payload_json ->> 'error') || ' ' || (payload_json ->> 'data') FROM frames ORDER BY id",
    ).splitlines()
    expected = []
    for number in range(100):
        for ts_ns, arbitration_id, flags, data in in_microseconds(wire("can1", number * 1_000_000)):
            kinds = "".join(
                str(bool(flags & flag)).lower() for flag in (Flag.EXTENDED, Flag.FD, Flag.REMOTE, Flag.ERROR)
            )
            expected.append(f"{ts_ns} can1 {arbitration_id} {kinds} {data.hex()}".strip())
    assert [line.strip() for line in stored] == expected


def test_jsonl_has_everything(folder: Path) -> None:
    """Nanoseconds, serial lines as text or hex, events with what they count, sessions; a stretch or source alone."""
    lines = [json.loads(line) for line in ingestd("journal", "export", folder, "--format", "jsonl").stdout.splitlines()]
    kinds = [line["kind"] for line in lines]
    assert (kinds.count("frame"), kinds.count("event"), kinds.count("session")) == (5022, 1, 2)
    event = lines[kinds.index("event")]
    assert (event["event"], event["payload"], event["lost"]) == ("bus_off", {"tec": 256}, {"overflow": 3})
    assert event["utc"] == "2023-11-14T22:13:20.000000077Z"
    assert lines[kinds.index("session")]["fields"] == {"name": "shakedown"}
    text, raw = (line for line in lines if line.get("source") == "gps")
    assert (text["ts_mono_ns"], text["utc"]) == (200_000_500, "2023-11-14T22:13:20.200000500Z")
    assert (text["text"], text["flags"]) == ("$GPRMC,é*00", ["text", "serial"])
    assert (raw["data"], raw["flags"]) == ("ff01", ["serial"])
    fd = [line for line in lines if line.get("flags") == ["fd", "bitrate_switch"]]
    assert (fd[0]["id"], fd[0]["data"]) == (0x222, bytes(range(64)).hex())

    second = lines[-1]["stretch"]
    alone = ingestd("journal", "export", folder, "--format", "jsonl", "--stretch", second[:10], "--source", "can0")
    assert len(alone.stdout.splitlines()) == 20


def test_what_was_refused_comes_out(folder: Path) -> None:
    """--rejected gives the refused records alone, as frames again, with the reason in JSON."""
    assert len(ingestd("journal", "export", folder, "--rejected").stdout.splitlines()) == 40
    lines = ingestd("journal", "export", folder, "--rejected", "--format", "jsonl").stdout.splitlines()
    assert len(lines) == 40
    assert {json.loads(line)["reason"] for line in lines} == {"22P05: no"}


def test_an_output_is_whole_or_not_there(folder: Path, tmp_path: Path) -> None:
    """An existing file is not replaced unless told to, a mistake leaves none behind, and a device is no file."""
    out = tmp_path / "out.log"
    out.write_text("mine")
    assert "--force" in ingestd("journal", "export", folder, "-o", out, exit_code=2).stderr
    assert out.read_text() == "mine"
    refused = ingestd("journal", "export", folder, "-o", out, "--force", "--source", "can7", exit_code=2)
    assert "can0, can1, gps" in refused.stderr
    assert "no stretch zz" in ingestd("journal", "export", folder, "--stretch", "zz", exit_code=2).stderr
    assert out.read_text() == "mine"
    ingestd("journal", "export", folder, "-o", out, "--force")
    assert len(out.read_text().splitlines()) == 5020
    assert "not a regular file" in ingestd("journal", "export", folder, "-o", "/dev/null", exit_code=2).stderr
    assert "not a folder" in ingestd("journal", "export", folder, "-o", tmp_path / "no" / "x", exit_code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal", "out.log"]


def test_names_and_frames_that_candump_cannot_have(tmp_path: Path) -> None:
    """A blank in a name becomes `_`, and is said; a payload that no bus has is left out and counted."""
    journal = open_journal(tmp_path)
    batch = wire("chassis bus", 0)
    long = replace(batch, flags=batch.flags * 0, length=np.full(len(batch), 11, np.uint16))
    journal.append_frames(batch, Clock(0, ClockState.UNSET))
    journal.append_frames(replace(long, source="long"), CLOCK)
    journal.close(ended=True)
    done = ingestd("journal", "export", tmp_path)
    assert done.stdout.splitlines()[0] == "(0000000000.000001) chassis_bus 100#0001020304050607"
    assert len(done.stdout.splitlines()) == len(WIRE)
    assert "'chassis bus' is written as chassis_bus" in done.stderr
    assert f"{len(WIRE)} frames of long left out" in done.stderr


def test_a_reader_that_goes_away_is_no_error_to_be_traced(folder: Path) -> None:
    """`export | head`: no traceback when the pipe is closed."""
    command = f"{sys.executable} -m ingestd journal export {folder} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
