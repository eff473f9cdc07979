"""Protocols that are installed beside ingestd: the example of the documentation, and plug-ins that are none."""

from __future__ import annotations

import importlib
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingestd.decode.databases import load
from ingestd.errors import ConfigError
from ingestd.framing import Framer, SerialFrame
from ingestd.model import Flag, Memory
from ingestd.pipeline import Binding, Decoders
from ingestd.protocols import Line, check_memory, new_decoder, new_framer
from ingestd.sources.serial import columns
from tests.plugins import EXAMPLE, install_example
from tests.property.test_framing import balanced, lumps, run, singly
from tests.unit.test_decode_keyed import values

LOG = "serial/actisense_dle_raymarine_ev1.dle"
Message = tuple[int, int, int, int, bytes]  # priority, PGN, source, destination, data


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example, installed."""
    install_example(tmp_path, monkeypatch)
    yield
    sys.modules.pop("ingestd_actisense", None)
    importlib.invalidate_caches()


def framer() -> Framer:
    return new_framer(Line("actisense", {}))


def message(frame: SerialFrame) -> Message:
    pgn, destination = frame.arbitration_id >> 8 & 0x3FFFF, 255
    if pgn >> 8 & 0xFF < 240:
        pgn, destination = pgn & 0x3FF00, pgn & 0xFF
    return frame.arbitration_id >> 26, pgn, frame.arbitration_id & 0xFF, destination, frame.payload


def expected(shared_data: Path) -> list[Message]:
    """canboat's text of the same capture, without the gateway's own messages."""
    rows = [line.split(",") for line in (shared_data / "expected" / f"{Path(LOG).stem}.raw").read_text().split()]
    return [
        (int(priority), int(pgn), int(source), int(destination), bytes.fromhex("".join(data)))
        for _, priority, pgn, source, destination, _, *data in rows
        if int(pgn) < 1 << 18
    ]


@pytest.mark.usefixtures("installed")
def test_the_example_reads_every_message_of_a_bus(shared_data: Path) -> None:
    """23,535 messages of an NMEA 2000 bus, equal to what canboat made of the same bytes; the gateway's own are none."""
    reader = framer()
    frames = run(reader, [(shared_data / LOG).read_bytes()])
    assert [message(frame) for frame in frames] == expected(shared_data)
    assert len(frames) == 23_535
    assert {frame.flags for frame in frames} == {Flag.EXTENDED}
    assert (reader.counters["other_messages"], reader.counters["bad_checksums"]) == (260, 0)
    assert balanced(reader)


@pytest.mark.usefixtures("installed")
def test_the_example_in_pieces_with_garbage_between(shared_data: Path) -> None:
    """Byte by byte, in lumps, and with noise between the messages: the same ones, stamped with their first byte."""
    data, chance = (shared_data / LOG).read_bytes()[:40_000], random.Random(4)
    whole = [message(frame) for frame in run(framer(), [data])]
    for pieces in (singly(data), lumps(data, chance)):
        reader = framer()
        assert [message(frame) for frame in run(reader, pieces)] == whole
        assert balanced(reader)
    noise = bytes(set(range(256)) - {0x10})
    parts = data.split(b"\x10\x03\x10\x02")
    dirty = b"".join(
        b"\x10\x02" + part + b"\x10\x03" + bytes(chance.choices(noise, k=chance.randrange(9))) for part in parts[1:-1]
    )
    frames = run(framer(), singly(dirty))
    assert [message(frame) for frame in frames] == whole
    assert all(dirty[frame.ts_ns : frame.ts_ns + 2] == b"\x10\x02" for frame in frames)
    assert [message(frame) for frame in run(framer(), lumps(data[7:], chance))] == whole[1:]


@pytest.mark.usefixtures("installed")
def test_frames_of_a_gateway_are_decoded_as_of_a_bus(shared_data: Path) -> None:
    """With a signal database, by PGN: the heading is what stands in the message, whoever sent it."""
    database = load(shared_data / "dbc" / "canboat_nmea2000.dbc", "pgn")
    decoders = Decoders([Binding("boat", database)], protocols={"boat": "actisense"})
    frames = columns("boat", run(framer(), [(shared_data / LOG).read_bytes()[:40_000]]))
    frames.ts_ns[:] = range(len(frames))
    decoded = decoders.of("boat").decode(frames, {})
    assert decoded.counts.decoded > 200
    headings = [
        int.from_bytes(bytes(data[1:3]), "little") * 1e-4
        for data, identity in zip(frames.data, frames.arbitration_id.tolist(), strict=True)
        if identity >> 8 & 0x3FFFF == 127250
    ]
    assert len(headings) > 50
    found = [value for each in values(decoded) for name, value in each.items() if "127250" in name and "eading" in name]
    assert {round(float(each), 6) for each in found} >= {round(each, 6) for each in headings if each < 6.3}


