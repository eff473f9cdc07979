"""A reload on real buses under load: the socket of a bus that stays is kept, its databases and filters change."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.can_bus.bus import Bus, numbered
from tests.can_bus.test_daemon import fetch
from tests.commands import is_listening
from tests.recorder import Recorder, wait_until

TICK_S, TICK_FRAMES = 0.02, 10
MESSAGE = 'BO_ {id} M{id}: 8 X\n SG_ {name} : 0|64@1+ (1,0) [0|0] "" X\n'
NUMBERED_ID = 0x123


def database(name: str, *others: int) -> str:
    """The message that is sent, with a signal of that name, and others that nobody sends."""
    messages = [MESSAGE.format(id=NUMBERED_ID, name=name), *(MESSAGE.format(id=other, name="S") for other in others)]
    return 'VERSION ""\nNS_:\nBS_:\nBU_: X\n' + "".join(messages)


@contextlib.contextmanager
def talking(*buses: Bus) -> Iterator[Callable[[], int]]:
    """Numbered frames on every bus for as long as this lasts; then how many there were on each."""
    stop, sent = threading.Event(), 0

    def talk() -> None:
        nonlocal sent
        with contextlib.ExitStack() as stack:
            senders = [stack.enter_context(bus.sender()) for bus in buses]
            while not stop.wait(TICK_S):
                for sender in senders:
                    sender.send(numbered(TICK_FRAMES, first=sent, can_id=NUMBERED_ID))
                sent += TICK_FRAMES

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        yield lambda: sent
    finally:
        stop.set()
        talker.join()


@pytest.mark.slow
def test_databases_filters_and_other_buses_change_under_load(tmp_path: Path, migrated: str, buses: list[Bus]) -> None:
    """Every frame of the bus that stays is recorded once, decoded once, by the definition in force at some time.

    Also with more ids than the kernel has filters for: then every frame passes, and again only the known ones after it.
    """
    steady, other = buses[:2]
    dbc = tmp_path / "car.dbc"
    dbc.write_text(database("One"))
    table = f'[[can]]\nname = "steady"\nchannel = "{steady.channel}"\ndbc = ["{dbc}"]\nfilters = "databases"\n'
    more = f'[[can]]\nname = "other"\nchannel = "{other.channel}"\n'
    recorder = Recorder(tmp_path, migrated, table)
    alone = recorder.config.read_text()
    unknown = numbered(1, can_id=0x700)
    try:
        recorder.start()
        assert recorder.process is not None
        is_listening(recorder)
        recorder.wait_for("the database takes data")
        with talking(steady, other) as sent_now, steady.sender() as sender:
            wait_until(lambda: _samples(migrated, "One") > 100, "samples of One", more=recorder.log)
            for name, others, configuration, said in (
                ("Two", (), alone, "databases=car.dbc"),
                ("Two", (), alone + more, "added=other"),
                ("Three", range(0x200, 0x200 + 600), alone + more, "databases=car.dbc"),
                ("Four", (), alone, "removed=other"),
            ):
                dbc.write_text(database(name, *others))
                recorder.config.write_text(configuration)
                begun = len(recorder.log())
                recorder.process.send_signal(signal.SIGHUP)
                recorder.wait_for(said, after=begun)
                sender.send(unknown)
                wait_until(lambda name=name: _samples(migrated, name) > 100, f"samples of {name}")  # type: ignore[misc]
        sent = sent_now()
        count = "SELECT coalesce(sum(frame_count), 0)::bigint FROM frame_chunks WHERE source = 'steady'"
        wait_until(lambda: fetch(migrated, count)[0][0] >= sent, "every frame", more=recorder.log)
        log = recorder.stop()
    finally:
        recorder.close()
    assert log.count("more filters than the kernel takes") == 1
    # The unknown frame passed where there were no filters, once.
    assert f"source=steady received={sent + 1} committed={sent + 1} pending=0 rejected=0 dropped=0 balanced=True" in log
    assert log.count("link up source=steady") == 1
    ids = "SELECT payload_json ->> 'id', count(*) FROM frames WHERE payload_json ->> 'source' = 'steady' GROUP BY 1"
    assert {row[0]: row[1] for row in fetch(migrated, ids)} == {str(NUMBERED_ID): sent, str(0x700): 1}
    rows = fetch(
        migrated,
        "SELECT channel, value_num::bigint FROM signals WHERE source = 'steady' ORDER BY ts_mono_ns, value_num",
    )
    assert sorted(number for _, number in rows) == list(range(sent))
    changes = [str(channel).rpartition(".")[2] for channel, _ in rows]
    assert list(dict.fromkeys(changes)) == ["One", "Two", "Three", "Four"]
    others = fetch(migrated, "SELECT data FROM frame_chunks WHERE source = 'other' ORDER BY id")
    numbers = np.frombuffer(b"".join(row[0] for row in others), "<u8").astype(np.int64)
    assert len(numbers) > 0
    assert (np.diff(numbers) == 1).all(), "between its beginning and its end nothing is missing"
    assert fetch(migrated, "SELECT count(*) FROM events WHERE kind = 'reload'")[0][0] == 4


def _samples(dsn: str, name: str) -> int:
    query = "SELECT count(*) FROM signals WHERE channel LIKE '%.' || $1"
    return int(fetch(dsn, query, name)[0][0])
