"""A journal that was copied to a second machine: both go on with it, and everything that either has is in SQL.

tests/adversity/test_daemon.py has the plain case, a copy that was taken while nobody wrote it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adversity.conftest import through
from tests.books import in_log, in_metrics
from tests.recorder import OTHER_MACHINE, Instrument, Recorder, lines_of, stored, wait_until
from tests.torture.proxy import Proxy

# Machines made from one image, behind one router: the server cannot tell their connections apart.
SAME_NAME = """
import ingestd.daemon.service as service
Writer = service.Writer
service.Writer = lambda dsn, feed_id, journal: Writer(dsn, feed_id, journal="of one image")
"""
CLONED = "the journal was cloned"


@pytest.fixture
def second(tmp_path: Path) -> Iterator[Instrument]:
    """The instrument of the second machine; silent."""
    (tmp_path / "second").mkdir()
    device = Instrument(tmp_path / "second" / "instrument")
    yield device
    device.close()


def received(recorder: Recorder) -> int:
    said = in_metrics(recorder).get("line")
    return 0 if said is None else said.received


def wait_for_frames(recorder: Recorder, count: int = 100) -> None:
    """Until so many more are received."""
    before = received(recorder)
    wait_until(lambda: received(recorder) >= before + count, f"{count} frames", more=recorder.log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "is_away", "is_killed"),
    [
        pytest.param(OTHER_MACHINE.format("another"), True, False, id="to another machine, while it runs"),
        pytest.param(SAME_NAME, True, False, id="with its machine's id, while it runs"),
        pytest.param(SAME_NAME, True, True, id="with its machine's id, while it is down"),
        pytest.param(SAME_NAME, False, False, id="with its machine's id, earlier"),
    ],
)
def test_both_copies_go_on(
    tmp_path: Path, migrated: str, proxy: Proxy, instrument: Instrument, second: Instrument,
    changes: str, is_away: bool, is_killed: bool,
) -> None:  # fmt: skip
    """All that either has received is stored; only what was in both, and not sent, may be there twice; that is said."""
    dsn = through(proxy, migrated)
    one = Recorder(tmp_path, dsn, lines_of(instrument), changes=SAME_NAME)
    two = Recorder(tmp_path / "second", dsn, lines_of(second), changes=changes)
    try:
        one.start()
        wait_until(lambda: len(stored(migrated)) > 100, "first frames", more=one.log)
        if is_away:  # What is recorded now is in both journals and not in the database.
            proxy.refuse()
            wait_for_frames(one)
        if is_killed:
            one.kill()
        shutil.copytree(one.journal, two.journal)
        if is_killed:
            one.start()
            one.wait_for("listening http", after=one.begun)
        wait_for_frames(one)
        if not is_away:
            copied = received(one)
            wait_until(lambda: in_metrics(one)["line"].committed >= copied, "commit of what was copied", more=one.log)
        second.start()
        two.start()
        two.wait_for("listening http")
        wait_for_frames(two)
        proxy.mend()
        for recorder, device in ((one, instrument), (two, second)):
            wait_until(lambda r=recorder: in_metrics(r)["line"].committed > 300, "commits", more=recorder.log)  # type: ignore[misc]
            device.stop()
        for recorder in (one, two):
            wait_until(lambda r=recorder: not in_metrics(r)["line"].pending, "end of it", more=recorder.log)  # type: ignore[misc]
            recorder.stop()
    finally:
        one.close()
        two.close()
    found, of_one, of_two = stored(migrated), one.journalled(), two.journalled()
    shared = set(of_one) & set(of_two)
    assert set(found) == set(of_one) | set(of_two)
    assert len(shared) > 100
    assert set(of_one) - shared
    assert set(of_two) - shared
    doubled = {frame for frame, count in found.items() if count > 1}
    assert doubled <= shared
    assert max(found.values()) <= 2
    logs = one.log() + two.log()
    assert not doubled or CLONED in logs
    if not is_away:
        assert not doubled
    for recorder, journal in ((one, of_one), (two, of_two)):
        said = in_log(recorder.log()[recorder.begun :])["line"]
        assert (said.received, said.committed, said.dropped) == (len(journal), len(journal), {})
    assert "Traceback" not in logs