def test_the_example_is_short() -> None:
    """What a gateway costs its user."""
    lines = (EXAMPLE / "ingestd_actisense.py").read_text().splitlines()
    assert len([line for line in lines if line.strip() and not line.strip().startswith(("#", '"""'))]) < 60


def write_plugin(folder: Path, code: str) -> None:
    (folder / "other.py").write_text(code)
    information = folder / "other-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[ingestd.protocols]\nother = other:protocol\n")


OWN_DECODER = """
from ingestd.decode.can import Counts, Decoded
from ingestd.framing import LineFramer
from ingestd.protocols import SerialProtocol

class Decoder:
    def __init__(self, source, *, gain):
        self.name = f"{source} {gain}"
    def decode(self, frames, memory):
        memory["seen"] = memory.get("seen", 0) + len(frames)
        return Decoded([], Counts(frames=len(frames), decoded=len(frames)))

protocol = SerialProtocol(lambda gain: LineFramer(), Decoder)
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("protocol = 1", 'the protocol "other" (other:protocol) is no ingestd.protocols.SerialProtocol'),
        ("1/0", 'the protocol "other" (other:protocol) cannot be loaded: ZeroDivisionError: division by zero'),
        ("pass", "cannot be loaded: AttributeError"),
        (None, 'no installed package brings the protocol "other"'),
    ],
)
def test_plugins_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str | None, said: str) -> None:
    """Each is an error that names the package."""
    if code is not None:
        write_plugin(tmp_path, code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other", raising=False)
    with pytest.raises(ConfigError) as caught:
        new_framer(Line("other", {}))
    assert said in str(caught.value)


def test_a_plugin_with_a_decoder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Framer and decoder are given the options; the decoder has a memory of the feed."""
    write_plugin(tmp_path, OWN_DECODER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "other", raising=False)
    line = Line("other", {"gain": 3})
    frames = columns("x", run(new_framer(line), [b"one\ntwo\n"]))
    decoder, memory = new_decoder("x", line), {}  # type: ignore[var-annotated]
    assert decoder is not None
    assert decoder.decode(frames, memory).counts.decoded == 2
    assert (memory, decoder.name) == ({"seen": 2}, "x 3")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ({"a": {1, 2}}, "is no JSON: Object of type set"),
        ({"a": (1, 2)}, "is no JSON: it has tuples"),
        ({1: 2}, "is no JSON: it has tuples, or keys"),
        ({"a": float("nan")}, "is no JSON: Out of range"),
        ({"a": "\ud800"}, "is no JSON: 'utf-8' codec"),
        ({"a": "x\\\0"}, "has a NUL in it"),
        ({"a\0": 1}, "has a NUL in it"),
        ({"a": "\\u0000", "b": [1, None, {"c": 2.5}]}, ""),
        ({}, ""),
    ],
)
def test_what_a_decoder_may_remember(memory: Memory, said: str) -> None:
    """What the database gives back as it was, and nothing else."""
    if not said:
        check_memory(memory)
        return
    with pytest.raises(ValueError, match=said):
        check_memory(memory)


def test_libraries_are_imported_when_a_line_asks_for_them() -> None:
    """A daemon that records buses alone starts without the libraries of GPS receivers."""
    program = (
        "import sys, ingestd.cli, ingestd.daemon.running, ingestd.sources.serial, ingestd.protocols as p\n"
        "print(sorted({'pynmeagps', 'pyubx2'} & sys.modules.keys()))\n"
        "p.new_decoder('gps', p.Line('ubx', {}))\n"
        "print(sorted({'pynmeagps', 'pyubx2'} & sys.modules.keys()))\n"
    )
    said = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == ["[]", "['pynmeagps', 'pyubx2']"]
