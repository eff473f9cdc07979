"""The pauses between attempts: doubled up to a cap, never all of them, and short again after a success."""

from __future__ import annotations

from ingestd.backoff import Backoff


def test_pauses_double_up_to_the_cap() -> None:
    """Each pause lies between half of and all of what doubling gives, and none is longer than the cap."""
    backoff = Backoff(0.1, 5.0)
    for pause in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0):
        assert pause / 2 <= backoff.next_seconds() <= pause


def test_pauses_differ() -> None:
    """Two recorders that fail together do not come back together."""
    assert len({Backoff(1.0, 1.0).next_seconds() for _ in range(10)}) > 1


def test_a_success_begins_anew() -> None:
    """After `reset` the pause is the shortest again."""
    backoff = Backoff(0.1, 5.0)
    assert repr(backoff) == "<Backoff 0.1 of at most 5 s>"
    for _ in range(5):
        backoff.next_seconds()
    backoff.reset()
    assert backoff.next_seconds() <= 0.1
