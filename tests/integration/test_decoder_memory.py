"""What decoders remember from stretch to stretch, with the journal and the database in the process of the test."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingestd.decode.can import Counts, Decoded
from ingestd.delivery import memory
from ingestd.framing import SerialFrame
from ingestd.journal import Journal, Record
from ingestd.model import FrameBatch, Memory, SerialFlag
from ingestd.pipeline import Decoders
from ingestd.sources.serial import columns
from tests.conftest import psql
from tests.deliveries import make, send
from tests.journals import CLOCK, frames, kill, open_journal

PROTOCOLS = {"ecu": "csv", "line": "lines"}


def say(journal: Journal, first_ns: int, *lines: bytes) -> None:
    """Record lines of the logger, and something else between them."""
    for number, line in enumerate(lines, first_ns):
        journal.append_frames(columns("ecu", [SerialFrame(number, line, SerialFlag.SERIAL | SerialFlag.TEXT)]), CLOCK)
        journal.append_frames(frames(number, 1), CLOCK)


async def deliver(journal: Journal, dsn: str, machine_id: str = "machine-1") -> None:
    delivery = make(journal, dsn, machine_id)
    delivery.decoders = Decoders([], protocols=PROTOCOLS)
    await send(delivery)


def stored(dsn: str) -> list[str]:
    return psql(
        dsn, "SELECT channel || '=' || value_num FROM signals WHERE source = 'ecu' ORDER BY ts_mono_ns, id"
    ).splitlines()


@pytest.mark.parametrize("sent_first", [True, False])
async def test_a_header_two_stretches_back(
    tmp_path: Path, migrated: str, monkeypatch: pytest.MonkeyPatch, sent_first: bool
) -> None:
    """Whether the database had the old stretches or nobody had: the rows have their names, also in small portions."""
    monkeypatch.setattr(memory, "BATCH_FRAMES_MAX", 2)
    journal = open_journal(tmp_path)
    say(journal, 1, b"logger 1.0", b"t,rpm", b"1,10", b"t,map", b"s,kPa")
    if sent_first:
        await deliver(journal, migrated)
    kill(journal)
    journal = open_journal(tmp_path)
    say(journal, 20, b"WATCHDOG")
    kill(journal)
    journal = open_journal(tmp_path)
    say(journal, 30, b"2,20", b"3,30")
    await deliver(journal, migrated)
    kill(journal)
    assert stored(migrated) == ["t=1", "rpm=10", "t=2", "map=20", "t=3", "map=30"]
    assert psql(migrated, "SELECT DISTINCT unit FROM signals WHERE channel = 'map'") == "kPa"


async def test_a_stretch_of_which_nothing_was_remembered(tmp_path: Path, migrated: str) -> None:
    """The journal says what was remembered at a position that an older version committed, or that a clone has moved."""
    journal = open_journal(tmp_path)
    say(journal, 1, b"t,rpm", b"1,10")
    await deliver(journal, migrated)
    psql(migrated, "UPDATE feeds SET decoder_state = decoder_state - 'memory'")
    say(journal, 30, b"2,20")
    await deliver(journal, migrated)
    psql(migrated, "UPDATE feeds SET machine_id = 'machine-2'")
    say(journal, 40, b"3,30")
    await deliver(journal, migrated)
    kill(journal)
    assert stored(migrated) == ["t=1", "rpm=10", "t=2", "rpm=20", "t=3", "rpm=30"]


async def test_numbers_alone_teach_nothing(tmp_path: Path, migrated: str) -> None:
    """Rows without a header are undecoded in either stretch, and the frames are there."""
    for first in (1, 30):
        journal = open_journal(tmp_path)
        say(journal, first, b"1,10", b"2,20")
        if first == 30:
            await deliver(journal, migrated)
        kill(journal)
    assert stored(migrated) == []
    assert psql(migrated, "SELECT count(*) FROM frames WHERE payload_json ->> 'source' = 'ecu'") == "4"


async def test_a_decoder_that_cannot_bear_what_was(
    tmp_path: Path, migrated: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said, nothing is rejected, and recording and sending go on."""
    journal = open_journal(tmp_path)
    say(journal, 1, b"t,rpm")
    kill(journal)
    journal = open_journal(tmp_path)
    say(journal, 30, b"1,10")

    def remember(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(Decoders, "remember", remember)
    await deliver(journal, migrated)
    kill(journal)
    assert "cannot be remembered source=ecu" in caplog.text
    assert psql(migrated, "SELECT count(*) FROM frames") == "4"


class _Forgetful:
    """A decoder that remembers what no database can keep, from the second frame on."""

    def decode(self, batch: FrameBatch, known: Memory) -> Decoded:
        known["seen"] = known.get("seen", 0) + len(batch)
        if known["seen"] > 1:
            known["when"] = {batch.source}
        return Decoded([], Counts(frames=len(batch), decoded=len(batch)))


async def test_a_decoder_that_remembers_what_is_no_json(
    tmp_path: Path, migrated: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its frames are stored undecoded, what it remembered before stays, and nothing stops."""
    journal = open_journal(tmp_path)
    say(journal, 1, b"one", b"two", b"three")
    delivery = make(journal, migrated, "machine-1")
    delivery.decoders = Decoders([], protocols={"line": "lines"})
    delivery.decoders.keep("ecu", _Forgetful())
    await send(delivery)
    kill(journal)
    assert "what the decoder remembers is no JSON" in caplog.text
    assert psql(migrated, "SELECT count(*) FROM frames WHERE payload_json ->> 'source' = 'ecu'") == "3"
    state = json.loads(psql(migrated, "SELECT decoder_state FROM feeds"))
    assert state["memory"]["ecu"] == {"seen": 1}
    assert (state["counts"]["ecu"]["decoded"], state["counts"]["ecu"]["undecoded"]) == (1, 2)


async def test_a_stop_does_not_wait_for_what_was(
    tmp_path: Path, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long the backlog is that the memory is read from: who is cancelled leaves nobody reading on."""
    journal = open_journal(tmp_path)
    say(journal, 1, b"t,rpm", b"1,10")
    record = next(journal.look_back(journal.stretches()[-1].id, 0, 1))
    kill(journal)
    journal = open_journal(tmp_path)
    say(journal, 30, b"2,20")
    reading, left = threading.Event(), threading.Event()

    def endless(*_: Any) -> Iterator[Record]:
        try:
            while True:
                reading.set()
                yield record
        finally:
            left.set()

    monkeypatch.setattr(journal, "look_back", endless)
    delivery = make(journal, migrated, "machine-1")
    delivery.decoders = Decoders([], protocols=PROTOCOLS)
    sending = asyncio.create_task(send(delivery))
    assert await asyncio.to_thread(reading.wait, 30)
    sending.cancel()
    assert await asyncio.to_thread(left.wait, 30)
    kill(journal)


def test_what_nobody_can_read_without_a_memory() -> None:
    """Keys stand in the lines themselves; the names of a CSV log do not."""
    decoders = Decoders([], protocols={"ecu": "csv", "imu": "json", "line": "lines"})
    assert (decoders.remembering, decoders.dependent) == ({"ecu", "imu"}, {"ecu"})
