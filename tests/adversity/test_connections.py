"""A network between the daemon and its database that cuts, stalls, half-closes and loses answers, at any byte."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adversity.conftest import through
from tests.books import assert_books, in_metrics
from tests.conftest import psql
from tests.recorder import Instrument, Recorder, lines_of, stored, wait_until
from tests.torture.proxy import Proxy

CUTS = 30
STALLED_SECONDS_MAX = 60.0
SHORT_STALL = "import ingestd.store.writer as writer; writer.STALL_SECONDS_MAX = 1.0"
# Transactions of a daemon that wait for their client.
OPEN = (
    "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'ingestd/%' AND datname = current_database()"
    " AND state = 'idle in transaction'"
)


@pytest.fixture
def recorder(tmp_path: Path, migrated: str, proxy: Proxy, instrument: Instrument) -> Iterator[Recorder]:
    """A daemon that records, and commits through the proxy."""
    daemon = Recorder(tmp_path, through(proxy, migrated), lines_of(instrument))
    daemon.start()
    try:
        wait_until(lambda: len(stored(migrated)) > 100, "first frames", more=daemon.log)
        yield daemon
    finally:
        daemon.close()


def committed(recorder: Recorder) -> int:
    return in_metrics(recorder)["line"].committed


def wait_for_commit(recorder: Recorder, seconds: float = STALLED_SECONDS_MAX) -> float:
    """Until something more is committed; how long it took."""
    before, begun = committed(recorder), time.monotonic()
    wait_until(lambda: committed(recorder) > before, "commit", seconds, recorder.log)
    return time.monotonic() - begun


@pytest.mark.slow
def test_cut_at_any_byte(recorder: Recorder, proxy: Proxy, migrated: str, instrument: Instrument) -> None:
    """Thirty times, each at another byte of what goes to and fro, from the handshake to the answer to COMMIT."""
    dice = random.Random(4)
    for _ in range(CUTS):
        cuts = proxy.cuts
        proxy.cut_after(int(2 ** dice.uniform(0, 12)))
        wait_until(lambda cuts=cuts: proxy.cuts > cuts, "cut", more=recorder.log)  # type: ignore[misc]
        wait_for_commit(recorder)
    assert_books(recorder, migrated, {"line": instrument.stop()})


@pytest.mark.slow
def test_the_answer_to_commit_is_lost(recorder: Recorder, proxy: Proxy, migrated: str, instrument: Instrument) -> None:
    """The server has committed and the daemon never hears of it: nothing is sent twice."""
    for count in range(1, 6):
        proxy.lose_answer()
        wait_until(lambda count=count: proxy.lost_answers == count, "lost answer", more=recorder.log)  # type: ignore[misc]
    wait_for_commit(recorder)
    assert_books(recorder, migrated, {"line": instrument.stop()})


@pytest.mark.slow
@pytest.mark.parametrize("to_server", [True, False], ids=["to the server", "to the daemon"])
def test_half_closed(
    recorder: Recorder, proxy: Proxy, migrated: str, instrument: Instrument, *, to_server: bool
) -> None:
    """One direction is closed, and the other one is not: the daemon goes on over another connection."""
    for _ in range(5):
        proxy.half_close(to_server=to_server)
        wait_for_commit(recorder)
    assert_books(recorder, migrated, {"line": instrument.stop()})


@pytest.mark.slow
def test_a_connection_that_stalls_while_the_update_is_uncommitted(
    recorder: Recorder, proxy: Proxy, migrated: str, instrument: Instrument
) -> None:
    """Nobody closes it, so the feed's row stays locked on the server: within a minute the daemon commits again."""
    proxy.stall_on(b"COMMIT", withheld=True)
    wait_until(lambda: proxy.stalled == 1, "stalled connection", more=recorder.log)
    assert psql(migrated, OPEN) == "1", psql(
        migrated, "SELECT datname, application_name, state, query FROM pg_stat_activity"
    )
    assert wait_for_commit(recorder, 2 * STALLED_SECONDS_MAX) <= STALLED_SECONDS_MAX
    assert_books(recorder, migrated, {"line": instrument.stop()})


@pytest.mark.slow
@pytest.mark.parametrize("words", [b"COPY", b"COMMIT"])
def test_a_connection_that_stalls_elsewhere(
    recorder: Recorder, proxy: Proxy, migrated: str, instrument: Instrument, words: bytes
) -> None:
    """In the middle of the data, or with the answer to COMMIT on its way: another connection goes on where it ended."""
    recorder.stop()
    recorder.changes = SHORT_STALL
    recorder.start()
    wait_until(lambda: "the database takes data" in recorder.log()[recorder.begun :], "commit", more=recorder.log)
    for count in range(1, 4):
        proxy.stall_on(words)
        wait_until(lambda count=count: proxy.stalled == count, "stalled connection", more=recorder.log)  # type: ignore[misc]
        wait_for_commit(recorder)
    assert_books(recorder, migrated, {"line": instrument.stop()})
